"""What slices by contributions are good for: telling attacked inputs, pruning to some classes, hiding weights."""

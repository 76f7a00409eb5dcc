"""What slices by contributions are good for: pruning to some classes, and hiding the weights that matter."""

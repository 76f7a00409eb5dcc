"""Which inputs turn a trained student, without knowing any attack."""

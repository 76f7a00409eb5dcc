"""What may be said: numbers to verdicts, worded once."""

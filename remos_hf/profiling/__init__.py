"""Which neurons the student's data uses."""

"""What is wrong with a teacher, and how to show it."""

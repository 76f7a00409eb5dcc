"""How much of a teacher's defects a student inherited."""

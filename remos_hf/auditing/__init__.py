"""A whole audit: what is made, measured and reported, its students, recipes and data files."""

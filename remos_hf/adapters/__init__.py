"""From someone's model to the questions we ask of it."""

"""The command `remos`: the package's public functions from a shell.

`commands.py` declares what may be asked for and loads nothing heavy; one module a command does it.
"""

"""The command `remos`, and `python -m remos_hf.cli` for where that is not on the path."""

import sys

try:
    from remos_hf.cli.commands import main
except ImportError as error:  # without the extra: a line, and no traceback of whoever only typed a command
    sys.exit(f"remos: {error}")

if __name__ == "__main__":
    main()

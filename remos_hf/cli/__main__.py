"""`python -m remos_hf.cli`, for where the command `remos` is not on the path."""

from remos_hf.cli.commands import main

if __name__ == "__main__":
    main()

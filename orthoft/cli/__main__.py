"""``python -m orthoft.cli``."""

from orthoft.cli.app import main

if __name__ == "__main__":
    main()

"""`python -m woolly`: the `woolly` command."""

import sys

from woolly.cli import main

if __name__ == "__main__":
    sys.exit(main())

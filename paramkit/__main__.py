"""`python -m paramkit` is the command `paramkit`."""

import sys

from paramkit.cli import main

if __name__ == "__main__":
    sys.exit(main())

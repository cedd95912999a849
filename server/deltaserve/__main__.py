"""python -m deltaserve: the command line."""

import sys

from deltaserve.cli import main

if __name__ == "__main__":
    sys.exit(main())

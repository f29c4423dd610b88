"""`python -m prunesearch` is the `prunesearch` command."""

import sys

from prunesearch.cli import main

if __name__ == "__main__":  # worker processes import this module under another name
    sys.exit(main())

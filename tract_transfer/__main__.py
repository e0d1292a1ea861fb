"""`python -m tract_transfer` is the command `tract-transfer`."""

import sys

from tract_transfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

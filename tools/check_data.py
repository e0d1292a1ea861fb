"""Check the data of a config: list everything that is broken."""

import sys

from tract_transfer.cli.data import check as main

if __name__ == "__main__":
    sys.exit(main())

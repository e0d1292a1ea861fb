"""Check the data of a config: open every image, read every annotation, list all that is broken."""

import sys

from tract_transfer.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())

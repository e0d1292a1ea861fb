"""Write the report of any runs: run folders, or folders that contain them."""

import sys

from tract_transfer.cli.report import main

if __name__ == "__main__":
    sys.exit(main())

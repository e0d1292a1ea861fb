"""Write the report of any runs: run folders, a suite's folder, or folders that hold either."""

import sys

from tract_transfer.cli.report import main

if __name__ == "__main__":
    sys.exit(main())

"""Run methods x tasks x seeds and report on them; finished runs are skipped."""

import sys

from tract_transfer.cli.suite import main

if __name__ == "__main__":
    sys.exit(main())

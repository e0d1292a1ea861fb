"""Run methods x tasks x seeds and report on them; what is finished is skipped, so run it again."""

import sys

from tract_transfer.cli.suite import main

if __name__ == "__main__":
    sys.exit(main())

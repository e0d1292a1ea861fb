"""Draw what a model sees in training."""

import sys

from tract_transfer.cli.data import visualize as main

if __name__ == "__main__":
    sys.exit(main())

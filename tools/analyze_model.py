"""Print what a model costs: parameters, FLOPs, the first layer, strides, memory."""

import sys

from tract_transfer.cli.analyze import main

if __name__ == "__main__":
    sys.exit(main())

"""Convert a ResNet's weights to detectron2's names, or back."""

import sys

from tract_transfer.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())

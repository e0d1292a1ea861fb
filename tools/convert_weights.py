"""Convert a ResNet's weights to detectron2's names, or back."""

import sys

from tract_transfer.cli.export import convert as main

if __name__ == "__main__":
    sys.exit(main())

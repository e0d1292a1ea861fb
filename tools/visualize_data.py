"""Draw what a model sees in training: images after the transforms, with classes or boxes."""

import sys

from tract_transfer.cli.visualize import main

if __name__ == "__main__":
    sys.exit(main())

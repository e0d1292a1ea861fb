"""Export a finished classification run for timm, torchvision or others."""

import sys

from tract_transfer.cli.export import main

if __name__ == "__main__":
    sys.exit(main())

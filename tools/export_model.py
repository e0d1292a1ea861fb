"""Export a finished classification run as a folder that timm, torchvision or others load."""

import sys

from tract_transfer.cli.export import main

if __name__ == "__main__":
    sys.exit(main())

"""Apply a trained model to images and videos."""

import sys

from tract_transfer.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())

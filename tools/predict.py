"""Let a trained model answer for images and videos: boxes drawn, or the likeliest classes."""

import sys

from tract_transfer.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())

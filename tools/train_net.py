"""Train, probe or evaluate one config: pre-training, fine-tuning, a probe or a detector."""

import sys

from tract_transfer.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

"""Commands: each module parses one command line and hands over to `tract_transfer.run`."""

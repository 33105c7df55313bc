"""Runs `trl-fast` as `python -m trl_fast`."""

import sys

from trl_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""The command line: `trl-fast dpo`, `trl-fast env`."""

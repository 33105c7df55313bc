"""The command line: `trl-fast COMMAND`, one module a command, and the arguments and parser that scripts use too."""

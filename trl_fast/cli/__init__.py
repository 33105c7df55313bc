"""Provides the commands of `trl-fast`, and the arguments and the parser that scripts use too."""

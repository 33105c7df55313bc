"""Holds the small public helpers of TRL that scripts import and that nothing else here needs."""

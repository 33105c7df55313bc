"""Shows the package at work."""

"""Writes, finds and checks checkpoints, and keeps what a run that goes on needs."""

"""Trains a student to predict what a teacher predicts."""

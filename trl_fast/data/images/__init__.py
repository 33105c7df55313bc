"""Reads images of datasets, and turns messages with images into token ids and the model's inputs."""

from .inputs import ImageInput

__all__ = ["ImageInput"]

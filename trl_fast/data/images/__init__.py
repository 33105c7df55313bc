"""Reads images of datasets, and turns messages with images into token ids and the model's inputs."""

from .inputs import ImageInput
from .loading import load_image
from .messages import images_of, prepare_multimodal_messages, strip_images_from_messages
from .reader import ImageReader

__all__ = [
    "ImageInput",
    "ImageReader",
    "images_of",
    "load_image",
    "prepare_multimodal_messages",
    "strip_images_from_messages",
]

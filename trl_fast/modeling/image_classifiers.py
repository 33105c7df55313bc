"""Makes classifiers of models that read images, which transformers has for few families."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification, PretrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

_FAMILY, _CLASSIFIER = "PreTrainedModel", "ForSequenceClassification"


def register_image_classifier(config: PretrainedConfig) -> None:
    """Lets `AutoModelForSequenceClassification` make a classifier of a model that reads images.

    Where transformers has no such class it is made as transformers makes its own: the model without its head, and a
    linear layer `score` that reads its last hidden states. It is known in this process only.

    Raises:
        ValueError: transformers has no model without a head for the config.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"{config.model_type}: transformers has neither a classifier nor a model without a head for it, so there "
            "is nothing to read rewards from; choose a model of another family"
        )
    whole: Any = MODEL_MAPPING[type(config)]
    reads_images: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    family = next(each for each in whole.__mro__ if each.__name__.endswith(_FAMILY))
    name = family.__name__.removesuffix(_FAMILY) + _CLASSIFIER
    made = type(name, (GenericForSequenceClassification, family), {"__module__": whole.__module__})
    # Weights have the names on disk that the family's language models have.
    names = get_checkpoint_conversion_mapping(reads_images.__name__)
    if names is not None:
        register_checkpoint_conversion_mapping(name, names, overwrite=True)
    # Without exist_ok transformers leaves out what is registered for a config of its own.
    AutoModelForSequenceClassification.register(type(config), made, exist_ok=True)

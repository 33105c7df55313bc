"""Sets up how a trainer's model reads the images of its datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import PIL.Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import AnyDataset
from trl_fast.data.images.columns import has_images
from trl_fast.data.images.reader import ImageReader
from trl_fast.data.images.row_images import RowImages
from trl_fast.modeling.blank_images import attach_blank_image
from trl_fast.modeling.image_models import image_layout
from trl_fast.modeling.loading import base_model, load_processor, reads_images
from trl_fast.modeling.unread_parts import freeze_unreached_weights
from trl_fast.parallel.engines import Engine, engine_of

from .config import BaseConfig
from .prepared_datasets import check_dataset_type


def images_of_datasets(
    datasets: Mapping[str, AnyDataset],
    given: Any,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    args: BaseConfig,
) -> RowImages | None:
    """Returns how a model reads the images of datasets; None if their first rows have no place for any.

    datasets: by their names in messages. given: what came as processing_class, a processor; None loads the model's.
    tokenizer: that of the trainer, with its chat template and pad token.

    Raises:
        ValueError: the model or what was given reads no images, or the processor is another model's; or there is no
            dataset.
        TypeError: as in `check_dataset_type`.
    """
    for part, dataset in datasets.items():
        check_dataset_type(dataset, part)
    name = next((name for name, dataset in datasets.items() if has_images(dataset)), None)
    if name is None:
        return None
    if not reads_images(model.config):
        raise ValueError(
            f"The {name} dataset has images, which {type(model).__name__} does not read; give a model that does, or "
            "remove the column"
        )
    if isinstance(given, PreTrainedTokenizerBase):
        raise ValueError(
            f"The {name} dataset has images, which processing_class, a {type(given).__name__}, does not read; give "
            "the model's processor (AutoProcessor.from_pretrained), or leave processing_class out"
        )
    options: Any = args.model_init_kwargs or {}
    revision = options.get("revision", "main")
    processor = given or load_processor(
        model.config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
    )
    processor.tokenizer = tokenizer
    images = RowImages(ImageReader(processor), image_layout(model))
    written, read = images.reader.image_token_id, images.layout.image_token_id
    if written != read:
        raise ValueError(
            f"processing_class ({type(processor).__name__}) writes the token {written} for images, but "
            f"{type(model).__name__} reads the token {read} as them; give the model's own processor"
        )
    return images


def share_images(trainer: Any, model: Any) -> None:
    """Sets up a model of several processes, before it is prepared, for batches of which only some have images.

    trainer: has `images` and an accelerator; model: of transformers, or of PEFT.
    """
    images: RowImages | None = getattr(trainer, "images", None)
    engine = engine_of(trainer.accelerator)
    if images is None or engine is Engine.ONE:
        return
    inner, blank = base_model(model), [PIL.Image.new("RGB", size) for size in ((56, 56), (112, 56))]
    tensors = [images.reader.image_input(image).tensors for image in blank]
    attach_blank_image(inner, tensors[0])
    if engine is Engine.DDP:
        freeze_unreached_weights(inner, tensors)

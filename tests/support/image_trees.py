"""Token trees whose prompts have pictures, through a processor."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from transformers import ProcessorMixin

from support.vision_processors import pictures
from trl_fast.data import Tree
from trl_fast.data.images.reader import ImageReader

# The text of a prompt, and the sizes of the pictures before it.
PROMPTS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    ("What color?", ((56, 56),)),
    ("The sky, the sea?", ((90, 56), (56, 90))),
    ("The sky is blue, is it not, the sky?", ()),
)


def question(text: str, images: Sequence[Image]) -> list[dict]:
    """A conversation of one message: images, then text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def image_trees(
    processor: ProcessorMixin, prompts: Sequence[tuple[str, tuple[tuple[int, int], ...]]] = PROMPTS
) -> list[Tree]:
    """A tree of two completions for each prompt; all pictures are different."""
    reader = ImageReader(processor)
    trees = []
    for number, (text, sizes) in enumerate(prompts):
        images = [pictures(1, size, 10 * number + index)[0] for index, size in enumerate(sizes)]
        messages = question(text, images)
        answers = [processor.tokenizer(answer)["input_ids"] + [1] for answer in ("It is blue.", "green")]
        trees.append(Tree(reader.prompt_ids(messages), answers, tuple(map(reader.image_input, images))))
    return trees

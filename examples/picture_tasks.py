"""Makes the task of the demo of images: questions about squares in generated pictures, and a tiny model that reads."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture
from PIL.Image import fromarray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLORS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (220, 200, 40)}
COLORS |= {"purple": (150, 50, 190), "white": (240, 240, 240)}
COUNTS = ("one", "two", "three", "four", "five", "six")
# Each question with the answers that it may have.
QUESTIONS = {"Which color ?": tuple(COLORS), "How many ?": COUNTS}
# A picture has CELLS × CELLS places for squares, of CELL × CELL pixels each.
CELLS, CELL = 4, 8
_SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_IMAGE = "<image>"
_TEMPLATE = """\
{%- for message in messages %}<s> {{ message.role }} {% for part in message.content %}
{%- if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}
{%- endfor %}</s> {% endfor %}
{%- if add_generation_prompt %}<s> assistant {% endif %}"""


def draw(color: str, count: int, rng: random.Random) -> Picture:
    """Returns a picture of `count` squares of a color on a gray ground with noise; places, sizes and shades vary."""
    side = CELLS * CELL
    pixels = np.full((side, side, 3), rng.randint(60, 130), dtype=np.float64)
    for cell in rng.sample(range(CELLS * CELLS), count):
        size = rng.randint(4, CELL - 1)
        top, left = (CELL * place + rng.randint(0, CELL - size) for place in divmod(cell, CELLS))
        pixels[top : top + size, left : left + size] = [value + rng.randint(-25, 25) for value in COLORS[color]]
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 12, pixels.shape)
    return fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def questions(count: int, seed: int) -> Dataset:
    """Returns rows of `images`, `prompt`, `completion` (messages) and `answer`; colors and counts in turns.

    The same seed gives the same rows.
    """
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        color, number = rng.choice(list(COLORS)), rng.randint(1, len(COUNTS))
        question = list(QUESTIONS)[index % 2]
        answer = (color, COUNTS[number - 1])[index % 2]
        rows.append(
            {
                "images": [draw(color, number, rng)],
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
                "answer": answer,
            }
        )
    return _dataset(rows, "prompt", "completion", answer=Value("string"))


def preference_pairs(data: Dataset, ranked: Sequence[Sequence[str]]) -> Dataset:
    """Returns a pair of each row: its answer is chosen, the wrong answer that the model likes best is rejected.

    ranked: the answers to each row's question, the likeliest first (`ranked_answers`).
    """
    rows = []
    for row, answers in zip(data, ranked, strict=True):
        mistake = next(answer for answer in answers if answer != row["answer"])
        rejected = [{"role": "assistant", "content": mistake}]
        rows.append(
            {"images": row["images"], "prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}
        )
    return _dataset(rows, "prompt", "chosen", "rejected")


def _dataset(rows: Iterable[dict], *conversations: str, **others: Value) -> Dataset:
    message = {"role": Value("string"), "content": Value("string")}
    features = {"images": List(Image()), **dict.fromkeys(conversations, List(message)), **others}
    return Dataset.from_list(list(rows), features=Features(features))


def make_processor() -> LlavaProcessor:
    """Returns a processor whose tokenizer knows the words of the task, each of them one token."""
    words = ["user", "assistant", *COLORS, *COUNTS, *sorted({word for text in QUESTIONS for word in text.split()})]
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL.values(), _IMAGE, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": token for name, token in _SPECIAL.items()}
    side = CELLS * CELL
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, extra_special_tokens=[_IMAGE]),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def make_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """Returns a LLaVA of 440 thousand parameters with random weights, float32."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(_SPECIAL[name]) for name in ("pad", "bos", "eos")}
    config = LlavaConfig(
        text_config={
            **{"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 4, **sizes, **ids},
            "max_position_embeddings": 128,
        },
        vision_config={
            **{"model_type": "clip_vision_model", "image_size": CELLS * CELL, "patch_size": CELL, **sizes},
            "projection_dim": sizes["hidden_size"],
        },
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        image_seq_length=CELLS * CELLS,
        # The last layer's states, since all of the tower is trained.
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).float()


@torch.no_grad()
def ranked_answers(model: torch.nn.Module, processor: LlavaProcessor, data: Dataset) -> list[list[str]]:
    """Returns the answers that each row's question may have, the likeliest first.

    The model runs as transformers runs it: nothing of the trainers is in it.
    """
    was_training = model.training
    model.eval()
    ranked = []
    for start in range(0, len(data), 100):
        rows = [data[number] for number in range(start, min(start + 100, len(data)))]
        texts = [processor.apply_chat_template(_with_image(row["prompt"]), add_generation_prompt=True) for row in rows]
        # All prompts have as many tokens.
        inputs = processor(images=[row["images"] for row in rows], text=texts, return_tensors="pt")
        for row, logits in zip(rows, model(**inputs).logits[:, -1], strict=True):
            answers = QUESTIONS[row["prompt"][0]["content"]]
            scores = logits[processor.tokenizer.convert_tokens_to_ids(list(answers))]
            ranked.append([answers[place] for place in scores.argsort(descending=True)])
    model.train(was_training)
    return ranked


def accuracy(data: Dataset, ranked: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the share of rows whose likeliest answer is the right one, for each question."""
    right: dict[str, list[bool]] = {question: [] for question in QUESTIONS}
    for row, answers in zip(data, ranked, strict=True):
        right[row["prompt"][0]["content"]].append(answers[0] == row["answer"])
    return {question: sum(found) / len(found) for question, found in right.items()}


def _with_image(prompt: list[dict]) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}]}]

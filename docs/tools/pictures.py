"""Draws the pictures of the documentation: `python docs/tools/pictures.py` writes docs/pictures/.

Every number in a picture is computed here from the lengths and shapes that it names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drawing import Drawing

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
GIB = 1 << 30


def rows() -> Drawing:
    """Draws a preference pair in the three layouts."""
    prompt, chosen, rejected, cell = 8, 4, 6, 26
    longest = prompt + max(chosen, rejected)
    # The layout, its rows of (colour, length), and what is to be said of it.
    layouts = (
        (
            "padded",
            [
                [("prompt", prompt), ("chosen", chosen), ("padding", longest - prompt - chosen)],
                [("prompt", prompt), ("rejected", rejected)],
            ],
            "two rows, the shorter one filled up",
        ),
        (
            "packed",
            [[("prompt", prompt), ("chosen", chosen), ("prompt", prompt), ("rejected", rejected)]],
            "one row, no padding",
        ),
        (
            "shared_prefix",
            [[("prompt", prompt), ("chosen", chosen), ("rejected", rejected)]],
            "one row, the prompt once: both answers attend to it",
        ),
    )
    drawing = Drawing(720, 306, "A preference pair in padded, packed and shared_prefix rows")
    y = 20
    for name, lines, remark in layouts:
        count = sum(length for line in lines for _, length in line)
        drawing.text(20, y + 15, name, bold=True, size=14)
        drawing.text(145, y + 15, f"{count} positions: {remark}", colour="faint")
        y += 26
        for line in lines:
            x = 20.0
            for colour, length in line:
                for position in range(length):
                    drawing.box(x + position * cell, y, cell - 2, cell - 2, colour)
                    if colour in ("chosen", "rejected"):
                        drawing.dot(x + position * cell + cell / 2 - 1, y + cell / 2 - 1)
                x += length * cell
            y += cell + 4
        y += 12
    x = 20.0
    for colour, word in (("prompt", "prompt"), ("chosen", "chosen answer"), ("rejected", "rejected answer")):
        drawing.box(x, 274, 14, 14, colour)
        drawing.text(x + 20, 286, word)
        x += 40 + 7.2 * len(word)
    drawing.box(x, 274, 14, 14, "padding")
    drawing.text(x + 20, 286, "padding")
    drawing.dot(x + 98, 281)
    drawing.text(x + 108, 286, "its log-probability counts")
    return drawing


def memory() -> Drawing:
    """Draws the memory of the logits of 8192 tokens at a vocabulary of 151936."""
    count = 8192 * 151936
    unit = 52
    # The case, and its parts: (colour, bytes, what they are).
    bars = (
        (
            "built as a whole",
            [("logits", 4 * count, "log-softmax, float32"), ("again", 4 * count, "its gradient, float32")],
        ),
        ("in blocks, trained", [("logits", 2 * count, "kept, 16 bits")]),
        ("in tiles, scored only", [("logits", 256 << 20, "")]),
    )
    drawing = Drawing(720, 166, "Memory of the logits of 8192 tokens at a vocabulary of 151936")
    for number, (name, parts) in enumerate(bars):
        y = 20 + 48 * number
        drawing.text(15, y + 21, name, size=12)
        x = 148.0
        for colour, size, what in parts:
            drawing.box(x, y, size / GIB * unit, 32, colour, what, size=11)
            x += size / GIB * unit
        total = sum(size for _, size, _ in parts)
        remark = ": gradients are written over the logits" if number == 1 else ""
        drawing.text(x + 8, y + 21, f"{total / GIB:.2f} GiB{remark}", colour="faint", size=12)
    return drawing


def passes() -> Drawing:
    """Draws the passes over tokens x vocabulary x hidden size that a step makes."""
    logits, again = ("logits", "logits"), ("again", "logits again")
    kept, hidden, weight = ("logits", "logits, kept"), ("chosen", "∂ hidden"), ("prompt", "∂ weight")
    cases = (
        ("trained head", [logits, again, hidden, weight], [kept, hidden, weight]),
        ("frozen head (LoRA)", [logits, again, hidden], [kept, hidden]),
        ("scores only", [logits], [logits]),
    )
    drawing = Drawing(720, 288, "Passes over tokens x vocabulary x hidden size: TRL 1.16's and ours")
    y = 18
    for name, theirs, ours in cases:
        drawing.text(20, y + 38, name, bold=True)
        for who, boxes in (("TRL 1.16", theirs), ("trl_fast", ours)):
            drawing.text(175, y + 20, who, colour="faint", size=12)
            for number, (colour, text) in enumerate(boxes):
                drawing.box(245 + 112 * number, y, 106, 30, colour, text, size=12)
            y += 36
        y += 16
    return drawing


def tokens() -> Drawing:
    """Draws the tokens that a model computes for a prompt with several completions, with and without sharing it."""
    # What, the prompt's tokens, the number of completions and the tokens of each.
    cases = (("DPO, 1024 + 256", 1024, 2, 256), ("GRPO, 256 + 64", 256, 8, 64), ("GRPO, 1024 + 1024", 1024, 8, 1024))
    drawing = Drawing(720, 250, "Tokens that a model computes for a prompt with its completions")
    y = 18
    for name, prompt, branches, completion in cases:
        apart, shared = branches * (prompt + completion), prompt + branches * completion
        width = 440 / apart
        drawing.text(20, y + 18, name, bold=True)
        drawing.text(20, y + 36, f"{branches} completions", colour="faint", size=12)
        for row, (who, total) in enumerate((("apart", apart), ("shared", shared))):
            top = y + 30 * row
            drawing.text(170, top + 17, who, colour="faint", size=12)
            x = 220.0
            for number in range(branches):
                if who == "apart" or number == 0:
                    drawing.box(x, top, prompt * width, 24, "prompt")
                    x += prompt * width
                drawing.box(x, top, completion * width, 24, "rejected" if number % 2 else "chosen")
                x += completion * width
            anchor, place = ("start", x + 6) if x < 640 else ("start", 664)
            text = f"{total}" if who == "apart" else f"{total}: {apart / shared:.2f} times fewer"
            drawing.text(place, top + 17, text, anchor=anchor, size=12)
        y += 76
    return drawing


def data_flow() -> Drawing:
    """Draws how a dataset's row becomes a gradient, with the loss called from inside the sweep of the head."""
    drawing = Drawing(720, 372, "From a dataset's row to the gradient: the loss is called inside the head's sweep")
    steps = (
        ("row of a dataset\ntext, messages", "padding"),
        ("Tree\nprompt and branches", "prompt"),
        ("TokenBatch\none packed row", "prompt"),
        ("backbone\nhidden states", "chosen"),
    )
    for number, (text, colour) in enumerate(steps):
        x = 20 + 176 * number
        drawing.box(x, 24, 152, 48, colour, text, size=12)
        if number:
            drawing.arrow((x - 24, 48), (x - 2, 48))
    for number, room in enumerate(("data/", "data/packing.py", "modeling/")):
        drawing.text(108 + 176 * number + 76, 90, room, colour="faint", anchor="middle", size=11)
    drawing.box(20, 118, 680, 168, "paper")
    drawing.arrow((624, 72), (624, 116))
    drawing.text(36, 140, "the head's sweep, block by block of rows", bold=True)
    drawing.text(684, 140, "ops/head/", colour="faint", anchor="end", size=11)
    inside = (
        ("logits\nof the block", "logits"),
        ("log-probabilities\nof the block", "chosen"),
        ("the loss: what\neach row weighs", "rejected"),
        ("gradient,\nover the logits", "again"),
    )
    for number, (text, colour) in enumerate(inside):
        x = 36 + 168 * number
        drawing.box(x, 160, 144, 52, colour, text, size=12)
        if number:
            drawing.arrow((x - 24, 186), (x - 2, 186))
    drawing.text(444, 232, "losses/", colour="faint", anchor="middle", size=11)
    drawing.arrow((612, 212), (612, 262), (108, 262), (108, 214))
    drawing.text(
        360, 256, "next block: the memory of this one is used again", colour="faint", anchor="middle", size=12
    )
    drawing.arrow((180, 286), (180, 312))
    drawing.arrow((540, 286), (540, 312))
    drawing.box(60, 314, 240, 40, "chosen", "loss and metrics: [N] vectors", size=12)
    drawing.box(420, 314, 240, 40, "again", "∂ hidden → backbone, ∂ weight", size=12)
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "data-flow": data_flow,
    "memory": memory,
    "passes": passes,
    "rows": rows,
    "tokens": tokens,
}


def main() -> None:
    """Writes all pictures."""
    for name, draw in DRAWINGS.items():
        draw().save(PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()

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


DRAWINGS: dict[str, Callable[[], Drawing]] = {"rows": rows}


def main() -> None:
    """Writes all pictures."""
    for name, draw in DRAWINGS.items():
        draw().save(PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()

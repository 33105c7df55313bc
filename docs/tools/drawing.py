"""Draws boxes, texts and arrows as an SVG that is readable on a light and on a dark page.

Written as text, so that a change of a picture is a diff that people can read. Colours are CSS variables: where the
reader's browser prefers dark pages, the dark values count. The picture brings its own background, so it is readable
on any page.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

# Name of a colour: its value on a light page, and on a dark one.
COLOURS = {
    "paper": ("#ffffff", "#1b1e26"),
    "frame": ("#d5d9e2", "#3b404d"),
    "ink": ("#1f2430", "#e4e7ee"),
    "faint": ("#5b6272", "#a3aabb"),
    "prompt": ("#9db4e8", "#4a66a8"),
    "chosen": ("#8fd0a5", "#2f7d4c"),
    "rejected": ("#f2b38a", "#a3602f"),
    "padding": ("#e9ebf0", "#2a2e39"),
    "logits": ("#c9b2ea", "#6b4fa0"),
    "again": ("#f0a3a3", "#994545"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


class Drawing:
    """Collects the shapes of one picture, `width` x `height` units large, and says what it shows in `title`."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, text: str = "", size: int = 13
    ) -> None:
        """Draws a box with a text in its middle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="var(--{colour})" '
            'stroke="var(--frame)"/>'
        )
        if text:
            lines = text.split("\n")
            for number, line in enumerate(lines):
                middle = y + height / 2 + size * 0.36 + (number - (len(lines) - 1) / 2) * size * 1.3
                self.text(x + width / 2, middle, line, anchor="middle", size=size)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = "ink",
        anchor: str = "start",
        size: int = 13,
        bold: bool = False,
    ) -> None:
        """Writes a line of text whose baseline begins, ends or has its middle at (x, y)."""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" fill="var(--{colour})" text-anchor="{anchor}" font-size="{size}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draws an arrow along points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="var(--faint)" marker-end="url(#head)"/>')

    def dot(self, x: float, y: float) -> None:
        """Draws a dot."""
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="2.5" fill="var(--ink)"/>')

    def svg(self) -> str:
        """Returns the picture's text."""
        light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="{FONT}">',
            f"<title>{escape(self.title)}</title>",
            f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="var(--faint)"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" fill="var(--paper)" '
            'stroke="var(--frame)"/>',
            *self.shapes,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def save(self, path: Path) -> None:
        """Writes the picture to a file."""
        path.write_text(self.svg(), encoding="utf-8")

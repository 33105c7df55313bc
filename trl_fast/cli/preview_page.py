"""Makes the page of previewed examples: one HTML file with their tokens and small copies of their images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trl_fast.console import make_recording_console

from .preview_report import Report, left_out_line, show_layout, show_summary
from .preview_tokens import CONTEXT, CUT, LEARNED

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 96  # pixels of a small copy's longer side
_WIDTH = 100  # characters of a line of drawings and tables
_CLASSES = {LEARNED: "learned", CONTEXT: "context", CUT: "cut"}
_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 48px; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1rem; margin: 20px 0 4px; }
.tokens { font: 14px/1.8 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens span { padding: 2px 0; }
.tokens img { vertical-align: middle; margin: 2px; }
.learned { background: #aee8b5; } .learned.odd { background: #d0f4d4; }
.context { background: #e3e6ea; } .context.odd { background: #f1f3f5; }
.cut { background: #f6b9b6; text-decoration: line-through; } .cut.odd { background: #fad7d5; }
.special { font-weight: 600; }
pre { overflow-x: auto; padding: 10px 12px; border: 1px solid #e1e5ea; }
</style>
</head>
<body>
{% for example in report.found %}
<h1>{{ report.title }}</h1>
{% for heading, pieces in report.parts(example) %}
<h2>{{ heading }}</h2>
{% for tokens, left_out in pieces %}
{% if left_out %}<p>{{ left_out_line(left_out) }}</p>{% endif %}
<div class="tokens">
{%- for token in tokens -%}
<span class="{{ classes[token.kind] }}{{ ' odd' if loop.index0 % 2 }}{{ ' special' if token.special }}">
{{- token.text }}
{%- if token.image %}<img src="{{ thumbnail(token.image.picture) }}" alt="">{% endif %}</span>
{%- if token.ends_line %}<br>{% endif %}
{%- endfor -%}
</div>
{% endfor %}
{% endfor %}
<p>
{%- for name, kind in classes.items() %}<span class="{{ kind }}">{{ name }}</span> {% endfor -%}
<span class="context special">special</span></p>
<pre>{{ layout(example) }}</pre>
{% else %}
<h1>{{ report.dropped }}</h1>
{% endfor %}
<h2>summary</h2>
<pre>{{ summary }}</pre>
</body>
</html>
"""


def thumbnail(picture: Image) -> str:
    """Returns a small copy of an image as a `data:` URL, with at most 96 pixels a side."""
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def report_page(report: Report) -> str:
    """Returns the page, which needs no other file."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def printed(show: Callable[[Console], None]) -> Markup:
        console = make_recording_console(_WIDTH)
        show(console)
        return Markup(console.export_html(code_format="{code}", inline_styles=True))

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        report=report,
        classes=_CLASSES,
        left_out_line=left_out_line,
        thumbnail=thumbnail,
        layout=lambda example: printed(lambda console: show_layout(console, report.examples, example)),
        summary=printed(lambda console: show_summary(console, report)),
    )


def write_page(path: Path, report: Report) -> None:
    """Writes the page into a file; raises OSError if it cannot be written."""
    path.write_text(report_page(report), encoding="utf-8")

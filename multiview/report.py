"""Tables and figures for people: as text, as Markdown, and as one HTML page that needs no file or address beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from multiview.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_WIDTH = 1280  # pixels of an embedded image; wider ones are reduced
JPEG_QUALITY = 82
COLORS = {"poor": "#b3261e", "usable": "#9a6700", "good": "#1a7f37", "note": "#57606a"}  # of badges and findings
TEMPLATE = """<!doctype html><html lang='en'><meta charset='utf-8'>
<meta name='viewport' content='width=device-width'><title>{{ title }}</title><style>
body{font:14px/1.45 sans-serif;margin:2em;max-width:1400px;color:#1f2328}
table{border-collapse:collapse;font-size:13px;margin:.5em 0}
td,th{border:1px solid #d0d7de;padding:3px 8px;text-align:right;white-space:nowrap}th{background:#f6f8fa}
td.text{text-align:left}.wide{overflow-x:auto}img{max-width:100%;border:1px solid #d0d7de}
figure{margin:0 0 1.5em;display:inline-block;vertical-align:top}figcaption,p.note{color:#57606a;max-width:80em}
b.badge{padding:2px 12px;border-radius:6px;color:#fff}
</style><h1>{{ title }}{% if badge %}:
<b class='badge' style='background:{{ colors[badge] }}'>{{ badge }}</b>{% endif %}</h1>
{% if facts %}<table>{% for name, value in facts.items() %}
<tr><td class='text'>{{ name }}</td><td class='text'>{{ cell(value) }}</td></tr>{% endfor %}</table>{% endif %}
{% for block in blocks %}
{% if block.columns is defined %}{% if block.title %}<h2>{{ block.title }}</h2>{% endif %}<div class='wide'><table>
<tr>{% for name in block.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in block.rows %}<tr>{% for value in row %}
<td{% if value is string %} class='text'{% endif %}
{%- if value in colors %} style='color:{{ colors[value] }}'{% endif %}>
{{- cell(value) }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% for note in block.notes %}<p class='note'>{{ note }}</p>{% endfor %}
{% elif block.caption is defined %}<figure>{{ block.markup() }}<figcaption>{{ block.caption }}</figcaption></figure>
{% else %}<p class='note'>{{ block }}</p>{% endif %}
{% endfor %}</html>
"""


@dataclass(frozen=True)
class Table:
    """Rows of values under column names; numbers are shown with three significant digits, None as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Returns the table for a terminal: aligned columns."""
        lines = [list(map(str, self.columns)), *([cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        shown = ["  ".join(value.ljust(width) for value, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([self.title, *shown, *self.notes]) + "\n"

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *([cell(value) for value in row] for row in self.rows)]
        table = "\n".join("| " + " | ".join(str(value).replace("|", "\\|") for value in line) + " |" for line in lines)
        return "\n\n".join([f"## {self.title}", table, *self.notes]) + "\n"


@dataclass(frozen=True)
class Figure:
    """An image under which a caption stands: a tensor [3, h, w] 0..1, a PNG file, or SVG of our own making."""

    caption: str
    image: Tensor | Path | None = None
    svg: str = ""  # trusted: texts from outside must be escaped in it

    def markup(self):
        """Returns the HTML element, the image inside it."""
        from markupsafe import Markup

        if self.image is None:
            return Markup(self.svg)
        kind, image, buffer = "png", self.image, io.BytesIO()
        if isinstance(image, Path):
            buffer.write(image.read_bytes())
        else:
            import torch
            from PIL import Image

            from multiview.image import to_uint8

            if image.shape[-1] > IMAGE_WIDTH:
                size = [round(side * IMAGE_WIDTH / image.shape[-1]) for side in image.shape[-2:]]
                image = torch.nn.functional.interpolate(image[None], size=size, mode="area")[0]
            Image.fromarray(to_uint8(image)).save(buffer, format="JPEG", quality=JPEG_QUALITY)
            kind = "jpeg"
        data = base64.b64encode(buffer.getvalue()).decode()
        return Markup("<img src='data:image/{};base64,{}' alt='{}'>").format(kind, data, self.caption)


def write_page(
    path: Path | str, title: str, blocks: Sequence[Table | Figure | str], *,
    facts: Mapping[str, object] | None = None, badge: str | None = None,
) -> None:  # fmt: skip
    """Writes one HTML file. blocks: in order, a str is a note. facts: name -> value, on top. badge: a key of COLORS."""
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    words = {"title": title, "blocks": blocks, "facts": facts or {}, "badge": badge, "colors": COLORS, "cell": cell}
    with atomic_write(path) as temporary:
        temporary.write_text(page.render(**words), encoding="utf-8")


def cell(value: object) -> str:
    """Returns a value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)

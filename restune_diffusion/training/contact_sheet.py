"""Lay images out in a labelled grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    *,
    cell: int = 192,
) -> Image.Image:
    """Draw images in rows and columns, the row labels on the left and the column labels on top.

    Args:
        rows: the images, the same number in each row.
        row_labels: one label a row, wrapped over several lines where it is long.
        column_labels: one label a column, or none.
        cell: side of the square that each image is fitted into, in pixels.
    """
    font = ImageFont.load_default(size=14)
    line = 18
    top = _MARGIN + (line + _MARGIN if column_labels else 0)
    left = 2 * _MARGIN + 150
    pitch = cell + _MARGIN
    sheet = Image.new("RGB", (left + pitch * max(map(len, rows)), top + pitch * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, label in enumerate(column_labels):
        draw.text((left + pitch * number + cell / 2, _MARGIN), label, fill=_INK, font=font, anchor="ma")
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        wrapped = textwrap.wrap(label, width=19)[: cell // line]
        draw.multiline_text((_MARGIN, top + pitch * row), "\n".join(wrapped), fill=_INK, font=font)
        for column, image in enumerate(images):
            sheet.paste(_fitted(image, cell), (left + pitch * column, top + pitch * row))
    return sheet


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    # Small images are enlarged by whole pixels, so that the grid shows what the model drew.
    if max(image.size) * 2 <= cell:
        factor = cell // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = cell / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)

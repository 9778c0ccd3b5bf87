"""Contact sheets: images in a grid with labels or captions."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
_FRAME = (200, 200, 200)
_FONT, _LINE = 14, 18
_LABEL = 150
_HEADLINES = 3
# Largest side of a sheet in pixels that image viewers and browsers display without problems.
_PAGE = 4096


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    *,
    row_notes: Sequence[str] = (),
    cell: int = 192,
) -> Image.Image:
    """Draw images in rows and columns, the row labels on the left and the column labels on top.

    Args:
        rows: the images, the same number in each row.
        row_labels: one label per row, wrapped to the lines that fit the row's height, then truncated.
        column_labels: one label per column, or none; wrapped in the same way.
        row_notes: one text per row, or none; written below the images of the row, wrapped to their width.
        cell: side of the square that each image is fitted into, in pixels.
    """
    font = ImageFont.load_default(size=_FONT)
    fitted = [[_fitted(image, cell) for image in images] for images in rows]
    width = max(image.width for images in fitted for image in images)
    height = max(image.height for images in fitted for image in images)
    across = width + _MARGIN
    notes = [_wrapped(note, font, across * max(map(len, rows)) - _MARGIN, _HEADLINES) for note in row_notes]
    below = _LINE * max(map(len, notes)) + _MARGIN if notes else 0
    titles = [_wrapped(label, font, width, _HEADLINES) for label in column_labels]
    label = max(_LABEL, cell // 2)
    left = 2 * _MARGIN + label
    top = _MARGIN + (_LINE * max(1, *map(len, titles)) + _MARGIN if titles else 0)
    down = height + _MARGIN + below
    sheet = Image.new("RGB", (left + across * max(map(len, rows)), top + down * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, lines in enumerate(titles):
        # On the bottom line, next to the images
        first = top - _MARGIN - _LINE * len(lines)
        for offset, line in enumerate(lines):
            place = (left + across * number + width / 2, first + _LINE * offset)
            draw.text(place, line, fill=_INK, font=font, anchor="ma")
    for row, (images, text) in enumerate(zip(fitted, row_labels, strict=True)):
        for offset, line in enumerate(_wrapped(text, font, label, max(1, height // _LINE))):
            draw.text((_MARGIN, top + down * row + _LINE * offset), line, fill=_INK, font=font)
        for column, image in enumerate(images):
            _paste_framed(sheet, image, (left + across * column, top + down * row))
        for offset, line in enumerate(notes[row] if notes else ()):
            place = (left, top + down * row + height + _MARGIN // 2 + _LINE * offset)
            draw.text(place, line, fill=_INK, font=font)
    return sheet


def captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[tuple[str, str]], *, columns: int, cell: int = 192
) -> Image.Image:
    """Draw images row by row, each with a heading and a caption below; text that does not fit is truncated.

    Args:
        images: the images, at least one, of any shapes.
        captions: heading and caption of each.
        columns: number of images in a row.
        cell: side of the square that each image is fitted into, and width of the text, in pixels.
    """
    font = ImageFont.load_default(size=_FONT)
    fitted = [_fitted(image, cell) for image in images]
    rows = [range(start, min(start + columns, len(fitted))) for start in range(0, len(fitted), columns)]
    # The height of each row is that of its tallest image.
    heights = [max(fitted[number].height for number in row) for row in rows]
    text = _LINE * (1 + _HEADLINES) + _MARGIN
    width = _MARGIN + (cell + _MARGIN) * min(columns, len(fitted))
    sheet = Image.new("RGB", (width, _MARGIN + sum(heights) + len(rows) * (text + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    bottom = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        bottom += height
        for column, number in enumerate(row):
            left = _MARGIN + (cell + _MARGIN) * column
            image, (heading, caption) = fitted[number], captions[number]
            _paste_framed(sheet, image, (left + (cell - image.width) // 2, bottom - image.height))
            lines = [(heading, _FAINT), *((line, _INK) for line in _wrapped(caption, font, cell, _HEADLINES))]
            for offset, (line, color) in enumerate(lines):
                place = (left + cell / 2, bottom + _MARGIN // 2 + _LINE * offset)
                draw.text(place, line, fill=color, font=font, anchor="ma")
        bottom += text + _MARGIN
    return sheet


def _paste_framed(sheet: Image.Image, image: Image.Image, place: tuple[int, int]) -> None:
    """Paste an image, with a thin frame around it that shows where a white image ends."""
    left, top = place
    frame = (left - 1, top - 1, left + image.width, top + image.height)
    ImageDraw.Draw(sheet).rectangle(frame, outline=_FRAME)
    sheet.paste(image, place)


def fitting_cell(rows: int, columns: int, side: int) -> int:
    """Return a cell size for a grid: the images' own size or a multiple of it, smaller if the page would be too large.

    Args:
        rows: number of rows.
        columns: number of columns.
        side: the longer side of the images, in pixels.
    """
    wanted = side * max(1, 192 // side)
    across = (_PAGE - max(_LABEL, wanted // 2)) // columns - _MARGIN
    return max(96, min(wanted, across, _PAGE // rows - _MARGIN))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, limit: int) -> list[str]:
    """Wrap text to lines of a width in pixels; only words that are too long are broken, an ellipsis marks the end."""
    lines: list[str] = []
    # Pillow's default font has no accented letters.
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    for word in plain.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width:
            part = _truncated(word, font, width)
            lines.append(part)
            word = word[len(part) :]
        lines.append(word)
    if len(lines) > limit:
        lines[limit - 1 :] = [_truncated(" ".join(lines[limit - 1 : limit + 1]), font, width, "…") + "…"]
    return lines


def _truncated(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, end: str = "") -> str:
    """Return the longest prefix of a text that fits, at least one character."""
    while len(text) > 1 and font.getlength(text + end) > width:
        text = text[:-1]
    return text


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    # Small images are scaled by a whole factor without interpolation, so that the grid shows the exact pixels.
    if max(image.size) * 2 <= cell:
        factor = cell // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = cell / max(image.size)
    if scale == 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)

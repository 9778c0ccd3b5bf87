"""Images that belong to the training images by their name: masks and condition images."""

from __future__ import annotations

import os
from pathlib import Path

from ...utils.errors import DataError
from ..files import list_images
from .label_files import label_of


class PartnerFiles:
    """Images of a folder, each found by the name of its training image.

    The full file name decides first, then the name without its suffix. A name that fits two files, or a file that
    fits two training images, is refused.

    Args:
        folder: folder of the partners.
        root: folder of the training images.
        label: ending that the partners' names have behind the name of the image, before the suffix.
    """

    def __init__(self, folder: Path, root: Path, label: str = "") -> None:
        self._root = root
        self._partners: dict[Path, list[Path]] = {}
        for path in list_images(folder):
            if not path.stem.endswith(label):
                continue
            inside = path.relative_to(folder)
            named = inside.with_name(path.stem.removesuffix(label))
            for name in {named} if label else {inside, named}:
                self._partners.setdefault(name, []).append(path)
        self._images: dict[Path, list[Path]] = {}
        for path in list_images(root):
            if label_of(path) is None:
                inside = path.relative_to(root)
                self._images.setdefault(inside.with_suffix(""), []).append(inside)

    def of(self, image: Path) -> Path | None:
        """Return the partner of a training image; None if it has none.

        Raises:
            DataError: if the partner is ambiguous. The message continues a sentence that starts with the image's name.
        """
        name = _inside(image, self._root)
        if name is None:
            return None
        exact = self._partners.get(name, [])
        found = exact or self._partners.get(name.with_suffix(""), [])
        if len(found) > 1:
            raise DataError(f"fits {_named(found)}; keep one of them, or name it like the image")
        others = [other for other in self._images.get(name.with_suffix(""), []) if other != name]
        if found and not exact and others:
            raise DataError(
                f"differs from {others[0]} only in its suffix, so {found[0]} could belong to either; "
                f"rename one of the images"
            )
        return found[0] if found else None


def _inside(path: Path, root: Path) -> Path | None:
    """Return a path relative to a folder, by its own name first and then with symbolic links resolved."""
    for file, folder in ((os.path.abspath(path), os.path.abspath(root)), (path.resolve(), root.resolve())):
        if Path(file).is_relative_to(folder):
            return Path(file).relative_to(folder)
    return None


def _named(paths: list[Path]) -> str:
    return " and ".join(str(path) for path in sorted(paths))

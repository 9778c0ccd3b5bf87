"""Convert icon sets to captioned images: the pretraining data of `restune-tiny` and the demo set.

An Iconify set is one npm package whose `icons.json` has SVG bodies keyed by English names. This script reads the
packages from local tarballs or downloads them with `npm pack`. It skips flags, skin tones, letters and hidden icons,
renders the rest at a small size with transparency, and writes for each set the pixels (`<set>.npy`, uint8 RGBA) and
the captions (`<set>.json`).

Examples:
    python research/restune_tiny/prepare_icons.py data/icons --download
    python research/restune_tiny/prepare_icons.py data/icons --tarballs ~/Downloads
    python research/restune_tiny/prepare_icons.py --demo restune_diffusion/assets/demo --tarballs ~/Downloads
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# A script finds its imports from the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.restune_tiny.icon_sources import (
    CLOCK,
    COMMON,
    DEMO_CONCEPTS,
    DEMO_SET,
    DEVELOPMENT_SETS,
    EVERYDAY_WORDS,
    GENDERED,
    LEFT_OUT,
    MAX_TAG_CONCEPTS,
    NAMES,
    PRETRAINING_SETS,
    SKIN_TONE,
    SOURCES,
    WIDELY_DRAWN,
    ZODIAC,
    Source,
)


@dataclass
class Icon:
    """One rendered icon: name in the set, label, captions, tags and sampling weight."""

    name: str
    label: str
    captions: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    weight: float = 1.0


def checked_bytes(path: Path, source: Source) -> bytes:
    """Return the bytes of a tarball.

    Raises:
        ValueError: if its hash is not the pinned one.
    """
    data = path.read_bytes()
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != source.sha512:
        raise ValueError(
            f"`{path}` is not `{source.package}` {source.version}: its sha512 is {found}, not {source.sha512}."
        )
    return data


def download(source: Source, folder: Path) -> Path:
    """Download a pinned package from the npm registry with `npm pack`, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.tarball
    if not target.exists():
        subprocess.run(["npm", "pack", "--silent", f"{source.package}@{source.version}"], cwd=folder, check=True)
    return target


def read_package(path: Path, source: Source, members: tuple[str, ...]) -> list[Any]:
    """Return the parsed JSON files of a package's tarball, in the order of `members`."""
    with tarfile.open(fileobj=io.BytesIO(checked_bytes(path, source)), mode="r:gz") as tar:
        files = [tar.extractfile(f"package/{member}") for member in members]
        return [json.load(handle) if handle else {} for handle in files]


def kept(name: str, icon: dict[str, Any]) -> bool:
    """Return whether an icon is used: not a flag, skin tone, letter, button or hidden icon."""
    return not (icon.get("hidden") or SKIN_TONE.search(name) or LEFT_OUT.search(name))


def svg(icon: dict[str, Any], root: dict[str, Any]) -> str:
    """Return a complete SVG document with an icon's body."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(key, root.get(key, default)) for key, default in defaults.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render(document: str, size: int, supersample: int = 2) -> npt.NDArray[np.uint8]:
    """Return an SVG rendered as a square RGBA image, supersampled and averaged down."""
    import resvg_py

    large = size * supersample
    png = bytes(resvg_py.svg_to_bytes(svg_string=document, width=large, height=large))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (large, large))
    square.paste(image, ((large - image.width) // 2, (large - image.height) // 2))
    # `RGBa` is premultiplied: averaging it keeps the color of transparent pixels out of the edges.
    small = square.convert("RGBa").resize((size, size), Image.Resampling.BOX).convert("RGBA")
    return np.asarray(small)


def plain(text: str) -> str:
    """Return a text as lower-case words with ASCII apostrophes and without punctuation."""
    return re.sub(r"\s+", " ", re.sub(r"[-_:,“”\"]", " ", text.lower().replace("’", "'"))).strip()


def weight_of(label: str, sets: int) -> float:
    """Return the sampling weight of a concept by its number of sets: high for common things, low for rare ones."""
    if sets < WIDELY_DRAWN:
        return 0.1
    if CLOCK.search(label) or GENDERED.search(label) or ZODIAC.search(label) or "arrow" in label:
        return 0.4
    return 1.3 if label in COMMON else 1.0


def emoji_names(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return Unicode's entries keyed by code points, with only the tags that identify a concept."""
    taken = {plain(entry["label"]) for entry in entries} | set(EVERYDAY_WORDS.values())
    counts = Counter(plain(tag) for entry in entries for tag in entry.get("tags", []))
    for entry in entries:
        words = [plain(tag) for tag in entry.get("tags", []) if re.fullmatch(r"[a-z' -]{3,}", plain(tag))]
        entry["tags"] = [word for word in words if counts[word] <= MAX_TAG_CONCEPTS and word not in taken]
    return {hex_key(entry["hexcode"]): entry for entry in entries}


def hex_key(code_points: str) -> str:
    """Return code points in canonical form: lower case, without the variation selector for color."""
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


def describe(name: str, entry: dict[str, Any] | None) -> Icon:
    """Return an icon with its captions: the Unicode label and the set's own name."""
    slug = plain(name)
    if entry is None:
        return Icon(name, slug, [slug])
    label = plain(entry["label"])
    captions = list(dict.fromkeys([label, slug, EVERYDAY_WORDS.get(label, label)]))
    if CLOCK.search(label):
        captions.append(f"clock at {label}")
    tags = [tag for tag in entry["tags"] if tag not in captions]
    return Icon(name, label, captions, tags)


def read_set(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a set's `icons.json` and the code points of its icons by name."""
    root, chars = read_package(folder / SOURCES[name].tarball, SOURCES[name], ("icons.json", "chars.json"))
    code_points: dict[str, str] = {}
    for code, icon in chars.items():
        code_points.setdefault(icon, hex_key(code))
    return root, code_points


def slugs_to_names(
    folder: Path, names: dict[str, dict[str, Any]], sets: tuple[str, ...] = PRETRAINING_SETS
) -> dict[str, dict[str, Any]]:
    """Return Unicode's entries by icon name for all sets: two sets have no code points but the same names."""
    by_slug = {plain(entry["label"]).replace(" ", "-"): entry for entry in names.values()}
    for name in sets:
        for slug, code in read_set(name, folder)[1].items():
            if code in names:
                by_slug[slug] = names[code]
    return by_slug


def render_set(
    name: str, folder: Path, names: dict[str, dict[str, Any]], size: int
) -> tuple[npt.NDArray[np.uint8], list[Icon]]:
    """Render all used icons of a set; return N x size x size x 4 pixels in uint8, and the icons."""
    root, _ = read_set(name, folder)
    images, icons = [], []
    for slug, icon in root["icons"].items():
        if not kept(slug, icon):
            continue
        images.append(render(svg(icon, root), size))
        icons.append(describe(slug, names.get(slug)))
    return np.stack(images), icons


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_set(out: Path, name: str, images: npt.NDArray[np.uint8], icons: list[Icon]) -> None:
    """Write a set's pixels and captions."""
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    write_atomic(out / f"{name}.npy", buffer.getvalue())
    source = SOURCES[name]
    about = {"set": name, "style": source.style, "package": source.package, "version": source.version}
    about |= {"licence": source.licence, "icons": [asdict(icon) for icon in icons]}  # type: ignore[dict-item]
    write_atomic(out / f"{name}.json", json.dumps(about, indent=1).encode())


def write_demo(out: Path, folder: Path, size: int) -> None:
    """Write the demo set: PNGs with white background and `metadata.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    source = SOURCES[DEMO_SET]
    root, _ = read_set(DEMO_SET, folder)
    lines = []
    for concept in DEMO_CONCEPTS:
        image = Image.fromarray(render(svg(root["icons"][concept], root), size))
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        buffer = io.BytesIO()
        white.convert("RGB").save(buffer, "PNG", optimize=True)
        write_atomic(out / f"{concept}.png", buffer.getvalue())
        text = f"{plain(concept)}, {source.style}"
        lines.append(json.dumps({"file_name": f"{concept}.png", "text": text}))
    write_atomic(out / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder for the pretraining data")
    parser.add_argument("--demo", type=Path, metavar="DIR", help="write the demo set (24 images) to this folder")
    parser.add_argument("--benchmark", action="store_true", help="add the sets of the icon-style benchmark")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tarballs", type=Path, metavar="DIR", help="read the npm tarballs from this folder")
    where.add_argument("--download", action="store_true", help="fetch the tarballs with `npm pack` (uses the network)")
    parser.add_argument("--cache", type=Path, default=Path(".icon-tarballs"), help="folder for downloaded tarballs")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default: 64)")
    arguments = parser.parse_args(argv)
    if arguments.out is None and arguments.demo is None:
        parser.error("give a folder for the pretraining data, or --demo DIR, or both")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse_arguments(argv)
    wanted = [SOURCES[name] for name in PRETRAINING_SETS] + [NAMES] if arguments.out else []
    wanted += [SOURCES[DEMO_SET]] if arguments.demo else []
    wanted += [SOURCES[name] for name in DEVELOPMENT_SETS] if arguments.benchmark else []
    folder = arguments.cache if arguments.download else arguments.tarballs
    if arguments.download:
        for source in wanted:
            download(source, folder)
    if arguments.demo:
        write_demo(arguments.demo, folder, arguments.size)
        print(f"{arguments.demo}: {len(DEMO_CONCEPTS)} images")
    if arguments.out:
        entries = read_package(folder / NAMES.tarball, NAMES, ("en/data.json",))[0]
        by_code_points = emoji_names(entries)
        names = slugs_to_names(folder, by_code_points)
        drawn = {name: render_set(name, folder, names, arguments.size) for name in PRETRAINING_SETS}
        counts = Counter(label for _, icons in drawn.values() for label in {icon.label for icon in icons})
        for name, (images, icons) in drawn.items():
            for icon in icons:
                icon.weight = weight_of(icon.label, counts[icon.label])
            write_set(arguments.out, name, images, icons)
            matched = sum(len(icon.captions) + len(icon.tags) > 1 for icon in icons)
            print(f"{name}: {len(icons)} icons, {matched} with more than one name", flush=True)
        if arguments.benchmark:
            names = slugs_to_names(folder, by_code_points, PRETRAINING_SETS + DEVELOPMENT_SETS)
            for name in DEVELOPMENT_SETS:
                images, icons = render_set(name, folder, names, arguments.size)
                write_set(arguments.out, name, images, icons)
                print(f"{name}: {len(icons)} icons", flush=True)


if __name__ == "__main__":
    main()

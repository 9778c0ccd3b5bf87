"""The two tuners of the examples, for the bundled base: black ink on white, and white chalk on blue."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageOps

from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.training import TrainConfig, train

IMAGES = BUNDLED_BASE.parent / "demo"
STYLES: dict[str, tuple[str, str | tuple[int, int, int]]] = {
    "ink": ("black", "white"),
    "chalk": ("white", (20, 60, 160)),
}
"""Colors of the lines and of the background."""


def demo_tuners(folder: Path, steps: int = 150) -> list[Path]:
    """Return the files of both tuners in a folder; train the tuners that are missing, a minute each on a CPU."""
    files = [folder / f"{style}.safetensors" for style in STYLES]
    for style, file in zip(STYLES, files, strict=True):
        if not file.exists():
            train(
                TrainConfig(
                    base=str(BUNDLED_BASE),
                    data=icons(folder / f"{style}-icons", style),
                    trigger_word=f"{style} style",
                    output=folder,
                    name=style,
                    preset="style",
                    steps=steps,
                    learning_rate=2e-3,
                    checkpoint_every=0,
                    log_with="none",
                )
            )
    return files


def icons(folder: Path, style: str) -> Path:
    """Write the icons of the demo in the colors of a style, with captions that end in its name."""
    folder.mkdir(parents=True, exist_ok=True)
    ink, paper = STYLES[style]
    entries = [json.loads(line) for line in (IMAGES / "metadata.jsonl").read_text("utf-8").splitlines()]
    for entry in entries:
        gray = Image.open(IMAGES / entry["file_name"]).convert("L")
        ImageOps.colorize(gray, ink, paper).save(folder / entry["file_name"])
        entry["text"] = entry["text"].replace("ink style", f"{style} style")
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metadata.jsonl").write_text(text, "utf-8")
    return folder

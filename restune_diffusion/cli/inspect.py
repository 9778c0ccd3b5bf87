"""`restune inspect`: show the header of a tuner file, or how an image was generated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict

from ..utils.display import printable
from ..utils.errors import TunerFileError
from .options.early_checks import check_exists

if TYPE_CHECKING:
    from ..storage.header import TunerInfo


class InspectOptions(BaseModel):
    """Show the header of a tuner file without loading its weights, or how an image was generated.

    Images of `restune generate` and of A1111 are supported.

    Example: restune inspect watercolor.safetensors
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[Path, tyro.conf.Positional]
    """Tuner file, or image (PNG, JPEG or WebP)."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON for other programs."""
    config_output: Annotated[bool, tyro.conf.arg(name="config"), tyro.conf.FlagCreatePairsOff] = False
    """Print the training settings as YAML, for `restune train --config`. Data, output and a base that was a folder
    are not included and must be given again."""

    def run(self) -> None:
        """Print the header, or the image's record, in the chosen format."""
        check_exists([str(self.file)], "tuner file")
        text = self._of_image() if is_image(self.file) else self._of_tuner()
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))

    def _of_image(self) -> str:
        from ..imaging.generation_record import read_record
        from .options.image_facts import record_as_json, record_as_text

        if self.config_output:
            raise TunerFileError(f"{self.file} is an image; --config needs a tuner file.")
        record = read_record(self.file)
        if self.json_output:
            return json.dumps(record_as_json(self.file, record), indent=2)
        return record_as_text(self.file, record)

    def _of_tuner(self) -> str:
        from ..storage.header import read_header

        info = read_header(self.file)
        if self.config_output:
            return as_config(info)
        return json.dumps(as_json(info), indent=2) if self.json_output else as_text(info)


def is_image(path: Path) -> bool:
    """Return whether a file starts as a PNG, JPEG or WebP image does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"))


def as_json(info: TunerInfo) -> dict[str, Any]:
    """Return the whole header as plain JSON values; numbers beyond a float's range are strings."""
    return {
        "file": str(info.path),
        "bytes": info.bytes,
        "parameters": info.num_parameters,
        "dtype": info.dtype,
        "parts": [config.model_dump(mode="json") for config in info.configs],
        "base": info.base.model_dump(mode="json"),
        "training": info.training,
        "metadata": {key: value for key, value in info.metadata.items() if not key.startswith("restune.")},
    }


def as_config(info: TunerInfo) -> str:
    """Return the training settings of a tuner as YAML.

    Raises:
        TunerFileError: if the file records no training settings.
    """
    from ..training.config.config_file import recorded_yaml

    recorded = _mapping(info.training.get("config"))
    if not recorded:
        raise TunerFileError(f"{info.path} records no training settings.")
    return recorded_yaml(recorded).rstrip("\n")


def as_text(info: TunerInfo) -> str:
    """Return the main header fields, one per line; long values are truncated and control characters escaped."""
    training = info.training
    config = _mapping(training.get("config"))
    widths = list(dict.fromkeys(site.channels for site in info.base.sites.values()))
    facts: list[tuple[str, Any]] = [("file", f"{info.path} ({info.bytes / 2**20:.2f} MiB)")]
    facts += [(part.part, _settings(part.model_dump(mode="json", exclude={"part"}))) for part in info.configs]
    facts += [
        ("parameters", f"{info.num_parameters:,} ({info.dtype})"),
        ("base", f"{config.get('base') or info.base.name or 'unnamed'} ({info.base.denoiser}, widths {widths})"),
    ]
    if config.get("vae"):
        facts.append(("vae", config["vae"]))
    if words := info.trigger_words:
        facts.append(("trigger", ", ".join(words)))
    # A tuner saved from Python may have other training facts, or none; `--json` shows all of them.
    if {"steps", "images", "data_hash"} <= training.keys():
        taught = _mapping(training.get("teacher"))
        seen = f"{taught['latents']} generated latents" if "latents" in taught else f"{training.get('images')} images"
        facts += [
            *([("teacher", f"{taught.get('file')}, weight {taught.get('weight')}")] if taught else []),
            ("trained", f"{training.get('steps')} steps on {seen} of "
                        f"{training.get('resolution')} px, {training.get('prediction_type')}"),
            ("recipe", _settings({key: config[key] for key in _RECIPE if config.get(key) is not None})),
            ("images", f"sha256 {str(training.get('data_hash'))[:16]}…"),
            ("versions", _settings(_mapping(training.get("versions")))),
        ]  # fmt: skip
    for key in ("modelspec.title", "modelspec.date", "modelspec.license"):
        if info.metadata.get(key):
            facts.append((key.removeprefix("modelspec."), info.metadata[key]))
    return "\n".join(f"{name:<12}{printable(str(value), _LINE)}" for name, value in facts)


_RECIPE = ("prompt", "optimizer", "learning_rate", "lr_scheduler", "batch_size", "gradient_accumulation_steps", "seed",
           "mixed_precision", "caption_dropout", "snr_gamma",
           "ema_decay", "prediction_type", "timestep_sampling")  # fmt: skip
_LINE = 2000


def _mapping(value: object) -> dict[str, Any]:
    """Return a training fact if it is a JSON object, otherwise an empty one; the file may hold any value."""
    return value if isinstance(value, dict) else {}


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in settings.items()
    )

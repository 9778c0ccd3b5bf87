"""Record of one image's generation: what reproduces it, without the paths of this machine."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.base_files.location import public_name
from ...utils.version import __version__
from ...utils.weighted_path import split_weight
from .mix import unique_names

if TYPE_CHECKING:
    from .settings import SamplingSettings

_SHORT = 10  # hexadecimal digits of a model's hash in A1111
_SHORT_LORA = 12
# Options that are recorded for each image, or do not change it.
_APART = {"base", "vae", "prompt", "seed", "images", "output", "overwrite", "tuner", "lora"}
_FILES = {"tuner_mask", "init_image", "control_image", "control_from"}


class RunRecord:
    """What the images of one command have in common; reads all files of tuners and the base once, for their hashes."""

    def __init__(self, options: SamplingSettings, pipeline: Any) -> None:
        import diffusers
        import torch

        from ...imaging.generation_record import a1111_text
        from ..schedulers import scheduler_label

        self._text = a1111_text
        self._options = options
        scheduler = pipeline.scheduler
        self._label, self._spacing = scheduler_label(scheduler)
        given = options.files()
        kinds = ["tuner"] * len(options.tuner) + ["lora"] * len(options.lora)
        names = unique_names([path for path, _ in given])
        self._tuners: list[dict[str, Any]] = [
            {"name": name, "kind": kind, "file": Path(path).name, "sha256": _sha256([_file(path)]), "weight": weight}
            for name, kind, (path, weight) in zip(names, kinds, given, strict=True)
        ]
        self._lora_hashes = {
            name: _addnet_hash(_file(path))[:_SHORT_LORA]
            for name, kind, (path, _) in zip(names, kinds, given, strict=True)
            if kind == "lora"
        }
        self._common: dict[str, Any] = {
            "restune_diffusion": __version__,
            "versions": {"torch": str(torch.__version__), "diffusers": diffusers.__version__},
            "base": {"name": public_base(options.base), "sha256": _sha256(_weights_of_base(options.base, pipeline))},
            **({"vae": _vae_record(options.vae, pipeline)} if options.vae is not None else {}),
            "tuners": self._tuners,
            "images": _image_hashes(options),
            "scheduler": {"class": type(scheduler).__name__, "config": _plain(scheduler.config)},
            "device": pipeline.device.type,
            "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        }

    def of_image(self, prompt: str, seed: int, size: tuple[int, int]) -> tuple[dict[str, Any], str]:
        """Return the record of one image, as JSON values and as A1111's text.

        Args:
            prompt: its prompt.
            seed: its seed.
            size: its width and height.
        """
        options = self._options
        facts = {
            "prompt": prompt,
            "negative_prompt": options.negative_prompt,
            "seed": seed,
            "steps": options.steps,
            "guidance": options.guidance,
            "guidance_rescale": options.guidance_rescale,
            "clip_skip": options.clip_skip,
            "width": size[0],
            "height": size[1],
            **self._common,
            "command": shlex.join(["restune", "generate", *self._flags(prompt, seed, size)]),
        }
        return facts, self._text(prompt, options.negative_prompt, self._pairs(seed, size))

    def _pairs(self, seed: int, size: tuple[int, int]) -> dict[str, object]:
        from .settings import DEFAULT_STRENGTH

        options, base, vae = self._options, self._common["base"], self._common.get("vae", {})
        hashed = {tuner["name"]: tuner["sha256"][:_SHORT] for tuner in self._tuners if tuner["kind"] == "tuner"}
        weights = {tuner["name"]: f"{tuner['weight']:g}" for tuner in self._tuners}
        strength = None if options.init_image is None else options.strength or DEFAULT_STRENGTH
        return {
            "Steps": options.steps,
            "Sampler": self._label,
            "Schedule type": self._spacing,
            "CFG scale": f"{options.guidance:g}",
            "Seed": seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model hash": base["sha256"][:_SHORT] or None,
            "Model": base["name"],
            "VAE hash": vae.get("sha256", "")[:_SHORT] or None,
            "VAE": vae.get("name"),
            "Denoising strength": strength,
            "Clip skip": options.clip_skip,
            "CFG Rescale": options.guidance_rescale or None,
            "RNG": "CPU",
            "Lora hashes": _listed(self._lora_hashes),
            "Tuners": _listed(weights),
            "Tuner hashes": _listed(hashed),
            "Version": f"restune-diffusion {__version__}",
        }

    def _flags(self, prompt: str, seed: int, size: tuple[int, int]) -> list[str]:
        """Return the flags of a command for this image alone."""
        options = self._options
        flags = [f"--base={public_base(options.base)}", f"--prompt={prompt}", f"--seed={seed}"]
        flags += [f"--vae={public_name(options.vae)}"] if options.vae is not None else []
        for name in ("tuner", "lora"):
            files = [split_weight(argument) for argument in getattr(options, name)]
            flags += [f"--{name}", *(f"{Path(path).name}:{weight:g}" for path, weight in files)] if files else []
        values = {**options.model_dump(exclude=_APART), "width": size[0], "height": size[1]}
        # The device and precision that `auto` chose.
        short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        values |= {"device": self._common["device"], "dtype": short[self._common["dtype"]]}
        for name in sorted(values):
            field = _sampling_fields().get(name)
            if field is None or values[name] == field.get_default(call_default_factory=True):
                continue
            given = values[name] if isinstance(values[name], tuple) else (values[name],)
            texts = [_without_folder(str(value)) if name in _FILES else str(value) for value in given]
            flag = f"--{name.replace('_', '-')}"
            flags += [flag, *texts] if isinstance(values[name], tuple) else [f"{flag}={texts[0]}"]
        return flags


def _sampling_fields() -> dict[str, Any]:
    from .settings import SamplingSettings

    return SamplingSettings.model_fields


def _listed(values: dict[str, str]) -> str | None:
    # A quotation mark would end the value for Civitai's parser.
    return ", ".join(f"{name.replace(chr(34), '')}: {value}" for name, value in values.items()) or None


def _plain(config: Any) -> dict[str, Any]:
    """Return a scheduler's settings as JSON values; infinity, which JSON lacks, is a string."""
    plain = (bool, int, float, str, type(None))
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in config.items()
        if isinstance(value, plain) and key != "_name_or_path"
    }


def public_base(base: str) -> str:
    """Return a hub id, or the last part of a path: an image that is shared must not reveal private paths."""
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() else base


def _without_folder(value: str) -> str:
    """Return `NAME:FILE`, `CONDITION=FILE` or `FILE` without the folders of the file."""
    prefix, file = re.fullmatch(r"(\w[^/\\:=]*[:=]\s*)?(.*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
    return (prefix or "") + Path(file).name


def _file(path: str) -> Path:
    """Return the file of a tuner, which may be given as a folder or a hub id."""
    from ...storage.sources import tuner_file

    given = Path(path).expanduser()
    if given.is_dir():
        found = sorted(given.rglob("*.safetensors"))
        return found[0] if len(found) == 1 else tuner_file(path)
    return given if given.exists() else tuner_file(path)


def _weights_of_base(base: str, pipeline: Any) -> list[Path]:
    """Return the single file of a base, or the weights of its U-Net."""
    path = Path(base).expanduser()
    if path.is_file():
        return [path]
    folder = path / "unet" if path.is_dir() else Path(str(pipeline.unet.config.get("_name_or_path", "")))
    for pattern in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _vae_record(vae: str, pipeline: Any) -> dict[str, str]:
    path = Path(vae).expanduser()
    folder = path if path.is_dir() else Path(str(pipeline.vae.config.get("_name_or_path", "")))
    files = [path] if path.is_file() else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {"name": public_name(vae), "sha256": _sha256(files)}


def _image_hashes(options: SamplingSettings) -> dict[str, str]:
    """Return the hash of each image that the command reads, by the name of its file."""
    entries = [*options.tuner_mask, *options.control_image, *options.control_from]
    files = [] if options.init_image is None else [options.init_image]
    for entry in entries:
        candidates = (entry, entry.partition(":")[2].strip(), entry.partition("=")[2])
        files += [Path(text) for text in candidates if text and Path(text).is_file()][:1]
    return {file.name: _sha256([file]) for file in files}


def file_sha256(file: Path) -> str:
    """Return the hash of a file's bytes; that of a file that has not changed is kept."""
    return _sha256([file])


def _sha256(files: list[Path]) -> str:
    """Return the hash of the files' bytes one after the other; empty without files.

    The hash of files that have not changed is kept: a studio records one base of gigabytes for every image.
    """
    states = ((file, file.stat()) for file in files)
    return _kept_sha256(tuple((file, state.st_mtime_ns, state.st_size, state.st_ino) for file, state in states))


@functools.lru_cache(maxsize=256)
def _kept_sha256(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, *_ in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else ""


def _addnet_hash(file: Path) -> str:
    """Return the hash of a safetensors file without its header, by which A1111 and Civitai identify a LoRA."""
    with file.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

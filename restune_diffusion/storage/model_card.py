"""Model card of a tuner, the README.md of its repository on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..tuners.registry import PartConfig, tuner_family
from .header import TunerInfo

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PARTS = {
    "skip": "SC-Tuners on the skip connections ([SCEdit](https://arxiv.org/abs/2312.11392))",
    "control": "CSC-Tuners for control images on skip connections ([SCEdit](https://arxiv.org/abs/2312.11392))",
    "res": "tuners parallel to operations of transformer blocks ([Res-Tuning](https://arxiv.org/abs/2310.19859))",
    "bypass": "a side network on detached features ([Res-Tuning](https://arxiv.org/abs/2310.19859))",
    "text": "placeholder tokens ([Textual Inversion](https://arxiv.org/abs/2208.01618)) and LoRA for text encoders",
}
_RECIPE = ("learning_rate", "lr_scheduler", "batch_size", "mixed_precision", "seed")


def model_card(
    info: TunerInfo,
    repo_id: str,
    *,
    samples: Mapping[str, str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    weight_name: str | None = None,
) -> str:
    """Return the text of a model card with its YAML front matter; it depends only on the arguments.

    Args:
        info: header of the tuner's file.
        repo_id: repository of the card, `user/name`.
        samples: prompt of each sample image, by the image's path in the repository.
        base_model: id of the base's repository; defaults to the base in the file, if that is an id.
        license: license identifier of the Hub.
        weight_name: name of the file in the repository, if it is not the default name.
    """
    samples = samples or {}
    base = base_model or (info.base.name if _HUB_ID.fullmatch(info.base.name) else None)
    title = info.metadata.get("modelspec.title") or repo_id.rsplit("/", 1)[-1]
    sections = [
        f"# {_plain(title)}",
        _about(info, base),
        "<Gallery />" if samples else "",
        _usage(info, repo_id, base, weight_name, next(iter(samples.values()), None)),
        _training(info.training),
    ]
    front = _front_matter(info, samples, base, license)
    return f"---\n{front}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(info: TunerInfo, samples: Mapping[str, str], base: str | None, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    facts: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": license or info.metadata.get("modelspec.license"),
        "base_model": base,
        # The Hub assumes a full fine-tuning by default.
        "base_model_relation": "adapter" if base else None,
        "tags": ["restune-diffusion", "res-tuning", "stable-diffusion", "template:diffusion-lora"]
        + [f"restune-{config.part}" for config in info.configs],
        "instance_prompt": _phrase(info),
        "widget": [_widget(path, prompt) for path, prompt in samples.items()] or None,
    }
    return str(ModelCardData(**{key: value for key, value in facts.items() if value is not None}).to_yaml()).strip()


def _widget(path: str, prompt: str) -> dict[str, Any]:
    return {"text": " ".join(prompt.split()) or "-", "output": {"url": path}}


def _about(info: TunerInfo, base: str | None) -> str:
    parts = "; ".join(f"{_what(config)}, {_settings(config)}" for config in info.configs)
    structure = f"`{_plain(base or info.base.name or info.base.denoiser)}`"
    text = (
        f"A detachable tuner for {structure} and every checkpoint of the same structure, trained with "
        f"restune-diffusion: {parts}. It has {info.num_parameters:,} parameters ({info.dtype}, "
        f"{info.bytes / 2**20:.2f} MiB). The base's weights are not changed, and removing the tuner restores the base "
        "bit for bit."
    )
    prompt = _prompt(info.training)
    if prompt is not None:
        text += f"\n\nIt was trained with the prompt `{_plain(prompt)}`; use this phrase in prompts."
    if info.trigger_words:
        words = ", ".join(f"`{_code(word)}`" for word in info.trigger_words)
        text += f"\n\nTrigger words: {words}. Use them in prompts."
    return text


def _usage(info: TunerInfo, repo_id: str, base: str | None, weight_name: str | None, prompt: str | None) -> str:
    xl = info.base.structure.get("cross_attention_dim") == 2048
    name = "RestuneStableDiffusionXLPipeline" if xl else "RestuneStableDiffusionPipeline"
    more = f", weight_name={weight_name!r}" if weight_name else ""
    return f"""## Usage

```python
from restune_diffusion import {name}

pipe = {name}.from_pretrained({base or "path/to/the/base"!r})
pipe.load_tuner_weights({repo_id!r}{more})
image = pipe({(prompt or _phrase(info) or "a prompt")!r}).images[0]
```"""


def _training(training: Mapping[str, Any]) -> str:
    config = training.get("config")
    recipe = config if isinstance(config, dict) else {}
    teacher = training.get("teacher")
    taught = teacher if isinstance(teacher, dict) else {}
    facts = {
        "steps": training.get("steps"),
        "teacher": taught.get("file"),
        "images": training.get("images") if "latents" not in taught else None,
        "generated latents": taught.get("latents"),
        "resolution": training.get("resolution"),
        "VAE": recipe.get("vae"),
        **{key.replace("_", " "): recipe.get(key) for key in _RECIPE},
    }
    rows = [f"| {name} | {_plain(str(value))} |" for name, value in facts.items() if value is not None]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows]) if rows else ""


def _prompt(training: Mapping[str, Any]) -> str | None:
    config = training.get("config")
    prompt = config.get("prompt") if isinstance(config, dict) else None
    return " ".join(prompt.split()) or None if isinstance(prompt, str) else None


def _phrase(info: TunerInfo) -> str | None:
    """Return the prompt of the training, after the trigger words that it lacks."""
    prompt = _prompt(info.training) or ""
    words = [" ".join(word.split()) for word in info.trigger_words]
    return ", ".join([*(word for word in words if word not in prompt), *([prompt] if prompt else [])]) or None


def _what(config: PartConfig) -> str:
    return _PARTS.get(config.part) or f"{config.part}: {_plain(tuner_family(config.part).summary).rstrip('.')}"


def _settings(config: PartConfig) -> str:
    settings = config.model_dump(mode="json", exclude={"part"}, exclude_none=True)
    return ", ".join(f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                     for name, value in settings.items())  # fmt: skip


def _plain(text: str) -> str:
    """Remove line breaks and Markdown characters from untrusted text, so that it stays in its cell or code span."""
    return " ".join(re.sub(r"[`|<>]", " ", text).split())


def _code(word: str) -> str:
    """Return a trigger word for a code span, in which the angle brackets of a token are literal."""
    return " ".join(word.replace("`", " ").split())


def sample_paths(images: Sequence[object]) -> list[str]:
    """Return the paths of the sample images in a repository."""
    return [str(PurePosixPath("images", f"{number:02d}.png")) for number in range(len(images))]

"""Compare several tuner files on the same captions and noise, for example those of one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.training_images import Sample
from ..imaging.contact_sheet import fitting_cell, labelled_grid
from ..storage.tuner_file import read_info
from ..utils.atomic_write import atomic_write
from ..utils.errors import RestuneError
from .comparison import Comparison, Images, MetricNetworks, References, Row
from .evaluate import digest, warn_of_shared_images
from .metric_names import KID_IMAGES, METRICS
from .report import Evaluation, as_image
from .sampling import Sampling, as_bytes, generate

_COLUMNS = 8
"""Maximum number of images in a row of the grid."""
_PROMPTS = 4
"""Columns kept for prompts if there are captions too."""


@dataclass(frozen=True)
class Material:
    """What several tuners are compared on.

    Attributes:
        true: captioned true images; the metrics compare with them.
        prompts: further prompts, shown in the grid; without true images, the metrics are measured on them.
        training: training images, to detect memorization.
        drift_prompts: prompts without the subject, to measure unwanted changes.
    """

    true: Sequence[Sample] = ()
    prompts: Sequence[str] = ()
    training: Sequence[Sample] = ()
    drift_prompts: Sequence[str] = ()

    @property
    def captions(self) -> list[str]:
        """Captions of the images that are measured."""
        return [sample.caption for sample in self.true] or list(self.prompts)

    @property
    def further(self) -> list[str]:
        """Prompts of the images that are only shown."""
        return list(self.prompts) if self.true else []


@dataclass(frozen=True)
class _Shown:
    """Images of a tuner, of the base, or of the true images: those of the captions, and those of further prompts."""

    images: Images
    further: Images = ()


def evaluate_tuners(
    pipeline: Any,
    tuners: Mapping[str, Path],
    output: Path,
    material: Material,
    sampling: Sampling,
    *,
    title: str,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate tuner files as `evaluate_tuner` does each of them, and write report.json, report.md and grid.png.

    Args:
        pipeline: pipeline that supports tuners, with none loaded.
        tuners: files by the names of their rows.
        output: folder for the report; created if it does not exist.
        material: captions, true images and prompts.
        sampling: settings of every image.
        title: heading of the report.
        settings: further settings to report, JSON values by name.

    Returns:
        The metrics, one row for each file, and the settings.

    Raises:
        TunerFileError: if a file is damaged or of another program, or the report cannot be written.
        RestuneError: if a tuner does not fit, nothing can be generated, or the extra `evaluate` is not installed.
    """
    if not material.captions:
        raise RestuneError(
            "There is nothing to generate: no held-out images and no prompts; give --data or --prompts."
        )
    # All inputs are checked before sampling, which may take hours.
    infos = {name: read_info(file) for name, file in tuners.items()}
    warn_of_shared_images(list(material.true), list(material.training))
    networks = MetricNetworks(pipeline.device)

    def draw(what: str) -> tuple[_Shown, Images]:
        prompts, count = [*material.captions, *material.drift_prompts], len(material.captions)
        images = generate(pipeline, prompts, sampling, what)
        further = generate(pipeline, material.further, sampling, f"{what}, prompts") if material.further else []
        return _Shown(images[:count], further), images[count:]

    base, drift = draw("base")
    true = [as_bytes(sample) for sample in material.true]
    references = References(base.images, true, [as_bytes(sample) for sample in material.training], drift)
    comparison = Comparison(networks, references)
    rows: dict[str, Row] = {"base": comparison.base_row()}
    shown = {"base": base}
    for name, file in tuners.items():
        pipeline.load_tuner_weights(file)
        try:
            shown[name], changed = draw(name)
        finally:
            pipeline.unload_tuner_weights()
        rows[name] = comparison.row(shown[name].images, changed)
    if true:
        rows["true pictures"], shown["true pictures"] = comparison.true_row(), _Shown(true)
    evaluation = Evaluation(
        rows,
        {
            **(settings or {}),
            "pictures": len(material.captions),
            "true_pictures": len(true),
            "training_pictures": len(material.training),
            "drift_prompts": list(material.drift_prompts),
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "seed": sampling.seed,
            "resolution": base.images[0].shape[-1],
        },
        title=title,
        remarks=[*_best(rows, tuners), *_unsure(len(true)), *_unmeasured(comparison)],
        files={
            name: {"step": (info.training or {}).get("steps"), "sha256": digest(tuners[name])}
            for name, info in infos.items()
        },
    )
    _write(evaluation, output, material, shown)
    return evaluation


def _best(rows: Mapping[str, Row], tuners: Mapping[str, Path]) -> list[str]:
    """Return a sentence with the best files by each metric that compares with the true images and tells them apart."""
    found = []
    for key, metric in METRICS.items():
        values = {name: value for name in tuners if (value := rows[name][key]) is not None}
        if metric.true_images and len(set(values.values())) > 1:
            best = (min if metric.lower_is_better else max)(values.values())
            names = [name for name, value in values.items() if value == best]
            found.append(f"{metric.heading}: {' and '.join(names)}")
    return [f"Best by {'; by '.join(found)}."] if found else []


def _unsure(true: int) -> list[str]:
    few = METRICS["kid"].true_images <= true < KID_IMAGES
    return [f"The KID of {true} images is mostly noise; it needs {KID_IMAGES} or more."] if few else []


def _unmeasured(comparison: Comparison) -> list[str]:
    return [f"No {METRICS[name].heading}: it {reason}." for name, reason in comparison.missing.items()]


def _write(evaluation: Evaluation, output: Path, material: Material, shown: Mapping[str, _Shown]) -> None:
    further = min(len(material.further), _PROMPTS)
    captions = min(len(material.captions), _COLUMNS - further)
    rows, labels, notes = [], [], []
    # The true images are what the rows of the files are compared with.
    for name in sorted(shown, key=lambda name: name != "true pictures"):
        images = [as_image(image) for image in shown[name].images[:captions]]
        own = [as_image(image) for image in shown[name].further[:further]]
        rows.append(images + (own or [Image.new("RGB", images[0].size, "white") for _ in range(further)]))
        step = evaluation.files.get(name, {}).get("step")
        label = evaluation.label(name).removesuffix(".safetensors").removesuffix("/tuner")
        labels.append(label + (f" (step {step})" if step is not None else ""))
        notes.append(evaluation.summary(name))
    columns = [*material.captions[:captions], *material.further[:further]]
    cell = fitting_cell(len(rows), len(columns), max(rows[0][0].size))
    grid = labelled_grid(rows, labels, columns, row_notes=notes, cell=cell)
    with atomic_write(output / "grid.png") as file:
        grid.save(file, format="PNG")
    with atomic_write(output / "report.md") as file:
        file.write(evaluation.as_markdown().encode())
    with atomic_write(output / "report.json") as file:
        file.write(json.dumps(evaluation.as_json(), indent=2).encode())

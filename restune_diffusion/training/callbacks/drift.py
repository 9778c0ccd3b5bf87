"""Drift: change of the base's predictions on prompts without the subject.

The base generates one image of each prompt from a fixed seed. Fixed noise is added to the latent of the image at
`TIMESTEPS` evenly spaced timesteps, and the drift is

    100 * sum |tuned(x_t, t, prompt) - base(x_t, t, prompt)|^2 / sum |base(x_t, t, prompt)|^2

over these: the squared change of the predictions, in percent of the base's own. It is 0 for a tuner that does nothing,
and does not depend on guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.image_files import SizeConditioning
from ...pipelines.load_base import is_inpainting, sampling_pipeline
from ...utils.errors import TrainingError
from ...utils.seeds import derived_seed
from ..config.validation import ValidationConfig
from ..latents.batches import Batch
from ..latents.text_conditioning import Conditioning, LiveEncoder, denoiser_inputs, encode_caption
from ..losses.objective import scheduler_changes
from ..losses.prediction import predict, tuner_attached, tuners_disabled
from ..state import StepReport, TrainState
from .base import Callback

TIMESTEPS = 8
"""Number of noise levels of each prompt; each is a forward pass of batch size 1."""


@dataclass(frozen=True)
class DriftPrompt:
    """Prompt, its text embeddings from the base, and the latent of the base's image, scaled as in training."""

    prompt: str
    states: Conditioning
    latent: torch.Tensor


def encode_drift_prompts(
    prompts: Sequence[str],
    validation: ValidationConfig,
    pipeline: Any,
    resolution: int,
    prediction_type: str | None = None,
) -> list[DriftPrompt]:
    """Encode the prompts of a run's drift, and generate an image of each with the base.

    Args:
        prompts: prompts without the subject; the class prompt by default.
        validation: sampling steps, guidance and seed.
        pipeline: the base, without tuners.
        resolution: side of the training images in pixels.
        prediction_type: prediction type of the base; that of its scheduler's config if None.

    Raises:
        TrainingError: if drift prompts are given for an inpainting base.
    """
    if prompts and is_inpainting(pipeline):
        if validation.drift_prompts:
            raise TrainingError(
                "An inpainting base cannot generate images from a prompt alone; omit --validation.drift-prompts."
            )
        prompts = ()
    if not prompts:
        return []
    sampler = sampling_pipeline(pipeline, scheduler_changes(prediction_type))
    encoded = []
    for prompt in prompts:
        latents = sampler(
            prompt,
            height=resolution,
            width=resolution,
            num_inference_steps=validation.steps,
            guidance_scale=validation.guidance,
            generator=torch.Generator("cpu").manual_seed(validation.seed),
            output_type="latent",
        ).images
        encoded.append(DriftPrompt(prompt, encode_caption(pipeline, prompt), latents[0].float().cpu()))
    return encoded


class DriftProbe(Callback):
    """Log the drift of each prompt at the start, with every validation, and at the end.

    Args:
        prompts: encoded prompts with their latents.
        log: called with the run and the metrics.
        show: called with a line for the terminal; nothing is printed if None.
    """

    def __init__(
        self,
        prompts: Sequence[DriftPrompt],
        log: Callable[[TrainState, dict[str, float]], None],
        show: Callable[[str], object] | None = None,
    ) -> None:
        self._prompts = prompts
        self._log = log
        self._show = show
        self._batches: list[list[Batch]] = []
        self._base: list[list[torch.Tensor]] = []
        self._last: int | None = None

    def on_start(self, run: TrainState) -> None:
        """Store the base's predictions, which all later predictions are compared with."""
        if run.accelerator.is_main_process:
            self._batches = [probe_batches(run, number, prompt) for number, prompt in enumerate(self._prompts)]
            with tuners_disabled(run.pipeline.unet):
                self._base = [[predict(run, batch).float() for batch in batches] for batches in self._batches]
        if run.step == 0:
            self._report(run)
        run.accelerator.wait_for_everyone()

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether the drift is due: every `validation.every` steps, except after the last step."""
        return bool(run.config.drift_prompts) and run.config.validation.due(step) and step < run.steps

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Log the drift if it is due."""
        if self.reads_state(run, report.step):
            self._report(run)

    def on_end(self, run: TrainState) -> None:
        """Log the drift of the finished tuner, unless a run that stops early has logged it already."""
        if run.stopped_early is None or self._last != run.step:
            self._report(run)

    def _report(self, run: TrainState) -> None:
        self._last = run.step
        if self._prompts and run.accelerator.is_main_process:
            with run.released_weights(), tuner_attached(run):
                drifts = self.measure(run)
            mean = sum(drifts) / len(drifts)
            self._log(run, {"drift": mean})
            if self._show is not None:
                each = ", ".join(
                    f"{prompt.prompt!r} {drift:.2f}%" for prompt, drift in zip(self._prompts, drifts, strict=True)
                )
                self._show(f"drift       {mean:.2f}% at step {run.step} ({each})")
        run.accelerator.wait_for_everyone()

    @torch.no_grad()
    def measure(self, run: TrainState) -> list[float]:
        """Return the drift of each prompt in percent."""
        encode = LiveEncoder(sampling_pipeline(run.pipeline)) if run.config.learns_from_text else None
        drifts = []
        for prompt, batches, base in zip(self._prompts, self._batches, self._base, strict=True):
            states = prompt.states if encode is None else encode([prompt.prompt])[0]
            inputs = _inputs(run, states)
            sums = []
            for batch, expected in zip(batches, base, strict=True):
                tuned = predict(run, Batch(batch.latents, batch.noise, batch.timesteps, inputs)).float()
                sums.append(torch.stack([(tuned - expected).square().sum(), expected.square().sum()]))
            # Read at once, because each read waits for the device.
            change, energy = map(sum, zip(*torch.stack(sums).tolist(), strict=True))
            drifts.append(100 * change / energy)
        return drifts


def probe_batches(run: TrainState, number: int, prompt: DriftPrompt) -> list[Batch]:
    """Return a batch of size 1 at the midpoint of each of `TIMESTEPS` equal parts of the timesteps."""
    device, inputs = run.accelerator.device, _inputs(run, prompt.states)
    # `leak` was the metric's name in version 0.1; another string would change the noise.
    seed = derived_seed(run.config.validation.seed, "leak", number)
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            prompt.latent[None].to(device),
            torch.randn(prompt.latent[None].shape, generator=generator).to(device),
            torch.tensor([int((part + 0.5) / TIMESTEPS * run.objective.timesteps)], device=device),
            inputs,
        )
        for part in range(TIMESTEPS)
    ]


def _inputs(run: TrainState, states: Conditioning) -> dict[str, Any]:
    side = run.resolution
    whole = SizeConditioning((side, side), (0, 0), (side, side))
    return denoiser_inputs([states], [whole], run.accelerator.device, run.pipeline.unet.dtype)

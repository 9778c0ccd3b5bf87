"""How far a tuner moves what it was not asked to: the leak.

For a prompt without the subject, the base draws a picture of its own, once and from a fixed seed. Its latent is made
noisy at `TIMESTEPS` evenly spaced timesteps, with fixed noise, and the leak is

    100 * sum |tuned(x_t, t, prompt) - base(x_t, t, prompt)|^2 / sum |base(x_t, t, prompt)|^2

over these: the mean squared drift of the predictions, in percent of the base's own. It is 0 for a tuner that does
nothing and does not depend on guidance.
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
from ..losses.prediction import predict, tuner_at_hand, tuners_disabled
from ..state import StepReport, TrainState
from .base import Callback

TIMESTEPS = 8
"""Number of noise levels of each prompt; each is one pass of the denoiser, alone."""


@dataclass(frozen=True)
class DriftPrompt:
    """A prompt, what the base's encoders make of it, and the latent of the base's picture, scaled as in training."""

    prompt: str
    states: Conditioning
    latent: torch.Tensor


def draw_drift_prompts(
    prompts: Sequence[str],
    validation: ValidationConfig,
    pipeline: Any,
    resolution: int,
    prediction_type: str | None = None,
) -> list[DriftPrompt]:
    """Draw what the leak of a run is measured on.

    Args:
        prompts: the prompts, by default that of the class.
        validation: how to draw.
        pipeline: the base, without tuners.
        resolution: side of the training images in pixels.
        prediction_type: what the base predicts, where its scheduler does not say so.

    Raises:
        TrainingError: if prompts are given for a base that does not draw from prompts alone.
    """
    if prompts and is_inpainting(pipeline):
        if validation.drift_prompts:
            raise TrainingError("An inpainting base draws nothing from a prompt alone; leave the drift prompts out.")
        prompts = ()
    if not prompts:
        return []
    sampler = sampling_pipeline(pipeline, scheduler_changes(prediction_type))
    drawn = []
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
        drawn.append(DriftPrompt(prompt, encode_caption(pipeline, prompt), latents[0].float().cpu()))
    return drawn


class DriftProbe(Callback):
    """Tells the leak of each prompt at the start, with every validation, and at the end.

    Args:
        prompts: what it is measured on.
        log: takes the run and the figures, for the log.
        show: takes a line of text, for the terminal.
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

    def on_start(self, run: TrainState) -> None:
        """Let the base predict, which is what all later predictions are compared with."""
        if run.accelerator.is_main_process:
            self._batches = [probe_batches(run, number, prompt) for number, prompt in enumerate(self._prompts)]
            with tuners_disabled(run.pipeline.unet):
                self._base = [[predict(run, batch).float() for batch in batches] for batches in self._batches]
        if run.step == 0:
            self._tell(run)
        run.accelerator.wait_for_everyone()

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Tell the leak if it is time."""
        every = run.config.validation.every
        if every and run.step % every == 0 and run.step < run.config.steps:
            self._tell(run)

    def on_end(self, run: TrainState) -> None:
        """Tell the leak of the finished tuner."""
        self._tell(run)

    def _tell(self, run: TrainState) -> None:
        if self._prompts and run.accelerator.is_main_process:
            with run.released_weights(), tuner_at_hand(run):
                leaks = self.measure(run)
            mean = sum(leaks) / len(leaks)
            self._log(run, {"leak": mean})
            if self._show is not None:
                each = ", ".join(
                    f"{prompt.prompt!r} {leak:.2f}%" for prompt, leak in zip(self._prompts, leaks, strict=True)
                )
                self._show(f"leak        {mean:.2f}% at step {run.step} ({each})")
        run.accelerator.wait_for_everyone()

    @torch.no_grad()
    def measure(self, run: TrainState) -> list[float]:
        """Return the leak of each prompt in percent."""
        encode = LiveEncoder(sampling_pipeline(run.pipeline)) if run.config.learns_from_text else None
        leaks = []
        for prompt, batches, base in zip(self._prompts, self._batches, self._base, strict=True):
            states = prompt.states if encode is None else encode([prompt.prompt])[0]
            inputs = _inputs(run, states)
            drift = energy = 0.0
            for batch, expected in zip(batches, base, strict=True):
                tuned = predict(run, Batch(batch.latents, batch.noise, batch.timesteps, inputs)).float()
                drift += float((tuned - expected).square().sum())
                energy += float(expected.square().sum())
            leaks.append(100 * drift / energy)
        return leaks


def probe_batches(run: TrainState, number: int, prompt: DriftPrompt) -> list[Batch]:
    """Return the batches of one, at the midpoints of `TIMESTEPS` equal parts of all timesteps, for a prompt."""
    device, inputs = run.accelerator.device, _inputs(run, prompt.states)
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

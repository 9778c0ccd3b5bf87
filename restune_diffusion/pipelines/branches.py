"""Branched sampling: generate one composition in many styles, computing the first denoising steps once.

The whole call runs with one batch row per branch. All rows of an image start from the same latent and get the same
noise, so they are equal until their tuners differ. During these steps torch hooks let the U-Net compute one row per
image and repeat its output. The pipeline's loop and the scheduler with its state need no changes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..hooks.manager import TunerManager
from ..hooks.mixing import Layout
from ..hooks.weights import Weight
from ..utils.errors import RestuneError

# Relative tolerance: equal rows are bit-identical on a CPU, but a GPU may use different kernels for different rows.
# Rows with different noise differ by far more.
_SAME = 1e-2


@dataclass(frozen=True)
class Fork:
    """Plan of a branched call: number of rows and shared steps, and the tuner weights before and after the fork.

    Args:
        images: number of images, each of which is generated in all branches.
        branches: number of rows per image; they are adjacent.
        share_steps: number of denoising steps that the branches of an image share.
        trunk: weights by tuner during the shared steps.
        mixes: weights by tuner after the shared steps, with one value per row.
    """

    images: int
    branches: int
    share_steps: int
    trunk: Mapping[str, Weight]
    mixes: Mapping[str, Weight]


def arguments_of_branches(call: Callable[..., Any], kwargs: Mapping[str, Any], fork: Fork) -> dict[str, Any]:
    """Return the arguments with which a pipeline generates one row per branch, with equal noise in an image's rows.

    Args:
        call: the pipeline's own `__call__`.
        kwargs: arguments that generate each image once.
        fork: plan of the branches.

    Raises:
        RestuneError: if the pipeline cannot generate several images per prompt, or an argument does not fit.
    """
    parameters = inspect.signature(call).parameters
    missing = {"num_images_per_prompt", "callback_on_step_end"} - parameters.keys()
    if missing:
        raise RestuneError(f"Branches need a pipeline whose call takes {' and '.join(sorted(missing))}.")
    asked = {name: kwargs.get(name, parameter.default) for name, parameter in parameters.items()}
    _check_steps(fork.share_steps, asked)
    rows = {
        "num_images_per_prompt": (asked["num_images_per_prompt"] or 1) * fork.branches,
        "generator": _row_generators(asked["generator"], fork.images, fork.branches),
    }
    if asked.get("latents") is not None:
        if len(asked["latents"]) != fork.images:
            raise RestuneError(
                f"`latents` contains {len(asked['latents'])} latents for {fork.images} images; give one per image, "
                "from which all of its branches start."
            )
        rows["latents"] = asked["latents"].repeat_interleave(fork.branches, 0)
    if "strength" in parameters:
        # These pipelines encode `image` once per generator; a single image would consume only the first row's noise.
        total = fork.images * fork.branches
        rows |= {name: _row_images(asked[name], total) for name in ("image", "mask_image") if name in parameters}
    return {**kwargs, **rows}


@contextlib.contextmanager
def forked(pipeline: Any, base: nn.Module, fork: Fork, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Context manager in which the rows of one call share their first steps.

    Args:
        pipeline: the pipeline.
        base: its U-Net.
        fork: plan of the branches.
        arguments: the result of `arguments_of_branches`.

    Yields:
        The arguments for the call, with a `callback_on_step_end` that ends the sharing.
    """
    manager = TunerManager.of(base)
    before = manager.weights if manager is not None else {}
    callback = arguments.get("callback_on_step_end")
    networks = [network for network in (getattr(pipeline, "controlnet", None),) if network is not None]
    shared = SharedRows([base, *networks], manager, fork.branches, sharing=fork.share_steps > 0)

    def end_of_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        # Second-order schedulers list each step twice.
        if shared.installed and (step + 1) // pipe.scheduler.order >= fork.share_steps:
            shared.part()
            if manager is not None:
                manager.set_weights(fork.mixes)
        return callback(pipe, step, timestep, tensors) if callback is not None else {}

    own: dict[str, Any] = {"callback_on_step_end": end_of_step}
    # The pipeline reads this attribute only from diffusers' callback classes.
    inputs = getattr(callback, "tensor_inputs", None)
    if inputs is not None:
        own["callback_on_step_end_tensor_inputs"] = inputs
    try:
        if manager is not None:
            manager.set_weights(fork.trunk if fork.share_steps else fork.mixes)
        yield {**arguments, **own}
        # Some schedulers have fewer steps than twice those that are shared.
        shared.check()
    finally:
        shared.remove()
        if manager is not None:
            manager.set_weights(before)


class SharedRows:
    """Torch hooks with which modules compute one row per image and repeat its output for the other rows.

    Args:
        modules: the base and other modules that run on its batch; the sample is the first argument of each.
        manager: manager of the base's tuners, whose layout is adjusted to the smaller batch.
        copies: number of adjacent rows per image.
        sharing: False only notes, in the first step, whether the rows of an image are equal.
    """

    def __init__(self, modules: Sequence[nn.Module], manager: TunerManager | None, copies: int, sharing: bool) -> None:
        self._manager = manager
        self._copies = copies
        self._sharing = sharing
        self._layout: Layout | None = None
        self._rows = 0
        self._unequal: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = []
        for module in modules:
            # The first runs before the tuners' hooks, the second after them.
            self._handles += [
                module.register_forward_pre_hook(self._reduce, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._repeat),
            ]

    @property
    def installed(self) -> bool:
        """Whether the hooks are still registered."""
        return bool(self._handles)

    def part(self) -> None:
        """Stop sharing: compute every row from now on.

        Raises:
            RestuneError: if the rows of an image were not equal in one of the shared steps.
        """
        self.remove()
        self.check()
        if self._manager is not None and self._layout is not None:
            self._manager.layout = self._layout

    def check(self) -> None:
        """Raise `RestuneError` if the rows of an image were not equal in one of the steps so far.

        The host waits for the device here, once for all steps.
        """
        unequal, self._unequal = self._unequal, None
        if unequal is not None and bool(unequal):
            raise RestuneError(
                "The branches of one image do not start from the same noise; use a scheduler that samples its noise "
                "with `generator`, and the same inputs for all branches."
            )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _reduce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sample = args[0] if args else kwargs["sample"]
        self._compare(sample)
        if not self._sharing:
            return None
        if self._manager is not None and self._manager.layout is not None and self._layout is None:
            self._layout = self._manager.layout
            self._manager.layout = replace(self._layout, images=self._layout.images // self._copies)
        rows = len(sample)
        self._rows = rows // self._copies

        def first_rows(x: torch.Tensor) -> torch.Tensor:
            return x[:: self._copies] if x.dim() and len(x) == rows else x

        return _map_tensors(first_rows, args), _map_tensors(first_rows, kwargs)

    def _repeat(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._sharing:
            return None

        def all_rows(x: torch.Tensor) -> torch.Tensor:
            return x.repeat_interleave(self._copies, 0) if x.dim() and len(x) == self._rows else x

        return _map_tensors(all_rows, output)

    def _compare(self, sample: torch.Tensor) -> None:
        """Note on the device whether the rows of each image are equal."""
        if len(sample) % self._copies:
            raise RestuneError(
                f"The batch has {len(sample)} rows, which is not a multiple of {self._copies} branches; "
                "generate the branches of this pipeline in separate calls."
            )
        grouped = sample.unflatten(0, (-1, self._copies))
        unequal = (grouped - grouped[:, :1]).abs().max() > _SAME * sample.abs().max()
        self._unequal = unequal if self._unequal is None else self._unequal | unequal


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and mappings, including model outputs."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: _map_tensors(function, item) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(function, item) for item in value)
    return value


def _check_steps(share_steps: int, asked: Mapping[str, Any]) -> None:
    listed = [asked[name] for name in ("timesteps", "sigmas") if asked.get(name) is not None]
    steps = len(listed[0]) if listed else asked["num_inference_steps"]
    if not 0 <= share_steps <= steps:
        raise RestuneError(
            f"share_steps is {share_steps}, but must be between 0 and {steps}, the number of denoising steps."
        )


def _row_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, images: int, copies: int
) -> list[torch.Generator]:
    """Return one generator per row; those of one image have the same state.

    A single generator for several images seeds one generator per image; None does so from torch's global state.
    """
    if generator is None or (isinstance(generator, torch.Generator) and images > 1):
        device = torch.device("cpu") if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (images,), generator=generator, device=device).tolist()
        generator = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    own = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(own) != images:
        raise RestuneError(f"There are {len(own)} generators for {images} images; give one per image.")
    rows = []
    for first in own:
        # The first row advances the given generator, as a call without branches does.
        rows += [first, *(torch.Generator(first.device).set_state(first.get_state()) for _ in range(copies - 1))]
    return rows


def _row_images(images: Any, rows: int) -> Any:
    """Repeat each input image for the rows that start from it."""
    if images is None:
        return None
    if isinstance(images, torch.Tensor):
        images = images if images.dim() == 4 else images[None]
        return images.repeat_interleave(rows // len(images), 0)
    if isinstance(images, np.ndarray):
        images = images if images.ndim == 4 else images[None]
        return images.repeat(rows // len(images), 0)
    images = images if isinstance(images, list) else [images]
    return [image for image in images for _ in range(rows // len(images))]

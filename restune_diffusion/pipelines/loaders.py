"""Mixin that loads, mixes and unloads tuners on a diffusers pipeline with a U-Net, in parallel to its LoRA loader."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn

from ..backbones import text_encoders
from ..hooks.attachment import attach
from ..hooks.compiled import is_compiled, uncompiled
from ..hooks.manager import TunerManager
from ..hooks.mixing import Layout
from ..hooks.placeholder_tokens import PlaceholderTokens
from ..hooks.text_encoders import text_part
from ..hooks.weights import TunerWeight, Weight
from ..storage.sources import TUNER_WEIGHT_NAME, local_tuner_file, tuner_file
from ..storage.tuner_cache import TunerCache
from ..storage.tuner_file import load_tuner, save_tuner
from ..tuners.tuner import Tuner
from ..utils.errors import ConditionError, RestuneError, TunerFileError, TunerNameError
from .call_options import (
    MixPerImage,
    call_layout,
    encode_conditions_ahead,
    listed,
    mix_of_call,
    mixed,
    named_weights,
    weights_by_name,
)
from .control_images import TunerImage, TunerScale, with_control_images
from .prediction_check import warn_of_other_prediction
from .prompt_encoding import converted_prompt, prompt_encoding
from .saving import PlainConfigMixin
from .signatures import adopt_signature

_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")


class RestuneLoaderMixin(PlainConfigMixin):
    """Tuner loader for diffusers pipelines, with the methods of diffusers' LoRA loader under names of their own.

    List it before the pipeline class: `class MyPipeline(RestuneLoaderMixin, StableDiffusionPipeline)`.
    Tuners belong to the base, so pipelines that share a U-Net share its tuners.
    """

    unet: Any
    scheduler: Any
    _execution_device: torch.device
    _tuner_hotswap = False
    _placeholder_tokens: tuple[PlaceholderTokens, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt_signature(cls, RestuneLoaderMixin, "__call__")
        adopt_signature(cls, RestuneLoaderMixin, "encode_prompt")

    def __call__(
        self,
        *args: Any,
        tuners: MixPerImage | None = None,
        tuner_image: TunerImage | None = None,
        tuner_conditioning_scale: TunerScale = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Generate with the loaded tuners. Accepts the pipeline's own arguments and these keyword arguments.

        Args:
            tuners: tuners of each prompt, for this call only: a list with one entry per prompt, each a name, a mapping
                from names to weights, or None for the base with tuners disabled. By default the weights of
                `set_tuners` apply to all images.
            tuner_image: condition images of the active control tuners: one image, a list with one per prompt, or a
                mapping from names of conditions (or of tuners) to these. Images are resized to the generated image;
                `restune_diffusion.conditions` computes some from an image. Without an active control tuner it has no
                effect.
            tuner_conditioning_scale: factor on the residuals of the conditions, or factors by name.

        Returns:
            The output of the pipeline.

        Raises:
            ConditionError: if an active control tuner has no image, or an image is invalid.
        """
        call = super().__call__  # type: ignore[misc]
        manager = TunerManager.of(self._tuner_base)
        if manager is None:
            # Raises TunerNameError if the call names any tuner.
            self.set_tuners(weights_by_name(tuners or [], 1))
            with self._with_images([], tuner_image, tuner_conditioning_scale, None):
                return call(*args, **kwargs)
        layout = call_layout(call, args, kwargs, self._tuner_base)
        with (
            mixed(manager, tuners, layout, self._execution_device, self.scheduler),
            self._with_images(manager.active_names, tuner_image, tuner_conditioning_scale, layout),
        ):
            if layout is not None and is_compiled(self.unet):
                encode_conditions_ahead(self, manager, call, args, kwargs)
            return call(*args, **kwargs)

    def branches(
        self,
        prompt: str | list[str] | None = None,
        tuners: MixPerImage = (),
        share_steps: int = 0,
        *,
        trunk: str | Mapping[str, float] | None = None,
        tuner_image: TunerImage | None = None,
        tuner_conditioning_scale: TunerScale = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Generate each prompt once per mix of tuners, with the same composition.

        The first denoising steps are computed once per image and shared by all of its branches; afterwards each
        branch is a row of one batch.

        Args:
            prompt: the prompt or prompts; None if `prompt_embeds` is given.
            tuners: one entry per branch: a name, a mapping from names to weights, or None for the base with tuners
                disabled.
            share_steps: number of denoising steps of this call that the branches share.
            trunk: tuners during the shared steps, in the form of one entry of `tuners`; by default none.
            tuner_image: condition images of the control tuners among them, as in a call.
            tuner_conditioning_scale: factor on the residuals of the conditions, as in a call.
            kwargs: the pipeline's own arguments. A generator, or a latent, belongs to one image and all its branches.

        Returns:
            The output of the pipeline, with `len(tuners)` samples per image: the branches of an image are adjacent, in
            the order of `tuners`.

        Raises:
            TunerNameError: if a name is unknown.
            ConditionError: if an active control tuner has no image, or an image is invalid.
            RestuneError: if an argument does not fit, or the scheduler adds different noise to the branches.
        """
        from .branches import Fork, arguments_of_branches, forked

        call = super().__call__  # type: ignore[misc]
        kwargs = {"prompt": prompt, **kwargs}
        layout = call_layout(call, (), kwargs, self._tuner_base)
        if layout is None:
            # Raises the error for the invalid arguments.
            return call(**kwargs)
        if not tuners:
            raise RestuneError("`tuners` is empty, so there are no branches; give one entry per branch.")
        names = weights_by_name([*tuners, trunk], 1)
        if names:
            manager = self._manager_of(names)
            shared = weights_by_name([*tuners, trunk] if share_steps else tuners, 1)
            for name, weights in shared.items():
                if len(set(weights)) > 1 and text_part(manager.tuner(name)) is not None:
                    raise RestuneError(
                        f"The tuner {name!r} has a `text` part, and all branches of a prompt share its text; give it "
                        "the same weight in all branches and in the trunk, or generate them in separate calls."
                    )
        before = self.get_list_tuners()
        fork = Fork(
            images=layout.images,
            branches=len(tuners),
            share_steps=share_steps,
            trunk=mix_of_call([trunk], None, before),
            mixes=mix_of_call([*tuners] * layout.images, None, before),
        )
        arguments = arguments_of_branches(call, kwargs, fork)
        active = [name for name, weights in names.items() if any(weights)]
        with (
            self._with_images(active, tuner_image, tuner_conditioning_scale, layout),
            forked(self, self._tuner_base, fork, arguments) as forked_arguments,
        ):
            return self(**forked_arguments)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the pipeline does, with the placeholder tokens and LoRA of the tuners' `text` parts."""
        base = getattr(self, "unet", None)
        with prompt_encoding(self, TunerManager.of(base) if isinstance(base, nn.Module) else None):
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """Replace placeholder tokens, including those of Textual Inversion, by the tokens of the tokenizer in use."""
        prompt = super().maybe_convert_prompt(prompt, tokenizer)  # type: ignore[misc]
        return converted_prompt(prompt, tokenizer, self._placeholder_tokens)

    def load_tuner_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str] | Tuner,
        tuner_name: str | None = None,
        *,
        weight: Weight | None = None,
        hotswap: bool = False,
        cache: TunerCache | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        """Load a tuner and activate it, in addition to those already loaded.

        Args:
            pretrained_model_name_or_path: a tuner file, a folder that contains one, a repository id on the Hub, or a
                `Tuner`.
            tuner_name: name of the tuner in this pipeline; defaults to the file's name.
            weight: weight of the tuner; defaults to 1, and with `hotswap` to the current weight.
            hotswap: overwrite the parameters of the loaded tuner `tuner_name`, which must have the same config,
                instead of loading another tuner: nothing is allocated, and a compiled U-Net is not recompiled. See
                `enable_tuner_hotswap`.
            cache: cache to get the file's tuner from, and to add it to.
            weight_name: name of the file in a folder or repository.
            subfolder: folder inside the folder or repository.
            revision: branch, tag or commit on the Hub.
            token: token for the Hub.
            cache_dir: folder of the Hub's file cache.
            local_files_only: use only files that are already in the Hub's file cache.

        Raises:
            TunerFileError: if the file cannot be found, read or trusted.
            TunerNameError: if the name is taken; with `hotswap`, if no tuner of this name is loaded.
            RestuneError: if `hotswap` is set and the tuner has another config.
            BaseMismatchError: if the tuner is for a base of another structure.
        """
        source, base = pretrained_model_name_or_path, self._tuner_base
        if isinstance(source, Tuner):
            tuner, name = source, tuner_name or "default"
        else:
            path = tuner_file(
                source,
                weight_name,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
            name = tuner_name or (str(source).rsplit("/", 1)[-1] if path.name == TUNER_WEIGHT_NAME else path.stem)
            tuner = load_tuner(path) if cache is None else cache.get(path)
        if hotswap:
            self._manager_of([name]).swap(name, tuner, weight)
            return
        if not _NAME.fullmatch(name):
            raise TunerNameError(f"{name!r} is not a valid tuner name; use a name without slashes or a leading dot.")
        if tuner is not source:
            tuner = tuner.copy() if tuner.shared else tuner
            tuner.to(base.dtype).requires_grad_(False)
        part = text_part(tuner)
        if part is not None and part.tokens and not isinstance(self, TextualInversionLoaderMixin):
            raise RestuneError(
                f"The tuner {name!r} has placeholder tokens, which a {type(self).__name__} does not support; use a "
                "pipeline with TextualInversionLoaderMixin."
            )
        warn_of_other_prediction(self, tuner, name)
        attach(self.unet, tuner, name, 1.0 if weight is None else weight, text=text_encoders(self))
        if self._tuner_hotswap:
            self._manager_of([name]).static = True

    def enable_tuner_hotswap(self, check_compiled: Literal["error", "warn", "ignore"] = "error") -> None:
        """Prepare for switching tuners without recompilation; call it before `torch.compile`.

        `load_tuner_weights(..., hotswap=True)` and changed weights never recompile. With this setting, disabling and
        enabling a tuner does not either: the compiled U-Net computes every loaded tuner, even with weight zero.

        Args:
            check_compiled: action if the U-Net is already compiled, in which case the next call recompiles once:
                raise an error, warn, or ignore.

        Raises:
            RestuneError: if the U-Net is already compiled and `check_compiled` is `error`, or its value is invalid.
        """
        if check_compiled not in ("error", "warn", "ignore"):
            raise RestuneError(f"check_compiled must be `error`, `warn` or `ignore`, but is {check_compiled!r}.")
        base = self._tuner_base
        if (is_compiled(self.unet) or is_compiled(base)) and check_compiled != "ignore":
            late = "The U-Net is already compiled and would recompile; call enable_tuner_hotswap before torch.compile."
            if check_compiled == "error":
                raise RestuneError(late)
            warnings.warn(late, stacklevel=2)
        # A manager exists only while tuners are loaded.
        self._tuner_hotswap = True
        manager = TunerManager.of(base)
        if manager is not None:
            manager.static = True

    @classmethod
    def tuner_state_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], weight_name: str | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Read a local tuner file without attaching it; return its tensors and its metadata."""
        path = local_tuner_file(pretrained_model_name_or_path, weight_name)
        if path is None:
            raise TunerFileError(f"There is no tuner file at {pretrained_model_name_or_path}.")
        tuner = load_tuner(path)
        return tuner.state_dict(), tuner.metadata

    def save_tuner_weights(
        self, save_directory: str | os.PathLike[str], tuner_name: str, weight_name: str | None = None
    ) -> Path:
        """Write a loaded tuner to a folder, in its current dtype, and return the path of the file.

        Args:
            save_directory: the folder; created if it does not exist.
            tuner_name: name of the loaded tuner.
            weight_name: name of the file; defaults to `<tuner_name>.safetensors`.
        """
        path = Path(save_directory) / (weight_name or f"{tuner_name}.safetensors")
        save_tuner(self._manager_of([tuner_name]).tuner(tuner_name), path)
        return path

    def set_tuners(
        self,
        tuner_names: str | Sequence[str] | Mapping[str, Weight],
        weights: float | Sequence[float] | None = None,
    ) -> None:
        """Set the weights of the named tuners; all other loaded tuners get weight zero.

        Args:
            tuner_names: one name, several names, or a mapping from names to weights.
            weights: one weight for all names, or one per name; defaults to 1. A weight is a number, a list with one
                number per image of a batch, factors by site (`{"skip.0-3": 0.2}`), a `schedule(...)` over the
                denoising steps, or a `TunerWeight` that combines all these with a mask.
        """
        chosen = named_weights(tuner_names, weights)
        if chosen or self.get_list_tuners():
            self._manager_of(chosen).set_weights(chosen)

    def get_active_tuners(self) -> list[str]:
        """Return the names of the active tuners: loaded, enabled, and with a nonzero weight."""
        manager = TunerManager.of(self._tuner_base)
        return manager.active_names if manager is not None else []

    def get_list_tuners(self) -> dict[str, float | tuple[float, ...] | TunerWeight]:
        """Return the weights of all loaded tuners, by name."""
        manager = TunerManager.of(self._tuner_base)
        return manager.weights if manager is not None else {}

    def disable_tuners(self) -> None:
        """Disable all tuners; they stay loaded and keep their weights."""
        self._switch(False)

    def enable_tuners(self) -> None:
        """Enable the tuners again after `disable_tuners`."""
        self._switch(True)

    def delete_tuners(self, tuner_names: str | Sequence[str]) -> None:
        """Unload the named tuners; removing the last one removes all hooks."""
        names = listed(tuner_names)
        if names:
            manager = self._manager_of(names)
            for name in dict.fromkeys(names):
                manager.remove(name)

    def unload_tuner_weights(self) -> None:
        """Unload all tuners, which restores the base to its original state."""
        self.delete_tuners(list(self.get_list_tuners()))

    def set_tuner_device(self, tuner_names: str | Sequence[str], device: torch.device | str) -> None:
        """Move loaded tuners to a device; an active tuner is moved back to the base's device in the next call."""
        names = listed(tuner_names)
        for name in names:
            self._manager_of(names).tuner(name).to(device)

    @property
    def _tuner_base(self) -> Any:
        base = getattr(self, "unet", None)
        if not isinstance(base, nn.Module):
            raise RestuneError(f"Tuners need a pipeline with a U-Net, but {type(self).__name__} has no U-Net loaded.")
        return uncompiled(base)

    def _with_images(
        self, names: Iterable[str], images: TunerImage | None, scale: TunerScale, layout: Layout | None
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that sets the condition images of the named control tuners."""
        manager = TunerManager.of(self._tuner_base)
        if manager is not None:
            return with_control_images(manager, names, images, scale, layout)
        if images is not None:
            raise ConditionError("tuner_image needs a control tuner, but no tuner is loaded; load one, or omit it.")
        return contextlib.nullcontext()

    def _manager_of(self, names: Iterable[str]) -> TunerManager:
        """Return the manager of the base's tuners; raise `TunerNameError` if one of the names is not loaded."""
        manager = TunerManager.of(self._tuner_base)
        if manager is None:
            raise TunerNameError(f"No tuner named {', '.join(map(repr, names))} is loaded; loaded: none.")
        manager.check_known(names)
        return manager

    def _switch(self, on: bool) -> None:
        manager = TunerManager.of(self._tuner_base)
        if manager is not None:
            manager.enabled = on

"""Load, mix and unload tuners on any diffusers pipeline with a U-Net, beside its LoRA loader."""

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
from ..hooks.manager import TunerManager, is_compiled, uncompiled
from ..hooks.mixing import Layout
from ..hooks.placeholder_tokens import PlaceholderTokens
from ..hooks.text_encoders import text_part
from ..hooks.weights import TunerWeight, Weight
from ..storage.sources import TUNER_WEIGHT_NAME, local_tuner_file, tuner_file
from ..storage.tuner_cache import TunerCache
from ..storage.tuner_file import load_tuner, save_tuner
from ..tuners.tuner import Tuner
from ..utils.errors import ConditionError, RestuneError, TunerFileError, TunerNameError
from .call_options import MixPerImage, call_layout, listed, mix_of_call, mixed, named_weights, weights_by_name
from .control_images import TunerImage, TunerScale, with_control_images
from .prompt_encoding import converted_prompt, prompts_read
from .saving import PlainConfigMixin
from .signatures import adopt_signature

_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")


class RestuneLoaderMixin(PlainConfigMixin):
    """Methods that a diffusers pipeline gains: those of its LoRA loader, under names that do not collide with it.

    Mix it in before the pipeline's class: `class MyPipeline(RestuneLoaderMixin, StableDiffusionPipeline)`.
    Tuners belong to the base, so pipelines that share a U-Net share its tuners.
    """

    unet: Any
    scheduler: Any
    _execution_device: torch.device
    _tuner_hotswap = False
    _new_words: tuple[PlaceholderTokens, ...] = ()

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
        """Generate with the loaded tuners. Takes the pipeline's own arguments, and by keyword these.

        Args:
            tuners: which tuner acts on each prompt, for this call only: a list with one entry for each prompt, an
                entry being a name, a mapping from names to weights, or None for the base alone. Without it, the mix
                of `set_tuners` acts on all images.
            tuner_image: what steers the control tuners that act: one condition image, a list with one for each prompt,
                or a mapping from names of conditions (or of tuners) to these. Images of any size are brought to that
                of the picture; `restune_diffusion.conditions` makes some from a picture. Without an acting control
                tuner it has no effect.
            tuner_conditioning_scale: factor on what the conditions add, or factors by name.

        Returns:
            What the pipeline returns.

        Raises:
            ConditionError: if a control tuner acts without an image, or an image is of the wrong kind.
        """
        call = super().__call__  # type: ignore[misc]
        manager = TunerManager.of(self._tuner_base)
        if manager is None:
            # Says which names are not loaded, if the call asks for any.
            self.set_tuners(weights_by_name(tuners or [], 1))
            with self._steered([], tuner_image, tuner_conditioning_scale, None):
                return call(*args, **kwargs)
        layout = call_layout(call, args, kwargs, self._tuner_base)
        with (
            self._mixed(manager, tuners, layout),
            self._steered(manager.active_names, tuner_image, tuner_conditioning_scale, layout),
        ):
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
        """Draw each prompt once for each mix of tuners, all from one composition.

        The first steps are computed for one row of each image and count for all of its branches; after them each
        branch is a row of one batch.

        Args:
            prompt: the prompt or prompts; None where the call has `prompt_embeds`.
            tuners: one entry for each branch: a name, a mapping from names to weights, or None for the base alone.
            share_steps: how many denoising steps the branches have in common, of those that the call makes.
            trunk: what acts during those steps, in the form of one entry of `tuners`; the base alone by default.
            tuner_image: what steers the control tuners among them, as in a call.
            tuner_conditioning_scale: factor on what the conditions add, as in a call.
            kwargs: the pipeline's own arguments. One generator, or one latent, is for one image and all its branches.

        Returns:
            What the pipeline returns, with `len(tuners)` pictures for each image: the branches of an image are
            adjacent, in the order of `tuners`.

        Raises:
            TunerNameError: if a name is unknown.
            ConditionError: if a control tuner acts without an image, or an image is of the wrong kind.
            RestuneError: if an argument does not fit, or the scheduler gives the branches different noise.
        """
        from .branches import Fork, arguments_of_branches, forked

        call = super().__call__  # type: ignore[misc]
        kwargs = {"prompt": prompt, **kwargs}
        layout = call_layout(call, (), kwargs, self._tuner_base)
        if layout is None:
            # Says what is wrong with the arguments.
            return call(**kwargs)
        if not tuners:
            raise RestuneError("There are no branches to draw; give `tuners` an entry for each.")
        names = weights_by_name([*tuners, trunk], 1)
        if names:
            manager = self._manager_of(names)
            shared = weights_by_name([*tuners, trunk] if share_steps else tuners, 1)
            for name, weights in shared.items():
                if len(set(weights)) > 1 and text_part(manager.tuner(name)) is not None:
                    raise RestuneError(
                        f"The tuner {name!r} has a `text` part, and all branches of a prompt share its text; give it "
                        "one weight in all of them and in the trunk, or draw them in calls of their own."
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
        acting = [name for name, weights in names.items() if any(weights)]
        with (
            self._steered(acting, tuner_image, tuner_conditioning_scale, layout),
            forked(self, self._tuner_base, fork, arguments) as forked_arguments,
        ):
            return self(**forked_arguments)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the pipeline does, with the new words of its tuners that have a `text` part."""
        base = getattr(self, "unet", None)
        with prompts_read(self, TunerManager.of(base) if isinstance(base, nn.Module) else None):
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """Write new words, those of Textual Inversion too, as the tokenizer that is used knows them."""
        prompt = super().maybe_convert_prompt(prompt, tokenizer)  # type: ignore[misc]
        return converted_prompt(prompt, tokenizer, self._new_words)

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
        """Load a tuner and make it active, beside those that are already loaded.

        Args:
            pretrained_model_name_or_path: a tuner file, a folder that holds one, a repository id on the Hub, or a
                `Tuner`.
            tuner_name: name for this pipeline; defaults to the file's name.
            weight: how strongly it acts; defaults to 1, and with `hotswap` to the weight that is set.
            hotswap: overwrite the parameters of the loaded tuner `tuner_name`, which has the same config, instead of
                loading one more: nothing is allocated, and a compiled U-Net is not compiled again. See
                `enable_tuner_hotswap`.
            cache: where to look for the file's tuner before reading it, and to keep it afterwards.
            weight_name: name of the file in a folder or repository.
            subfolder: folder inside the folder or repository.
            revision: branch, tag or commit on the Hub.
            token: token for the Hub.
            cache_dir: where files of the Hub are kept.
            local_files_only: use only files of the Hub that are already here.

        Raises:
            TunerFileError: if the file cannot be found, read or trusted.
            TunerNameError: if the name is taken; with `hotswap`, if no tuner of this name is loaded.
            RestuneError: if a tuner to swap has another config.
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
            raise TunerNameError(f"{name!r} cannot name a tuner; use a name without slashes or a leading dot.")
        if tuner is not source:
            tuner = tuner.copy() if tuner.shared else tuner
            tuner.to(base.dtype).requires_grad_(False)
        part = text_part(tuner)
        if part is not None and part.tokens and not isinstance(self, TextualInversionLoaderMixin):
            raise RestuneError(f"The tuner {name!r} has new words, which a {type(self).__name__} cannot read.")
        attach(self.unet, tuner, name, 1.0 if weight is None else weight, text=text_encoders(self))
        if self._tuner_hotswap:
            self._manager_of([name]).static = True

    def enable_tuner_hotswap(self, check_compiled: Literal["error", "warn", "ignore"] = "error") -> None:
        """Prepare for changing tuners without compiling again; call it before `torch.compile`.

        `load_tuner_weights(..., hotswap=True)` and other weights never compile anew. With this, turning a tuner off
        and on does not either: the compiled U-Net computes every loaded tuner, also those of weight zero.

        Args:
            check_compiled: what to do if the U-Net is compiled already, where it makes the next call compile once
                more: raise, warn, or nothing.

        Raises:
            RestuneError: if the U-Net is compiled already.
        """
        if check_compiled not in ("error", "warn", "ignore"):
            raise RestuneError(f"check_compiled is `error`, `warn` or `ignore`, not {check_compiled!r}.")
        base = self._tuner_base
        if (is_compiled(self.unet) or is_compiled(base)) and check_compiled != "ignore":
            late = "Call enable_tuner_hotswap before torch.compile; the U-Net would be compiled once more."
            if check_compiled == "error":
                raise RestuneError(late)
            warnings.warn(late, stacklevel=2)
        # A manager lives only while tuners are loaded.
        self._tuner_hotswap = True
        manager = TunerManager.of(base)
        if manager is not None:
            manager.static = True

    @classmethod
    def tuner_state_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], weight_name: str | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Read a local tuner file without attaching it: its tensors and its metadata."""
        path = local_tuner_file(pretrained_model_name_or_path, weight_name)
        if path is None:
            raise TunerFileError(f"There is no tuner file at {pretrained_model_name_or_path}.")
        tuner = load_tuner(path)
        return tuner.state_dict(), tuner.metadata

    def save_tuner_weights(
        self, save_directory: str | os.PathLike[str], tuner_name: str, weight_name: str | None = None
    ) -> Path:
        """Write a loaded tuner into a folder, in the dtype that it has here, and return the file's path.

        Args:
            save_directory: the folder; made where it does not exist.
            tuner_name: which of the loaded tuners.
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
        """Choose which loaded tuners act, and how strongly; all others get weight zero.

        Args:
            tuner_names: one name, several names, or a mapping from names to weights.
            weights: one weight for all names, or one each; defaults to 1. A weight is a number, or a list with one
                for each image of a batch, factors by site (`{"skip.0-3": 0.2}`), a `schedule(...)` over the denoising
                steps, or a `TunerWeight` of all these with a mask.
        """
        chosen = named_weights(tuner_names, weights)
        if chosen or self.get_list_tuners():
            self._manager_of(chosen).set_weights(chosen)

    def get_active_tuners(self) -> list[str]:
        """Names of the tuners that act: loaded, enabled, and of a weight other than zero."""
        manager = TunerManager.of(self._tuner_base)
        return manager.active_names if manager is not None else []

    def get_list_tuners(self) -> dict[str, float | tuple[float, ...] | TunerWeight]:
        """Names of all loaded tuners, with their weights."""
        manager = TunerManager.of(self._tuner_base)
        return manager.weights if manager is not None else {}

    def disable_tuners(self) -> None:
        """Switch all tuners off, keeping them loaded with their weights."""
        self._switch(False)

    def enable_tuners(self) -> None:
        """Switch the tuners on again."""
        self._switch(True)

    def delete_tuners(self, tuner_names: str | Sequence[str]) -> None:
        """Unload the named tuners; with the last one go all hooks."""
        names = listed(tuner_names)
        if names:
            manager = self._manager_of(names)
            for name in dict.fromkeys(names):
                manager.remove(name)

    def unload_tuner_weights(self) -> None:
        """Unload all tuners; the base is as it was before the first was loaded."""
        self.delete_tuners(list(self.get_list_tuners()))

    def set_tuner_device(self, tuner_names: str | Sequence[str], device: torch.device | str) -> None:
        """Move loaded tuners; one that acts is moved back to its feature's device when it is next needed."""
        names = listed(tuner_names)
        for name in names:
            self._manager_of(names).tuner(name).to(device)

    @property
    def _tuner_base(self) -> Any:
        base = getattr(self, "unet", None)
        if not isinstance(base, nn.Module):
            raise RestuneError(f"Tuners need a pipeline with a U-Net, but {type(self).__name__} has none loaded.")
        return uncompiled(base)

    def _steered(
        self, names: Iterable[str], images: TunerImage | None, scale: TunerScale, layout: Layout | None
    ) -> contextlib.AbstractContextManager[None]:
        """Give condition images to those of the named tuners that take them."""
        manager = TunerManager.of(self._tuner_base)
        if manager is not None:
            return with_control_images(manager, names, images, scale, layout)
        if images is not None:
            raise ConditionError("There is an image for a control tuner, but no tuner is loaded.")
        return contextlib.nullcontext()

    def _mixed(
        self, manager: TunerManager, tuners: MixPerImage | None, layout: Layout | None
    ) -> contextlib.AbstractContextManager[None]:
        timesteps = self.scheduler.config.num_train_timesteps
        return mixed(manager, tuners, layout, self._execution_device, timesteps)

    def _manager_of(self, names: Iterable[str]) -> TunerManager:
        """Return the manager that has all these tuners, or say which it has not."""
        manager = TunerManager.of(self._tuner_base)
        if manager is None:
            raise TunerNameError(f"No tuner named {', '.join(map(repr, names))} is loaded; loaded: none.")
        manager.check_known(names)
        return manager

    def _switch(self, on: bool) -> None:
        manager = TunerManager.of(self._tuner_base)
        if manager is not None:
            manager.enabled = on

"""Manager of the tuners attached to one base, with plain torch hooks.

Only the hooks reference the manager, outside the base's module tree: the base's state dict and saved files never
contain a tuner, and a deep copy of a base with tuners gets its own manager. The hooks add the sum of the active
residuals at each site, so the order of attaching does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backbones import TextEncoder, describe_base, structure_of
from ..tuners import Features
from ..tuners.tuner import Tuner
from ..utils.errors import TunerNameError
from .attached_tuner import AttachedTuner
from .compiled import is_compiled, refuse_if, uncompiled
from .integrity import HookedModules
from .mixing import ForwardContext, HostTimesteps, Layout, check_images
from .operations import operation_input, show_operation
from .site_writers import SiteWriters, Writer
from .text_encoders import EncoderHooks, attach_text, check_text
from .weights import TunerWeight, Weight, as_weight, warn_of_large


class TunerManager:
    """Tuners attached to one base, and the torch hooks that all of them share.

    Created by `attach` or a pipeline with `RestuneLoaderMixin`; `TunerManager.of` returns the manager of a base.
    """

    def __init__(self, base: nn.Module) -> None:
        self._structure = structure_of(base)
        self.base_info = describe_base(base)
        self.enabled = True
        self.layout: Layout | None = None
        """Layout of the batch; a pipeline with `RestuneLoaderMixin` sets it for each call."""
        self.num_train_timesteps = 1000
        """Number of training timesteps of the base, from which schedules compute the progress of denoising."""
        self.timesteps: HostTimesteps | None = None
        """Timesteps of the scheduler; a pipeline with `RestuneLoaderMixin` sets them for each call. Without them a
        schedule waits for the device in each forward pass."""
        self.static = False
        """In a compiled graph, compute every tuner even with weight zero, so that no change of weights recompiles."""
        self._base = base
        self._tuners: dict[str, AttachedTuner] = {}
        self._text: dict[str, list[EncoderHooks]] = {}
        self._writers = SiteWriters([])
        self._features = Features()
        self._pass: ForwardContext | None = None
        self._quiet = False
        self._traced = False
        self._operation_handles: dict[str, RemovableHandle] = {}
        self._handles: list[RemovableHandle]
        self._install(base)
        self._hooked = HookedModules(base, self._handles, {})

    @classmethod
    def of(cls, base: nn.Module) -> TunerManager | None:
        """Return the manager of a base, compiled or not, or None if no tuner is attached."""
        for hook in uncompiled(base)._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    @property
    def names(self) -> list[str]:
        """Names of the attached tuners, in the order in which they were attached."""
        return list(self._tuners)

    @property
    def weights(self) -> dict[str, float | tuple[float, ...] | TunerWeight]:
        """Weights of the attached tuners, by name; only the value if nothing else is set."""
        return {name: attached.weight.plain() for name, attached in self._tuners.items()}

    @property
    def active_names(self) -> list[str]:
        """Names of the active tuners: enabled, and with a nonzero weight for at least one image."""
        return [name for name, attached in self._tuners.items() if attached.weight.acts and self.enabled]

    def tuner(self, name: str) -> Tuner:
        """Return an attached tuner; raise `TunerNameError` for an unknown name."""
        return self.attached(name).tuner

    def attached(self, name: str) -> AttachedTuner:
        """Return what the manager keeps of a tuner; raise `TunerNameError` for an unknown name."""
        self.check_known([name])
        return self._tuners[name]

    def add(
        self, name: str, tuner: Tuner, weight: Weight = 1.0, text: Mapping[str, TextEncoder] | None = None
    ) -> None:
        """Attach a tuner under a name; see `attach`.

        Raises:
            TunerNameError: if the name is taken.
            RestuneError: if the tuner has a `text` part and `text` is not given.
            BaseMismatchError: if the tuner is for a base of another structure.
        """
        if name in self._tuners:
            raise TunerNameError(f"The tuner name `{name}` is taken; choose another or delete the loaded one first.")
        tuner.base.check_fits(self.base_info)
        check_text(tuner, text)
        attached = AttachedTuner(tuner.copy() if tuner.shared else tuner, as_weight(weight))
        if not {*self.base_info.stations, *self._operation_handles}.issuperset(attached.sites):
            refuse_if(self._traced or any(map(is_compiled, self._base.modules())))
        self._tuners[name] = attached
        self._text[name] = attach_text(name, self, attached, text)
        self._refresh()

    def remove(self, name: str) -> None:
        """Detach a tuner; detaching the last one removes all hooks."""
        self.check_known([name])
        for hooks in self._text.pop(name):
            hooks.remove(self._tuners[name])
        del self._tuners[name]
        self._refresh()
        self.release()

    def release(self) -> None:
        """Remove the hooks if no tuner is attached."""
        if not self._tuners:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def swap(self, name: str, tuner: Tuner, weight: Weight | None = None) -> None:
        """Replace an attached tuner by another with the same config, by overwriting its parameters.

        Nothing stays allocated and a compiled graph stays valid; condition images are kept.

        Args:
            name: name of the attached tuner.
            tuner: source of the parameters; it may have another dtype, and is not changed.
            weight: new weight of the tuner; None keeps the current weight.

        Raises:
            TunerNameError: if no tuner with this name is attached.
            RestuneError: if the tuner has another config.
            BaseMismatchError: if the tuner is for a base of another structure.
        """
        attached = self.attached(name)
        checked = attached.weight if weight is None else as_weight(weight)
        factors = attached.site_factors(checked)
        attached.swap(tuner)
        attached.set_weight(checked, factors)
        self._resolve()

    def check_known(self, names: Iterable[str]) -> None:
        """Raise `TunerNameError` if one of the names is not attached."""
        unknown = [name for name in names if name not in self._tuners]
        if unknown:
            present = ", ".join(self._tuners) or "none"
            raise TunerNameError(f"No tuner named {', '.join(map(repr, unknown))} is loaded; loaded: {present}.")

    def set_weights(self, weights: Mapping[str, Weight]) -> None:
        """Set the weights of the named tuners, and weight zero for all others; no parameter is changed or copied.

        Raises:
            TunerNameError: if a name is unknown.
            RestuneError: if a weight is not valid; no weight is changed then.
        """
        self.check_known(weights)
        checked = {name: as_weight(weight) for name, weight in weights.items()}
        factors = {name: self._tuners[name].site_factors(weight) for name, weight in checked.items()}
        for name, attached in self._tuners.items():
            if name in checked:
                warn_of_large(name, checked[name])
                attached.set_weight(checked[name], factors[name])
            else:
                attached.set_weight(TunerWeight(0.0), dict.fromkeys(attached.sites, 1.0))
        self._resolve()

    def set_conditions(
        self, name: str, images: Sequence[torch.Tensor | None], weights: Sequence[float] | None = None
    ) -> None:
        """Set the condition images of a tuner with a `control` part.

        Args:
            name: name of the tuner.
            images: one tensor per condition, in their order, `(images or 1, channels, height, width)` with values
                from 0 to 1, or None to omit the condition.
            weights: factor of each condition; defaults to 1.

        Raises:
            TunerNameError: if the name is unknown.
            ConditionError: if the tuner takes no conditions, or another number of conditions.
        """
        self.attached(name).set_conditions(images, weights)

    def encode_conditions(self, size: tuple[int, int]) -> None:
        """Encode all condition images now instead of in the next forward pass.

        A graph that is compiled afterwards then needs no second version for passes with encoded images.

        Args:
            size: height and width of the latents.
        """
        for attached in self._tuners.values():
            attached.encode_conditions(size)

    def check_images(self, images: int) -> None:
        """Raise `RestuneError` if a weight is for another number of images; a compiled graph does not check it."""
        for attached in self._tuners.values():
            if attached.acts:
                check_images(attached.weight, images)

    def check_modules(self) -> None:
        """Raise `RestuneError` if an active tuner has no effect, because its modules were replaced or fused."""
        active = [attached for attached in self._tuners.values() if attached.acts and self.enabled]
        if active:
            self._hooked.check(site for attached in active for site in attached.sites)

    def place(self, device: torch.device) -> None:
        """Move the active tuners to a device; a compiled graph cannot move them."""
        for attached in self._tuners.values():
            if attached.acts or self.static:
                attached.place(device)

    def clear_conditions(self) -> None:
        """Remove the condition images of all tuners."""
        for attached in self._tuners.values():
            attached.conditions = None

    def has_conditions(self, name: str) -> bool:
        """Return whether a tuner has condition images; raise `TunerNameError` for an unknown name."""
        return self.attached(name).conditions is not None

    @contextlib.contextmanager
    def conditions_kept(self) -> Iterator[None]:
        """Context manager that restores the condition images of every tuner at the end."""
        before = {name: attached.conditions for name, attached in self._tuners.items()}
        try:
            yield
        finally:
            for name, attached in self._tuners.items():
                attached.conditions = before.get(name)

    def _refresh(self) -> None:
        """Update the hooks on transformer blocks and the writers of the sites to the attached tuners."""
        self._resolve()
        written = {site for attached in self._tuners.values() for site in attached.sites}
        wanted = written.difference(self.base_info.stations)
        for site in self._operation_handles.keys() - wanted:
            self._operation_handles.pop(site).remove()
        for site in sorted(wanted - self._operation_handles.keys()):
            # A tuner may write to a site of the base, or to a linear layer inside one.
            module = self._structure.module(self._base, site)
            if site in self.base_info.sites:
                handle = module.register_forward_hook(partial(self._after_operation, site), with_kwargs=True)
            else:
                handle = module.register_forward_hook(partial(self._after_linear, site))
            self._operation_handles[site] = handle
        linears = {site: self._structure.module_path(site) for site in wanted if site not in self.base_info.sites}
        self._hooked = HookedModules(self._base, [*self._handles, *self._operation_handles.values()], linears)

    def _install(self, base: nn.Module) -> None:
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
            *self._structure.install(base, self),
        ]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._features = Features()
        call = self._structure.call(module, args, kwargs)
        self._pass = ForwardContext(
            rows=call.rows,
            size=call.size,
            device=call.device,
            timestep=call.timestep,
            num_train_timesteps=self.num_train_timesteps,
            layout=self.layout,
            frames=call.frames,
            timesteps=self.timesteps,
        )
        self._features.size = call.size
        if torch.compiler.is_compiling():
            self._traced = True
        for attached in self._tuners.values():
            attached.begin(self._pass)
        # A pipeline with `RestuneLoaderMixin` checks before each call instead of inside a compiled graph.
        if not torch.compiler.is_compiling():
            if self._taking_part() != self._writers.tuners:
                self._resolve()
            self.check_modules()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._features = Features()
        for attached in self._tuners.values():
            attached.end()

    def active(self) -> bool:
        """Return whether any tuner is active in this forward pass; called by the base's hooks."""
        # Dynamo of torch 2.11 cannot trace `bool` of a list.
        return len(self._active()) > 0

    def tap(self, site: str, x: torch.Tensor) -> None:
        """Store a feature until the end of this forward pass, if an active tuner taps the site."""
        if torch.compiler.is_compiling():
            tapped = any(site in attached.taps for attached in self._active())
        else:
            tapped = self.enabled and site in self._writers.taps
        if tapped:
            self._features.by_site[site] = x

    def tuned(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Add the active residuals to a feature; each is computed from the base's unmodified feature."""
        self.tap(site, x)
        writers = self._writers_at(site)
        return self._summed(writers, site, x, x, self._features) if writers else x

    def see(self, *, time: torch.Tensor | None = None, text: torch.Tensor | None = None) -> None:
        """Store the time embedding or the text states until the end of this forward pass."""
        if time is not None:
            self._features.time = time
        if text is not None:
            self._features.text = text

    def _after_operation(self, site: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        writers = self._writers_at(site)
        if not writers:
            return None
        x = operation_input(args, kwargs)
        features = self._features.beside(show_operation(module, args, kwargs, self._silence))
        # Attention modules of transformers return a tuple of output and attention weights.
        if isinstance(output, tuple):
            return self._summed(writers, site, x, output[0], features), *output[1:]
        return self._summed(writers, site, x, output, features)

    def _after_linear(self, site: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self._quiet:
            return None
        writers = self._writers_at(site)
        return self._summed(writers, site, args[0], output, self._features) if writers else None

    @contextlib.contextmanager
    def _silence(self) -> Iterator[None]:
        """Context manager in which the base's layers run without tuners, for tuners that call the frozen layers."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _resolve(self) -> None:
        """Find the parts that write to each site, for all passes until the mix of tuners changes."""
        self._writers = SiteWriters(self._taking_part())

    def _taking_part(self) -> list[AttachedTuner]:
        return [attached for attached in self._tuners.values() if attached.takes_part]

    def _active(self) -> Sequence[AttachedTuner]:
        """Return the tuners that are active in this forward pass; a tuner with weight zero has no cost."""
        if not self.enabled:
            return ()
        if not torch.compiler.is_compiling():
            return self._writers.tuners
        return list(self._tuners.values()) if self.static else self._taking_part()

    def _writers_at(self, site: str) -> Sequence[Writer]:
        """Return the parts that write to a site in this forward pass."""
        if torch.compiler.is_compiling():
            # The graph depends on the tuners alone and reads the factors of the sites from tensors.
            active = self._active()
            return [Writer(attached, part, None) for attached in active for part in attached.parts_at.get(site, ())]
        return self._writers.at(site) if self.enabled else ()

    def _summed(
        self, writers: Sequence[Writer], site: str, x: torch.Tensor, total: torch.Tensor, features: Features
    ) -> torch.Tensor:
        """Add the residuals of the active tuners for the feature `x` to `total`."""
        this = self._pass
        if this is None:
            return total
        if len(writers) > 1 and not torch.compiler.is_compiling():
            total, writers = self._writers.add_stacked(site, x, total)
        some, rows = [], []
        for attached, part, factor in writers:
            if factor is None:
                total = total + attached.traced_residual(part, site, x, features, this).to(total.dtype)
                continue
            residual, acting = attached.residual(part, site, factor, x, features, this)
            if acting is None:
                total = total + residual.to(total.dtype)
            else:
                some.append(residual)
                rows.append(acting)
        if not some:
            return total
        # A single addition: each one copies the whole batch, and there may be one tuner per image.
        return total.index_add(0, torch.cat(rows), torch.cat(some).to(total.dtype))

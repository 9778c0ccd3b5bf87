"""Attach tuners to a base with plain torch hooks, mix them, and take them off without a trace.

One `TunerManager` per base owns the attached tuners. It lives in the hooks, outside the base's module tree: the
base's state dict and saved files never contain a tuner, and a deep copy of an attached base gets its own manager.
The hooks add the sum of the active residuals at each site, so the order of attaching does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import RestuneError, TunerNameError
from .sites import describe_base, merge_module, skip_counts
from .tuner import Tuner
from .tuners import Features, Part

Weight: TypeAlias = float | Sequence[float]
"""Factor on a tuner's residuals: one number, or one for each image of a batch."""


class _Attached:
    """A tuner in a manager, with its weight."""

    def __init__(self, tuner: Tuner, weight: Weight) -> None:
        self.tuner = tuner
        # Changed in place, so that a compiled graph sees the new value without compiling again.
        self.scale = torch.zeros(())
        self.set_weight(_checked(weight))

    def set_weight(self, weight: float | tuple[float, ...]) -> None:
        """Set a weight that is known to be valid."""
        self.weight = weight
        values = torch.tensor(weight)
        # A compiled graph depends on this and not on the weight itself, which would compile it anew for each value.
        self.acts = bool(values.any())
        if values.shape == self.scale.shape:
            self.scale.copy_(values)
        else:
            self.scale = values

    def add_residuals(self, site: str, x: torch.Tensor, features: Features, total: torch.Tensor) -> torch.Tensor:
        """Add the weighted residuals that the tuner's parts make of the feature `x` to `total`."""
        for part in self.tuner.parts():
            if site in part.writes:
                if self.tuner.device != x.device:
                    self.tuner.to(x.device)
                if self.scale.dim() == 0:
                    total = total + (part(site, x, features) * self.scale).to(x.dtype)
                else:
                    total = self._add_by_image(part, site, x, features, total)
        return total

    def _add_by_image(
        self, part: Part, site: str, x: torch.Tensor, features: Features, total: torch.Tensor
    ) -> torch.Tensor:
        """Run the part on the rows of the batch whose image has a weight other than zero.

        Guidance stacks copies of the images, `[uncond..., cond...]`, in a number that differs between pipelines, so
        it is read off the batch.
        """
        copies, rest = divmod(x.shape[0], self.scale.numel())
        if rest:
            raise RestuneError(
                f"The tuners' weights are for {self.scale.numel()} images, but the batch has {x.shape[0]} rows; "
                "give one weight for each image."
            )
        scale = self.scale.repeat(copies)
        rows = scale.nonzero().flatten().to(x.device)
        residual = part(site, x[rows], features.rows(rows)) * scale.to(x.device)[rows, None, None, None]
        return total.index_add(0, rows, residual.to(x.dtype))


class TunerManager:
    """The tuners that are attached to one base, and the hooks that serve them all.

    Use `attach`, or a pipeline with `RestuneLoaderMixin`; ask for the manager itself with `TunerManager.of`.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base_info = describe_base(base)
        self.enabled = True
        self._tuners: dict[str, _Attached] = {}
        self._features = Features()
        self._handles: list[RemovableHandle] = []
        self._install(base)

    @classmethod
    def of(cls, base: nn.Module) -> TunerManager | None:
        """Return the manager of a base, or None when no tuner is attached."""
        for hook in base._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    @property
    def names(self) -> list[str]:
        """Names of the attached tuners, in the order of attaching."""
        return list(self._tuners)

    @property
    def weights(self) -> dict[str, float | tuple[float, ...]]:
        """Weight of each attached tuner."""
        return {name: attached.weight for name, attached in self._tuners.items()}

    @property
    def active_names(self) -> list[str]:
        """Names of the tuners that act: enabled, and of a weight other than zero for at least one image."""
        return [name for name, attached in self._tuners.items() if attached.acts and self.enabled]

    def tuner(self, name: str) -> Tuner:
        """Return an attached tuner; raises `TunerNameError` for an unknown name."""
        self.check_known([name])
        return self._tuners[name].tuner

    def add(self, name: str, tuner: Tuner, weight: Weight = 1.0) -> None:
        """Attach a tuner under a name.

        Raises:
            TunerNameError: if the name is taken.
            BaseMismatchError: if the tuner was made for a base of another structure.
        """
        if name in self._tuners:
            raise TunerNameError(f"The tuner name `{name}` is taken; choose another or delete the loaded one first.")
        tuner.base.check_fits(self.base_info)
        self._tuners[name] = _Attached(tuner, weight)

    def remove(self, name: str) -> None:
        """Take a tuner off; with the last one go all hooks."""
        self.check_known([name])
        del self._tuners[name]
        if not self._tuners:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def check_known(self, names: Iterable[str]) -> None:
        """Raise `TunerNameError` if one of the names is not attached."""
        unknown = [name for name in names if name not in self._tuners]
        if unknown:
            present = ", ".join(self._tuners) or "none"
            raise TunerNameError(f"No tuner named {', '.join(map(repr, unknown))} is loaded; loaded: {present}.")

    def set_weights(self, weights: Mapping[str, Weight]) -> None:
        """Give the named tuners these weights and all others zero; no parameter is touched or copied.

        Raises:
            TunerNameError: if a name is unknown.
            RestuneError: if a weight is not finite; no weight has changed then.
        """
        self.check_known(weights)
        checked = {name: _checked(weight) for name, weight in weights.items()}
        for name, attached in self._tuners.items():
            attached.set_weight(checked.get(name, 0.0))

    def _install(self, base: nn.Module) -> None:
        hooks = self._handles
        hooks.append(base.register_forward_pre_hook(self._begin))
        hooks.append(base.register_forward_hook(self._end, always_call=True))
        counts = skip_counts(base)
        stop = sum(counts)
        for number, (block, count) in enumerate(zip(base.up_blocks, counts, strict=True)):  # type: ignore[arg-type]
            hook = partial(self._enter_up_block, stop - count)
            hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            hooks.append(block.register_forward_hook(partial(self._record, f"up.{number}")))
            stop -= count
        if "mid" in self.base_info.sites:
            hooks.append(base.mid_block.register_forward_hook(partial(self._record, "mid")))  # type: ignore[union-attr]
        hooks.append(merge_module(base).register_forward_pre_hook(self._enter_head))

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._features = Features()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._features = Features()

    def _record(self, site: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._tap(site, output)

    def _tap(self, site: str, x: torch.Tensor) -> None:
        """Keep a feature until the end of this forward, if an active tuner asks for it."""
        if any(site in part.taps for attached in self._active() for part in attached.tuner.parts()):
            self._features.by_site[site] = x

    def _enter_up_block(
        self, first_skip: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if not self._active():
            return None
        self._features.time = kwargs["temb"]
        self._features.text = kwargs.get("encoder_hidden_states", self._features.text)
        skips = kwargs["res_hidden_states_tuple"]
        tuned = tuple(self._tuned(f"skip.{first_skip + offset}", skip) for offset, skip in enumerate(skips))
        return args, {**kwargs, "res_hidden_states_tuple": tuned}

    def _enter_head(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (self._tuned("out", args[0]), *args[1:]) if self._active() else None

    def _active(self) -> list[_Attached]:
        """The tuners that take part in this forward; one of weight zero costs nothing."""
        return [attached for attached in self._tuners.values() if attached.acts and self.enabled]

    def _tuned(self, site: str, x: torch.Tensor) -> torch.Tensor:
        """Add the active residuals to a feature, all of them made from it as the base made it."""
        self._tap(site, x)
        total = x
        for attached in self._active():
            total = attached.add_residuals(site, x, self._features, total)
        return total


class Attachment:
    """A tuner on a base; `detach` takes it off, and so does leaving a `with` block."""

    def __init__(self, base: nn.Module, name: str) -> None:
        self._base = base
        self.name = name

    def detach(self) -> None:
        """Take the tuner off; raises `TunerNameError` if it is no longer there."""
        detach(self._base, self.name)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(base: nn.Module, tuner: Tuner, name: str = "default", weight: Weight = 1.0) -> Attachment:
    """Attach a tuner to a base, changing no parameter of it.

    Args:
        base: a `UNet2DConditionModel`, not compiled yet.
        tuner: a tuner that was made for a base of this structure.
        name: name of the tuner on this base.
        weight: factor on the tuner's residuals, or one for each image of a batch.

    Returns:
        A handle that detaches the tuner, also as a context manager.

    Raises:
        TunerNameError: if the name is taken.
        BaseMismatchError: if the tuner was made for a base of another structure.
    """
    manager = TunerManager.of(base)
    if manager is None:
        _refuse_compiled(base)
        tuner.base.check_fits(describe_base(base))
        manager = TunerManager(base)
    manager.add(name, tuner, weight)
    return Attachment(base, name)


def detach(base: nn.Module, name: str = "default") -> None:
    """Take a tuner off a base; after the last one the base is as it was, without hooks.

    Raises:
        TunerNameError: if no tuner of this name is attached.
    """
    manager = TunerManager.of(base)
    if manager is None:
        raise TunerNameError(f"No tuner named {name!r} is loaded; loaded: none.")
    manager.remove(name)


def _checked(weight: Weight) -> float | tuple[float, ...]:
    values = tuple(map(float, weight)) if isinstance(weight, Sequence) else (float(weight),)
    if not values or not all(map(math.isfinite, values)):
        raise RestuneError(f"A tuner's weight must be a finite number, or one for each image, but is {weight}.")
    return values if isinstance(weight, Sequence) else values[0]


def _refuse_compiled(base: nn.Module) -> None:
    # A graph that was compiled without the hooks would go on without them, silently.
    if hasattr(base, "_orig_mod") or getattr(base, "_compiled_call_impl", None) is not None:
        raise RestuneError("This model is already compiled; attach the tuners first, then call torch.compile.")

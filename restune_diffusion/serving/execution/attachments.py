"""Tuners that the engine keeps attached to the base: attached for requests, evicted when unused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ...backbones import text_encoders
from ...hooks.attachment import attach, detach
from ...hooks.conditions import Conditions, EncodedConditions
from ...hooks.manager import TunerManager
from ...hooks.mixing import Layout
from ...hooks.text_encoders import text_part
from ...pipelines.control_images import condition_tensor, shares_of
from ...pipelines.prediction_check import warn_of_other_prediction
from ...tuners.tuner import Tuner
from ...utils.errors import ConditionError
from ..library import TunerEntry
from ..requests import ImageRequest
from .job import Denoising, Job, Size

_Key = tuple[str, str, tuple[bool, ...]]

Loaded = list[tuple[TunerEntry, Tuner]]
"""Tuners of a request that are read, in the order of the request."""


@dataclass(eq=False)
class Slot:
    """Attached tuner.

    Args:
        name: its name on the base.
        key: name in the library, version of the file, and the conditions for which its requests have an image.
        has_text: whether it acts on the text encoders.
    """

    name: str
    key: _Key
    has_text: bool
    users: int = 0
    last_used: int = 0


@dataclass(frozen=True)
class Use:
    """Tuner in use by a request.

    Args:
        slot: the attached tuner.
        weight: its weight.
        images: tensors of the condition images, in the order of the tuner's conditions.
    """

    slot: Slot
    weight: float
    images: tuple[torch.Tensor | None, ...] = ()


@dataclass
class AttachmentCounts:
    """Counters of the attached tuners."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class Attachments:
    """Tuners attached to the base of an engine.

    Args:
        pipeline: the pipeline of the base.
        device: device of the base.
        capacity: largest number of attached tuners.
    """

    def __init__(self, pipeline: Any, device: torch.device, capacity: int) -> None:
        self._pipeline = pipeline
        self._device = device
        self._base = pipeline.unet
        self._capacity = capacity
        self._slots: dict[_Key, Slot] = {}
        self._clock = itertools.count(1)
        self._applied: Any = None
        self.counts = AttachmentCounts()

    def __len__(self) -> int:
        return len(self._slots)

    def names(self) -> list[str]:
        """Return the names in the library of the attached tuners, the most recently used first."""
        slots = sorted(self._slots.values(), key=lambda slot: -slot.last_used)
        return list(dict.fromkeys(slot.key[0] for slot in slots))

    def take(self, request: ImageRequest, loaded: Loaded) -> list[Use] | None:
        """Attach the tuners of a request and keep them in use, or return None while too many others are in use.

        Raises:
            ConditionError: if a control tuner has no condition image, or an image is invalid.
            RestuneError: if a tuner does not fit the base.
        """
        weights = dict(request.active_tuners)
        images = _condition_images(request, loaded)
        wanted = []
        for entry, tuner in loaded:
            given = images.get(entry.name, ())
            wanted.append((entry, tuner, (entry.name, entry.version, tuple(image is not None for image in given))))
        present = [key for _, _, key in wanted if key in self._slots]
        if not self._make_room(len(wanted) - len(present), keep=present):
            return None
        uses: list[Use] = []
        try:
            for entry, tuner, key in wanted:
                uses.append(Use(self._slot(key, tuner), weights[entry.name], images.get(entry.name, ())))
        finally:
            for use in uses:
                use.slot.users += 1
            if len(uses) < len(wanted):
                self.give_back(uses)
        return uses

    def give_back(self, uses: Sequence[Use]) -> None:
        """End the use of tuners by a request; they stay attached until their room is needed."""
        for use in uses:
            use.slot.users -= 1
            use.slot.last_used = next(self._clock)

    def activate_text(self, uses: Sequence[Use]) -> tuple[Any, ...]:
        """Activate the text parts of a request's tuners alone, and return a key of them for a cache."""
        text = [use for use in uses if use.slot.has_text]
        manager = TunerManager.of(self._base)
        if manager is not None and any(slot.has_text for slot in self._slots.values()):
            self._applied = None
            manager.layout = None
            manager.set_weights({use.slot.name: use.weight for use in text})
        return tuple((use.slot.key, use.weight) for use in text)

    @torch.no_grad()
    def encode_conditions(self, job: Job, state: Denoising) -> None:
        """Encode the condition images of a request, once for all of its steps."""
        manager = TunerManager.of(self._base)
        for use in job.uses:
            if use.images and manager is not None:
                attached = manager.attached(use.slot.name)
                part = next(part for part in attached.tuner.parts() if part.conditions)
                attached.place(self._device)
                with attached.tuner.precision(self._device):
                    state.conditions[use.slot.name] = part.encode(use.images, job.size)

    def apply(self, jobs: Sequence[Job], size: Size) -> None:
        """Set the weights and the conditions of the attached tuners for the rows of some requests."""
        manager = TunerManager.of(self._base)
        if manager is None:
            return
        states = [job.state for job in jobs if job.state is not None]
        rows = sum(state.rows for state in states)
        # Every row is an image of its own for the manager: each has its own weights.
        manager.layout = Layout(images=rows, guided=False, prompts=rows)
        # The states themselves, because the address of one that has ended may be that of a new one.
        if self._applied is not None and self._applied == states:
            return
        weights: dict[str, list[float]] = {}
        row = 0
        for job, state in zip(jobs, states, strict=True):
            for use in job.uses:
                weights.setdefault(use.slot.name, [0.0] * rows)[row : row + state.rows] = [use.weight] * state.rows
            row += state.rows
        manager.set_weights({name: tuple(values) for name, values in weights.items()})
        for name in weights:
            encoded = [(state.rows, state.conditions.get(name)) for state in states]
            if any(levels is not None for _, levels in encoded):
                attached = manager.attached(name)
                features = _by_row(encoded)
                attached.conditions = Conditions([None] * len(features), (1.0,) * len(features), features, size)
        manager.place(self._device)
        self._applied = states

    def invalidate(self) -> None:
        """Set the weights again in the next call."""
        self._applied = None

    def leave(self) -> None:
        """End a U-Net call."""
        manager = TunerManager.of(self._base)
        if manager is not None:
            manager.layout = None

    def close(self) -> None:
        """Detach all tuners."""
        for slot in list(self._slots.values()):
            self._detach(slot)

    def _slot(self, key: _Key, tuner: Tuner) -> Slot:
        slot = self._slots.get(key)
        if slot is None:
            self.counts.misses += 1
            manager = TunerManager.of(self._base)
            taken = manager.names if manager is not None else []
            name = next(name for name in _names(key[0]) if name not in taken)
            warn_of_other_prediction(self._pipeline, tuner, key[0])
            # The weight of a new tuner is zero until a call applies it.
            attach(self._base, self._to_attach(tuner), name, 0.0, text=text_encoders(self._pipeline))
            self._applied = None
            slot = self._slots[key] = Slot(name, key, text_part(tuner) is not None)
            self._drop_older(slot)
        else:
            self.counts.hits += 1
        slot.last_used = next(self._clock)
        return slot

    def _to_attach(self, tuner: Tuner) -> Tuner:
        """Return a tuner for the base; on the host it has the parameters of the cache, which are only read."""
        if self._device.type != "cpu" or tuner.dtype != self._base.dtype:
            # Attaching a shared tuner makes a copy, which moves to the device.
            return tuner
        twin = copy.copy(tuner)
        twin.shared = False
        return twin

    def _make_room(self, count: int, keep: Sequence[_Key]) -> bool:
        """Evict the least recently used tuners until `count` more fit; return whether they do."""
        unused = sorted(
            (slot for key, slot in self._slots.items() if not slot.users and key not in keep),
            key=lambda slot: slot.last_used,
        )
        excess = len(self._slots) + count - self._capacity
        if excess > len(unused):
            return False
        for slot in unused[: max(0, excess)]:
            self._detach(slot)
            self.counts.evictions += 1
        return True

    def _drop_older(self, new: Slot) -> None:
        """Detach unused tuners of older versions of a file, which no request can name any more."""
        for slot in list(self._slots.values()):
            if slot.key[0] == new.key[0] and slot.key[1] != new.key[1] and not slot.users:
                self._detach(slot)

    def _detach(self, slot: Slot) -> None:
        detach(self._base, slot.name)
        del self._slots[slot.key]
        self._applied = None


def _names(name: str) -> Any:
    yield name
    yield from (f"{name} ({number})" for number in itertools.count(2))


def _condition_images(request: ImageRequest, loaded: Loaded) -> dict[str, tuple[torch.Tensor | None, ...]]:
    """Return the tensors of the condition images of each control tuner of a request, by its name in the library."""
    parts = {entry.name: part for entry, tuner in loaded for part in tuner.parts() if part.conditions}
    if not parts:
        return {}
    given: Image.Image | Mapping[str, Any] | None = request.conditions
    shares = {} if given is None else shares_of(given, {name: part.conditions for name, part in parts.items()})
    images: dict[str, tuple[torch.Tensor | None, ...]] = {}
    for name, part in parts.items():
        share = shares.get(name, {})
        if not share:
            raise ConditionError(
                f"The tuner {name!r} needs an image for {' or '.join(map(repr, part.conditions))}; give one as a "
                "condition, or give the tuner no weight."
            )
        images[name] = tuple(
            None if condition not in share else condition_tensor(condition, share[condition], part.channels, None)
            for condition in part.conditions
        )
    return images


def _by_row(encoded: Sequence[tuple[int, EncodedConditions | None]]) -> EncodedConditions:
    """Return the features of the conditions with one row per row of the batch.

    Rows on which the tuner does not act get the features of another request, which are not used.
    """
    some = next(levels for _, levels in encoded if levels is not None)
    return tuple(
        {
            site: torch.cat(
                [
                    (feature if levels is None else levels[number][site]).expand(rows, -1, -1, -1)
                    for rows, levels in encoded
                ]
            )
            for site, feature in level.items()
        }
        for number, level in enumerate(some)
    )

"""Tuners on text encoders, with plain torch hooks outside the encoders' module trees.

The base's `TunerManager` owns the tuners and their weights; this module applies their `text` parts, with one
`EncoderHooks` per text encoder. Neither the encoder nor its tokenizer is modified: placeholder tokens have ids beyond
the tokenizer's own, and their vectors replace the looked-up embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backbones import TextEncoder, describe_text, text_stack
from ..backbones.transformer_block import without_lora
from ..tuners import TextPart
from ..tuners.tuner import Tuner
from ..utils.devices import sent
from ..utils.errors import RestuneError
from .attached_tuner import AttachedTuner
from .mixing import Layout
from .placeholder_tokens import PlaceholderToken, PlaceholderTokens, TokenizerCopy


class MixOwner(Protocol):
    """Interface of `TunerManager` that a text encoder's hooks use."""

    enabled: bool
    layout: Layout | None


@dataclass(eq=False)
class _Reader:
    """Tuner with a `text` part on a text encoder."""

    name: str
    manager: MixOwner
    attached: AttachedTuner
    part: TextPart
    paths: frozenset[str]
    """Paths of the linear layers with LoRA."""

    def factors(self, rows: int) -> tuple[float, ...]:
        """Return the tuner's factor on each of several prompts, or one common factor."""
        if not self.manager.enabled:
            return (0.0,)
        return prompt_factors(self.name, self.attached.weight.values, rows, self.manager.layout)


class EncoderHooks:
    """Torch hooks on one text encoder, shared by all tuners.

    Args:
        name: name of the encoder in a pipeline.
        encoder: the text encoder.
    """

    def __init__(self, name: str, encoder: nn.Module) -> None:
        self.name = name
        self._stack = text_stack(encoder, name)
        self._readers: list[_Reader] = []
        self._scope: MixOwner | None = None
        self._scoped = False
        self._placeholders: PlaceholderTokens | None = None
        self._copies = TokenizerCopy()
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._factors: dict[_Reader, tuple[float, ...]] = {}
        self._scales: dict[_Reader, torch.Tensor] = {}
        self._linears: dict[str, RemovableHandle] = {}
        self._handles = [
            encoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            encoder.register_forward_hook(self._end, always_call=True),
            self._stack.embeddings.register_forward_pre_hook(self._embed, with_kwargs=True),
        ]

    @classmethod
    def of(cls, encoder: nn.Module) -> EncoderHooks | None:
        """Return the hooks of a text encoder, or None if no tuner acts on it."""
        for hook in encoder._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    def add(self, name: str, manager: MixOwner, attached: AttachedTuner, part: TextPart) -> None:
        """Add a tuner to the encoder."""
        self._readers.append(_Reader(name, manager, attached, part, frozenset(part.linears(self.name))))
        self._refresh()

    def remove(self, attached: AttachedTuner) -> None:
        """Remove a tuner; removing the last one removes all hooks."""
        self._readers = [reader for reader in self._readers if reader.attached is not attached]
        self._refresh()
        if not self._readers:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @contextmanager
    def reading(self, manager: MixOwner | None, encoder: TextEncoder) -> Iterator[PlaceholderTokens | None]:
        """Context manager in which the encoder encodes prompts for one base, with only the tuners of its manager.

        Yields:
            The placeholder tokens of these tuners, or None if there are none.
        """
        readers = [reader for reader in self._readers if reader.manager is manager]
        tokens = [
            PlaceholderToken(token, reader.name, reader.part.vectors_per_token, reader.factors)
            for reader in readers
            for token in reader.part.tokens
        ]
        before = self._scope, self._scoped, self._placeholders
        self._scope, self._scoped = manager, True
        self._placeholders = PlaceholderTokens(encoder.tokenizer, tokens, self._copies) if tokens else None
        try:
            yield self._placeholders
        finally:
            self._scope, self._scoped, self._placeholders = before

    def _acting(self) -> list[_Reader]:
        return [reader for reader in self._readers if not self._scoped or reader.manager is self._scope]

    def _refresh(self) -> None:
        """Update the hooks on linear layers to the tuners."""
        wanted = {path for reader in self._readers for path in reader.paths}
        for path in self._linears.keys() - wanted:
            self._linears.pop(path).remove()
        for path in sorted(wanted - self._linears.keys()):
            layer = without_lora(self._stack.encoder.get_submodule(path))
            self._linears[path] = layer.register_forward_hook(partial(self._after_linear, path))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._new, self._factors, self._scales = None, {}, {}
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, torch.Tensor):
            return None
        self._factors = {reader: reader.factors(len(ids)) for reader in self._acting()}
        if self._placeholders is None:
            return None
        # The encoder finds the end of the text by its ids, some CLIP versions by the largest, so ours are replaced.
        is_new = ids >= self._placeholders.first_id
        self._new = is_new, (ids - self._placeholders.first_id).clamp(min=0)
        known = ids.masked_fill(is_new, 0)
        return ((known, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": known})

    def _embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._new is None:
            return None
        names = ("input_ids", "position_ids", "inputs_embeds")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # Looked up here and not in a hook on the embedding, because Textual Inversion replaces that module.
        embedded = module.token_embedding(given.pop("input_ids"))  # type: ignore[operator]
        is_new, numbers = self._new
        given["inputs_embeds"] = torch.where(is_new[..., None], self._table(embedded)[numbers], embedded)
        return (), given

    def _table(self, like: torch.Tensor) -> torch.Tensor:
        """Return the vectors of all placeholder tokens, in the order of their ids."""
        tables = []
        for reader in self._acting():
            if reader.part.tokens:
                reader.attached.place(like.device)
                tables.append(reader.part.vectors(self.name).to(like.dtype))
        return torch.cat(tables)

    def _after_linear(self, path: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        for reader, factors in self._factors.items():
            if any(factors) and path in reader.paths:
                if output.device != reader.attached.placed:
                    reader.attached.place(output.device)
                residual = reader.part(f"{self.name}.{path}", args[0])
                if len(factors) > 1:
                    if reader not in self._scales:
                        self._scales[reader] = sent(torch.tensor(factors), residual.device).view(-1, 1, 1)
                    residual = residual * self._scales[reader]
                elif factors[0] != 1:
                    residual = residual * factors[0]
                output = output + residual.to(output.dtype)
        return output

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._new, self._factors, self._scales = None, {}, {}


def text_part(tuner: Tuner) -> TextPart | None:
    """Return the `text` part of a tuner, if it has one."""
    return next((part for part in tuner.parts() if isinstance(part, TextPart)), None)


def check_text(tuner: Tuner, encoders: Mapping[str, TextEncoder] | None) -> None:
    """Check that the `text` part of a tuner, if it has one, fits the text encoders.

    Raises:
        RestuneError: if the text encoders are not given, or one is compiled.
        BaseMismatchError: if they have another structure.
    """
    part = text_part(tuner)
    if part is None:
        return
    if encoders is None:
        raise RestuneError(
            "This tuner has a `text` part, which acts on the text encoders: load it with load_tuner_weights, or "
            "attach it with text=text_encoders(pipe)."
        )
    tuner.base.check_text_fits(
        describe_text({name: encoders[name] for name in part.text_encoders if name in encoders})
    )
    for name in part.text_encoders:
        if encoders[name].compiled:
            raise RestuneError(f"The {name} is already compiled; load the tuners first, then call torch.compile.")


def attach_text(
    name: str, manager: MixOwner, attached: AttachedTuner, encoders: Mapping[str, TextEncoder] | None
) -> list[EncoderHooks]:
    """Add the `text` part of a tuner, if it has one, to text encoders that `check_text` has checked.

    Args:
        name: name of the tuner.
        manager: manager of the base that the tuner is attached to.
        attached: the attached tuner.
        encoders: the text encoders.

    Returns:
        The hooks of the text encoders that the tuner acts on.
    """
    part = text_part(attached.tuner)
    touched = []
    for encoder in part.text_encoders if part is not None else ():
        assert encoders is not None
        module = encoders[encoder].module
        hooks = EncoderHooks.of(module) or EncoderHooks(encoder, module)
        hooks.add(name, manager, attached, part)  # type: ignore[arg-type]
        touched.append(hooks)
    return touched


def prompt_factors(name: str, values: Sequence[float], rows: int, layout: Layout | None) -> tuple[float, ...]:
    """Return a tuner's factor on each of several prompts, or a single factor if all have the same.

    Args:
        name: name of the tuner.
        values: weight of the tuner: one number, or one per image.
        rows: number of prompts, or of copies of the prompts.
        layout: number of images and prompts of the call; None means one image per prompt.

    Raises:
        RestuneError: if the images of one prompt have different weights, or the numbers do not match.
    """
    if len(set(values)) == 1:
        return (values[0],)
    images, prompts = (layout.images, layout.prompts) if layout is not None else (rows, rows)
    if len(values) != images or rows % prompts:
        raise RestuneError(
            f"The weights of the tuner {name!r} are for {len(values)} images, but the text encoder encodes {rows} "
            f"prompts for {images} images; give one weight per image."
        )
    each = images // prompts
    by_prompt = [values[start : start + each] for start in range(0, images, each)]
    if any(len(set(of_one)) > 1 for of_one in by_prompt):
        raise RestuneError(
            f"The tuner {name!r} has a `text` part, and the images of one prompt share its text; give them the same "
            "weight, or repeat the prompt for each image."
        )
    return tuple(by_prompt[row % prompts][0] for row in range(rows))

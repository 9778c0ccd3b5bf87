"""Typed, validated settings of each part of a tuner; they are stored in the tuner's file as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from ..utils.errors import RestuneError


class _PartConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SkipConfig(_PartConfig):
    """SC-Tuner on the skip connections of a U-Net (SCEdit, arXiv 2312.11392).

    `O_j = x_j + W_up GELU(W_down x_j)` at every position of every selected skip feature.
    """

    part: Literal["skip"] = "skip"
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck over the width of the skip feature."""
    sites: tuple[str, ...] = ("skip.*",)
    """Patterns of the sites that get a tuner, for instance `skip.0-3`; `SitePattern` says how they are written."""
    grad_depth: int | None = Field(default=None, ge=1, le=64)
    """Of these only the skips that the last so many up blocks take; gradients end there (as the late layers of SHERL,
    ECCV 2024). Beside a bypass it is the dial from least memory (bypass alone) to most capacity (no limit)."""


class BypassConfig(_PartConfig):
    """Res-Tuning-Bypass: a side network that reads detached features and writes at the U-Net's output head.

    `b_l = lam_l * H_l(sg(x_l)) + (1 - lam_l) * V_l(b_{l-1})`, `lam_l = sigmoid` of a learned scalar
    (Res-Tuning, arXiv 2310.19859). Training it keeps no activation of the backbone for backward.
    """

    part: Literal["bypass"] = "bypass"
    ratio: float = Field(default=0.5, gt=0, le=8)
    """Width of the bypass state over the width of the tapped feature."""
    expansion: float = Field(default=2.0, gt=0, le=8)
    """Width inside a vertical tuner over the width of the bypass state."""
    taps: tuple[str, ...] = ()
    """Patterns of the sites that the bypass reads: skips, mid and up blocks of a U-Net, blocks of a transformer.
    Without any, the shallowest skip and the last up block of a U-Net, from which few pictures teach most, and all
    blocks of a transformer; `*` is the whole chain of the paper."""


ResKind: TypeAlias = Literal["adapter", "prefix", "prompt", "lora", "attention"]


class ResConfig(_PartConfig):
    """Res-Tuning: a tuner in parallel to an operation of the transformer blocks (Res-Tuning, arXiv 2310.19859).

    `y = OP(x) + Tuner(x)` for any of four operations, each with a kind of tuner of its own or none. The default is
    the paper's dual form, an adapter beside attention and one beside the feed-forward network.
    """

    part: Literal["res"] = "res"
    self_attention: ResKind | None = "adapter"
    """Kind of tuner beside self-attention."""
    cross_attention: ResKind | None = None
    """Kind of tuner beside cross-attention."""
    feed_forward: ResKind | None = "adapter"
    """Kind of tuner beside the feed-forward network."""
    block: ResKind | None = None
    """Kind of tuner beside the whole transformer block."""
    width: int = Field(default=16, gt=0, le=4096)
    """Width of an adapter's bottleneck, rank of lora and attention, number of tokens of prefix and prompt."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Factor `alpha / width` on what lora adds; the width where not given, which makes the factor 1."""
    gate: Literal["exact", "scale"] = "scale"
    """For prefix and prompt beside attention: share the softmax with the frozen keys (exact), or add beside it."""
    scale: Literal["scalar", "channel"] = "scalar"
    """Learned factor on a tuner's residual: one number, or one for each channel. lora has none."""
    linears: tuple[str, ...] = ("*",)
    """For lora: patterns of the linear layers that get one, for instance `to_q` or `net.2`."""
    sites: tuple[str, ...] = ("*",)
    """Patterns of the transformer blocks that get tuners, for instance `up.*` or `down.1.attn.0.block.0`."""
    grad_depth: int | None = Field(default=None, ge=1, le=256)
    """Of these only the last so many transformer blocks of the base; gradients end there (as the late layers of SHERL,
    ECCV 2024). One keeps little more for backward than a bypass, all keep what LoRA on them keeps."""

    @model_validator(mode="after")
    def _some_operation_is_tuned(self) -> ResConfig:
        if not self.operations:
            raise ValueError("no operation has a tuner; choose a kind for at least one")
        if self.block == "lora" and "lora" in (self.self_attention, self.cross_attention, self.feed_forward):
            raise ValueError(
                "lora beside the block covers the linear layers of all its operations; choose one of both"
            )
        return self

    @property
    def operations(self) -> dict[str, ResKind]:
        """Kind of tuner by the last step of a site's name: `self`, `cross`, `ff`, `block`."""
        chosen = {
            "self": self.self_attention,
            "cross": self.cross_attention,
            "ff": self.feed_forward,
            "block": self.block,
        }
        return {operation: kind for operation, kind in chosen.items() if kind is not None}


ConditionName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class ControlConfig(_PartConfig):
    """CSC-Tuner on the skip connections of a U-Net: images steer what is drawn (SCEdit, arXiv 2312.11392).

    `O_j = x_j + sum_m alpha_m (T_j^m(x_j + c_j^m) + c_j^m)`, `c_j^m` the features of condition `m` at skip `j`.
    """

    part: Literal["control"] = "control"
    conditions: tuple[ConditionName, ...] = Field(default=("condition",), min_length=1, max_length=16)
    """Names of the conditions, in the order in which their images are given."""
    channels: int = Field(default=3, gt=0, le=64)
    """Channels of a condition image."""
    ratio: float = Field(default=1.0, gt=0, le=8)
    """Width of the bottleneck over the width of the skip feature."""
    level_kernel: Literal[1, 3] = 1
    """Kernel of the convolutions that carry the condition from one skip to the next."""
    shortcut: bool = True
    """Carry the condition past these convolutions too, which are zero at the start. The published encoder does not,
    and learns slowly."""

    @model_validator(mode="after")
    def _names_differ(self) -> ControlConfig:
        if len(set(self.conditions)) != len(self.conditions):
            raise ValueError("two conditions have the same name")
        return self


Token: TypeAlias = Annotated[str, StringConstraints(pattern=r"^\S{1,64}$")]


class TextConfig(_PartConfig):
    """New words for text encoders (Textual Inversion, arXiv 2208.01618), and LoRA on their layers (arXiv 2106.09685).

    Neither touches the encoder or the tokenizer: the vectors of the words replace embeddings as they are looked up,
    and LoRA adds `(alpha / rank) B A x` to what a linear layer returns.
    """

    part: Literal["text"] = "text"
    tokens: tuple[Token, ...] = Field(default=(), max_length=64)
    """New words as they are written in prompts, for instance `<dog>`; upper and lower case are the same."""
    initializers: tuple[Annotated[str, StringConstraints(max_length=200)], ...] = ()
    """For each new word what it starts as: known words, whose vectors' mean it gets, or nothing for small random
    vectors."""
    vectors_per_token: int = Field(default=1, gt=0, le=64)
    """How many vectors stand for a new word; each takes a place of the prompt's 75."""
    rank: int = Field(default=4, ge=0, le=4096)
    """Rank of LoRA; 0 for new words alone."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Factor `alpha / rank` on what LoRA adds; the rank where not given, which makes the factor 1."""
    linears: tuple[str, ...] = ("*",)
    """Patterns of the linear layers that get LoRA, for instance `self_attn.*` or `mlp.fc1`."""
    encoders: tuple[str, ...] = ("*",)
    """Patterns of the text encoders that the part is for: `text_encoder`, and of SDXL `text_encoder_2` too."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> TextConfig:
        if not self.tokens and not self.rank:
            raise ValueError("there is neither a new token nor LoRA; give tokens, or a rank above 0")
        if len({token.lower() for token in self.tokens}) != len(self.tokens):
            raise ValueError("two new tokens are the same, as upper and lower case do not count")
        if not all(token.isprintable() for token in self.tokens):
            raise ValueError("a new token holds a character that cannot be shown")
        if self.initializers and len(self.initializers) != len(self.tokens):
            raise ValueError(f"there are {len(self.initializers)} initializers for {len(self.tokens)} tokens")
        return self


PartConfig: TypeAlias = Annotated[
    SkipConfig | BypassConfig | ResConfig | ControlConfig | TextConfig, Field(discriminator="part")
]
_PARTS: TypeAdapter[tuple[PartConfig, ...]] = TypeAdapter(tuple[PartConfig, ...])


def parts_to_json(parts: Iterable[PartConfig]) -> str:
    """Write part configs as a JSON list."""
    return _PARTS.dump_json(tuple(parts)).decode()


def parts_from_json(text: str) -> tuple[PartConfig, ...]:
    """Read part configs back from JSON.

    Raises:
        RestuneError: if the text is not a valid list of part configs; names the first fault.
    """
    try:
        return _PARTS.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the list"
        raise RestuneError(f"The tuner config is not valid at {place}: {first['msg']}.") from error

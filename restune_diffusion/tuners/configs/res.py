"""Settings of the family `res`, and its registration."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from ..registry import PartConfig, register_lazy_tuner_family

ResKind: TypeAlias = Literal["adapter", "prefix", "prompt", "lora", "attention"]


class ResConfig(PartConfig):
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


register_lazy_tuner_family(
    ResConfig,
    "restune_diffusion.tuners.res:ResPart",
    summary="Adapter, prefix, prompt, LoRA or attention beside operations of the transformer blocks (Res-Tuning).",
)

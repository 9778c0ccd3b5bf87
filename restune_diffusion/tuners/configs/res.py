"""Settings and registration of the family `res`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, model_validator

from ..registry import PartConfig, register_lazy_tuner_family

if TYPE_CHECKING:
    from ...backbones.site_names import Kind

ResKind: TypeAlias = Literal["adapter", "prefix", "prompt", "lora", "attention"]


class ResConfig(PartConfig):
    """Res-Tuning: tuners in parallel to operations of the transformer blocks (Res-Tuning, arXiv 2310.19859).

    The output is `y = OP(x) + Tuner(x)` for any of four operations, each with its own type of tuner or none. The
    default is the paper's dual form: one adapter in parallel to self-attention and one in parallel to the feed-forward
    network. The layers of a U-Net outside its transformer blocks can have LoRA.
    """

    part: Literal["res"] = "res"
    self_attention: ResKind | None = "adapter"
    """Type of the tuner in parallel to self-attention."""
    cross_attention: ResKind | None = None
    """Type of the tuner in parallel to cross-attention."""
    feed_forward: ResKind | None = "adapter"
    """Type of the tuner in parallel to the feed-forward network."""
    block: ResKind | None = None
    """Type of the tuner in parallel to the whole transformer block."""
    projections: Literal["lora"] | None = None
    """LoRA on `proj_in` and `proj_out` of the spatial transformers of a U-Net, which kohya's trainer tunes too."""
    convolutions: Literal["lora"] | None = None
    """LoRA on the layers of residual blocks, downsamplers and upsamplers of a U-Net (LoCon)."""
    ends: Literal["lora"] | None = None
    """LoRA on the first and last convolution of a U-Net and on the embeddings of the timestep and of SDXL's sizes."""
    width: int = Field(default=16, gt=0, le=4096)
    """Bottleneck width of an adapter, rank of lora and attention, number of tokens of prefix and prompt."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Numerator of the factor `alpha / width` on the lora residual. If not set, the factor is 1."""
    conv_width: int | None = Field(default=None, gt=0, le=4096)
    """Rank of lora on convolutions with a kernel larger than 1x1. If not set, they have `width` and `alpha`."""
    conv_alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Numerator of the factor `conv_alpha / conv_width` for these convolutions. If not set, the factor is 1."""
    gate: Literal["exact", "scale"] = "scale"
    """For prefix and prompt in parallel to attention: `exact` shares the softmax with the frozen keys, `scale` adds a
    separate attention with a learned factor."""
    scale: Literal["scalar", "channel"] = "scalar"
    """Learned factor on a tuner's residual: one number (`scalar`) or one per channel (`channel`). lora has none."""
    linears: tuple[str, ...] = ("*",)
    """For lora: patterns of the layers that get LoRA, for instance `to_q`, `net.2` or `conv1`."""
    sites: tuple[str, ...] = ("*",)
    """Patterns of the transformer blocks that get tuners, for instance `up.*` or `down.1.attn.0.block.0`. The other
    layers belong to sites like `down.1.attn.0` (projections), `down.1.resnet.0`, `up.1.upsample` or `stem`."""
    grad_depth: int | None = Field(default=None, ge=1, le=256)
    """Tune only those of these blocks that are among the last N transformer blocks of the base; backpropagation stops
    there (as with the late layers of SHERL, ECCV 2024). One block needs little more activation memory than a bypass;
    all blocks need as much as LoRA on them."""

    @model_validator(mode="after")
    def _some_operation_is_tuned(self) -> ResConfig:
        if not self.operations:
            raise ValueError("no operation has a tuner; choose a type of tuner for at least one operation")
        if self.block == "lora" and "lora" in (self.self_attention, self.cross_attention, self.feed_forward):
            raise ValueError(
                "block = lora covers the linear layers of all operations; "
                "set lora for the block or for its operations, not for both"
            )
        if self.grad_depth is not None and any(kind in self.operations for kind in ("proj", "conv", "ends")):
            raise ValueError(
                "grad_depth counts transformer blocks; leave it out with lora on projections, convolutions or ends, "
                "and choose sites"
            )
        if self.conv_alpha is not None and self.conv_width is None:
            raise ValueError("conv_alpha needs conv_width; set conv_width, or alpha for all layers")
        return self

    @property
    def operations(self) -> dict[Kind, ResKind]:
        """Type of tuner by operation of the site: `self`, `cross`, `ff`, `block`, `proj`, `conv` or `ends`."""
        chosen: dict[Kind, ResKind | None] = {
            "self": self.self_attention,
            "cross": self.cross_attention,
            "ff": self.feed_forward,
            "block": self.block,
            "proj": self.projections,
            "conv": self.convolutions,
            "ends": self.ends,
        }
        return {operation: kind for operation, kind in chosen.items() if kind is not None}


register_lazy_tuner_family(
    ResConfig,
    "restune_diffusion.tuners.res:ResPart",
    summary="Adapter, prefix, prompt, LoRA or attention in parallel to operations of transformer blocks (Res-Tuning).",
)

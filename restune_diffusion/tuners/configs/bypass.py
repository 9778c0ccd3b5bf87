"""Settings and registration of the family `bypass`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ..registry import PartConfig, register_lazy_tuner_family


class BypassConfig(PartConfig):
    """Res-Tuning-Bypass: a side network that reads detached features and writes at the U-Net's output head.

    The state is `b_l = lam_l * H_l(sg(x_l)) + (1 - lam_l) * V_l(b_{l-1})`, where `lam_l` is the sigmoid of a learned
    scalar (Res-Tuning, arXiv 2310.19859). Training stores no activations of the backbone for the backward pass.
    """

    writes_at_out_alone: ClassVar[bool] = True

    part: Literal["bypass"] = "bypass"
    ratio: float = Field(default=0.5, gt=0, le=8)
    """Width of the bypass state, as a multiple of the width of the tapped feature."""
    expansion: float = Field(default=2.0, gt=0, le=8)
    """Inner width of a vertical tuner, as a multiple of the width of the bypass state."""
    taps: tuple[str, ...] = ()
    """Patterns of the sites that the bypass reads: skips, mid and up blocks of a U-Net, blocks of a transformer. If
    not set, the shallowest skip and the last up block of a U-Net, the best choice for few images, and all blocks of a
    transformer. `*` selects the whole chain of the paper."""
    form: Literal["chain", "redundancy", "mixers"] = "chain"
    """Form of the side network. `chain`: the one above. `redundancy`: one weighted sum of all taps, in which taps that
    resemble others count less, after SHERL (ECCV 2024). `mixers`: low-rank mixers of channels and tokens in turn,
    after LoSA (CVPR 2024); not for a transformer with a class token. The last two read all taps if `taps` is not
    set."""
    mixer_rank: int = Field(default=32, gt=0, le=4096)
    """Inner width of the mixers of form `mixers`."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave settings of later releases out at their defaults, so that files of the chain stay the same."""
        values: dict[str, Any] = handler(self)
        for name in ("form", "mixer_rank"):
            if values.get(name) == type(self).model_fields[name].default:
                values.pop(name)
        return values


register_lazy_tuner_family(
    BypassConfig,
    "restune_diffusion.tuners.bypass:BypassPart",
    summary="Side network on detached features (Res-Tuning-Bypass); trains fastest and with the least memory.",
)

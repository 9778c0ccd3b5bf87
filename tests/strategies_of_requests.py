"""Random requests to the serving engine."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from restune_diffusion.serving import ImageRequest

from .serving_base import SCHEDULERS, STYLES, gray, image, mask


@st.composite
def requests(draw: st.DrawFn) -> ImageRequest:
    """Return a request with any scheduler, size, tuners, and image to start from."""
    names = draw(st.lists(st.sampled_from([*STYLES, "other", "control"]), max_size=2, unique=True))
    options: dict[str, Any] = {}
    if "control" in names:
        options["conditions"] = draw(st.sampled_from([gray(255), image()]))
    if draw(st.booleans()):
        options["image"] = draw(st.sampled_from([gray(180), image()]))
        options["strength"] = draw(st.sampled_from([0.5, 0.8, 1.0]))
        if draw(st.booleans()):
            options["mask"] = mask()
    else:
        options["width"] = draw(st.sampled_from([32, 40]))
        options["height"] = 32
    return ImageRequest(
        draw(st.sampled_from(["", "a <dog>", "a boat at sea"])),
        negative_prompt=draw(st.sampled_from(["", "gray"])),
        seed=draw(st.integers(0, 2**63 - 1)),
        steps=draw(st.integers(2, 6)),
        guidance=draw(st.sampled_from([0.0, 1.0, 1.5, 5.0])),
        scheduler=draw(st.sampled_from(SCHEDULERS)),
        tuners=tuple((name, draw(st.sampled_from([0.0, 0.5, 1.0, -0.5]))) for name in names),
        **options,
    )

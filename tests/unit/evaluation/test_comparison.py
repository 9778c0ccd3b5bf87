from __future__ import annotations

import pytest
import torch

from restune_diffusion.evaluation import InceptionFeatures, Lpips, comparison
from restune_diffusion.evaluation.comparison import Comparison, MetricNetworks, References
from restune_diffusion.evaluation.metric_names import METRICS, without_reference
from restune_diffusion.evaluation.metrics import kernel_distance, nearest_distance, similarity, style_share


@pytest.fixture(scope="module")
def sets(icons: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Two images each: of the tuner, true, of the base and of the training data."""
    images = [(image * 255).round().to(torch.uint8) for image in icons]
    return {"found": images[:2], "true": images[2:4], "base": images[4:6], "training": images[6:]}


def test_a_row_has_the_metrics_of_the_two_networks(
    sets: dict[str, list[torch.Tensor]], inception: InceptionFeatures, lpips: Lpips
) -> None:
    networks = MetricNetworks(torch.device("cpu"))
    references = References(sets["base"], sets["true"], sets["training"], sets["base"])
    row = Comparison(networks, references).row(sets["found"], sets["true"])
    assert row.pop("retrieval_top5") is None
    pixels = {name: torch.stack(images) / 255 for name, images in sets.items()}
    features = {name: inception(images) for name, images in pixels.items()}
    found, true = features["found"], features["true"]
    assert row == pytest.approx(
        {
            "kid": kernel_distance(found, true)[0],
            "style_share": style_share(found, true, features["base"]),
            "retrieval_top1": row["retrieval_top1"],
            "lpips": float(lpips(pixels["found"], pixels["true"]).mean()),
            "similarity": float(similarity(found, true).mean()),
            "nearest_training": float(nearest_distance(found, features["training"]).mean()),
            "drift": float(lpips(pixels["true"], pixels["base"]).mean()),
        },
        rel=1e-4,
    )
    assert row["retrieval_top1"] in (0, 0.5, 1)


def test_only_the_networks_of_the_chosen_metrics_are_loaded(
    sets: dict[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "InceptionFeatures", None)
    networks = MetricNetworks(torch.device("cpu"), ["lpips"])
    row = Comparison(networks, References(sets["base"], sets["true"]), ["lpips", "drift"]).row(sets["found"])
    assert [name for name, value in row.items() if value is not None] == ["lpips"]
    assert list(row) == list(METRICS)


def test_each_metric_says_what_it_lacks() -> None:
    assert without_reference(METRICS, true=6, training=1, drift=1) == {}
    assert without_reference(["kid", "lpips"], true=0, training=0, drift=0) == {
        "kid": "needs 2 held-out images, and there are none",
        "lpips": "needs a held-out image, and there are none",
    }
    lacking = without_reference(METRICS, true=1, training=0, drift=0)
    assert lacking["retrieval_top5"] == "needs 6 held-out images, and there is 1"
    assert (lacking["nearest_training"], lacking["drift"]) == ("needs the training images", "needs drift prompts")
    assert lacking.keys() == METRICS.keys() - {"lpips", "similarity"}

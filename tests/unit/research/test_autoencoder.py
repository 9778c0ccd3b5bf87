import pytest
import torch

from research.restune_tiny.stages.autoencoder import (
    SCALING_FACTOR,
    Perceptual,
    new_vae,
    normalise,
    reconstruction_loss,
)
from restune_diffusion.evaluation import Lpips


@torch.no_grad()
def test_a_normalized_vae_decodes_the_same_images_from_even_latents():
    torch.manual_seed(0)
    vae = new_vae().eval()
    torch.nn.init.normal_(vae.quant_conv.bias, std=0.5)
    pictures = torch.rand(6, 3, 64, 64) * 2 - 1
    before = vae.encode(pictures).latent_dist
    drawn = vae.decode(before.mean).sample
    std, mean = torch.std_mean(before.mean, (0, 2, 3), correction=0)
    assert mean.abs().max() > 0.1  # else the next lines show nothing

    normalise(vae, mean, std)

    after = vae.encode(pictures).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, drawn, rtol=1e-4, atol=1e-4)
    spread, centre = torch.std_mean(after.mean * vae.config.scaling_factor, (0, 2, 3), correction=0)
    torch.testing.assert_close(centre, torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(spread, torch.ones(16), rtol=1e-3, atol=0)
    gain = (1 / SCALING_FACTOR / std)[:, None, None]
    torch.testing.assert_close(after.std, before.std * gain, rtol=1e-3, atol=0)


def test_reconstruction_loss_sees_colours_and_outlines():
    flat, lines = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    lines[..., ::2] = 0.2
    even = torch.full_like(flat, 0.1)
    assert reconstruction_loss(flat, flat) == 0
    # 0.1 in every place: once as it is and half at each of three halved sizes; no outlines.
    assert float(reconstruction_loss(even, flat)) == pytest.approx(0.1 + 0.01 + 3 * 0.05)
    # The stripes differ as much on average, and in their outlines too.
    assert reconstruction_loss(lines, flat) > reconstruction_loss(even, flat) + 0.09


def test_perceptual_loss_weighs_lpips_of_enlarged_images():
    torch.manual_seed(0)
    wanted = torch.rand(2, 3, 64, 64) * 2 - 1
    found = (wanted + 0.2 * torch.randn_like(wanted)).requires_grad_()
    large = [
        torch.nn.functional.interpolate(picture / 2 + 0.5, scale_factor=2, mode="bilinear")
        for picture in (found, wanted)
    ]
    loss = Perceptual(0.5)(found, wanted)
    assert float(loss) == pytest.approx(0.5 * float(Lpips()(*large).mean()))
    loss.backward()
    assert found.grad.abs().max() > 0
    assert Perceptual(0.5)(wanted, wanted) == 0
    assert Perceptual(0.0)(found, wanted) == 0

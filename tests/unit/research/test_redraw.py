from types import SimpleNamespace

import pytest
import torch
from torch import nn

from research.restune_tiny.parts.networks import new_scheduler
from research.restune_tiny.stages.redraw import redraw

WANTED = torch.linspace(-2, 2, 2 * 16 * 8 * 8).view(2, 16, 8, 8)


class Painter(nn.Module):
    """Stand-in for a U-Net that predicts the target latents with a prompt, and half of them without."""

    dtype = torch.float64

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, noisy, timestep, states):
        self.seen.append(int(timestep))
        signal = new_scheduler().alphas_cumprod[timestep].double()
        guess = torch.cat([WANTED, WANTED]).double() * states[:, :1, :1, None]
        noise = (noisy - signal.sqrt() * guess) / (1 - signal).sqrt()
        return SimpleNamespace(sample=signal.sqrt() * noise - (1 - signal).sqrt() * guess)


class Texts:
    """Stand-in for a pipeline: the embedding of a prompt is 1, that of an empty one is 0.5."""

    def __init__(self):
        self.unet, self.scheduler = Painter(), new_scheduler()

    def encode_prompt(self, prompts, *_):
        return torch.tensor([1.0 if prompt else 0.5 for prompt in prompts]).view(-1, 1, 1), None


@pytest.mark.parametrize("steps", [1, 4])
def test_redrawn_latents_follow_the_unets_prediction(steps):
    clean = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = [401, 301, 201, 101, 1][-steps - 1 :]
    for guidance in (1.0, 3.0):
        torch.manual_seed(0)
        pipeline = Texts()
        found = redraw(pipeline, clean, ["sun", "moon"], steps, guidance)
        assert pipeline.unet.seen == timesteps
        torch.manual_seed(0)
        noisy, signal = torch.randn(2, 16, 8, 8).double(), new_scheduler().alphas_cumprod.double()
        angles = signal.sqrt().arccos()
        noisy = angles[timesteps[0]].cos() * clean + angles[timesteps[0]].sin() * noisy
        guess = WANTED.double() * (0.5 + guidance * 0.5)
        for now, then in zip(timesteps, [*timesteps[1:], 0], strict=True):
            # DDIM keeps the remaining noise of the prediction, which is linear in the guidance.
            noise = (noisy - angles[now].cos() * guess) / angles[now].sin()
            noisy = angles[then].cos() * guess + angles[then].sin() * noise
        torch.testing.assert_close(found.double(), noisy, rtol=1e-3, atol=2e-3)


def test_fewer_steps_stay_nearer_to_the_image():
    clean = WANTED.flip(0)
    torch.manual_seed(0)
    pipeline = Texts()
    pipeline.unet.forward = lambda noisy, *_: SimpleNamespace(sample=torch.zeros_like(noisy))  # learned nothing
    near, far = (redraw(pipeline, clean, ["sun", "moon"], steps, 1.0) for steps in (1, 4))
    assert (near - clean).square().mean() < 0.5 * (far - clean).square().mean()

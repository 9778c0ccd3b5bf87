import pytest
import torch
from torch import nn

from research.restune_tiny.parts.flat import Flat
from research.restune_tiny.parts.optimizers import new_optimizers


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3)
        self.token_embedding, self.norm = nn.Embedding(4, 6), nn.LayerNorm(9)
        self.wide = nn.Linear(33, 4)


def gradient(flat, turn):
    """Return the gradient of a step, zero in the padding."""
    generator = torch.Generator().manual_seed(turn)
    found = torch.zeros(flat.size)
    for view in flat.views(found).values():
        view.copy_(torch.randn(view.shape, generator=generator))
    return found


def trained(muon, turns, pause=None):
    """Return values, moments and the flat layout after some steps; the optimizers are rebuilt at the pause."""
    flat = Flat(Small())
    values, gradients = flat.gather(Small()), torch.zeros(flat.size)
    moments = torch.zeros(flat.size), torch.zeros(flat.size)
    optimizers = new_optimizers(flat, values, gradients, moments, 0, muon)
    for turn in range(turns):
        if turn == pause:
            optimizers = new_optimizers(flat, values, gradients, moments, turn, muon)
        gradients.copy_(gradient(flat, turn))
        optimizers.step(0.01 * (turn + 1))
    return flat, values, moments


def test_adam_is_adam_over_each_parameter():
    flat, values, _ = trained(muon=False, turns=3)
    module = Small()
    adam = torch.optim.Adam(module.parameters(), betas=(0.9, 0.99))
    for turn in range(3):
        for name, view in flat.views(gradient(flat, turn)).items():
            module.get_parameter(name).grad = view
        adam.param_groups[0]["lr"] = 0.01 * (turn + 1)
        adam.step()
    for name, view in flat.views(values).items():
        torch.testing.assert_close(view, module.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def test_muon_turns_hidden_matrices_only():
    flat, values, (first, second) = trained(muon=True, turns=1)
    _, by_adam, _ = trained(muon=False, turns=1)
    starts, adams, seconds = flat.views(flat.gather(Small())), flat.views(by_adam), flat.views(second)
    for name, view in flat.views(values).items():
        if name in ("conv.weight", "wide.weight"):
            change = (starts[name] - view).flatten(1)
            found = torch.linalg.svdvals(change / (0.01 * 0.2 * max(change.shape) ** 0.5))
            # Nearly orthogonal, whatever the gradient's were.
            assert found.min() > 0.6, name
            assert found.max() < 1.3, name
            left, _, right = torch.linalg.svd(flat.views(gradient(flat, 0))[name].flatten(1), full_matrices=False)
            assert torch.cosine_similarity((left @ right).flatten(), change.flatten(), dim=0) > 0.97
            assert not seconds[name].any()
        else:
            torch.testing.assert_close(view, adams[name], rtol=0, atol=0)
    assert all(view.any() for view in flat.views(first).values())


@pytest.mark.parametrize("muon", [False, True])
def test_optimizers_go_on_from_stored_moments(muon):
    _, whole, moments = trained(muon, turns=4)
    _, resumed, others = trained(muon, turns=4, pause=2)
    assert torch.equal(whole, resumed)
    assert all(torch.equal(a, b) for a, b in zip(moments, others, strict=True))
    _, three, _ = trained(muon, turns=3)
    assert not torch.equal(whole, three)

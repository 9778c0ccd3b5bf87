"""The stand-in refuses what CUDA refuses and logs what CUDA would copy or wait for."""

import pytest
import torch
from torch import nn

from .standin.tensors import on_host


def test_an_operation_on_two_devices_is_refused(cuda):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    # A number may come from the CPU.
    assert on_host(there + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_numpy_needs_a_copy_to_the_host(cuda):
    there = torch.arange(3, device="cuda")
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        there.numpy()
    assert there.cpu().numpy().tolist() == [0, 1, 2]


def test_copies_and_waits_are_logged(cuda):
    with cuda.phase("pageable"):
        there = torch.ones(4).to("cuda")
    with cuda.phase("pinned"):
        torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    with cuda.phase("pinned, other dtype"):
        torch.ones(4).pin_memory().to("cuda", torch.float16, non_blocking=True)
    with cuda.phase("pinned, in place"):
        there.copy_(torch.ones(4, pin_memory=True), non_blocking=True)
    with cuda.phase("to pinned"):
        torch.empty(4).pin_memory().copy_(there, non_blocking=True)
    with cuda.phase("to pageable"):
        torch.empty(4).copy_(there, non_blocking=True)
    with cuda.phase("event"):
        torch.cuda.Event().synchronize()
    with cuda.phase("list"):
        torch.tensor([1.0, 2.0], device="cuda")
    with cuda.phase("item"):
        there.sum().item()
    with cuda.phase("mask"):
        there[there > 0]
    with cuda.phase("none"):
        there.mul_(2).add(there[torch.zeros(1, dtype=torch.long, device="cuda")])
    expected = {
        "pageable": {"to device": 1},
        "pinned": {"to device, no wait": 1},
        "pinned, other dtype": {"to device": 1},
        "pinned, in place": {"to device, no wait": 1},
        "to pinned": {"to host, no wait": 1},
        "to pageable": {"to host": 1},
        "event": {"wait": 1},
        "list": {"to device": 1},
        "item": {"wait": 1},
        "mask": {"wait": 1},
        "none": {},
    }
    assert {name: cuda.counts(name, ours=False) for name in expected} == expected
    assert len(cuda.waits("pageable", ours=False)) == 1
    assert cuda.waits("pinned", ours=False) == []
    assert cuda.waits() == []


def test_a_module_trains_on_the_device_as_on_the_cpu(cuda):
    def losses(device):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        x = torch.randn(6, 4)
        module.to(device)
        kept = [id(parameter) for parameter in module.parameters()]
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(3):
            loss = module(x.to(device)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss)
        assert kept == [id(parameter) for parameter in module.parameters()]
        assert {parameter.device.type for parameter in module.parameters()} == {device}

    here, there = list(losses("cpu")), list(losses("cuda"))
    assert here == there
    assert here[2] < here[0]


def test_autocast_and_the_gradient_scaler_act(cuda):
    layer = nn.Linear(4, 4).to("cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    with torch.autocast("cuda", dtype=torch.float16):
        out = layer(torch.ones(1, 4, device="cuda"))
        assert out.dtype == torch.float16
        loss = out.float().sum()
        assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    assert on_host(layer.bias.grad).tolist() == [4.0] * 4


def test_the_device_is_gone_after_a_test():
    assert not torch.cuda.is_available()
    with pytest.raises(Exception, match=r"CUDA|cuda"):
        torch.ones(1).to("cuda").sum().item()

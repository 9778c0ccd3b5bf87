import pytest
import torch
from torch import nn

from train.pretraining.flat import Flat
from train.pretraining.folders import replace_folder
from train.pretraining.trainer import learning_rate


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 2, bias=False), nn.LayerNorm(9))


def test_flat_holds_every_parameter(module):
    flat = Flat(module)
    views = flat.views(flat.gather(module))
    assert list(views) == [name for name, _ in module.named_parameters()]
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(views[name], parameter.detach(), rtol=0, atol=0)
    assert all(offset % 32 == 0 for offset in flat.offsets)


def test_bound_parameters_live_in_the_flat_tensors(module):
    flat = Flat(module)
    start, gradients = flat.gather(module), torch.zeros(flat.size)
    values = start.clone()
    flat.bind(module, values, gradients)
    sum(2 * parameter.sum() for parameter in module.parameters()).backward()
    count = sum(parameter.numel() for parameter in module.parameters())
    assert gradients.sum() == 2 * count
    values -= gradients
    for name, before in flat.views(start).items():
        torch.testing.assert_close(module.get_parameter(name).detach(), before - 2)


def test_learning_rate_warms_up_and_falls_to_a_fiftieth():
    assert learning_rate(0, 100, 5.0, 10) == pytest.approx(0.5)
    assert learning_rate(4, 100, 5.0, 10) == pytest.approx(2.5)
    assert learning_rate(10, 100, 5.0, 10) == pytest.approx(5.0)
    assert learning_rate(55, 100, 5.0, 10) == pytest.approx(5 * 0.51)
    assert learning_rate(100, 100, 5.0, 10) == pytest.approx(0.1)
    assert learning_rate(150, 100, 5.0, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("left_over", [False, True])
def test_replaced_folder_holds_the_new_files_only(tmp_path, left_over):
    folder, new = tmp_path / "model", tmp_path / "model.tmp"
    for path, name in ((folder, "old.txt"), (new, "new.txt")):
        path.mkdir()
        (path / name).write_text(name)
    if left_over:
        (tmp_path / "model.old").mkdir()
        (tmp_path / "model.old" / "older.txt").write_text("older")
    replace_folder(new, folder)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/new.txt",
    ]


def test_folder_may_be_new(tmp_path):
    (tmp_path / "model.tmp").mkdir()
    replace_folder(tmp_path / "model.tmp", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

"""Two processes at batch size N match one process at 2N, for every tuner family; all tests share one launch."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.cache_shards import share
from restune_diffusion.training.processes import average_gradients, check_distribution, gather_objects
from restune_diffusion.utils.errors import TrainingError

from ... import tiny_training as tiny
from ...training_fixtures import start_script
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
WORKER = Path(__file__).with_name("two_processes.py")
KINDS: dict[str, dict[str, Any]] = {
    "skip": {"tuner": "skip"},
    "bypass": {"tuner": "bypass", "noise_offset": 0.1},
    "res": {"tuner": "res", "gradient_accumulation_steps": 2},
    "control": {"tuner": "control", "control": {"conditions": ["palette"]}},
    "text": {"tuner": ["text", "skip"], "text": {"tokens": ["<zorp>"], "initializers": ["disc"], "rank": 2}},
}

# A rate too low to change anything: two measurements without improvement end both processes at the same step.
HELD_OUT: dict[str, Any] = {
    "steps": 9, "learning_rate": 1e-12, "keep": "best", "patience": 2,
    "validation": {"holdout": 3, "loss_every": 1},
}  # fmt: skip
# The main process alone measures the metric that both stop by.
METRICS: dict[str, Any] = {
    **HELD_OUT, "best_by": "lpips", "validation": {"holdout": 3, "every": 1, "metrics": ["lpips"], "steps": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Output of the two processes."""

    folder: Path
    base: str
    data: Path
    ranks: list[dict[str, Any]]

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        return settings(self.base, self.data, self.folder / name, **changes)


def settings(base: str, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    common = {"steps": 3, "learning_rate": 1e-3, "caption_dropout": 0.3, "checkpoint_every": 0, "cpu": True}
    return {**common, "base": base, "data": str(data), "output": str(output), "batch_size": 1, **changes}


def words(folder: Path) -> Path:
    tiny.write_images(folder)
    rows = [{"file_name": f"{color}.png", "text": f"a {color} <zorp>"} for color in tiny.COLORS]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def broken(folder: Path, good: int) -> Path:
    """A folder whose last images, the share of the second process and more, cannot be read."""
    tiny.write_images(folder)
    for color in sorted(tiny.COLORS)[good:]:
        (folder / f"{color}.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").unlink()
    for number, color in enumerate(sorted(tiny.COLORS)):
        (folder / f"{color}.txt").write_text(f"caption {number % 2}")
    return folder


def start_group(jobs: Path) -> list[Any]:
    """Start both processes, as torchrun would, whose store of addresses outlives a process group and so allows one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start_script(WORKER, jobs, RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]


@pytest.fixture(scope="module")
def group(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("group")
    data = words(folder / "data")
    made = Group(folder, str(base), data, [])
    configs = [made.config(kind, **changes) for kind, changes in KINDS.items()]
    configs += [
        made.config("whole", checkpoint_every=9),
        made.config("part", steps=2, checkpoint_every=2),
        made.config("part", steps=3, checkpoint_every=9, resume=True),
        made.config("held out", **HELD_OUT),
        made.config("metrics", **METRICS),
    ]
    jobs = {"configs": configs, "base": made.base, "half_broken": str(broken(folder / "half", 2)),
            "broken": str(broken(folder / "none", 0))}  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    processes = start_group(folder / "jobs.json")
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    made.ranks.extend(json.loads((folder / f"jobs-{rank}.json").read_text()) for rank in (0, 1))
    assert made.ranks[0]["messages"] == made.ranks[1]["messages"] == [None] * len(configs)
    return made


def course(folder: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows] for key in ("step", "loss", "grad_norm")}


def test_two_processes_measure_and_stop_as_one(group: Group, tmp_path: Path) -> None:
    alone = group.config("unused", **HELD_OUT) | {"output": str(tmp_path / "one"), "batch_size": 2}
    one = train(TrainConfig.model_validate(alone), verbose=False)
    first, second = measured(tmp_path / "one"), measured(group.folder / "held out")
    assert [*first] == [*second] == [0, 1, 2]
    assert first == pytest.approx(second, rel=1e-6)
    folders = (tmp_path / "one", group.folder / "held out")
    best: Any = [read_info(folder / "tuner.best.safetensors").training for folder in folders]
    assert best[0]["best"]["step"] == best[1]["best"]["step"] == 0
    assert one.stopped_early is not None


def test_two_processes_stop_by_a_metric_that_one_measures(group: Group) -> None:
    values = measured(group.folder / "metrics", "lpips")
    assert [*values] == [0, 1, 2]
    assert len(set(values.values())) == 1
    training: Any = read_info(group.folder / "metrics" / "tuner.safetensors").training
    assert training["steps"] == 2


def measured(folder: Path, name: str = "validation_loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_with_twice_the_batch(group: Group, tmp_path: Path, kind: str) -> None:
    alone = group.config("unused", **KINDS[kind]) | {"output": str(tmp_path / "one"), "batch_size": 2}
    one = train(TrainConfig.model_validate(alone), verbose=False)
    first, second = course(tmp_path / "one"), course(group.folder / kind)
    assert first["step"] == second["step"] == [1, 2, 3]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    # Adam hides a wrong scale of the gradient, its norm does not.
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=2e-3)
    states = [load_tuner(path).state_dict() for path in (one.path, group.folder / kind / "tuner.safetensors")]
    for key, value in states[0].items():
        assert (value - states[1][key]).norm() <= 2e-2 * value.norm(), key


def test_two_processes_resume_as_if_they_had_gone_on(group: Group) -> None:
    assert_same(group.folder / "whole" / "tuner.safetensors", group.folder / "part" / "tuner.safetensors")
    assert course(group.folder / "whole") == course(group.folder / "part")


def test_each_process_encodes_its_share_and_has_the_whole(group: Group) -> None:
    """The second process can read none of its images."""
    for rank in group.ranks:
        assert rank["caches"] == {"share": 3, "images": 2, "equal": True}


def test_where_no_image_can_be_read_both_processes_say_so(group: Group) -> None:
    first, second = (rank["nothing"] for rank in group.ranks)
    assert first == second
    assert first.startswith("NoImageError: None of the images can be read")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 10])
def test_shares_are_the_whole_in_order(length: int, count: int) -> None:
    shares = [share(range(length), index, count) for index in range(count)]
    assert [item for each in shares for item in each] == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Peer:
    """An accelerator whose other process had these gradients."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, *others: list[float]) -> None:
        self._others = list(others)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        total = tensor + torch.tensor(self._others.pop(0))
        return total / 2 if reduction == "mean" else total


def test_a_parameter_that_a_batch_did_not_reach_counts_as_zero_there() -> None:
    """As when the word of a new vector is in the captions of one process only."""
    both, here, there, nowhere = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    both.grad, here.grad = torch.tensor([1.0]), torch.tensor([3.0])
    peer: Any = Peer([1.0, 0.0, 1.0, 0.0], [5.0, 0.0, 8.0])
    average_gradients(peer, [both, here, there, nowhere])
    assert [each.grad.item() for each in (both, here, there) if each.grad is not None] == [3.0, 1.5, 4.0]
    assert nowhere.grad is None


def test_objects_are_exchanged_through_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of gloo, because the group of accelerate on GPUs, NCCL, copies objects to the GPUs."""
    groups: list[str] = []

    def gather(results: list[Any], own: Any, group: Any) -> None:
        assert group == "gloo"
        results[:] = [own, ["theirs"]]

    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: backend)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", groups.append)
    peer: Any = Peer()
    assert gather_objects(peer, ["mine"]) == ["mine", "theirs"]
    assert groups == ["gloo"]


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    check_distribution(accelerator)
    monkeypatch.setattr(type(accelerator), "distributed_type", kind)
    with pytest.raises(TrainingError, match="nothing to shard; choose plain multi-GPU"):
        check_distribution(accelerator)

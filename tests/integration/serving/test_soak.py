"""Mixed traffic while tuner files are added, changed, broken and removed: right answers, and nothing stays."""

from __future__ import annotations

import gc
import os
import random
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from restune_diffusion import SkipConfig, Tuner, TunerFileError, TunerManager, TunerNameError, save_tuner
from restune_diffusion.serving import Engine, ImageRequest, Limits, Ticket, TunerLibrary

from ...conftest import randomize
from ...serving_base import STYLES, alone, assert_as_alone, gray, image, mask, small_pipeline, write_tuners

ROUNDS = int(os.environ.get("RESTUNE_SOAK_ROUNDS", "25"))
_ATTACHED = 4
_MIB = 1 << 20


class Traffic:
    """An engine, its folder of tuners, and a random source."""

    def __init__(self, folder: Path) -> None:
        self.base, self.reference = small_pipeline(), small_pipeline()
        self.folder = folder / "library"
        self.folder.mkdir()
        write_tuners(self.base, self.folder)
        self.random = random.Random(0)
        self.engine = Engine(
            self.base, TunerLibrary(self.folder, capacity=6), Limits(max_rows=6, max_attached=_ATTACHED, max_queue=20)
        )
        self.kept = folder / "kept"
        self.checked = 0

    def change_a_file(self) -> None:
        """Write, break or remove the file of one of the names that only this test uses."""
        path = self.folder / f"changing-{self.random.randrange(3)}.safetensors"
        kind = self.random.choice(["write", "write", "break", "remove"])
        if kind == "remove":
            path.unlink(missing_ok=True)
        elif kind == "break":
            path.write_bytes(self.random.randbytes(64))
        else:
            tuner = Tuner.for_base(self.base.unet, SkipConfig(ratio=self.random.choice([0.25, 0.5])))
            randomize(tuner, self.random.randrange(10**6), std=0.2)
            save_tuner(tuner, path)

    def submit(self) -> Ticket | None:
        """Submit a random request; None if it names a file that is gone or broken."""
        chance = self.random
        names = chance.sample([*STYLES, "other", "control", *(f"changing-{n}" for n in range(3))], chance.randrange(3))
        options: dict[str, Any] = {}
        if "control" in names:
            options["conditions"] = gray(chance.randrange(256))
        if chance.random() < 0.3:
            options |= {"image": image(), "strength": 0.8}
            if chance.random() < 0.5:
                options["mask"] = mask()
        else:
            options |= {"width": chance.choice([32, 40]), "height": 32}
        request = ImageRequest(
            chance.choice(["a <dog>", "a boat", ""]),
            seed=chance.randrange(2**40),
            steps=chance.randrange(2, 5),
            guidance=chance.choice([1.0, 3.0]),
            scheduler=chance.choice([None, "euler", "unipc", "lcm"]),
            tuners=tuple((name, chance.choice([0.5, 1.0])) for name in names),
            **options,
        )
        try:
            return self.engine.submit(request)
        except (TunerNameError, TunerFileError):
            assert any(name.startswith("changing") for name in names)
            return None

    def round(self) -> None:
        """Serve some requests, and compare one of them with the pipeline alone."""
        self.change_a_file()
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.folder, self.kept)
        tickets = [ticket for _ in range(4) if (ticket := self.submit()) is not None]
        # The tuners are read when the requests begin.
        self.engine.step()
        begun = [ticket for ticket in tickets if ticket.progress.state != "waiting"]
        if self.random.random() < 0.3 and tickets:
            self.random.choice(tickets).cancel()
        self.change_a_file()
        while self.engine.step():
            manager = TunerManager.of(self.base.unet)
            assert manager is None or len(manager.names) <= _ATTACHED
        assert all(ticket.done for ticket in tickets)
        done = [ticket for ticket in begun if ticket.progress.state == "done"]
        if done:
            assert_as_alone(self.reference, self.kept, [self.random.choice(done).result(0)])
            self.checked += 1


def hooks(module: torch.nn.Module) -> int:
    """Return the number of torch hooks in a module."""
    return sum(
        len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks)
        for each in module.modules()
    )


def tuners_alive() -> int:
    """Return the number of `Tuner` objects in memory."""
    gc.collect()
    return sum(isinstance(each, Tuner) for each in gc.get_objects())


def test_nothing_stays_of_mixed_traffic(tmp_path):
    traffic = Traffic(tmp_path)
    hooks_before = hooks(traffic.base.unet), hooks(traffic.base.text_encoder)
    before = {name: tensor.clone() for name, tensor in traffic.base.unet.state_dict().items()}
    for _ in range(10):
        traffic.round()
    memory, alive = psutil.Process().memory_info().rss, tuners_alive()
    for _ in range(ROUNDS):
        traffic.round()
    # The cache and the base hold a bounded number of tuners.
    assert tuners_alive() <= max(alive, 6 + _ATTACHED) + 4
    assert psutil.Process().memory_info().rss - memory < 100 * _MIB
    assert traffic.checked > ROUNDS / 2
    stats = traffic.engine.stats()
    assert (stats.queued, stats.running, stats.decoding) == (0, 0, 0)
    assert stats.tuner_evictions > 0
    traffic.engine.close()
    assert (hooks(traffic.base.unet), hooks(traffic.base.text_encoder)) == hooks_before
    for name, tensor in traffic.base.unet.state_dict().items():
        assert torch.equal(tensor, before[name])
    plain = ImageRequest("a", seed=1, steps=2)
    assert torch.equal(alone(traffic.base, tmp_path, plain, 1), alone(traffic.reference, tmp_path, plain, 1))

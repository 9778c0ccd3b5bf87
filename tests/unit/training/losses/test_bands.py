from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training import StepReport, TrainConfig, train
from restune_diffusion.training.callbacks.peak_memory import peak_memory
from restune_diffusion.training.callbacks.tracking import tracker_name
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.bands import BandLosses
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.errors import TrainingError

from ....tiny_training import sd_pipeline

MakeConfig = Callable[..., TrainConfig]


CPU = torch.device("cpu")


def means(bands: BandLosses, others: list[float] | None = None) -> dict[str, float]:
    """The means of one process, with the sums and counts of another."""
    taken = bands.take(CPU)
    return bands.means((taken if others is None else taken + torch.tensor(others)).tolist())


def test_bands_cover_every_timestep_once() -> None:
    assert BandLosses(1000).names == ["0-199", "200-399", "400-599", "600-799", "800-999"]
    for timesteps, count in [(1000, 5), (7, 3), (3, 5), (1000, 7)]:
        for timestep in range(timesteps):
            bands = BandLosses(timesteps, count)
            bands.add(torch.tensor([2.0]), torch.tensor([timestep]))
            (name,) = means(bands)
            first, last = map(int, name.split("-"))
            assert first <= timestep <= last


def test_means_are_over_the_samples_of_all_processes_and_are_reset() -> None:
    bands = BandLosses(1000)
    bands.add(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 199, 999]))
    bands.add(torch.tensor([5.0]), torch.tensor([100]))
    # the other process: one sample of 7 in the first band, two of sum 8 in the third
    # The mean of means would be wrong, because processes have different numbers of samples in a band.
    others = [7.0, 0, 8, 0, 0, 1, 0, 2, 0, 0]
    assert means(bands, others) == {"0-199": (1 + 3 + 5 + 7) / 4, "400-599": 4, "800-999": 10}
    bands.add(torch.tensor([2.0]), torch.tensor([999]))
    assert means(bands) == {"800-999": 2}
    assert means(bands) == {}


def test_the_first_steps_bands_are_those_computed_by_hand(config: MakeConfig, images: Path) -> None:
    reports: list[StepReport] = []
    settings = config(steps=1, batch_size=4, gradient_accumulation_steps=2, snr_gamma=5, seed=3)
    train(settings, pipeline=sd_pipeline(), on_progress=reports.append, verbose=False)
    pipeline = sd_pipeline()
    pipeline.unet.eval()
    objective = Objective(pipeline.scheduler, 5)
    with torch.no_grad():
        batches = Batches(
            build_cache(pipeline, load_samples(find_examples(images), 16)), seed=3, size=4, timesteps=1000,
            caption_dropout=0, device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        by_band: dict[int, list[float]] = {}
        for number in range(2):
            batch = batches[number]
            noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
            # a fresh tuner changes nothing
            errors = (pipeline.unet(noisy, batch.timesteps, **batch.inputs).sample - batch.noise).square()
            alphas = pipeline.scheduler.alphas_cumprod
            for error, timestep in zip(errors, batch.timesteps.tolist(), strict=True):
                snr = alphas[timestep] / (1 - alphas[timestep])
                by_band.setdefault(timestep // 200, []).append((error.mean() * min(1, 5 / snr)).item())
    expected = {f"{200 * band}-{200 * band + 199}": sum(each) / len(each) for band, each in by_band.items()}
    assert dict(reports[0].band_losses) == pytest.approx(expected, rel=1e-4)
    assert reports[0].loss == pytest.approx(sum(map(sum, by_band.values())) / 8, rel=1e-4)


def test_bands_speed_and_memory_are_logged(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(steps=3, log_with="auto")
    reports: list[StepReport] = []
    train(settings, on_progress=reports.append)
    lines = [json.loads(line) for line in (settings.output / "metrics.jsonl").read_text().splitlines()]
    for line, report in zip(lines, reports, strict=True):
        logged = {key.split("/")[1]: value for key, value in line.items() if key.startswith("loss_by_timestep/")}
        assert logged == dict(report.band_losses)
        assert logged
        assert line["images_per_second"] == report.images / report.seconds
        assert 50 < line["peak_memory_mib"] <= peak_memory(torch.device("cpu")) / 2**20  # type: ignore[operator]
    assert list((settings.output / "logs").rglob("events.out.tfevents*")), "TensorBoard is the default"
    shown = capsys.readouterr().err
    assert "images/s" in shown
    assert "iB" in shown


def test_trackers_are_chosen_and_named_with_their_extra(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracker_name("auto") == "tensorboard"
    assert tracker_name("none") is None
    for module in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    assert tracker_name("auto") is None
    for name in ("tensorboard", "wandb"):
        with pytest.raises(TrainingError, match=rf"pip install 'restune-diffusion\[{name}\]'"):
            tracker_name(name)


def test_only_the_metrics_file_is_written_without_a_tracker(config: MakeConfig) -> None:
    settings = config(steps=1, log_with="none")
    result = train(settings, verbose=False)
    assert math.isfinite(result.losses[0])
    assert not (settings.output / "logs").exists()
    assert (settings.output / "metrics.jsonl").is_file()

"""A file in the folder of a run asks for samples after the current step, and changes nothing in the tuner."""

from __future__ import annotations

import pytest
import torch

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import train
from restune_diffusion.training.callbacks.sample_request import REQUEST_FILE, request_samples
from restune_diffusion.utils.errors import TrainingError

from ....training_fixtures import base, config, images

__all__ = ["base", "config", "images"]
PROMPTS = {"validation": {"prompts": ("a disc",), "steps": 1}}


def sampled(output):
    return sorted(path.name for path in (output / "samples").iterdir())


def test_a_request_gives_samples_of_that_step_and_the_same_tuner(config, tmp_path):
    plain = config(output=tmp_path / "plain", **PROMPTS)
    train(plain, verbose=False)
    asked = config(output=tmp_path / "asked", **PROMPTS)

    def ask(report):
        if report.step == 2:
            request_samples(asked.output)

    train(asked, verbose=False, on_progress=ask)
    # The callbacks of the caller come last, so the request is seen after the next step.
    assert sampled(asked.output) == ["step-000000", "step-000003", "step-000004"]
    assert sampled(plain.output) == ["step-000000", "step-000004"]
    ours, others = (load_tuner(settings.file).state_dict() for settings in (asked, plain))
    assert all(torch.equal(ours[name], tensor) for name, tensor in others.items())
    assert not (asked.output / REQUEST_FILE).exists()


def test_a_request_during_the_last_step_is_answered_by_the_last_samples(config):
    settings = config(**PROMPTS)
    train(settings, verbose=False, on_progress=lambda report: report.step == 4 and request_samples(settings.output))
    assert sampled(settings.output) == ["step-000000", "step-000004"]
    assert not (settings.output / REQUEST_FILE).exists()


def test_a_request_before_the_folder_exists_is_one_sentence(tmp_path):
    with pytest.raises(TrainingError, match="wait until the run has started"):
        request_samples(tmp_path / "nothing")

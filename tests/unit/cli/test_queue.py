"""`restune queue`, except for what supervisors do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from restune_diffusion.run_queue import RunQueue, living_supervisor
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.training import read_config

Restune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESTUNE_HOME", str(tmp_path / "home"))
    (tmp_path / "images").mkdir()
    return tmp_path / "home"


def flags(folder: Path, output: str) -> list[str | Path]:
    return ["--base", BUNDLED_BASE, "--data", folder / "images", "--output", folder / output]


def test_runs_are_added_listed_changed_and_removed(restune: Restune, home: Path, tmp_path: Path) -> None:
    code, shown, errors = restune("queue", "list")
    assert (code, shown, errors) == (0, f"The queue {home}/queue is empty; `restune queue add` adds a run.\n", "")
    code, shown, errors = restune("queue", "add", *flags(tmp_path, "one"), "--steps", "7", "--queue-name", "foxes")
    assert (code, errors) == (0, "")
    hint = "Nothing works on the queue now; `restune queue run` starts its runs.\n"
    assert shown == f"Added run 1 (foxes); 0 runs before it.\n{hint}"
    (tmp_path / "run.yaml").write_text("steps: 9\nlearning_rate: 3.0e-4\n")
    _, shown, _ = restune("queue", "add", "--config", tmp_path / "run.yaml", *flags(tmp_path, "two"), "--steps=8")
    assert shown.startswith("Added run 2 (two); 1 run before it.\n")
    queue = RunQueue(home / "queue")
    config = read_config(queue.get("2").config)
    assert (config.steps, config.optimizer.learning_rate) == (8, 3e-4)
    assert read_config(queue.get("1").config).steps == 7

    assert restune("queue", "move", "2", "1")[1] == "Run 2 is moved.\n"
    assert restune("queue", "cancel", "1", "2")[1] == "Run 1 is cancelled.\nRun 2 is cancelled.\n"
    assert restune("queue", "resume", "1")[1] == "Run 1 waits.\n"
    assert restune("queue", "list")[1].splitlines() == [
        "run  state      name   started  ended  output",
        f"2    cancelled  two    -        -      {tmp_path / 'two'}",
        f"1    waiting    foxes  -        -      {tmp_path / 'one'}",
        hint.strip(),
    ]
    found = json.loads(restune("queue", "list", "--json")[1])
    assert [(run["id"], run["state"], run["command"][3]) for run in found] == [
        ("2", "cancelled", "train"),
        ("1", "waiting", "train"),
    ]
    assert restune("queue", "remove", "1", "2")[1] == "Run 1 is removed.\nRun 2 is removed.\n"
    assert queue.runs() == []


def test_another_folder_is_another_queue(restune: Restune, home: Path, tmp_path: Path) -> None:
    restune("queue", "add", f"--queue={tmp_path / 'other'}", *flags(tmp_path, "one"))
    assert restune("queue", "run", "--queue", tmp_path / "empty", "--until-empty")[0] == 0
    assert [run.name for run in RunQueue(tmp_path / "other").runs()] == ["one"]
    assert not (home / "queue").exists()


def test_a_supervisor_in_the_background_is_named_and_a_second_one_is_refused(restune: Restune, home: Path) -> None:
    code, shown, errors = restune("queue", "run", "--background", "--devices", "cpu")
    process = living_supervisor(home / "queue")
    assert process is not None
    try:
        assert (code, shown, errors) == (0, f"Process {process} works on the queue {home}/queue.\n", "")
        code, _, errors = restune("queue", "run")
        assert (code, errors) == (
            1,
            f"restune: Process {process} already works on the queue {home}/queue; leave the runs to it, or end it "
            "first.\n",
        )
    finally:
        os.kill(process, signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "`restune queue` needs an action; give add, list, cancel, resume, move, remove or run."),
        (("lst",), "There is no action lst of `restune queue`; give add, list, cancel, resume, move, remove or run."),
        (("add", "--queue"), "--queue needs a value; leave it out for the default."),
        (("add", "--base", "x"), "--data and --output are required."),
        (("add", "--lr", "1"), "--lr is not an option of restune train; give --learning-rate."),
        (("cancel",), "The argument RUNS is required."),
        (("cancel", "9"), "`restune queue list` lists them."),
        (("move", "1"), "The arguments NUMBER and PLACE are required."),
        (("move", "1", "0"), "PLACE 0 is not valid; use a whole number above 0."),
        (("run", "--devices", "gpu"), "The device gpu is not valid; use auto, cpu, or a GPU such as cuda:0."),
        (("list", "--jsn"), "--jsn is not an option of restune queue list; did you mean --json?"),
    ],
)
def test_mistakes_are_one_sentence(restune: Restune, home: Path, arguments: tuple[str, ...], message: str) -> None:
    code, shown, errors = restune("queue", *arguments)
    assert (code, shown, errors.count("\n")) == (2, "", 1), errors
    assert errors.rstrip("\n").endswith(message), errors


def test_the_help_names_the_actions_and_the_flags_of_training(restune: Restune, home: Path) -> None:
    assert all(f"• {action} " in restune("queue", "--help")[1] for action in ("add", "list", "cancel", "run"))
    shown = restune("queue", "add", "--help")[1]
    assert shown.startswith("usage: restune queue add")
    assert "--queue-name TEXT" in shown
    assert "--learning-rate" in shown

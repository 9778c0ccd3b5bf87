"""Queue on disk: what it accepts, the order, and damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.run_queue import RunQueue
from restune_diffusion.run_queue.records import RECORD_FILE, Record, read_record, write_record
from restune_diffusion.training import read_config
from restune_diffusion.utils.errors import DataError, RestuneError, SettingsError, TrainingError, UsageError

MakeSettings = Callable[..., dict[str, Any]]


def test_the_settings_of_a_run_hold_in_every_working_directory(
    queue: RunQueue, settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = settings("x", data="data", output="runs/fox", optimizer={"learning_rate": 3e-4}, preset="lora", epochs=2)
    run = queue.add(given)
    monkeypatch.chdir("/")
    config = read_config(run.config)
    assert (config.data.folder, config.output, run.output) == (tmp_path / "data", *[tmp_path / "runs" / "fox"] * 2)
    assert (config.optimizer.learning_rate, config.epochs, config.steps, config.kinds) == (3e-4, 2, None, ("res",))
    assert (run.id, run.name, run.state, run.pid, run.message) == ("1", "fox", "waiting", None, None)
    assert run.command[1:] == ["-m", "restune_diffusion", "train", "--config", str(run.config)]
    assert not (tmp_path / "runs" / "fox").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stepss": 3}, SettingsError, "there is no setting stepss; did you mean steps?"),
        ({"steps": 0}, SettingsError, "steps: 0 is not valid; use a whole number above 0"),
        ({"steps": 1, "epochs": 1}, SettingsError, "steps and epochs are both set"),
        ({3: 1}, SettingsError, "3 is not the name of a setting; give a text."),
        ({"data": "/nowhere"}, DataError, "The image folder /nowhere does not exist"),
        ({"base": "/nowhere"}, RestuneError, "There is no base at /nowhere"),
        ({"log_with": "wandb"}, TrainingError, "Weights & Biases is not installed"),
        ({"sweep": "colour=1,2"}, TrainingError, "The sweep has an unknown setting `colour`"),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(
    queue: RunQueue, settings: MakeSettings, changes: dict[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as refused:
        queue.add({**settings("x"), **changes})
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert queue.runs() == []


def test_two_runs_never_write_to_one_folder(queue: RunQueue, settings: MakeSettings, tmp_path: Path) -> None:
    first = queue.add(settings("x"))
    with pytest.raises(UsageError, match="x is the output folder of run 1 in the queue; choose another"):
        queue.add(settings("data/../x"))
    with pytest.raises(UsageError, match="lies in the queue's own folder"):
        queue.add(settings("queue/out"))
    queue.cancel(first.id)
    second = queue.add(settings("x"))
    with pytest.raises(UsageError, match="x is the output folder of run 2 in the queue"):
        queue.resume(first.id)
    queue.cancel(second.id)
    queue.resume(first.id)
    assert [run.state for run in queue.runs()] == ["waiting", "cancelled"]
    (tmp_path / "y" / "checkpoint-000500").mkdir(parents=True)
    with pytest.raises(TrainingError, match="holds checkpoint-000500 of an earlier run; add --resume"):
        queue.add(settings("y"))
    assert queue.add(settings("y", resume=True)).command[-1] == "--resume"


def test_runs_are_moved_and_removed_and_numbers_do_not_return(
    queue: RunQueue, settings: MakeSettings, tmp_path: Path
) -> None:
    for name in "abcd":
        queue.add(settings(name), name=f"run {name}")
    queue.move("3", 0)
    queue.move("1", 99)
    assert [run.id for run in queue.runs()] == ["3", "2", "4", "1"]
    (tmp_path / "d").mkdir()
    queue.remove("4")
    assert (tmp_path / "d").is_dir()
    queue.remove("3")
    assert queue.add(settings("e")).id == "5"
    assert [run.name for run in RunQueue(queue.folder).runs()] == ["run b", "run a", "e"]
    assert sorted(path.name for path in (queue.folder / "runs").iterdir()) == ["1", "2", "5"]
    for change in (queue.get, queue.cancel, queue.resume, queue.remove):
        for unknown in ("4", "../runs/1", "", "²"):
            with pytest.raises(UsageError, match="There is no run"):
                change(unknown)


def test_a_damaged_run_is_shown_with_a_sentence_and_leaves_the_others_alone(
    queue: RunQueue, settings: MakeSettings
) -> None:
    for name in "abc":
        queue.add(settings(name))
    for number, content in (("1", "{"), ("2", '{"name": 3}')):
        path = queue.folder / "runs" / number / RECORD_FILE
        path.write_text(content)
        run = queue.get(number)
        assert (run.state, run.message) == (
            "failed",
            f"{path} is damaged; remove the run from the queue and add it again.",
        )
        with pytest.raises(UsageError, match="is damaged; remove the run from the queue"):
            queue.resume(number)
        queue.remove(number)
    assert [run.id for run in queue.runs()] == ["3"]
    (queue.folder / "runs" / "3" / RECORD_FILE).unlink()
    assert str(queue.get("3").message).endswith("(No such file or directory); remove the run from the queue.")


def test_a_damaged_order_is_one_sentence_and_deleting_it_loses_no_run(queue: RunQueue, settings: MakeSettings) -> None:
    for name in "ab":
        queue.add(settings(name))
    queue.move("2", 0)
    order = queue.folder / "queue.json"
    for content in ("", "[]", '{"order": 3}', "\x00"):
        order.write_text(content)
        with pytest.raises(RestuneError) as refused:
            queue.runs()
        assert str(refused.value) == f"{order} is damaged; delete it to order the runs by number, no run is lost."
        with pytest.raises(RestuneError):
            queue.add(settings("c"))
    order.unlink()
    assert [run.id for run in queue.runs()] == ["1", "2"]
    assert queue.add(settings("c")).id == "3"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RestuneError, match=r"The folder of the queue .* cannot be created \(Not a directory"):
        RunQueue(tmp_path / "file" / "queue")


def test_records_of_later_releases_are_read(queue: RunQueue, settings: MakeSettings) -> None:
    run = queue.add(settings("a"))
    path = run.config.parent / RECORD_FILE
    record = read_record(path, Record)
    write_record(path, record)
    path.write_text(path.read_text().replace('"name"', '"priority": 3, "name"'))
    assert queue.get("1") == run

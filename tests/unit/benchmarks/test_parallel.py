import sys
import time
from pathlib import Path

import pytest
import tyro

from benchmarks.icon_style.__main__ import AllCommand, Command, StyleCommand
from benchmarks.icon_style.parallel import run_parallel

PYTHON = (sys.executable, "-c")
WAIT_FOR_EACH_OTHER = """
import sys, time
from pathlib import Path
own, other = Path(sys.argv[1]), Path(sys.argv[2])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""


def test_processes_run_in_parallel(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    # In sequence, the first would wait forever.
    run_parallel([[first, second], [second, first]], (*PYTHON, WAIT_FOR_EACH_OTHER))


def test_a_failure_is_named_and_ends_the_others(tmp_path):
    late = tmp_path / "late"
    sleep = f"import time, pathlib; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    with pytest.raises(SystemExit, match=r"`raise SystemExit\(3\)` ended with status 3; run the same command again"):
        run_parallel([[sleep], ["raise SystemExit(3)"]], PYTHON)
    time.sleep(3.5)
    assert not late.exists()


def commands_of(whole, monkeypatch):
    """Return the commands of the whole benchmark: a list of parallel commands for each stage."""
    passes = []
    monkeypatch.setattr("benchmarks.icon_style.__main__.run_parallel", passes.append)
    whole.run()
    return [[tyro.cli(Command, args=command) for command in commands] for commands in passes]


def test_the_parts_of_the_whole_share_its_settings(tmp_path, monkeypatch):
    whole = AllCommand(tmp_path, tmp_path / "work", style="fluent-emoji", seed=2)
    [judges], shards, [*again, subject], [report] = commands_of(whole, monkeypatch)
    assert judges.only == ("no method",)
    assert again == shards  # the methods at equal time, which is known then
    assert all(isinstance(part, StyleCommand) for part in [judges, *shards])
    assert [(part.shard, part.shards) for part in shards] == [(0, 2), (1, 2)]
    assert {(part.style, part.seed, part.quick, part.work) for part in [judges, *shards]} == {
        ("fluent-emoji", 2, False, tmp_path / "work")
    }
    assert (subject.rates_from, subject.seed) == ("fluent-emoji", 2)
    assert "minutes with 2 parallel processes" in report.remark


def test_the_quick_run_waits_for_no_learning_rates(tmp_path, monkeypatch):
    [judges, subject], shards, [report] = commands_of(AllCommand(tmp_path, tmp_path / "work", quick=True), monkeypatch)
    assert all(part.quick for part in [judges, subject, *shards, report])
    assert (judges.only, len(shards)) == (("no method",), 2)


def test_a_resumed_run_reports_no_duration(tmp_path, monkeypatch):
    row = tmp_path / "work" / "openmoji-seed0" / "rows" / "base-not-tuned-both.json"
    row.parent.mkdir(parents=True)
    row.write_text("{}")
    whole = AllCommand(tmp_path, tmp_path / "work", out=Path("out"), remark="By hand.")
    assert commands_of(whole, monkeypatch)[-1][0].remark == "By hand."


def test_a_run_with_existing_judges_reports_no_duration(tmp_path, monkeypatch):
    (tmp_path / "style-judge.json").write_text("{}")
    assert commands_of(AllCommand(tmp_path, tmp_path), monkeypatch)[-1][0].remark == ""

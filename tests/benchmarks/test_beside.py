import sys
import time
from pathlib import Path

import pytest
import tyro

from benchmarks.icon_style.__main__ import AllCommand, Command, StyleCommand
from benchmarks.icon_style.beside import run_beside

PYTHON = (sys.executable, "-c")
WAIT_FOR_EACH_OTHER = """
import sys, time
from pathlib import Path
own, other = Path(sys.argv[1]), Path(sys.argv[2])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""


def test_processes_run_at_the_same_time(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    # One after the other, the first would wait for ever.
    run_beside([[first, second], [second, first]], (*PYTHON, WAIT_FOR_EACH_OTHER))


def test_a_failure_is_named_and_ends_the_others(tmp_path):
    late = tmp_path / "late"
    sleep = f"import time, pathlib; time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    with pytest.raises(SystemExit, match=r"`raise SystemExit\(3\)` ended with status 3; run the same command again"):
        run_beside([[sleep], ["raise SystemExit(3)"]], PYTHON)
    time.sleep(3.5)
    assert not late.exists()


def test_the_parts_of_the_whole_share_its_settings(tmp_path, monkeypatch):
    started, passes = AllCommand(tmp_path, tmp_path / "work", quick=True, style="fluent-emoji", seed=2), []
    monkeypatch.setattr(AllCommand, "judges", lambda *_: passes.append("judges"))
    monkeypatch.setattr("benchmarks.icon_style.__main__.run_beside", lambda commands: passes.append(commands))
    started.run()

    judges, shards, [subject], report = passes
    assert judges == "judges"
    parsed = [tyro.cli(Command, args=command) for command in shards]
    assert all(isinstance(part, StyleCommand) for part in parsed)
    assert [(part.shard, part.shards) for part in parsed] == [(0, 2), (1, 2)]
    assert {(part.style, part.seed, part.quick, part.work) for part in parsed} == {
        ("fluent-emoji", 2, True, tmp_path / "work")
    }
    assert tyro.cli(Command, args=subject).rates_from == "fluent-emoji"
    assert "minutes, 2 processes" in tyro.cli(Command, args=report[0]).remark


def test_a_run_that_goes_on_does_not_say_how_long_it_took(tmp_path, monkeypatch):
    row = tmp_path / "work" / "openmoji-seed0" / "rows" / "base-not-tuned-both.json"
    row.parent.mkdir(parents=True)
    row.write_text("{}")
    passes = []
    monkeypatch.setattr(AllCommand, "judges", lambda *_: None)
    monkeypatch.setattr("benchmarks.icon_style.__main__.run_beside", lambda commands: passes.append(commands))
    AllCommand(tmp_path, tmp_path / "work", out=Path("out"), remark="By hand.").run()
    first, second, _ = passes
    assert second[:-1] == first  # the full form has the methods twice, the subject beside them
    assert second[-1][0] == "subject"
    assert tyro.cli(Command, args=passes[-1][0]).remark == "By hand."

"""The acceptance suite for a GPU in its dry form, which runs on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.cuda import __main__ as suite
from benchmarks.cuda import right
from benchmarks.cuda.bench import Bench
from benchmarks.cuda.results import CannotRun, Check, holds
from restune_diffusion.tuners.skip import SkipPart


@pytest.fixture(autouse=True)
def _settings_of_torch():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def kept(output):
    return json.loads(output.with_suffix(".json").read_text())["parts"]


def test_a_dry_run_passes_and_claims_nothing_about_cuda(tmp_path, capsys):
    output = tmp_path / "dry"
    assert suite.main(["--dry", "--output", str(output)]) == 0
    parts = kept(output)
    assert list(parts) == list(suite.PARTS)
    for part, checks in suite.PARTS.items():
        for check in checks:
            rows = parts[part][check.title]
            assert rows
            if check.needs_cuda:
                assert [(row["status"], row["value"]) for row in rows] == [("not run", "needs CUDA")]
            elif part == "generation":
                assert {row["status"] for row in rows} == {"measured"}
    rows = [row for checks in parts.values() for each in checks.values() for row in each]
    fp16_training = [row for row in parts["training"]["10 steps of each kind and precision"] if "fp16" in row["what"]]
    assert {row["status"] for row in fp16_training} == {"not run"}
    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "measured", "not run")}
    assert counts["passed"] > 50
    assert sum(counts.values()) == len(rows)
    page = output.with_suffix(".md").read_text()
    assert f"{counts['passed']} passed, 0 failed, {counts['measured']} measured, {counts['not run']} not run" in page
    assert f"torch {torch.__version__}" in page
    assert "| needs CUDA |  | not run |" in page


def test_a_tuner_that_changes_the_base_makes_the_suite_fail(monkeypatch, tmp_path):
    monkeypatch.setitem(suite.PARTS, "right", right.CHECKS[:1])
    monkeypatch.setattr(
        SkipPart, "reset_parameters", lambda self, generator=None: [p.fill_(0.1) for p in self.parameters()]
    )
    output = tmp_path / "broken"
    assert suite.main(["--dry", "--part", "right", "--output", str(output)]) == 1
    (rows,) = kept(output)["right"].values()
    assert {(row["status"], row["value"]) for row in rows} == {("failed", "changed by skip")}


def test_an_error_in_a_check_is_a_failure_and_a_missing_library_is_not(monkeypatch, tmp_path):
    def breaks(bench):
        yield holds("before", True)
        raise ValueError("it broke\nat line 2")

    def lacks(bench):
        yield from ()
        raise CannotRun("needs a library")

    output = tmp_path / "error"
    monkeypatch.setitem(suite.PARTS, "right", [Check("lacks", lacks)])
    assert suite.main(["--dry", "--part", "right", "--output", str(output)]) == 0
    monkeypatch.setitem(suite.PARTS, "right", [Check("breaks", breaks)])
    assert suite.main(["--dry", "--part", "right", "--output", str(output)]) == 1
    checks = kept(output)["right"]
    assert [(row["status"], row["value"]) for row in checks["lacks"]] == [("not run", "needs a library")]
    assert [(row["status"], row["value"]) for row in checks["breaks"]] == [
        ("passed", ""),
        ("failed", "ValueError: it broke"),
    ]


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(monkeypatch, tmp_path):
    calls = []

    def first(bench):
        calls.append("first")
        yield holds("a", True)

    def second(bench):
        calls.append("second")
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield holds("b", True)

    monkeypatch.setitem(suite.PARTS, "right", [Check("one", first), Check("two", second)])
    arguments = ["--dry", "--part", "right", "--output", str(tmp_path / "kept")]
    with pytest.raises(KeyboardInterrupt):
        suite.main(arguments)
    assert list(kept(tmp_path / "kept")["right"]) == ["one"]
    assert suite.main([*arguments, "--resume"]) == 0
    assert calls == ["first", "second", "second"]
    assert list(kept(tmp_path / "kept")["right"]) == ["one", "two"]


def test_the_comparison_of_devices_itself_runs(tmp_path):
    bench = Bench(dry=True, folder=tmp_path)
    results = list(right.fp32_against_the_cpu(bench))
    assert len(results) == 14
    assert {result.status for result in results} == {"passed"}


def test_without_cuda_the_suite_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main([]) == 2
    assert capsys.readouterr().err == "CUDA is not available; add --dry to run the suite on the CPU.\n"

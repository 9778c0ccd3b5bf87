from __future__ import annotations

import pytest

from benchmarks.icon_style.best_checkpoint import SCORES, difference, table


def rows() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for style in ("a", "b"):
        for seed in (0, 1):
            for file, step, gain in (("best", 100, 0.2 + seed / 10), ("last", 600, 0.0)):
                scores = dict.fromkeys(("validation_loss", *SCORES), 0.5 + gain) | {"validation_loss": 0.3}
                found.append({"style": style, "seed": seed, "file": file, "step": step, **scores})
    return found


def test_the_difference_is_best_minus_last_of_each_run() -> None:
    assert difference(rows(), "top1") == pytest.approx([0.2, 0.3, 0.2, 0.3])


def test_the_table_has_all_runs_means_and_the_difference() -> None:
    lines = table(rows())
    assert len(lines) == 2 + 8 + 4 + 1
    assert "| a | 1 | best | 100 | 0.3000 | 0.800 | 0.800 | 0.800 | 0.800 |" in lines
    assert "| b | mean of 2 | best | 100 | **0.3000** | **0.750** | **0.750** | **0.750** | **0.750** |" in lines
    assert lines[-1].startswith("| both | 4 runs | best - last |  | +0.000 ± 0.000 | +0.250 ± 0.058 |")

from __future__ import annotations

import pytest

from benchmarks.distillation.__main__ import ROWS, table_of, with_shares

SCORES = {"style": "openmoji", "style_vote": 0.5, "top1": 0.25, "top5": 0.75, "lpips": 0.4}


def test_shares_are_of_the_teacher_of_the_same_seed_and_the_table_has_their_means() -> None:
    rows = []
    for seed, losses in enumerate([(0.4, 0.3, 0.35, 0.31), (0.4, 0.2, 0.35, 0.25)]):
        found = [
            {**SCORES, "seed": seed, "method": method, "held_out_loss": loss}
            for method, loss in zip(ROWS, losses, strict=False)
        ]
        rows += with_shares(found)
    assert [row["gain_share"] for row in rows] == pytest.approx([0, 1, 0.5, 0.9, 0, 1, 0.25, 0.75])
    bypass = next(line for line in table_of(rows) if "bypass, distilled" in line)
    assert bypass == "| `openmoji` | bypass, distilled | 2 | 0.3500 | 38% | 0.50 | 0.25 | 0.75 | 0.400 |"

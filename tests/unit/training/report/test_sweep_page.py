from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from restune_diffusion.training.report import write_report
from restune_diffusion.utils.errors import RestuneError

from .test_report import EVIL, Page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of a sweep of two tuners, the second of which has the lower loss."""
    for name, rate, loss in (("ink-lr0.1", 0.1, 0.5), ("ink-lr0.2", 0.2, 0.25)):
        run = tmp_path / "sweep" / name
        values: dict[str, Any] = {"base": "user/base", "data": "/secret/images", "output": str(run), "name": name}
        values |= {"steps": 4, "learning_rate": rate, "validation": {"prompts": ["a disc", EVIL]}}
        for step in (0, 4) if name == "ink-lr0.1" else (4,):
            samples = run / "samples" / f"step-{step:06d}"
            samples.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (16, 16), (60 * step, 100 * number, 10)).save(samples / f"{number:02d}.png")
        (run / "config.yaml").write_text(json.dumps(values))  # JSON is YAML
        (run / "metrics.jsonl").write_text("\n".join(json.dumps({"step": s, "loss": loss}) for s in range(1, 5)))
    return tmp_path / "sweep"


def cells(path: Path) -> list[list[str]]:
    """Return the table of tuners."""
    table = path.read_text().partition("<table>")[2].partition("</table>")[0]
    rows = table.replace('<th class="number">', "<th>").replace('<td class="number">', "<td>").split("<tr>")[1:]
    return [[c.partition("</t")[0] for c in row.replace("<th>", "<td>").split("<td>")[1:]] for row in rows]


def test_the_tuners_stand_beside_their_settings_by_ascending_loss(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert cells(path) == [
        ["Tuner", "learning_rate", "Steps", "Loss"],
        ["ink-lr0.2", "0.2", "4 of 4", "0.2500"],
        ["ink-lr0.1", "0.1", "4 of 4", "0.5000"],
    ]
    assert "Sweep of 2 tuners on base; 2 not finished" in Page(path).text, "there is no tuner file"


def test_each_prompt_has_the_start_and_the_newest_sample_of_each_tuner(folder: Path) -> None:
    images = Page(write_report(folder)).images()
    assert [image["alt"] for image in images] == [
        f"{prompt}, {column}"
        for prompt in ("a disc", EVIL)
        for column in ("start", "ink-lr0.2, step 4", "ink-lr0.1, step 4")
    ]


def test_a_tuner_that_stopped_says_why(folder: Path) -> None:
    rows = [{"name": "ink-lr0.2", "error": f"The loss is not finite. {EVIL}"}, {"name": "ink-lr0.1", "error": None}]
    (folder / "sweep.json").write_text(json.dumps(rows))
    page = Page(write_report(folder))
    assert f"stopped: The loss is not finite. {EVIL}" in page.text
    assert "script" not in {tag for tag, _ in page.tags}


def test_a_tuner_without_steps_comes_last(folder: Path) -> None:
    (folder / "ink-lr0.2" / "metrics.jsonl").unlink()
    assert [row[0] for row in cells(write_report(folder))[1:]] == ["ink-lr0.1", "ink-lr0.2"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RestuneError, match="give the output folder of a training run or a sweep"):
        write_report(tmp_path)

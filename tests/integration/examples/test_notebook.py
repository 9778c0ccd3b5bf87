"""The notebook runs as committed, and its committed outputs are those of a run."""

from __future__ import annotations

import base64
import io
import itertools
import os
from collections.abc import Iterator
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from ...conftest import ROOT

FILE = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(FILE, as_version=4)


@pytest.fixture(scope="module")
def executed() -> Any:
    """The notebook after a run in a kernel of its own; a cell that raises an error ends it."""
    notebook = nbformat.read(FILE, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # The environment of the tests lacks ipywidgets and torchvision, which tqdm and transformers mention.
    environment |= {"PYTHONWARNINGS": "ignore:IProgress not found", "TRANSFORMERS_VERBOSITY": "error"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FILE.parent)}})
    return client.execute(env=environment)


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.outputs if cell.cell_type == "code" else ()


def images(notebook: Any) -> list[np.ndarray]:
    encoded = [output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int) for text in encoded]


def texts(notebook: Any) -> list[str]:
    return [output["text"] for output in outputs(notebook) if output.output_type == "stream"]


def test_a_sentence_stands_before_every_cell(committed):
    kinds = [cell.cell_type for cell in committed.cells]
    assert kinds[0] == "markdown"
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")


def test_the_notebook_runs_and_prints_no_warning(executed):
    assert [output.name for output in outputs(executed) if output.output_type == "stream"] == ["stdout"] * 3
    first, last = map(float, texts(executed)[0].split(": ")[1].split(", "))
    assert last < first
    assert texts(executed)[-1] == "The base generates the same images as before, bit for bit.\n"


def test_the_tuners_give_the_images_their_styles(executed):
    beside, mixed = images(executed)[2], images(executed)[4]
    # The lowest rows of both grids, without the labels on the left.
    base, ink, chalk = beside[-272:-136, -544:], beside[-136:, -544:], mixed[-136:, -544:]
    color = [float(np.ptp(row, axis=2).mean()) for row in (base, ink)]
    assert color[1] < 0.3 * color[0]
    blue = [float((row[..., 2] - row[..., 0]).mean()) for row in (base, ink, chalk)]
    assert max(blue[:2]) < 10
    assert blue[2] > 25


def test_the_committed_outputs_are_those_of_a_run(committed, executed):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown, again = images(committed), images(executed)
    assert [image.shape for image in shown] == [image.shape for image in again]
    # Another processor rounds differently, and training enlarges this.
    assert all(np.abs(a - b).mean() < 8 for a, b in zip(shown, again, strict=True))
    assert len(texts(committed)) == len(texts(executed))
    assert FILE.stat().st_size < 400_000

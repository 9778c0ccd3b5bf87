"""The small base and its tuners, shared by the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from restune_diffusion.serving import Engine, Limits, TunerLibrary

from ...serving_base import small_pipeline, write_tuners


@pytest.fixture(scope="session")
def base() -> Any:
    return small_pipeline()


@pytest.fixture(scope="session")
def reference() -> Any:
    """The same base once more, without an engine."""
    return small_pipeline()


@pytest.fixture(scope="session")
def tuners(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuners")
    write_tuners(base, folder)
    return folder


@pytest.fixture
def make_engine(base: Any, tuners: Path) -> Any:
    """Function that returns an engine on the base, which is closed after the test."""
    engines: list[Engine] = []

    def make(folder: Path | None = None, **limits: Any) -> Engine:
        engines.append(Engine(base, TunerLibrary(folder or tuners), Limits(**{"max_rows": 6, **limits})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()

"""What the tabs share: settings, folders, the queue of runs, and the loaded base."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .workspace import Workspace

if TYPE_CHECKING:
    from ..run_queue import RunQueue


@dataclass(frozen=True)
class StudioSettings:
    """Settings of a studio; the values are those of the options of `restune studio`."""

    home: Path
    base: str
    vae: str | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    data_folders: Sequence[Path] = ()
    password_digest: bytes | None = None
    """Digest of the password, from the function `key_digest`; None without a password."""
    max_upload_mib: int = 512


class StudioContext:
    """State of the studio's process that the tabs share.

    Args:
        settings: settings of the studio.
    """

    def __init__(self, settings: StudioSettings) -> None:
        self.settings = settings
        self.workspace = Workspace(settings.home, settings.data_folders)
        self.workspace.create()
        self.lock = threading.Lock()
        """Lock around each use of the pipeline: one generation at a time."""
        self._pipeline: Any = None
        self._base = settings.base

    @property
    def base(self) -> str:
        """Path or id of the base that `pipeline` returns."""
        return self._base

    @property
    def queue(self) -> RunQueue:
        """The queue of runs."""
        from ..run_queue import RunQueue

        return RunQueue(self.workspace.queue)

    def pipeline(self, base: str | None = None) -> Any:
        """Return the pipeline of a base; it is loaded on first use and kept until another base is asked for.

        Call it with `lock` held.

        Args:
            base: path or id; the base of the last call by default.
        """
        from ..pipelines.load_base import load_placed

        wanted = base or self._base
        if self._pipeline is None or wanted != self._base:
            self._pipeline = None
            self._pipeline = load_placed(wanted, self.settings.device, self.settings.dtype, self.settings.vae)
            self._pipeline.set_progress_bar_config(disable=True)
            self._base = wanted
        return self._pipeline

"""Files of a queue: the order of its runs, and one folder for each run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ..utils.atomic_write import atomic_write
from ..utils.display import printable
from ..utils.errors import RestuneError, UsageError
from .locks import locked
from .records import CONFIG_FILE, RECORD_FILE, Record, read_record, write_record
from .states import settled

_ORDER_FILE = "queue.json"
_LOCK_FILE = "queue.lock"
_RUNS = "runs"
_MOST_DIGITS = 40


class _Order(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    next: int = 1
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """Run of the queue.

    Attributes:
        id: number of the run.
        folder: its folder.
        record: its record with the present state; None if the file is damaged.
        saved: its record as on the disk.
        problem: error message about a damaged file.
    """

    id: str
    folder: Path
    record: Record | None
    saved: Record | None = None
    problem: str | None = None


class Store:
    """Files of a queue.

    Args:
        folder: folder of the queue; created if it is missing.

    Raises:
        RestuneError: if the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        try:
            (self.folder / _RUNS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RestuneError(
                f"The folder of the queue {folder} cannot be created ({error.strerror}); choose another."
            ) from error
        self._read: dict[Path, tuple[tuple[int, int], Record]] = {}

    def locked(self) -> AbstractContextManager[None]:
        """Context manager that keeps other processes and threads from changing the queue."""
        return locked(self.folder / _LOCK_FILE)

    def entries(self) -> list[Entry]:
        """Return all runs in their order."""
        return [self.entry(run_id) for run_id in self._ids()]

    def entry(self, run_id: str) -> Entry:
        """Return one run.

        Raises:
            UsageError: if there is no such run.
        """
        folder = self.folder / _RUNS / run_id
        # The system refuses to look for a name that is too long.
        if not run_id.isdecimal() or len(run_id) > _MOST_DIGITS or not folder.is_dir():
            shown = printable(run_id, _MOST_DIGITS)
            raise UsageError(f"There is no run {shown} in the queue {self.folder}; `restune queue list` lists them.")
        try:
            saved = self._record(folder / RECORD_FILE)
        except RestuneError as error:
            return Entry(run_id, folder, None, problem=str(error))
        return Entry(run_id, folder, settled(saved, folder), saved)

    def create(self, record: Record, config: str) -> Entry:
        """Add a run at the end; call it with the queue locked.

        Args:
            record: record of the run.
            config: its settings as YAML.
        """
        order = self._order()
        ids = self._ids()
        run_id = str(max([order.next, *(int(each) + 1 for each in ids)]))
        folder = self.folder / _RUNS / run_id
        # Renamed when it is complete: readers take no lock.
        temporary = folder.with_name(f".{run_id}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        with atomic_write(temporary / CONFIG_FILE) as file:
            file.write(config.encode())
        write_record(temporary / RECORD_FILE, record)
        temporary.rename(folder)
        self._write_order(_Order(next=int(run_id) + 1, order=(*ids, run_id)))
        return self.entry(run_id)

    def write(self, entry: Entry, record: Record) -> None:
        """Write the record of a run; call it with the queue locked."""
        write_record(entry.folder / RECORD_FILE, record)

    def move(self, run_id: str, place: int) -> None:
        """Move a run to a place in the order, counted from 0; call it with the queue locked."""
        ids = [each for each in self._ids() if each != run_id]
        ids.insert(max(place, 0), run_id)
        self._write_order(_Order(next=self._order().next, order=tuple(ids)))

    def delete(self, entry: Entry) -> None:
        """Delete the folder of a run in the queue; call it with the queue locked."""
        ids = tuple(each for each in self._ids() if each != entry.id)
        next_id = max(self._order().next, int(entry.id) + 1)
        doomed = entry.folder.with_name(f".{entry.id}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        # Renamed first: a half-deleted folder must not look like a run.
        entry.folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        self._write_order(_Order(next=next_id, order=ids))

    def _record(self, path: Path) -> Record:
        """Return the content of a file; one that has not changed is not read again, as supervisors ask often."""
        try:
            found = path.stat()
        except OSError:
            return read_record(path, Record)
        # Each write makes a new file.
        version = found.st_ino, found.st_mtime_ns
        known = self._read.get(path)
        if known is None or known[0] != version:
            known = self._read[path] = version, read_record(path, Record)
        return known[1]

    def _ids(self) -> Sequence[str]:
        """Return the numbers of the runs in their order; those that the file of the order lacks come last."""
        found = {path.name for path in (self.folder / _RUNS).glob("*") if path.name.isdecimal()}
        listed = [run_id for run_id in dict.fromkeys(self._order().order) if run_id in found]
        return [*listed, *sorted(found - {*listed}, key=int)]

    def _order(self) -> _Order:
        path = self.folder / _ORDER_FILE
        try:
            return _Order.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Order()
        except OSError as error:
            raise RestuneError(f"{path} cannot be read ({error.strerror}); change its permissions.") from error
        except ValidationError as error:
            raise RestuneError(f"{path} is damaged; delete it to order the runs by number, no run is lost.") from error

    def _write_order(self, order: _Order) -> None:
        write_record(self.folder / _ORDER_FILE, order)

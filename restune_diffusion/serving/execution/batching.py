"""Order in which requests are admitted and share U-Net calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from .job import Job, Size

Admission = Literal["admitted", "not yet", "all wait", "failed"]


class Batches:
    """Running requests in groups of one latent size, each with a limited number of rows.

    Fairness: groups take turns, so a request waits for one call of each other group between two of its own. Waiting
    requests of one size are admitted in their order. A request that waits for a resource which all sizes share holds
    back the younger ones. Every running request ends after its own steps, so every waiting one is admitted.

    Args:
        rows_of: function from a latent size to the largest number of rows of a call.
    """

    def __init__(self, rows_of: Callable[[Size], int]) -> None:
        self._rows_of = rows_of
        self._groups: dict[Size, list[Job]] = {}
        self._caps: dict[Size, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for group in list(self._groups.values()) for job in list(group))

    def limit(self, size: Size) -> int:
        """Return the largest number of rows of a call with latents of a size."""
        return min(self._rows_of(size), self._caps.get(size, self._rows_of(size)))

    def lower_limit(self, size: Size, rows: int) -> None:
        """Lower the limit of a size, after a call did not fit into the device's memory."""
        self._caps[size] = max(1, rows)

    def admit(self, waiting: list[Job], admit: Callable[[Job], Admission]) -> list[Job]:
        """Admit waiting requests for which there is room, from the oldest.

        Args:
            waiting: the waiting requests, from the oldest.
            admit: function that prepares a request, and returns whether it is running, must wait alone, must wait
                with all younger ones, or has failed.

        Returns:
            The requests that no longer wait.
        """
        gone: list[Job] = []
        full: set[Size] = set()
        for job in waiting:
            group = self._groups.get(job.size, [])
            # A single request always runs, even if the limit has been lowered below its rows.
            if job.size in full or (group and _rows(group) + job.rows > self.limit(job.size)):
                # Otherwise requests of one row would overtake one of two rows without end.
                full.add(job.size)
                continue
            outcome = admit(job)
            if outcome == "all wait":
                break
            if outcome == "not yet":
                continue
            gone.append(job)
            if outcome == "admitted":
                self._groups.setdefault(job.size, []).append(job)
        return gone

    def next(self) -> list[Job]:
        """Return the requests of the next U-Net call: those of the group that has waited longest."""
        if not self._groups:
            return []
        size = next(iter(self._groups))
        # The order of the dictionary is that of the turns, the order of a group that of its requests.
        group = self._groups.pop(size)
        chosen: list[Job] = []
        while group and (not chosen or _rows(chosen) + group[0].rows <= self.limit(size)):
            chosen.append(group.pop(0))
        # All of them, unless the limit has been lowered since they were admitted.
        self._groups[size] = [*group, *chosen]
        return chosen

    def remove(self, job: Job) -> None:
        """Remove a request that is done, failed or cancelled; its rows are free."""
        group = self._groups.get(job.size, [])
        if job in group:
            group.remove(job)
            if not group:
                del self._groups[job.size]


def _rows(jobs: list[Job]) -> int:
    return sum(job.rows for job in jobs)

"""Queue of training runs on disk: `RunQueue` holds it, a `Supervisor` starts the runs, one for each device."""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .background import ensure_supervisor
    from .queue import QueuedRun, RunQueue
    from .supervisor import Supervisor, living_supervisor

__all__ = ["QueuedRun", "RunQueue", "Supervisor", "ensure_supervisor", "living_supervisor"]

_MODULES = {
    "background": ("ensure_supervisor",),
    "queue": ("QueuedRun", "RunQueue"),
    "supervisor": ("Supervisor", "living_supervisor"),
}

# The process of a run imports a module of this room, and needs none of the others.
__getattr__ = lazy_names(__name__, _MODULES)

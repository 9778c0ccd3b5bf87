"""Engines that stop, as after an error that is not the fault of a request."""

from __future__ import annotations

import ctypes

from restune_diffusion.serving.cluster.replica import EngineReplica


def end_thread_of(engine) -> None:
    """Raise SystemExit in the thread of an engine, at its next instruction."""
    ident = ctypes.c_ulong(engine._thread.ident)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit)) == 1


class FragileReplica(EngineReplica):
    """Replica on Ray Serve whose engine stops when it is told to."""

    def end_engine(self) -> None:
        end_thread_of(self._engine)

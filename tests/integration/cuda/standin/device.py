"""Context manager in which this process has a CUDA device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.cuda.amp import common

from .guard import loaded
from .log import TransferLog
from .tensors import FactoryMode, OperationMode

_GIB = 2**30
_STATE = torch.zeros(16, dtype=torch.uint8)


@contextlib.contextmanager
def cuda_device() -> Iterator[TransferLog]:
    """Context manager in which `torch.cuda` reports one device and tensors can be on it; yields the log.

    Raises:
        RuntimeError: if the guard was not loaded before torch.
    """
    if not loaded():
        raise RuntimeError("The stand-in for CUDA is not loaded; run this through tests.integration.cuda.standin.")
    log = TransferLog()
    before, OperationMode.current = OperationMode.current, log
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    # `module.to()` keeps the identity of parameters, as on a real device.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with contextlib.ExitStack() as patches:
        for name, answer in _answers(log).items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        patches.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap))
        patches.enter_context(mock.patch.object(common, "amp_definitely_not_available", return_value=False))
        patches.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submit))
        try:
            with OperationMode(), FactoryMode():
                yield log
        finally:
            OperationMode.current = before
            torch.__future__.set_swap_module_params_on_conversion(swaps)


def _answers(log: TransferLog) -> dict[str, Callable[..., Any]]:
    """Return the functions of `torch.cuda` that libraries call, as they answer for one idle device."""
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "stand-in",
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="stand-in", total_memory=80 * _GIB, major=9, minor=0, multi_processor_count=132
        ),
        "mem_get_info": lambda device=None: (70 * _GIB, 80 * _GIB),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: log.note("wait", "synchronize"),
        "current_stream": lambda device=None: None,
        "Event": lambda: SimpleNamespace(
            record=lambda stream=None: None, synchronize=lambda: log.note("wait", "event"), query=lambda: True
        ),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: _STATE.clone(),
        "get_rng_state_all": lambda: [_STATE.clone()],
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
    }


def _swap(one: Any, other: Any) -> None:
    """Exchange two tensors as `torch.utils.swap_tensors` does, without its refusal of weak references."""
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


_submit_here = ThreadPoolExecutor.submit


def _submit(self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Submit a function that runs with the device in its thread, where modes have to be entered again."""

    @functools.wraps(function)
    def on_device(*args: Any, **kwargs: Any) -> Any:
        with OperationMode(), FactoryMode():
            return function(*args, **kwargs)

    return _submit_here(self, on_device, *args, **kwargs)

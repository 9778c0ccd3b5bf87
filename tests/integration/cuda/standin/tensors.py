"""Tensors on the stand-in, and the rules of CUDA for operations on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .log import TransferLog

CUDA = torch.device("cuda:0")
aten = torch.ops.aten

# Operations whose result's size depends on values, so that the host waits for it.
_SIZED_BY_VALUES = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.equal,
    aten.is_nonzero, aten.bincount, aten.histc,
}  # fmt: skip
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_PIN = {aten.pin_memory, aten._pin_memory}
_IS_PINNED = {aten.is_pinned}

# Storages in pinned memory. They are kept alive, so that no other storage can get the address of one.
_pinned: dict[int, torch.Tensor] = {}


class DeviceTensor(torch.Tensor):
    """Tensor on the stand-in: a wrapper around the CPU tensor `host`, which a test may read without a copy."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool | None = None) -> Any:
        """Wrap a CPU tensor; `type(parameter)(value, requires_grad=...)`, as in accelerate, makes a parameter."""
        if requires_grad is not None:
            return nn.Parameter(host, requires_grad)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=CUDA,
            requires_grad=False,
        )
        wrapper.host = host
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                twin = self.detach().clone()
            is_parameter = getattr(self, "_is_param", False)
            memo[id(self)] = (
                nn.Parameter(twin, self.requires_grad) if is_parameter else twin.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def tolist(self) -> Any:
        _log().note("to host", "tolist", _bytes(self.host))
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self.numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        # Two wrappers of one memory share it, as two views on a device do.
        return self.host.untyped_storage()

    def pin_memory(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise NotImplementedError("The stand-in cannot set `data` to a tensor of another device.")
        torch.Tensor.data.__set__(self, value)
        self.host = value.host

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


# Code that looks for quantized weights asks for the name of a tensor's type.
DeviceTensor.__name__ = "Tensor"


class OperationMode(TorchDispatchMode):
    """Mode in which factories and copies with `device="cuda"` give tensors on the stand-in."""

    current: TransferLog | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (torch.Tensor, nn.Parameter, DeviceTensor) for kind in types):
            # A tensor subclass of another library around ours dispatches its own parts.
            return NotImplemented
        return run(func, args, kwargs or {})


class FactoryMode(torch.overrides.TorchFunctionMode):
    """Mode for `torch.tensor(values, device="cuda")`, which copies from the host and passes no dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and isinstance(args[0], list | tuple):
            args = (tree_map(lambda item: item.item() if isinstance(item, DeviceTensor) else item, args[0]), *args[1:])
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and is_cuda(kwargs.get("device")):
            device = kwargs.pop("device")
            if func is not torch.tensor and args and isinstance(args[0], torch.Tensor):
                return args[0].to(device, kwargs.get("dtype") or args[0].dtype)
            grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(device).requires_grad_(grad)
        return func(*args, **kwargs)


def is_cuda(device: Any) -> bool:
    """Return whether a device argument means the stand-in."""
    return device is not None and torch.device(device).type == "cuda"


def on_host(value: Any) -> Any:
    """Return nested values with the CPU tensors of those on the stand-in, without a logged copy."""
    return tree_map(lambda item: item.host if isinstance(item, DeviceTensor) else item, value)


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation by CUDA's rules."""
    packet, device = func.overloadpacket, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    if packet in _PIN:
        return args[0] if _is_pinned(args[0]) else _pinned_now(args[0].clone())
    if packet in _IS_PINNED:
        return _is_pinned(args[0])
    if packet is aten._to_copy:
        return _to_copy(func, args[0], kwargs)
    if packet is aten.copy_:
        return _copy_in_place(func, *args, **kwargs)
    if packet is aten._local_scalar_dense and on_device:
        _log().note("wait", "item", _bytes(args[0]))
        return func(on_host(args[0]))
    if not on_device and not is_cuda(device):
        if kwargs.get("pin_memory"):
            return _pinned_now(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)
    if on_device:
        _check(func, args, tensors)
        if packet in _SIZED_BY_VALUES:
            _log().note("wait", str(packet))
        if packet is aten.repeat_interleave and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
            _log().note("wait", str(packet))
    if is_cuda(device):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    host_args, host_kwargs = on_host((tuple(args), dict(kwargs)))
    out = func(*host_args, **host_kwargs)
    if device is not None and not is_cuda(device):
        return out
    return _wrapped(func, args, kwargs, out)


def _log() -> TransferLog:
    return OperationMode.current or TransferLog()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pinned_now(tensor: torch.Tensor) -> torch.Tensor:
    _pinned[tensor.untyped_storage()._cdata] = tensor
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, DeviceTensor) and tensor.untyped_storage()._cdata in _pinned


def _to_copy(func: Any, source: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return func(on_host(source), **kwargs)
    host_kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    out = func(on_host(source), **host_kwargs)
    was_there = isinstance(source, DeviceTensor)
    goes_there = was_there if device is None else is_cuda(device)
    if goes_there and not was_there:
        _note_upload("to", source, out.dtype, kwargs.get("non_blocking", False))
    elif was_there and not goes_there:
        _log().note("to host", "to", _bytes(out))
    return DeviceTensor(out) if goes_there else out


def _copy_in_place(func: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    func(on_host(target), on_host(source))
    if isinstance(target, DeviceTensor) and not isinstance(source, DeviceTensor):
        _note_upload("copy_", source, target.dtype, non_blocking)
    elif isinstance(source, DeviceTensor) and not isinstance(target, DeviceTensor):
        free = non_blocking and _is_pinned(target) and source.dtype == target.dtype
        _log().note("to host, no wait" if free else "to host", "copy_", _bytes(source))
    return target


def _note_upload(op: str, source: torch.Tensor, dtype: torch.dtype, non_blocking: bool) -> None:
    # torch converts on the host, into memory that is not pinned, if the dtypes differ.
    free = non_blocking and _is_pinned(source) and source.dtype == dtype
    _log().note("to device, no wait" if free else "to device", op, _bytes(source))


def _check(func: Any, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
    """Raise CUDA's error for tensors of two devices; numbers and indices may be on the CPU."""
    packet = func.overloadpacket
    others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.device.type == "cpu"]
    if packet in _INDEXED:
        indices = [index for index in tree_leaves(args[1]) if isinstance(index, torch.Tensor)]
        for index in indices:
            if not isinstance(index, DeviceTensor):
                _log().note("to device", "index on the CPU", _bytes(index))
            if index.dtype in (torch.bool, torch.uint8):
                _log().note("wait", f"{packet} with a mask")
        others = [tensor for tensor in others if not any(tensor is index for index in indices)]
    others = [tensor for tensor in others if tensor.dim()]
    if others and packet is not aten.set_:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({func}, on the CPU {[tuple(tensor.shape) for tensor in others]})"
        )


def _wrapped(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    """Wrap the results; what an operation wrote in place is returned as the very argument."""
    values = [
        (argument, kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position])
        for position, argument in enumerate(func._schema.arguments)
    ]
    written = [value for argument, value in values if argument.alias_info is not None and argument.alias_info.is_write]
    known = {id(on_host(tensor)): tensor for tensor in tree_leaves(written) if isinstance(tensor, torch.Tensor)}
    returns = func._schema.returns
    in_place = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write

    def wrap(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or isinstance(item, DeviceTensor):
            return item
        return known.get(id(item)) if id(item) in known else DeviceTensor(item)

    if in_place and isinstance(out, torch.Tensor) and len(written) == 1 and isinstance(written[0], torch.Tensor):
        return written[0]
    return type(out)(map(wrap, out)) if isinstance(out, tuple | list) else wrap(out)

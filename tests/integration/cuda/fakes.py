"""Full-size U-Nets on a fake CUDA device: dtypes, autocast, kernels and bytes as on CUDA, without memory or values.

FakeTensor has shapes, dtypes and devices only. The guard of the stand-in lets it have a `cuda` device on a CPU build
of torch. Kernels and bytes are counted, times are not.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda.amp import common
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from restune_diffusion import Tuner, attach
from restune_diffusion.backbones import describe_base
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.pipelines.load_base import PRECISIONS
from restune_diffusion.training.build import tuner_autocast
from restune_diffusion.training.latents.batches import Batch
from restune_diffusion.training.losses.prediction import predict
from restune_diffusion.training.state import ATTACHED_NAME, TrainState
from restune_diffusion.tuners import PartConfig

from ...conftest import SD15, SDXL

BASES = {"SD 1.5": SD15, "SDXL": SDXL}
# Operations that launch no kernel, because their result is a view or no tensor.
_VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "expand", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Count(TorchDispatchMode):
    """Count of the kernels that run while it is entered, of the bytes that they write, and of the results' dtypes."""

    kernels: int = 0
    written: int = 0
    dtypes: dict[str, Counter[torch.dtype]] = field(default_factory=dict)
    """Dtypes of the results of each operation, by its name."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        results = result if isinstance(result, tuple | list) else (result,)
        tensors = [each for each in results if isinstance(each, torch.Tensor)]
        if name not in _VIEWS and tensors:
            self.kernels += 1
            self.written += sum(each.numel() * each.element_size() for each in tensors)
            self.dtypes.setdefault(name, Counter())[tensors[0].dtype] += 1
        return result


class FusedAttention(TorchFunctionMode):
    """Attention by the kernel that CUDA would choose on a GPU from Ampere on.

    Flash attention takes half precision without a mask; it fills heads up itself. Memory-efficient attention takes
    heads of a multiple of 16 bytes. All others take the kernel that stores the scores, here with its memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: Counter[str] = Counter()
        """Number of calls of each kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func is torch.Tensor.pin_memory:
            # FakeTensor would run it on the real tensor, for which a CPU build of torch has no pinned memory.
            return args[0]
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        half, width = query.dtype in _HALF, value.shape[-1]
        if half and attn_mask is None and query.shape[-1] == width:
            self.chosen["flash"] += 1
            query, key, value = (F.pad(each, (0, -width % 8)) if width % 8 else each for each in (query, key, value))
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0][..., :width]
        if not any(each.shape[-1] % (8 if half else 4) for each in (query, value)):
            self.chosen["memory-efficient"] += 1
            mask = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[2])
            attended = torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, torch.is_grad_enabled(), scale=scale
            )
            return attended[0]
        self.chosen["scores"] += 1
        scores = query @ key.transpose(-1, -2) * scale
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


@contextlib.contextmanager
def fake_cuda() -> Iterator[FusedAttention]:
    """Context manager in which tensors are fake and can be on `cuda`; yields the chosen attention kernels."""
    available = mock.patch.object(common, "amp_definitely_not_available", return_value=False)
    capable = mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True)
    with available, capable, FakeTensorMode(allow_non_fake_inputs=True), FusedAttention() as attention:
        yield attention


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_base(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    """Return the frozen U-Net of a base in a dtype, on the device; `changes` are of its config."""
    with default_dtype(dtype), torch.device("cuda"):
        return UNet2DConditionModel(**{**BASES[name], **changes}).eval().requires_grad_(False)


def make_batch(unet: Any, size: int = 1, conditions: int = 0) -> Batch:
    """Return a training batch at the base's own resolution."""
    side, device, dtype = unet.config.sample_size, "cuda", unet.dtype
    latents = torch.empty(size, 4, side, side, device=device)
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.empty(size, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    }
    if unet.config.addition_embed_type is not None:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(size, 1280, device=device, dtype=dtype),
            "time_ids": torch.empty(size, 6, device=device, dtype=dtype),
        }
    images = tuple(torch.empty(size, 3, 8 * side, 8 * side, device=device) for _ in range(conditions))
    return Batch(latents, latents, torch.zeros(size, dtype=torch.long, device=device), inputs, images)


def make_run(unet: Any, tuner: Any, precision: str, autocast: bool = False) -> Any:
    """Return the part of a training state that predictions read; `autocast` is around the base too."""
    tuner.autocast = None if autocast else tuner_autocast(precision, unet)
    dtype = PRECISIONS[precision]
    run = SimpleNamespace(
        pipeline=SimpleNamespace(unet=unet),
        tuner=tuner,
        objective=SimpleNamespace(add_noise=lambda latents, noise, timesteps: latents + noise),
        accelerator=SimpleNamespace(autocast=lambda: torch.autocast("cuda", dtype, enabled=precision != "no")),
    )
    run.base_precision = lambda: TrainState.base_precision(run)  # type: ignore[arg-type]
    return run


def weight_bytes(unet: Any) -> int:
    """Return the bytes of the base's weights, quantized or not."""
    return sum(each.numel() * each.element_size() for parameter in unet.parameters() for each in stored(parameter))


@dataclass
class Step:
    """Forward and backward pass of a training step."""

    forward: Count
    backward: Count
    kept: int
    """Bytes that autograd keeps for the backward pass, without parameters."""

    @property
    def kernels(self) -> int:
        return self.forward.kernels + self.backward.kernels

    @property
    def written(self) -> int:
        return self.forward.written + self.backward.written


def training_step(unet: Any, parts: tuple[PartConfig, ...], precision: str = "fp16", autocast: bool = False) -> Step:
    """Run a training step of a tuner of these parts, whose parameters are in fp32.

    Args:
        unet: the base.
        parts: parts of the tuner.
        precision: the setting `mixed_precision`.
        autocast: whether autocast is around the base, even if that is in half precision.
    """
    with torch.device("cuda"):
        tuner = Tuner(parts, describe_base(unet))
    run = make_run(unet, tuner, precision, autocast)
    frozen = [part for parameter in unet.parameters() for part in stored(parameter)]
    with attach(unet, tuner, ATTACHED_NAME):
        conditions = sum(len(part.conditions) for part in tuner.parts())
        batch = make_batch(unet, conditions=conditions)
        with Count() as forward, kept_storages() as kept:
            prediction = predict(run, batch)
        with Count() as backward:
            F.mse_loss(prediction.float(), batch.noise).backward()
        manager = TunerManager.of(unet)
        assert manager is not None
        manager.clear_conditions()
    known = {each.untyped_storage()._cdata for each in (*frozen, *tuner.parameters())}
    return Step(forward, backward, sum(storage.nbytes() for key, storage in kept.items() if key not in known))


def stored(tensor: Any) -> list[torch.Tensor]:
    """Return the stored tensors of a tensor: itself, or the components of a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]


@contextlib.contextmanager
def kept_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """Context manager that yields the storages of the tensors that autograd saves in it, by address."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in stored(tensor):
            storage = part.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def counted(call: Callable[[], Any]) -> Count:
    """Return the count of a call without gradients."""
    with torch.no_grad(), Count() as count:
        call()
    return count

"""Distributed training: check of the setup, exchange of objects, and averaging of gradients over processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import distributed, nn

from ..utils.errors import TrainingError

_T = TypeVar("_T")

_SHARDED = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def check_distribution(accelerator: Accelerator) -> None:
    """Check that all started processes train together, and that the base is not sharded.

    The tuner's hooks need the whole base on each device.

    Raises:
        TrainingError: if the launcher started more processes than accelerate connects, or accelerate is configured for
            FSDP, DeepSpeed or Megatron-LM.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise TrainingError(
            f"The launcher started {started} processes, but accelerate connects {accelerator.num_processes} of them. "
            f"Each would train alone and write to the same folder; on CPUs, add --cpu."
        )
    strategy = _SHARDED.get(accelerator.distributed_type)
    if strategy is not None:
        raise TrainingError(
            f"accelerate is configured for {strategy}, but a tuner is small and its frozen base stays whole on each "
            f"device, so there is nothing to shard; choose plain multi-GPU in `accelerate config`."
        )


def gather_objects(accelerator: Accelerator, own: list[_T]) -> list[_T]:
    """Return the objects of all processes, in the order of the processes; all must call it.

    They go through main memory. NCCL, the group of accelerate on GPUs, would copy all of them to every GPU.
    """
    if accelerator.num_processes == 1:
        return own
    group = distributed.new_group(backend="gloo")
    gathered: list[list[_T]] = [[] for _ in range(accelerator.num_processes)]
    distributed.all_gather_object(gathered, own, group=group)
    distributed.destroy_process_group(group)
    return [each for objects in gathered for each in objects]


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients over all processes, in place.

    A parameter without a gradient in one process counts as zero there, as in the mean over one batch of all samples. A
    parameter without a gradient in every process keeps none, so that the optimizer skips it, as in one process.

    `DistributedDataParallel` cannot do this, because the tuner runs in hooks of the base and not in a wrapped forward.
    """
    if accelerator.num_processes == 1:
        return
    reached = torch.tensor([parameter.grad is not None for parameter in parameters], device=accelerator.device)
    counts = accelerator.reduce(reached.float(), reduction="sum").tolist()
    shared = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
    flat = torch.cat([_gradient(parameter).flatten() for parameter in shared])
    means = accelerator.reduce(flat, reduction="mean").split([parameter.numel() for parameter in shared])
    for parameter, mean in zip(shared, means, strict=True):
        parameter.grad = mean.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

"""What the processes of a run tell each other in a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ..utils.errors import TrainingError

_SHARDED = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def check_distribution(accelerator: Accelerator) -> None:
    """Refuse what would split the base among the devices: it stays whole on each, with the tuner's hooks in it.

    Raises:
        TrainingError: if accelerate's configuration asks for it.
    """
    kind = _SHARDED.get(accelerator.distributed_type)
    if kind is not None:
        raise TrainingError(
            f"accelerate is configured for {kind}, but a tuner is small and its frozen base stays whole on each "
            f"device, so there is nothing to shard; choose plain multi-GPU in `accelerate config`."
        )


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients.

    A parameter that a batch did not reach counts as zero there, as in the mean over one batch of all samples; one that
    no batch reached keeps no gradient, so that the optimizer leaves it alone, as it does in one process.

    The tuner runs inside the base's hooks, where DistributedDataParallel could not see its forward.
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

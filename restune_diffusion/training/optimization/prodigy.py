"""Prodigy (arXiv 2306.06101): Adam that finds its own learning rate, computed on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch.optim import Optimizer

_ESTIMATES = ("d", "d_numerator")


class Prodigy(Optimizer):
    """Adam whose step size is an estimate `d` of the distance to the solution, times a learning rate near 1.

    This is algorithm 4 of the paper, with Adam's bias correction, decoupled weight decay, and a denominator of the
    estimate without the learning rate, so that warm-up does not inflate it. prodigyopt recommends these for diffusion
    models. The state has prodigyopt's names, so checkpoints made with it continue. `d` stays on the device, so that no
    step waits for it. Parameter groups may have different learning rates, which are factors on the common `d`. Where
    loss scaling finds an overflow, the update changes nothing, and the host need not know.

    Args:
        parameters: parameters or parameter groups, all on one device.
        lr: factor on the estimate.
        betas: decay of the moments.
        eps: number added to the root of the second moment, times `d`.
        weight_decay: decoupled weight decay.
        d0: first estimate.
    """

    # `GradScaler` then sets `found_inf` instead of reading it, for which the host would wait.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "d0": d0}
        super().__init__(parameters, {**settings, "d": d0, "d_numerator": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss again and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A group whose learning rate is zero, as at the start of a warm-up, learns nothing, not even the estimate.
        learning = [group for group in self.param_groups if group["lr"]]
        groups = [(group, parameters) for group in learning if (parameters := _reached(group))]
        if groups:
            self._start([parameter for _, parameters in groups for parameter in parameters])
            self._update(groups)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the estimates as numbers."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update({name: float(group[name]) for name in _ESTIMATES}, k=int(group["k"]))
        return state

    def _start(self, parameters: list[torch.nn.Parameter]) -> None:
        """Create the state of parameters that have none; the only place where the host waits."""
        fresh = [parameter for parameter in parameters if "step" not in self.state[parameter]]
        nonzero = torch.stack([parameter.any() for parameter in fresh]).tolist() if fresh else []
        for parameter, kept in zip(fresh, nonzero, strict=True):
            self.state[parameter].update(
                step=0,
                s=torch.zeros_like(parameter).flatten(),
                # A parameter that starts at zero needs no copy of its start.
                p0=parameter.flatten().clone() if kept else parameter.new_zeros(()),
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
            )

    def _update(self, groups: list[tuple[dict[str, Any], list[Any]]]) -> None:
        first = self.param_groups[0]
        device = groups[0][1][0].device
        d, numerator = (_on_device(first[name], device) for name in _ESTIMATES)
        beta1, beta2 = first["betas"]
        overflow = getattr(self, "found_inf", None)
        # 0 after an overflow, and 1 otherwise.
        kept = torch.ones_like(d) if overflow is None else 1 - overflow.to(d)
        steps = first["k"]
        correction = (1 - beta2 ** (steps + 1)) ** 0.5 / (1 - beta1 ** (steps + 1)) * kept
        first_decay, second_decay, decay = (1 - (1 - beta) * kept for beta in (beta1, beta2, sqrt(beta2)))
        numerator = numerator * decay
        sizes: list[torch.Tensor] = []
        for group, parameters in groups:
            states = [self.state[parameter] for parameter in parameters]
            gradients = [parameter.grad for parameter in parameters]
            if overflow is not None:
                gradients = [torch.where(kept > 0, each, torch.zeros_like(each)) for each in gradients]
            flat = [gradient.flatten() for gradient in gradients]
            moved = [state["p0"] - each.flatten() for state, each in zip(states, parameters, strict=True)]
            products = torch.stack([torch.dot(*pair) for pair in zip(flat, moved, strict=True)])
            numerator = numerator + d / group["d0"] * (d * group["lr"] * correction) * products.to(d).sum()
            means, squares, sums = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "s"))
            torch._foreach_mul_(means, first_decay.to(means[0].dtype))
            torch._foreach_add_(means, _scaled(gradients, d * (1 - beta1)))
            torch._foreach_mul_(squares, second_decay.to(means[0].dtype))
            torch._foreach_add_(squares, _scaled(torch._foreach_mul(gradients, gradients), d * d * (1 - beta2)))
            torch._foreach_mul_(sums, decay.to(means[0].dtype))
            torch._foreach_add_(sums, _scaled(flat, d / group["d0"] * d))
            sizes += torch._foreach_norm(sums, 1)
        size = torch.stack(sizes).to(d).sum()
        # Gradients of zero leave the estimate as it is.
        found = torch.maximum(d, torch.where(size > 0, numerator / size, d))
        for group, parameters in groups:
            states, rate = [self.state[parameter] for parameter in parameters], d * group["lr"] * correction
            roots = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
            # Without `alpha`, torch takes the scalar's value, for which the host would wait.
            torch._foreach_add_(roots, (found * group["eps"]).to(roots[0].dtype), alpha=1)
            if group["weight_decay"]:
                torch._foreach_add_(parameters, _scaled(parameters, -group["weight_decay"] * rate))
            ratios = torch._foreach_div([state["exp_avg"] for state in states], roots)
            torch._foreach_add_(parameters, _scaled(ratios, -rate))
        for group in self.param_groups:
            group.update(d=found, d_numerator=numerator, k=steps + kept)


def _reached(group: dict[str, Any]) -> list[Any]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _on_device(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return an estimate on the device, in double precision where there is one."""
    return torch.as_tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _scaled(tensors: Any, factor: torch.Tensor) -> Any:
    return torch._foreach_mul(tensors, factor.to(tensors[0].dtype))

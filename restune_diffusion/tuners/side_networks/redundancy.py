"""Aggregation of taps by their redundancy, after SHERL (ECCV 2024, arXiv 2407.07523).

The equation is that of the early route (`Guidance`) in the authors' code, with `l, j` over all taps but the last and
`L` the last tap:

    r_l = sum_j relu(cos(n_l, n_j));   a_l = relu(w . (n_l * n_L) + c) / r_l;   b = n_L + sum_l (a_l / sum_j a_j) n_l

at every position. A tap that resembles many others counts less. Adaptations: `n_l` is the layer norm of a horizontal
tuner's output, resized to the last tap; and `w = 0`, `c = 1` at the start, so that redundancy alone sets the weights
and no relu starts dead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .common import resample

_EPSILON = 1e-8


class RedundancyAggregation(nn.Module):
    """Weighted sum of reads of all taps with fewer weights on redundant ones, plus the read of the last tap.

    Args:
        channels: width of the reads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, 1)

    def forward(self, reads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Aggregate reads `(batch, channels, h_l, w_l)`, the last of which sets the size of the result."""
        size = reads[-1].shape[-2:]
        # (batch, h, w, taps, channels)
        normed = torch.stack([_layer_norm(resample(read, size)) for read in reads], dim=1).permute(0, 3, 4, 1, 2)
        shallow, deep = normed[..., :-1, :], normed[..., -1:, :]
        weights = self.weights(shallow, deep)
        aggregated: torch.Tensor = (weights * shallow).sum(-2) + deep.squeeze(-2)
        return aggregated.permute(0, 3, 1, 2)

    def weights(self, shallow: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
        """Return the weight of each shallow tap at every position, `(..., taps, 1)`.

        Args:
            shallow: normalized reads of all taps but the last, `(..., taps, channels)`.
            deep: normalized read of the last tap, `(..., 1, channels)`.
        """
        directions = F.normalize(shallow, dim=-1)
        redundancy = F.relu(directions @ directions.transpose(-1, -2)).sum(-1, keepdim=True)
        # At least 1, the similarity of a tap to itself; a read of zeros has no direction.
        scores = F.relu(self.score(shallow * deep)) / redundancy.clamp(min=_EPSILON)
        return scores / (scores.sum(-2, keepdim=True) + _EPSILON)

    def reset_parameters(self) -> None:
        """Start with equal scores, so that only the redundancy sets the weights."""
        nn.init.zeros_(self.score.weight)
        nn.init.ones_(self.score.bias)


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    """Normalize the channels at each position of `(batch, channels, h, w)`."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)

"""Group-relative advantages, and sums over segments that repeat to the bit.

Shapes: S sequences, P groups of them, N packed tokens. A segment is bounded by two neighbours of an
`offsets` tensor, int64.
"""

import math

import torch
from torch import Tensor


def group_offsets(num_sequences: int, group_size: int, device: torch.device) -> Tensor:
    """Offsets [P+1] of groups of `group_size` consecutive sequences."""
    return torch.arange(0, num_sequences + 1, group_size, device=device)


def segment_sum(values_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment, [S]; 0 for an empty one. Serial in each segment, hence repeatable."""
    return torch.segment_reduce(values_N, "sum", offsets=offsets, unsafe=True, initial=0.0)


def segment_index(offsets: Tensor, length: int) -> Tensor:
    """For each of `length` positions the index of its segment, without a host sync."""
    positions = torch.arange(length, device=offsets.device)
    return torch.searchsorted(offsets[1:], positions, right=True)


def normalized_advantages(
    rewards_S: Tensor, offsets: Tensor, *, scale: str, ddof: int, eps: float
) -> Tensor:
    """Advantages of sequences sorted by group, float64 [S]; `offsets` [P+1] bounds the groups.

    group: (R - mean) / (std + eps) of the group; batch: centred by group, std of all rewards; none:
    R - mean. Statistics are two-pass. NaN rewards leave the statistics and get advantage 0, and so
    does every group without spread, a group of one included.
    Source: Shao et al. 2024 (2402.03300) section 4.1.2; Liu et al. 2025 (2503.20783) section 3.2.
    """
    rewards_S = rewards_S.double()
    group_S = segment_index(offsets, len(rewards_S))
    valid_S = ~rewards_S.isnan()
    filled_S = torch.where(valid_S, rewards_S, 0.0)
    count_P = segment_sum(valid_S.double(), offsets)
    mean_P = segment_sum(filled_S, offsets) / count_P.clamp(min=1)
    centred_S = torch.where(valid_S, rewards_S - mean_P[group_S], 0.0)
    centred_S = torch.where(has_spread(rewards_S, offsets)[group_S], centred_S, 0.0)
    if scale == "none":
        return centred_S
    if scale == "group":
        squares, count = segment_sum(centred_S**2, offsets)[group_S], count_P[group_S]
    else:
        batch_mean = filled_S.sum() / valid_S.sum().clamp(min=1)
        squares = torch.where(valid_S, (rewards_S - batch_mean) ** 2, 0.0).sum()
        count = valid_S.sum()
    std = (squares / (count - ddof).clamp(min=1)).sqrt()
    return torch.where(centred_S == 0, 0.0, centred_S / (std + eps))


def has_spread(rewards_S: Tensor, offsets: Tensor) -> Tensor:
    """bool [P]: whether the group's rewards, NaN aside, are not all equal."""
    nan_S = rewards_S.isnan()
    highest_P, lowest_P = (
        torch.segment_reduce(
            torch.where(nan_S, fill, rewards_S.double()), reduce, offsets=offsets, unsafe=True
        )
        for reduce, fill in (("max", -math.inf), ("min", math.inf))
    )
    return highest_P > lowest_P

"""Logits split over the vocabulary: who owns which column, and how row statistics of shards become
those of the row.

Forward costs two collectives, a maximum of [N] and a sum of [4, N]; backward costs none, because
the gradient of a rank's columns needs nothing but the merged statistics. Shape legend:
`reference.py`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn import Parameter

from kernels.reference import IGNORED, NOT_OWNED

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Columns `start` to `end` (exclusive) of the vocabulary, held by this rank of `group`.

    Shards may be uneven. Logits may have more columns than `end - start`; the rest is padding,
    which is never read (it may hold NaN) and gets gradient 0.
    """

    group: dist.ProcessGroup
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(
                f"VocabShard: expected 0 <= start < end, got start={self.start}, end={self.end}"
            )

    @classmethod
    def from_parts(cls, bounds: list[int], group_name: str) -> "VocabShard | None":
        """The shard of these bounds in the process group of that name; None for no bounds."""
        if not bounds:
            return None
        named: Any = group_name
        return cls(_resolve_process_group(named), *bounds)

    @property
    def width(self) -> int:
        """Number of columns held."""
        return self.end - self.start


def is_dtensor(tensor: Tensor | None) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, whose module takes a second to import."""
    if tensor is None or type(tensor) in (Tensor, Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_logits(
    logits: Tensor, vocab: VocabShard | None, *, inplace: bool
) -> tuple[Tensor, VocabShard | None]:
    """The logits that this rank holds and their columns; see `dtensor.local_part`."""
    if not is_dtensor(logits):
        return logits, vocab
    if vocab is not None:
        raise ValueError(
            "vocab: expected None with DTensor logits, whose placement tells the shard"
        )
    from kernels.dtensor import local_part

    return local_part(logits, inplace)


def check_plain_tensors(**tensors: Tensor | None) -> None:
    """Refuses DTensors where their placement does not say what is meant.

    A weight sharded by rows may be split for memory (FSDP) or for the vocabulary.
    """
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor: call the op in the forward of "
                "the module that fully_shard wraps, or, for a shard of the vocabulary, pass "
                "to_local() and vocab=VocabShard(...)"
            )


def localize(token_ids_N: Tensor, vocab: VocabShard | None) -> Tensor:
    """Global ids to local columns: IGNORED stays, ids of other shards become NOT_OWNED."""
    if vocab is None:
        return token_ids_N
    owned_N = (token_ids_N >= vocab.start) & (token_ids_N < vocab.end)
    elsewhere_N = torch.where(token_ids_N == IGNORED, IGNORED, NOT_OWNED)
    return torch.where(owned_N, token_ids_N - vocab.start, elsewhere_N)


def merge_row_stats(stats_4N: Tensor, token_ids_N: Tensor, vocab: VocabShard | None) -> Tensor:
    """Row statistics of the whole vocabulary from those of each shard; see `reference.row_stats`.

    With M = max_r m_r and f_r = exp(m_r - M): s = sum_r f_r s_r, w = sum_r f_r (w_r + (m_r - M)
    s_r). A target that no shard owns gives a NaN target logit, hence a NaN log-prob.

    Collectives: all_reduce(max) of [N], all_reduce(sum) of [4, N].
    """
    if vocab is None:
        return stats_4N
    max_N, sum_N, weighted_N, target_N = stats_4N.unbind()
    global_max_N = max_N.clone()
    dist.all_reduce(global_max_N, dist.ReduceOp.MAX, group=vocab.group)
    # A shard (or a whole row) at -inf contributes nothing; -inf - -inf would be NaN.
    shift_N = torch.where(max_N == -math.inf, -math.inf, max_N - global_max_N)
    factor_N = shift_N.exp()
    shifted_N = torch.where(factor_N == 0, 0.0, shift_N * sum_N)
    found_N = (token_ids_N != NOT_OWNED).to(sum_N.dtype)
    sums_4N = torch.stack(
        [factor_N * sum_N, factor_N * (weighted_N + shifted_N), target_N, found_N]
    )
    dist.all_reduce(sums_4N, group=vocab.group)
    sum_N, weighted_N, target_N, found_N = sums_4N.unbind()
    target_N = torch.where(found_N == 0, math.nan, target_N)
    return torch.stack([global_max_N, sum_N, weighted_N, target_N])

"""Logits that are DTensors: what this rank holds of them, and which columns those are."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from kernels.sharding import VocabShard


class Waited(torch.autograd.Function):
    """The result of a collective that DTensor left under way, as a tensor with memory to read."""

    @staticmethod
    def forward(ctx: Any, pending: AsyncCollectiveTensor) -> Tensor:
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def local_part(logits: DTensor, inplace: bool) -> tuple[Tensor, VocabShard | None]:
    """The local tensor, whose gradient flows back with the placement of the logits, and its shard.

    Logits may be sharded over their last dimension on one mesh dimension, and are whole (None) on
    each rank otherwise. `inplace` tells that their memory will be overwritten.

    Raises:
        ValueError: another placement, or fewer columns than ranks.
    """
    last = logits.dim() - 1
    sharded = [axis for axis, place in enumerate(logits.placements) if place == Shard(last)]
    num_whole = sum(place == Replicate() for place in logits.placements)
    if len(sharded) > 1 or len(sharded) + num_whole != len(logits.placements):
        raise ValueError(
            f"logits: expected a DTensor placed Replicate(), or Shard(dim={last}) on one mesh "
            f"dimension, got {logits.placements}"
        )
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        # The versions of a DTensor and of its local tensor are counted apart.
        torch.autograd.graph.increment_version(logits)
    local = logits.to_local()
    if isinstance(local, AsyncCollectiveTensor):
        local = Waited.apply(local)
    return local, shard_of_rank(logits, sharded[0]) if sharded else None


def shard_of_rank(logits: DTensor, axis: int) -> VocabShard:
    """The columns of this rank, cut as `torch.chunk` cuts them."""
    mesh, width = logits.device_mesh, logits.shape[-1]
    size = -(-width // mesh.size(axis))
    if size * (mesh.size(axis) - 1) >= width:
        raise ValueError(
            f"logits: expected columns on each of the {mesh.size(axis)} ranks, "
            f"got {width} in parts of {size}"
        )
    start = mesh.get_local_rank(axis) * size
    return VocabShard(mesh.get_group(axis), start, min(start + size, width))

"""Processes and sharding: start-up, FSDP2, collectives on small values, full tensors, the
gradient's norm.

A run of one process has a process group too (gloo, in memory), so that no caller asks how many
ranks there are. Gradients are summed over ranks, never averaged: the loss is already divided by
counts of the whole batch.
"""

import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from kernels import VocabShard
from trainer.config import ShardingOptions, UsageError

T = TypeVar("T")

# The main rank makes the embedded model, minutes long, while the others wait.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
# A main rank that fails may have a checkpoint to finish, or imports, before it says why.
MAIN_RANK_SECONDS = 60.0
# Whole tensors that are in memory at once when weights are gathered.
GATHER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part; the parts of all ranks, in order, are the whole."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]


def start_world(cpu_threads: int | None) -> World:
    """Joins the processes that torchrun started, or stands alone; deterministic algorithms, and so
    many threads, from here on."""
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuBLAS reads it when it is first used, which is later.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling new memory would only guard against reads of it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    store = dist.HashStore() if size == 1 else None
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=rank, world_size=size, store=store, timeout=COLLECTIVE_TIMEOUT
    )
    return World(rank=rank, size=size, device=device)


def stop_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_in_order(world: World, parts: Sequence[T]) -> list[T]:
    """The parts of all ranks, rank by rank, on every rank.

    Collectives: one all-gather of pickled objects.
    """
    if world.size == 1:
        return list(parts)
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, list(parts))
    return [item for of_rank in gathered for item in of_rank]


def sum_over_ranks(world: World, values: Tensor) -> Tensor:
    """Each value summed over ranks; in place.

    Collectives: one all-reduce.
    """
    if world.size > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(world: World, values: Tensor) -> Tensor:
    """The largest of each value over ranks; in place.

    Collectives: one all-reduce.
    """
    if world.size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def any_rank(world: World, condition: bool) -> bool:
    """Whether the condition holds on some rank; the same answer on all.

    Collectives: one all-reduce.
    """
    return bool(sum_over_ranks(world, torch.tensor(int(condition))))


def from_main_rank(world: World, action: Callable[[], T]) -> T:
    """Runs the action on the main rank; its result, or its UsageError, is that of every rank.

    Raises:
        UsageError: the action raised one.
        MainRankFailedError: on the other ranks, when the action raised anything else on the main
            rank.

    Collectives: one broadcast of a pickled object.
    """
    if world.size == 1:
        return action()
    outcome: list[Any] = [MainRankFailedError()]
    try:
        if world.is_main:
            outcome = [action()]
    except UsageError as error:
        outcome = [error]
    finally:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UsageError | MainRankFailedError):
        raise outcome[0]
    return outcome[0]


class MainRankFailedError(Exception):
    """The main rank raised an error that it shows itself."""


def let_main_rank_speak() -> None:
    """On another rank that is about to fail: waits for the main one, which has the same to say.

    torchrun ends all ranks as soon as one exits, so this one must not be the first. It does come
    back on a rank that fails alone, or whose launcher leaves it running.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(MAIN_RANK_SECONDS)


def check_replicate(options: ShardingOptions, ranks: int) -> None:
    """Raises UsageError for ranks that the groups of `--replicate` do not divide."""
    if ranks % options.replicate:
        raise UsageError(
            f"--replicate: expected a divisor of the number of ranks, {ranks}, "
            f"got {options.replicate}"
        )


def shard_model(
    root: nn.Module,
    layers: Iterable[nn.Module],
    world: World,
    dtype: torch.dtype,
    options: ShardingOptions,
) -> None:
    """FSDP2 over `layers` and the rest of `root`, in place; weights stay float32 and compute in
    `dtype`.

    One rank in float32 is left as it is. Gradients of ranks are summed, in float32. With
    `options.replicate` above 1 the weights are sharded within as many groups of ranks (HSDP).
    Weights that are DTensors already are left alone.

    Raises:
        UsageError: ranks that the groups do not divide, or offloading on a CPU.
    """
    check_replicate(options, world.size)
    if options.cpu_offload and world.device.type == "cpu":
        raise UsageError("--cpu-offload: expected a GPU to offload from, got a run on the CPU")
    if world.size == 1 and dtype == torch.float32 and not options.cpu_offload:
        return
    mesh = _mesh(world, options.replicate)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    placed: set[nn.Parameter] = {
        weight for weight in root.parameters() if isinstance(weight, DTensor)
    }
    for module in (*layers, root):
        sharded = fully_shard(
            module, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params=placed
        )
        sharded.set_gradient_divide_factor(1.0)
        # gloo has neither an average nor a scaled sum.
        sharded.set_force_sum_reduction_for_comms(True)


def _mesh(world: World, replicate: int) -> DeviceMesh:
    shape, names = (world.size // replicate,), ("shard",)
    if replicate == 1:
        return init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    return init_device_mesh(
        world.device.type, (replicate, *shape), mesh_dim_names=("replicate", *names)
    )


def shard_head(model: PreTrainedModel, world: World) -> VocabShard:
    """Shards the output layer over the vocabulary, in place: each rank keeps whole rows of it.

    Raises:
        UsageError: the embedding shares the weight.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        raise UsageError(
            "--shard-head: expected a model with an output layer of its own, got one that shares "
            "the embedding"
        )
    mesh = _mesh(world, replicate=1)
    for name, weight in list(head.named_parameters()):
        rows = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        setattr(head, name, nn.Parameter(rows, requires_grad=weight.requires_grad))
    width = -(-head.weight.shape[0] // world.size)
    bounds = [min(width * rank, head.weight.shape[0]) for rank in (world.rank, world.rank + 1)]
    return VocabShard(mesh.get_group(), *bounds)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded.

    Collectives: one all-gather where it is.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(
    named: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = GATHER_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, on every rank; all ranks must draw them together.

    Args:
        named: tensors that may be sharded.
        dtype: to convert to before they travel; None keeps theirs.
        bucket_bytes: tensors are gathered together until they have this size.

    Collectives: one all-gather per bucket, and one per tensor that is sharded in another way than
    by FSDP2.
    """
    bucket: list[tuple[str, Tensor]] = []
    waiting_bytes = 0
    for name, tensor in named:
        tensor = tensor.detach()
        bucket.append((name, tensor if dtype is None else tensor.to(dtype)))
        waiting_bytes += bucket[-1][1].nbytes
        if waiting_bytes >= bucket_bytes:
            yield from _gathered(bucket)
            bucket, waiting_bytes = [], 0
    yield from _gathered(bucket)


def _gathered(bucket: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    alike: dict[tuple[DeviceMesh, int, torch.dtype], dict[str, DTensor]] = {}
    for name, tensor in bucket:
        if isinstance(tensor, DTensor) and (axis := _row_shard_axis(tensor)) is not None:
            alike.setdefault((tensor.device_mesh, axis, tensor.dtype), {})[name] = tensor
    whole: dict[str, Tensor] = {}
    for (mesh, axis, _), tensors in alike.items():
        whole |= _gather_rows(tensors, mesh, axis)
    for name, tensor in bucket:
        yield name, whole.pop(name) if name in whole else full_tensor(tensor)


def _row_shard_axis(tensor: DTensor) -> int | None:
    """The mesh axis that the rows are sharded over as FSDP2 does it; None where they are sharded in
    another way."""
    kinds = [type(placement) for placement in tensor.placements]
    if kinds.count(Shard) != 1 or kinds.count(Replicate) != len(kinds) - 1:
        return None
    axis = kinds.index(Shard)
    return axis if tensor.placements[axis].is_shard(dim=0) else None


def _gather_rows(tensors: Mapping[str, DTensor], mesh: DeviceMesh, axis: int) -> dict[str, Tensor]:
    """One all-gather for tensors whose ranks hold as many rows each, the last ones fewer."""
    ranks = mesh.size(axis)
    padded = []
    for tensor in tensors.values():
        rows = -(-tensor.shape[0] // ranks)
        shard = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        local = tensor.to_local()
        shard[: len(local)] = local
        padded.append(shard)
    packed_N = torch.cat([shard.flatten() for shard in padded])
    gathered_RN = packed_N.new_empty(ranks, len(packed_N))
    dist.all_gather(list(gathered_RN), packed_N, group=mesh.get_group(axis))
    by_tensor = gathered_RN.split([shard.numel() for shard in padded], dim=1)
    return {
        name: part.reshape(-1, *tensor.shape[1:])[: tensor.shape[0]]
        for (name, tensor), part in zip(tensors.items(), by_tensor, strict=True)
    }


def weights_checksum(world: World, named: Iterable[tuple[str, Tensor]]) -> str:
    """A fingerprint of the bits of weights, the same however they are sharded: per tensor the sum
    of its elements, read as 32-bit integers, modulo 2^32.

    Collectives: one all-reduce.
    """
    names, sums = [], []
    for name, weight in named:
        local, is_counted = weight.detach(), world.is_main
        if isinstance(local, DTensor):
            placed = zip(local.device_mesh.get_coordinate() or (), local.placements, strict=True)
            is_counted = all(place == 0 for place, kind in placed if kind.is_replicate())
            local = local.to_local()
        bits = local.contiguous().view(torch.int32).sum(dtype=torch.int32)
        names.append(name)
        sums.append(bits.long() * is_counted)
    totals = sum_over_ranks(world, torch.stack(sums)).remainder(2**32).tolist()
    return hashlib.sha256(json.dumps([names, totals]).encode()).hexdigest()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of the whole gradient, a 0-d float32 tensor; nan or inf where the gradient
    holds one.

    Collectives: one all-reduce where it is sharded.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return full_tensor(nn.utils.get_total_norm(gradients))

"""Logits that are DTensors, sharded over the vocabulary: values, gradients and collectives."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor
from torch.autograd.profiler import profile
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kernels
from kernels import LossSpec, VocabShard
from kernels.testing import GrpoBatch, backends_on, grpo_batch

WIDTH, PADDING, TOKENS = 61, 3, 16
SPECS = (
    LossSpec.preset("dapo", kl="k3", kl_weight=0.1, entropy_weight=0.01),
    LossSpec.preset("gspo"),
)


def check_rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    batch = grpo_batch(TOKENS, WIDTH, torch.float32)
    # A vocabulary padded to a multiple of something, as models have it: 64 columns in even parts,
    # without the padding uneven ones.
    padded = torch.nn.functional.pad(batch.logits_NV, (0, PADDING), value=-math.inf)
    for backend in backends_on("cpu"):
        check_packed(batch.logits_NV, batch, mesh, [Shard(-1)], True, backend)
        check_padded_batch(batch, mesh, backend)
        check_collectives(batch, mesh, backend)
    check_packed(batch.logits_NV, batch, mesh, [Shard(1)], False, "auto")
    check_packed(padded, batch, mesh, [Shard(1)], True, "auto")
    if world_size == 4:
        square = init_device_mesh("cpu", (2, 2))
        check_packed(padded, batch, square, [Replicate(), Shard(1)], True, "auto")
        check_packed(padded, batch, square, [Shard(1), Replicate()], False, "auto")
    check_replicated(batch, mesh)
    check_overwritten_logits_are_noticed(batch, mesh)
    check_other_placements_are_refused(batch, mesh)
    dist.destroy_process_group()


def collectives(recorded: profile) -> dict[str, int]:
    """How often each collective ran, as gloo itself records them."""
    return {
        event.key: event.count for event in recorded.key_averages() if event.key.startswith("gloo:")
    }


def loss_of(logits: Tensor, batch: GrpoBatch, spec: LossSpec, **options: Any) -> Any:
    return kernels.policy_loss(
        logits,
        batch.token_ids_N,
        batch.old_logprobs_N,
        ref_logprobs=batch.ref_logprobs_N,
        rewards=batch.rewards_S,
        group_size=batch.group_size,
        cu_seqlens=batch.cu_seqlens,
        spec=spec,
        **options,
    )


def check_packed(
    logits: Tensor,
    batch: GrpoBatch,
    mesh: DeviceMesh,
    placements: list,
    inplace: bool,
    backend: str,
) -> None:
    for spec in SPECS:
        whole = logits.clone().requires_grad_()
        want = loss_of(whole, batch, spec, backend=backend)
        want.loss.backward()
        part = distribute_tensor(logits.clone(), mesh, placements).requires_grad_()
        got = loss_of(part, batch, spec, inplace_backward=inplace, backend=backend)
        (2 * got.loss).backward()
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)
        check_gradient(part, 2 * whole.grad)


def check_gradient(part: Tensor, want: Tensor) -> None:
    assert isinstance(part, DTensor) and isinstance(part.grad, DTensor)
    assert part.grad.placements == part.placements and part.grad.shape == part.shape
    torch.testing.assert_close(part.grad.full_tensor(), want, rtol=1e-4, atol=1e-7)


def check_padded_batch(batch: GrpoBatch, mesh: DeviceMesh, backend: str) -> None:
    """Log-probs and entropy of logits [B, T, V], bfloat16."""
    logits = batch.logits_NV.bfloat16().view(4, 4, WIDTH)
    ids = batch.token_ids_N.view(4, 4)
    results = []
    for sharded in (False, True):
        leaf = distribute_tensor(logits, mesh, [Shard(2)]) if sharded else logits.clone()
        leaf.requires_grad_()
        out = kernels.token_logprobs(leaf, ids, with_entropy=True, backend=backend)
        (out.logprobs.sin() + out.entropy).sum().backward()
        results.append((out.logprobs, out.entropy, leaf))
    (want, want_entropy, whole), (got, entropy, part) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-5, atol=1e-5)
    assert part.grad.placements == (Shard(2),)
    torch.testing.assert_close(part.grad.full_tensor(), whole.grad, rtol=8e-3, atol=1e-6)


def check_collectives(batch: GrpoBatch, mesh: DeviceMesh, backend: str) -> None:
    part = distribute_tensor(batch.logits_NV, mesh, [Shard(1)]).requires_grad_()
    for op in (
        lambda: loss_of(part, batch, SPECS[0], backend=backend).loss,
        lambda: kernels.token_logprobs(part, batch.token_ids_N, backend=backend).logprobs.sum(),
    ):
        with profile() as forward:
            loss = op()
        with profile() as backward:
            loss.backward()
        assert collectives(forward) == {"gloo:all_reduce": 2}
        assert collectives(backward) == {}


def check_replicated(batch: GrpoBatch, mesh: DeviceMesh) -> None:
    """Replicated logits need no collective; a gather still under way is waited for."""
    whole = batch.logits_NV.clone().requires_grad_()
    want = loss_of(whole, batch, SPECS[0]).loss
    want.backward()
    part = distribute_tensor(batch.logits_NV, mesh, [Shard(1)]).requires_grad_()
    pending = part.redistribute(placements=[Replicate()], async_op=True)
    with profile() as forward:
        loss = loss_of(pending, batch, SPECS[0]).loss
    assert collectives(forward) == {}
    loss.backward()
    torch.testing.assert_close(loss, want)
    check_gradient(part, whole.grad)


def check_overwritten_logits_are_noticed(batch: GrpoBatch, mesh: DeviceMesh) -> None:
    leaf = distribute_tensor(batch.logits_NV, mesh, [Shard(1)]).requires_grad_()
    logits = leaf * 1.0
    other = (logits**2).sum()
    loss = loss_of(logits, batch, SPECS[0], inplace_backward=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other.full_tensor() + loss).backward()


def check_other_placements_are_refused(batch: GrpoBatch, mesh: DeviceMesh) -> None:
    ids = batch.token_ids_N
    for placement in (Partial(), Shard(0)):
        logits = DTensor.from_local(batch.logits_NV, mesh, [placement], run_check=False)
        with pytest.raises(ValueError, match=r"logits: expected a DTensor placed Replicate\(\)"):
            kernels.token_logprobs(logits, ids)
    sharded = distribute_tensor(batch.logits_NV, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="vocab: expected None with DTensor logits"):
        kernels.token_logprobs(sharded, ids, vocab=VocabShard(dist.group.WORLD, 0, 5))
    narrow = distribute_tensor(torch.zeros(2, mesh.size() + 1), mesh, [Shard(1)])
    if mesh.size() == 4:
        with pytest.raises(ValueError, match="logits: expected columns on each of the 4 ranks"):
            kernels.token_logprobs(narrow, ids[:2])


@pytest.mark.parametrize("world_size", [2, 4])
def test_dtensor_logits_equal_whole_logits(world_size: int, tmp_path: Path) -> None:
    spawn_ranks(check_rank, world_size, world_size, str(tmp_path / "store"))

"""GRPO with k3, from raw rewards to the gradient by the logits: each backend against PyTorch.

Every implementation gets the same ready buffer; ours writes the gradient into it. A case first
shows its error against float64, then its peak memory, then its time.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from harness import copy_seconds, let_threads_rest, peak_extra_bytes
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import GrpoBatch, eager_policy_loss, grpo_batch, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(512, 49152), (256, 151936)] if DEVICE == "cpu" else [(8192, 49152), (8192, 151936)]
DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["eager", "compile", "reference", "cpp", "triton", "cuda"]
SPEC = LossSpec(kl="k3", kl_weight=0.04)
ROUNDS = 15


@cache
def batch_and_truth(
    num_tokens: int, width: int, dtype: torch.dtype
) -> tuple[GrpoBatch, Tensor, float]:
    """The batch, its gradient in float64, and the time of a copy of its logits."""
    batch = grpo_batch(num_tokens, width, dtype, device=DEVICE)
    leaf = batch.logits_NV.double().requires_grad_()
    eager_policy_loss(leaf, batch).backward()
    assert leaf.grad is not None
    return batch, leaf.grad, copy_seconds(batch.logits_NV)


def implementation_of(name: str, batch: GrpoBatch) -> Callable[[Tensor], Tensor]:
    """Loss of a leaf of logits; skips what cannot run here."""
    if name == "eager":
        return lambda leaf: eager_policy_loss(leaf, batch)
    if name == "compile":
        compiled = torch.compile(eager_policy_loss)
        return lambda leaf: compiled(leaf, batch)
    reason = kernels.available_backends()[name]
    if reason != "available":
        pytest.skip(f"{name}: {reason}")
    if name == "triton" and DEVICE == "cpu":
        pytest.skip("triton: its interpreter is for tests, not for timing")
    if name == "cpp" and DEVICE == "cuda":
        pytest.skip("cpp: runs on the CPU")
    return lambda leaf: (
        kernels.policy_loss(
            leaf,
            batch.token_ids_N,
            batch.old_logprobs_N,
            spec=SPEC,
            rewards=batch.rewards_S,
            group_size=batch.group_size,
            cu_seqlens=batch.cu_seqlens,
            ref_logprobs=batch.ref_logprobs_N,
            inplace_backward=True,
            backend=name,
        ).loss
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_policy_loss(
    benchmark: object, shape: tuple[int, int], dtype: torch.dtype, implementation: str
) -> None:
    batch, truth, copy = batch_and_truth(*shape, dtype)
    loss_of = implementation_of(implementation, batch)
    buffer = torch.empty_like(batch.logits_NV)

    def restore() -> tuple[tuple[Tensor], dict[str, object]]:
        buffer.copy_(batch.logits_NV)
        let_threads_rest()
        return (buffer.detach().requires_grad_(),), {}

    def step(leaf: Tensor) -> Tensor:
        loss_of(leaf).backward()
        if leaf.is_cuda:
            torch.cuda.synchronize()
        assert leaf.grad is not None
        return leaf.grad

    (leaf,), _ = restore()
    error = relative_error(step(leaf), truth)
    (leaf,), _ = restore()
    peak = peak_extra_bytes(lambda: step(leaf))
    benchmark.extra_info.update(
        case=f"policy_loss {str(dtype).removeprefix('torch.')} {list(shape)}",
        implementation=implementation,
        copy_seconds=copy,
        bytes_moved=2 * batch.logits_NV.nbytes,
        error=error,
        peak_bytes=peak,
    )
    benchmark.pedantic(step, setup=restore, rounds=ROUNDS, warmup_rounds=2)

"""Log-probs of sampled tokens and entropy from ready logits, forward alone and with backward."""

from functools import partial

import pytest
import torch
from harness import (
    CHECKED_SHAPES,
    DEVICE,
    DTYPES,
    Case,
    Compete,
    Factory,
    Implementation,
    copy_ceiling,
    our_backends,
    shape_params,
)
from rivals import plain_rivals, trl_token_logprobs
from torch import Tensor

import kernels
from kernels.testing import GrpoLogits, eager_logprobs, eager_logprobs_and_entropy, grpo_batch

if DEVICE == "cpu":
    TIMED, FULL = [(512, 49152)], [(768, 32000), (256, 129920), (256, 151936), (128, 262144)]
else:
    TIMED, FULL = [(8192, 151936)], [(8192, 32000), (8192, 49152), (8192, 129920), (8192, 262144)]


def ours(batch: GrpoLogits, entropy: bool, *, backend: str, inplace: bool) -> Implementation:
    def implementation(logits_NV: Tensor) -> tuple[Tensor, ...]:
        out = kernels.token_logprobs(
            logits_NV,
            batch.token_ids_N,
            with_entropy=entropy,
            inplace_backward=inplace,
            backend=backend,
        )
        return (out.logprobs, out.entropy)[: 1 + entropy]

    return implementation


def plain(token_ids_N: Tensor, entropy: bool, logits_NV: Tensor) -> tuple[Tensor, ...]:
    if entropy:
        return eager_logprobs_and_entropy(logits_NV, token_ids_N)
    return (eager_logprobs(logits_NV, token_ids_N),)


def case_of(
    shape: tuple[int, int], dtype: torch.dtype, *, entropy: bool, backward: bool
) -> tuple[Case, dict[str, Factory]]:
    """One call, and who computes it."""
    batch = grpo_batch(*shape, dtype, device=DEVICE)
    ids_N, num_tokens, nbytes = batch.token_ids_N, shape[0], batch.logits_NV.nbytes
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(1 + entropy, num_tokens, generator=generator).to(DEVICE) / num_tokens
    case = Case(
        op="token_logprobs" + " + entropy" * entropy + (", backward" if backward else ", forward"),
        dtype=dtype,
        shape=shape,
        inputs={"logits": batch.logits_NV},
        outputs=("logprobs", "entropy")[: 1 + entropy],
        upstream=tuple(upstream) if backward else (),
        plain=partial(plain, ids_N, entropy),
        # One read of the logits, and one write of the gradient.
        work=2 * nbytes if backward else nbytes,
        ceilings={"copy": copy_ceiling(batch.logits_NV)},
        ceiling_work=2 * nbytes,
        unit="GB/s",
    )
    factories = plain_rivals(case.plain, dtype)
    factories["trl"] = partial(trl_token_logprobs, ids_N, len(batch.rewards_S), entropy=entropy)
    make = partial(ours, batch, entropy)
    return case, factories | our_backends(make, num_tokens, inplace=backward)


@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shape_params([], TIMED, FULL))
def bench_forward(
    contest: Compete, shape: tuple[int, int], dtype: torch.dtype, entropy: bool
) -> None:
    contest(*case_of(shape, dtype, entropy=entropy, backward=False))


@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shape_params(CHECKED_SHAPES, TIMED, FULL))
def bench_backward(
    contest: Compete, shape: tuple[int, int], dtype: torch.dtype, entropy: bool
) -> None:
    contest(*case_of(shape, dtype, entropy=entropy, backward=True))

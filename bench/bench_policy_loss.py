"""Policy losses from raw rewards and ready logits to the gradient by the logits.

GRPO with k3 is fused in one launch; an entropy bonus adds the entropy's gradient, and GSPO couples
the tokens of a sequence.
"""

from functools import partial

import pytest
import torch
from harness import (
    CHECKED_SHAPES,
    CHECKED_TOKENS,
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
from rivals import plain_rivals, trl_policy_loss
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import GRPO_K3, GrpoLogits, eager_policy_loss, grpo_batch

if DEVICE == "cpu":
    TIMED = [(512, 49152), (256, 151936)]
    FULL = [(768, 32000), (256, 129920), (128, 262144)]
else:
    TIMED = [(8192, 49152), (8192, 151936)]
    FULL = [(8192, 32000), (8192, 129920), (8192, 262144)]
# By default the other losses run on one vocabulary.
OTHERS_CHECKED, OTHERS_TIMED = [(CHECKED_TOKENS, 49152)], TIMED[:1]
OTHERS_FULL = [
    shape for shape in CHECKED_SHAPES + TIMED + FULL if shape not in OTHERS_CHECKED + OTHERS_TIMED
]
OTHER_LOSSES = {
    "grpo + k3 + entropy": LossSpec(kl="k3", kl_weight=0.04, entropy_weight=0.01),
    "gspo": LossSpec.preset("gspo"),
}


def ours(batch: GrpoLogits, spec: LossSpec, *, backend: str, inplace: bool) -> Implementation:
    def implementation(logits_NV: Tensor) -> tuple[Tensor, ...]:
        out = kernels.policy_loss(
            logits_NV,
            batch.token_ids_N,
            batch.old_logprobs_N,
            spec=spec,
            rewards=batch.rewards_S,
            group_size=batch.group_size,
            cu_seqlens=batch.cu_seqlens,
            ref_logprobs=batch.ref_logprobs_N,
            inplace_backward=inplace,
            backend=backend,
        )
        return (out.loss,)

    return implementation


def case_of(
    name: str, spec: LossSpec, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Case, dict[str, Factory]]:
    """One loss, and who computes it."""
    batch = grpo_batch(*shape, dtype, device=DEVICE)
    nbytes = batch.logits_NV.nbytes
    case = Case(
        op=f"policy_loss {name}",
        dtype=dtype,
        shape=shape,
        inputs={"logits": batch.logits_NV},
        outputs=("loss",),
        upstream=(torch.ones((), device=DEVICE),),
        plain=lambda logits_NV: (eager_policy_loss(logits_NV, batch, spec),),
        # One read of the logits and one write of the gradient.
        work=2 * nbytes,
        ceilings={"copy": copy_ceiling(batch.logits_NV)},
        ceiling_work=2 * nbytes,
        unit="GB/s",
    )
    factories = plain_rivals(case.plain, dtype)
    factories["trl"] = partial(trl_policy_loss, batch, spec)
    make = partial(ours, batch, spec)
    return case, factories | our_backends(make, shape[0], inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shape_params(CHECKED_SHAPES, TIMED, FULL))
def bench_grpo_k3(
    contest: Compete,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    contest(*case_of("grpo + k3", GRPO_K3, shape, dtype))


@pytest.mark.parametrize("loss", OTHER_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shape_params(OTHERS_CHECKED, OTHERS_TIMED, OTHERS_FULL))
def bench_other_losses(
    contest: Compete,
    shape: tuple[int, int],
    dtype: torch.dtype,
    loss: str,
) -> None:
    contest(*case_of(loss, OTHER_LOSSES[loss], shape, dtype))

"""The claim about policy losses on ready logits, with Liger's Triton kernel among the rivals.

Liger reads logits [S, T + 1, V] and ignores the last position, so everybody gets those; ours marks
it as ignored. TRL and the other claims are in `bench_policy_loss.py` and `bench_linear.py`, at the
shapes of a GPU.
"""

from functools import partial

import pytest
import torch
from harness import DEVICE, Case, Compete, Factory, Implementation, our_backends, require_package
from rivals import plain_rivals
from torch import Tensor
from torch.nn.functional import pad

import kernels
from kernels.testing import GRPO_K3, GrpoBatch, eager_advantages, eager_policy_loss, grpo_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device"),
]

NUM_SEQUENCES, NUM_TOKENS, WIDTH = 8, 8192, 151936


def scored(logits_STV: Tensor) -> Tensor:
    """The logits of tokens, [N, V], as a copy."""
    return logits_STV[:, :-1].flatten(0, 1)


def ours(batch: GrpoBatch, *, backend: str, inplace: bool) -> Implementation:
    def shaped(values_N: Tensor, last: int) -> Tensor:
        return pad(values_N.view(NUM_SEQUENCES, -1), (0, 1), value=last)

    ids_ST = shaped(batch.token_ids_N, -100)
    old_ST, ref_ST = shaped(batch.old_logprobs_N, 0), shaped(batch.ref_logprobs_N, 0)

    def implementation(logits_STV: Tensor) -> tuple[Tensor, ...]:
        out = kernels.policy_loss(
            logits_STV,
            ids_ST,
            old_ST,
            spec=GRPO_K3,
            rewards=batch.rewards_S,
            group_size=batch.group_size,
            ref_logprobs=ref_ST,
            inplace_backward=inplace,
            backend=backend,
        )
        return (out.loss,)

    return implementation


def liger(batch: GrpoBatch) -> Implementation:
    """liger-kernel 0.8.5, gradient in place of the logits, as it is by default."""
    require_package("liger_kernel")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = NUM_SEQUENCES, -1
    advantages_S = eager_advantages(batch.rewards_S, batch.group_size)

    def implementation(logits_STV: Tensor) -> tuple[Tensor, ...]:
        loss, _ = triton_grpo_loss(
            logits_STV,
            batch.old_logprobs_N.view(shape),
            batch.ref_logprobs_N.view(shape),
            batch.token_ids_N.view(shape),
            advantages_S,
            temperature=1.0,
            beta=GRPO_K3.kl_weight,
            eps_low=GRPO_K3.clip_low,
            eps_high=GRPO_K3.clip_high,
            loss_type="grpo",
            reduce=True,
        )
        return (loss,)

    return implementation


def bench_grpo_k3_against_liger(contest: Compete) -> None:
    batch = grpo_batch(NUM_TOKENS, WIDTH, torch.bfloat16, device=DEVICE)
    logits_STV = batch.logits_NV.view(NUM_SEQUENCES, -1, WIDTH)
    padded_STV = torch.cat([logits_STV, logits_STV[:, :1]], dim=1)
    nbytes = batch.logits_NV.nbytes
    target_STV = torch.empty_like(logits_STV)
    case = Case(
        op="policy_loss grpo + k3, [S, T + 1, V]",
        dtype=torch.bfloat16,
        shape=(NUM_TOKENS, WIDTH),
        inputs={"logits": padded_STV},
        outputs=("loss",),
        upstream=(torch.ones((), device=DEVICE),),
        plain=lambda logits_STV: (eager_policy_loss(scored(logits_STV), batch),),
        work=2 * nbytes,
        ceilings={"copy": lambda: target_STV.copy_(logits_STV)},
        ceiling_work=2 * nbytes,
        unit="GB/s",
    )
    factories: dict[str, Factory] = plain_rivals(case.plain, case.dtype)
    factories["liger"] = partial(liger, batch)
    contest(case, factories | our_backends(partial(ours, batch), NUM_TOKENS, inplace=True))

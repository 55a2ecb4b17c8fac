"""What other people run today: torch.compile, `linear_cross_entropy`, TRL and Liger.

Each function returns an implementation or raises `Unavailable`. Signatures are those of trl 1.16
and liger-kernel 0.8.5. Liger's Triton GRPO loss is missing: it reads logits [B, T + 1, V], to which
the logits of the others would have to be copied.
"""

import torch
from harness import PLAIN, UPCAST, Factory, Implementation, Unavailable, require_package
from torch import Tensor
from torch.nn import functional

from kernels.spec import LossSpec
from kernels.testing import GrpoBatch, eager_advantages, eager_loss

# TRL's own width of a block of the vocabulary (trl/trainer/utils.py).
TRL_CHUNK = 32768


def plain_rivals(plain: Implementation, dtype: torch.dtype) -> dict[str, Factory]:
    """Plain PyTorch as it is, on float32 copies of the inputs, and compiled.

    torch.compile specialises itself to the case: nothing is left of the graphs of earlier cases.
    """

    def compiled() -> Implementation:
        torch._dynamo.reset()
        return torch.compile(plain)

    def upcast(*inputs: Tensor) -> tuple[Tensor, ...]:
        return plain(*(tensor.float() for tensor in inputs))

    factories: dict[str, Factory] = {PLAIN: lambda: plain, "compile": compiled}
    if dtype != torch.float32:
        factories[UPCAST] = lambda: upcast
    return factories


def trl_token_logprobs(token_ids_N: Tensor, num_sequences: int, *, entropy: bool) -> Implementation:
    """TRL's log-probs (and entropy): Triton on a GPU, a loop over sequences on a CPU."""
    require_package("trl")
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    ids_ST = token_ids_N.view(num_sequences, -1)

    def implementation(logits_NV: Tensor) -> tuple[Tensor, ...]:
        logits_STV = logits_NV.view(*ids_ST.shape, -1)
        if not entropy:
            return (selective_log_softmax(logits_STV, ids_ST).flatten(),)
        logprobs_ST, entropy_ST = selective_log_softmax_and_entropy(logits_STV, ids_ST)
        return logprobs_ST.flatten(), entropy_ST.flatten()

    return implementation


def trl_policy_loss(batch: GrpoBatch, spec: LossSpec) -> Implementation:
    """TRL's log-probs, and the loss in plain PyTorch as its trainer has it."""
    entropy = spec.entropy_weight != 0
    logprobs_of = trl_token_logprobs(batch.token_ids_N, len(batch.rewards_S), entropy=entropy)

    def implementation(logits_NV: Tensor) -> tuple[Tensor, ...]:
        logprobs_N, *entropy_N = logprobs_of(logits_NV)
        return (eager_loss(logprobs_N, entropy_N[0] if entropy else None, batch, spec),)

    return implementation


def trl_linear_token_logprobs(token_ids_N: Tensor) -> Implementation:
    """TRL's fused LM head, which computes blocks of logits again in backward."""
    require_package("trl")
    from trl.kernels import ChunkedLogProbFunction

    return lambda hidden_ND, weight_VD: ChunkedLogProbFunction.apply(
        hidden_ND, weight_VD, None, token_ids_N, 1.0, TRL_CHUNK, None, 1.0, ()
    )[:1]


def trl_linear_policy_loss(batch: GrpoBatch, spec: LossSpec) -> Implementation:
    """TRL's fused LM head, and the loss in plain PyTorch as its trainer has it."""
    logprobs_of = trl_linear_token_logprobs(batch.token_ids_N)
    return lambda hidden_ND, weight_VD: (
        eager_loss(*logprobs_of(hidden_ND, weight_VD), None, batch, spec),
    )


def torch_linear_cross_entropy(token_ids_N: Tensor, reduction: str) -> Implementation:
    """`torch.nn.functional.linear_cross_entropy` in chunks (torch 2.13 and later).

    With reduction "mean" it computes its gradient in forward; with "none" it computes the logits
    again in backward.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden_ND, weight_VD: (
        functional.linear_cross_entropy(
            hidden_ND, weight_VD, token_ids_N, reduction=reduction, options=options
        ),
    )


def liger_linear_policy_loss(batch: GrpoBatch, spec: LossSpec) -> Implementation:
    """Liger's fused linear GRPO loss, PyTorch throughout: one sequence a chunk, its default."""
    require_package("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = len(batch.rewards_S), -1
    ids_ST = batch.token_ids_N.view(shape)
    advantages_S = eager_advantages(batch.rewards_S, batch.group_size)
    loss_of = LigerFusedLinearGRPOLoss(
        beta=spec.kl_weight,
        epsilon_low=spec.clip_low,
        epsilon_high=spec.clip_high,
        loss_type="grpo",
        importance_sampling_level=spec.ratio_level,
    )

    def implementation(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        loss, _ = loss_of(
            hidden_ND.view(*ids_ST.shape, -1),
            weight_VD,
            ids_ST,
            torch.ones_like(ids_ST),
            advantages_S,
            ref_per_token_logps=batch.ref_logprobs_N.view(shape),
            old_per_token_logps=batch.old_logprobs_N.view(shape),
        )
        return (loss,)

    return implementation

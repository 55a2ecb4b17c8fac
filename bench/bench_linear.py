"""From hidden states and the weight of the LM head to gradients by both: logits are never ready.

The ceiling is three bare matrix products on buffers that exist already, logits included: hidden @
weight.T, gradient @ weight, gradient.T @ hidden. A CPU without bfloat16 products computes them
orders of magnitude slower than in float32, so that the float32 ones are the ceiling there, and
bfloat16 is timed on a few tokens only. The largest case on a CPU, seconds a round, is between plain
PyTorch, ours and the ceiling; the others meet on fewer tokens.
"""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from harness import (
    CHECKED_TOKENS,
    DEVICE,
    DTYPES,
    PLAIN,
    VOCABULARIES,
    Case,
    Compete,
    Factory,
    Implementation,
    our_backends,
    seconds_of,
    shape_params,
)
from rivals import (
    liger_linear_policy_loss,
    plain_rivals,
    torch_linear_cross_entropy,
    trl_linear_policy_loss,
    trl_linear_token_logprobs,
)
from torch import Tensor
from torch.nn import functional

import kernels
from kernels import LossSpec
from kernels.testing import (
    GRPO_K3,
    GrpoHidden,
    eager_logprobs,
    eager_policy_loss,
    grpo_hidden_batch,
)

# Tokens, model width, vocabulary.
CHECKED = [(CHECKED_TOKENS, 64, width) for width in VOCABULARIES]
if DEVICE == "cpu":
    SMALL, CLAIMED, OTHERS = (16, 576, 49152), (4096, 576, 49152), (512, 576, 49152)
    FULL = [(1024, 896, 151936), (1024, 640, 262144)]
else:
    SMALL, CLAIMED, OTHERS = (1024, 4096, 151936), (8192, 4096, 151936), (8192, 4096, 151936)
    FULL = [(8192, 4096, width) for width in (32000, 49152, 129920, 262144)]
MEAN_NLL = LossSpec(surrogate="reinforce", aggregation="token_mean")


@cache
def emulates(dtype: torch.dtype) -> bool:
    """Whether products of the dtype are so slow here that the hardware cannot have them."""

    def seconds(dtype: torch.dtype) -> float:
        operand = torch.ones(256, 256, dtype=dtype, device=DEVICE)
        return min(seconds_of(lambda: operand @ operand) for _ in range(3))

    return dtype != torch.float32 and seconds(dtype) > 2 * seconds(torch.float32)


def bare_products(hidden_ND: Tensor, weight_VD: Tensor) -> Callable[[], None]:
    """The three products between buffers that exist."""
    logits_NV = hidden_ND.new_zeros(len(hidden_ND), len(weight_VD))
    grad_hidden_ND, grad_weight_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def products() -> None:
        torch.mm(hidden_ND, weight_VD.t(), out=logits_NV)
        torch.mm(logits_NV, weight_VD, out=grad_hidden_ND)
        torch.mm(logits_NV.t(), hidden_ND, out=grad_weight_VD)

    return products


def is_emulated(contest: Compete, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a case is left out because its products would take minutes."""
    left_out = shape[0] > SMALL[0] and emulates(dtype)
    if left_out:
        contest.leave_out(
            f"{op}, bfloat16 {list(shape)}",
            f"bfloat16 products are emulated on this CPU: timed on {SMALL[0]} tokens only",
        )
    return left_out


def linear_case(
    op: str,
    batch: GrpoHidden,
    plain: Implementation,
    output: str = "loss",
    upstream: Tensor | None = None,
) -> Case:
    """A case whose implementations take hidden states and weight and return one output."""
    hidden_ND, weight_VD = batch.hidden_ND, batch.weight_VD
    (num_tokens, model_width), width = hidden_ND.shape, len(weight_VD)
    flop = 6.0 * num_tokens * model_width * width
    dtype = torch.float32 if emulates(hidden_ND.dtype) else hidden_ND.dtype
    products = bare_products(hidden_ND.to(dtype), weight_VD.to(dtype))
    return Case(
        op=op,
        dtype=hidden_ND.dtype,
        shape=(num_tokens, model_width, width),
        inputs={"hidden": hidden_ND, "weight": weight_VD},
        outputs=(output,),
        upstream=(torch.ones((), device=DEVICE) if upstream is None else upstream,),
        plain=plain,
        work=flop,
        ceilings={f"3 products, {str(dtype).removeprefix('torch.')}": products},
        ceiling_work=flop,
        unit="TFLOP/s",
    )


def with_backends(
    case: Case, rivals: dict[str, Factory], make: Callable[..., Implementation]
) -> dict[str, Factory]:
    """Everyone who can take part in a case."""

    factories = plain_rivals(case.plain, case.dtype) | rivals
    if DEVICE == "cpu" and case.shape == CLAIMED:
        factories = {PLAIN: factories[PLAIN]}
    return factories | our_backends(make, case.shape[0], inplace=False)


def ours(batch: GrpoHidden, spec: LossSpec, *, backend: str, inplace: bool) -> Implementation:
    def implementation(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        out = kernels.linear_policy_loss(
            hidden_ND,
            weight_VD,
            batch.token_ids_N,
            batch.old_logprobs_N,
            spec=spec,
            rewards=batch.rewards_S,
            group_size=batch.group_size,
            cu_seqlens=batch.cu_seqlens,
            ref_logprobs=batch.ref_logprobs_N,
            backend=backend,
        )
        return (out.loss,)

    return implementation


def our_nll(batch: GrpoHidden, *, backend: str, inplace: bool) -> Implementation:
    """The mean NLL is the REINFORCE loss of advantages of 1."""
    ones_N = torch.ones_like(batch.old_logprobs_N)

    def implementation(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        out = kernels.linear_policy_loss(
            hidden_ND,
            weight_VD,
            batch.token_ids_N,
            None,
            spec=MEAN_NLL,
            advantages=ones_N,
            backend=backend,
        )
        return (out.loss,)

    return implementation


def our_logprobs(batch: GrpoHidden, *, backend: str, inplace: bool) -> Implementation:
    return lambda hidden_ND, weight_VD: (
        kernels.linear_token_logprobs(
            hidden_ND, weight_VD, batch.token_ids_N, backend=backend
        ).logprobs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", shape_params(CHECKED, list(dict.fromkeys([SMALL, OTHERS, CLAIMED])), FULL)
)
def bench_linear_policy_loss(
    contest: Compete, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    op = "linear_policy_loss grpo + k3"
    if is_emulated(contest, op, shape, dtype):
        return
    batch = grpo_hidden_batch(*shape, dtype, device=DEVICE)
    case = linear_case(
        op,
        batch,
        lambda hidden_ND, weight_VD: (eager_policy_loss(hidden_ND @ weight_VD.t(), batch),),
    )
    rivals: dict[str, Factory] = {
        "trl": partial(trl_linear_policy_loss, batch, GRPO_K3),
        "liger": partial(liger_linear_policy_loss, batch, GRPO_K3),
    }
    contest(case, with_backends(case, rivals, partial(ours, batch, GRPO_K3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shape_params([], [OTHERS], [SMALL, *FULL]))
def bench_linear_mean_nll(
    contest: Compete, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    op = "linear_policy_loss mean NLL"
    if is_emulated(contest, op, shape, dtype):
        return
    batch = grpo_hidden_batch(*shape, dtype, device=DEVICE)
    case = linear_case(
        op,
        batch,
        lambda hidden_ND, weight_VD: (
            functional.cross_entropy(hidden_ND @ weight_VD.t(), batch.token_ids_N),
        ),
    )
    rivals: dict[str, Factory] = {
        "linear_cross_entropy": partial(torch_linear_cross_entropy, batch.token_ids_N, "mean")
    }
    contest(case, with_backends(case, rivals, partial(our_nll, batch)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shape_params(CHECKED[1:2], [OTHERS], [SMALL, *FULL]))
def bench_linear_token_logprobs(
    contest: Compete, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    op = "linear_token_logprobs, backward"
    if is_emulated(contest, op, shape, dtype):
        return
    batch = grpo_hidden_batch(*shape, dtype, device=DEVICE)
    ids_N, num_tokens = batch.token_ids_N, shape[0]
    upstream_N = torch.randn(num_tokens, generator=torch.Generator().manual_seed(1)) / num_tokens

    def negated_nll() -> Implementation:
        nll_of = torch_linear_cross_entropy(ids_N, "none")
        return lambda hidden_ND, weight_VD: (-nll_of(hidden_ND, weight_VD)[0],)

    case = linear_case(
        op,
        batch,
        lambda hidden_ND, weight_VD: (eager_logprobs(hidden_ND @ weight_VD.t(), ids_N),),
        "logprobs",
        upstream_N.to(DEVICE),
    )
    rivals: dict[str, Factory] = {
        "trl": partial(trl_linear_token_logprobs, ids_N),
        "linear_cross_entropy": negated_nll,
    }
    contest(case, with_backends(case, rivals, partial(our_logprobs, batch)))

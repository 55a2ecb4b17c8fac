"""The ops under torch.compile and torch.library: registered, traced whole, compiled once."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec, library, linear_library
from kernels.arguments import LossArguments, RowArguments
from kernels.testing import GrpoBatch, grpo_batch

WIDTH = 101
LOSSES = {
    "grpo": LossSpec.preset("grpo", kl="k3", kl_weight=0.1),
    "gspo": LossSpec.preset("gspo", entropy_weight=0.01),
}


@pytest.fixture(autouse=True)
def any_compilation() -> Iterator[None]:
    """Undoes a test's ban on compiling again."""
    yield
    torch.compiler.set_stance("default")


def arguments_of(batch: GrpoBatch, spec: LossSpec, temperature: Tensor) -> tuple[object, ...]:
    """What `library.policy_loss` takes after the gradient and the logits."""
    rows = RowArguments(batch.token_ids_N, temperature, 0.0, [], "", "reference")
    terms = LossArguments(
        old_logprobs=batch.old_logprobs_N,
        ref_logprobs=batch.ref_logprobs_N,
        sampler_logprobs=None,
        advantages=None,
        rewards=batch.rewards_S,
        group_size=batch.group_size,
        cu_seqlens=batch.cu_seqlens,
        mask=None,
        denominator=None,
        spec_choices=spec.choices,
        spec_numbers=spec.numbers,
    )
    return (*rows, *terms)


@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss_op_passes_opcheck(loss: str) -> None:
    batch = grpo_batch(24, WIDTH, torch.float32)
    rest = arguments_of(batch, LOSSES[loss], torch.tensor(0.9))
    torch.library.opcheck(library.policy_loss, (None, batch.logits_NV, *rest))
    gradient = torch.empty_like(batch.logits_NV)
    torch.library.opcheck(library.policy_loss, (gradient, batch.logits_NV, *rest))
    torch.library.opcheck(library.scale_, (gradient, torch.tensor(0.5), "reference"))


def test_token_logprobs_ops_pass_opcheck() -> None:
    batch = grpo_batch(24, WIDTH, torch.float32)
    rows = RowArguments(batch.token_ids_N, torch.rand(24) + 0.5, 0.0, [], "", "reference")
    values = library.token_logprobs(batch.logits_NV, *rows)
    torch.library.opcheck(library.token_logprobs, (batch.logits_NV, *rows))
    torch.library.opcheck(
        library.token_logprobs_gradient,
        (
            torch.empty_like(batch.logits_NV),
            batch.logits_NV,
            *rows,
            list(values),
            *torch.randn(2, 24),
        ),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_linear_ops_pass_opcheck(loss: str) -> None:
    batch = grpo_batch(24, WIDTH, torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((24, 8), (WIDTH, 8), (WIDTH,))
    )
    chunked = (torch.float32, 10)
    wanted = [True, False, True]
    rest = arguments_of(batch, LOSSES[loss], torch.tensor(0.9))
    torch.library.opcheck(
        linear_library.linear_policy_loss, (hidden, weight, bias, *chunked, *rest, wanted)
    )
    call = (hidden, weight, bias, *chunked, *rest[: len(RowArguments._fields)])
    torch.library.opcheck(linear_library.linear_token_logprobs, call)
    values = list(linear_library.linear_token_logprobs(*call))
    torch.library.opcheck(
        linear_library.linear_token_logprobs_gradients, (*call, values, *torch.randn(2, 24), wanted)
    )


def test_group_advantages_op_passes_opcheck() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.5])
    torch.library.opcheck(library.group_advantages, (rewards, 2, None, "group", 1, 1e-4))
    groups = torch.tensor([1, 0, 1, 0])
    torch.library.opcheck(library.group_advantages, (rewards, None, groups, "batch", 0, 1e-4))


def all_ops(
    logits: Tensor, batch: GrpoBatch, spec: LossSpec, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """A loss with gradient through all four ops, and a metric; the first columns of the logits
    also stand in for hidden states and weight."""
    scaled = logits * 1.5
    hidden, weight = logits[:, :8] / 8, logits[:, 8:16].repeat(5, 1)[:WIDTH] / 8
    shared = dict(
        ref_logprobs=batch.ref_logprobs_N,
        rewards=batch.rewards_S,
        group_size=batch.group_size,
        cu_seqlens=batch.cu_seqlens,
        spec=spec,
        temperature=temperature,
        backend=backend,
    )
    policy = kernels.policy_loss(scaled, batch.token_ids_N, batch.old_logprobs_N, **shared)
    linear = kernels.linear_policy_loss(
        hidden, weight, batch.token_ids_N, batch.old_logprobs_N, chunk_tokens=10, **shared
    )
    linear_tokens = kernels.linear_token_logprobs(
        hidden, weight, batch.token_ids_N, chunk_tokens=16, backend=backend
    )
    tokens = kernels.token_logprobs(
        scaled, batch.token_ids_N, temperature=temperature, with_entropy=True, backend=backend
    )
    assert tokens.entropy is not None
    loss = policy.loss + linear.loss + linear_tokens.logprobs.mean()
    return loss + (tokens.logprobs * tokens.entropy).mean(), policy.metrics["kl"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_serves_every_length_temperature_and_clip(
    backend: str, device: str, loss: str, compiler: str
) -> None:
    if backend == "triton" and device == "cpu":
        pytest.skip("the traced program is the same; in Triton's interpreter it takes a minute")
    torch.compiler.reset()
    compiled = torch.compile(all_ops, fullgraph=True, dynamic=True, backend=compiler)
    spec = LOSSES[loss]
    for num_tokens, temperature, clip in ((24, 1.0, 0.2), (40, 0.7, 0.3), (56, 1.3, 0.25)):
        batch = grpo_batch(num_tokens, WIDTH, torch.float32, device=device)
        numbers = {"clip_high": clip, "kl_weight": clip / 2 if spec.kl != "none" else 0.0}
        changed = LossSpec.preset(loss, kl=spec.kl, entropy_weight=clip / 9, **numbers)
        results = []
        for function in (compiled, all_ops):
            leaf = batch.logits_NV.clone().requires_grad_()
            value, kl = function(leaf, batch, changed, temperature, backend)
            value.backward()
            results.append((value.detach(), kl, leaf.grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.compiler.set_stance("fail_on_recompile")


def test_memory_is_not_overwritten_in_a_compiled_program() -> None:
    batch = grpo_batch(24, WIDTH, torch.float32)
    compiled = torch.compile(
        lambda logits: (
            kernels.token_logprobs(logits, batch.token_ids_N, inplace_backward=True).logprobs
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="inplace_backward: expected False under torch.compile"):
        compiled(batch.logits_NV.clone().requires_grad_())

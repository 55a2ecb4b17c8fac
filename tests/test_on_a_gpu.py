"""What only a GPU can show: no call waits for it, graphs capture calls, streams and devices are the
caller's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LossSpec
from kernels.testing import grpo_hidden_batch, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NUM_TOKENS, DEPTH, WIDTH = 192, 64, 4099
SPECS = {
    "grpo + k3": LossSpec(kl="k3", kl_weight=0.04),
    "entropy": LossSpec(entropy_weight=0.01, aggregation="token_mean"),
    "gspo": LossSpec.preset("gspo"),
}
Call = Callable[[Tensor, Tensor], list[Tensor]]


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of a GPU; one that cannot run here skips with its reason."""
    reason = kernels.available_backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def problem(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Hidden states, a weight and the other arguments of a policy loss, on a device."""
    batch = grpo_hidden_batch(NUM_TOKENS, DEPTH, WIDTH, dtype)
    ids = batch.token_ids_N.clone()
    ids[::7] = -100
    arguments = dict(
        token_ids=ids.to(device),
        old_logprobs=batch.old_logprobs_N.to(device),
        ref_logprobs=batch.ref_logprobs_N.to(device),
        rewards=batch.rewards_S.to(device),
        cu_seqlens=batch.cu_seqlens.to(device),
        group_size=batch.group_size,
    )
    return batch.hidden_ND.to(device), batch.weight_VD.to(device), arguments


def with_gradients(hidden: Tensor, weight: Tensor, loss_of: Callable[..., Tensor]) -> list[Tensor]:
    """Loss and gradients by both."""
    leaves = [value.detach().requires_grad_() for value in (hidden, weight)]
    loss = loss_of(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def calls(backend: str, spec: LossSpec, arguments: dict[str, Any]) -> dict[str, Call]:
    """Loss and gradients by hidden states and weight, by each op."""
    ids = arguments["token_ids"]

    def linear_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = kernels.linear_policy_loss(
            hidden, weight, spec=spec, backend=backend, chunk_tokens=80, **arguments
        )
        return out.loss

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        return kernels.policy_loss(
            logits, spec=spec, backend=backend, inplace_backward=True, **arguments
        ).loss

    def linear_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        out = kernels.linear_token_logprobs(
            hidden, weight, ids, with_entropy=True, backend=backend, chunk_tokens=80
        )
        return (out.logprobs.sin() + out.entropy.cos()).sum()

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        out = kernels.token_logprobs(hidden @ weight.t(), ids, with_entropy=True, backend=backend)
        return (out.logprobs.sin() + out.entropy.cos()).sum()

    functions = {
        "policy_loss": loss,
        "linear_policy_loss": linear_loss,
        "token_logprobs": logprobs,
        "linear_token_logprobs": linear_logprobs,
    }
    return {
        name: lambda hidden, weight, function=function: with_gradients(hidden, weight, function)
        for name, function in functions.items()
    }


OPS = ["policy_loss", "linear_policy_loss", "token_logprobs", "linear_token_logprobs"]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_device(
    gpu_backend: str, op: str, name: str, dtype: torch.dtype
) -> None:
    hidden, weight, arguments = problem("cuda", dtype)
    call = calls(gpu_backend, SPECS[name], arguments)[op]
    want = call(hidden, weight)
    with waiting_is_an_error():
        got = call(hidden, weight)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SPECS)
def test_a_graph_replays_on_new_inputs(gpu_backend: str, op: str, name: str) -> None:
    hidden, weight, arguments = problem("cuda", torch.bfloat16)
    call = calls(gpu_backend, SPECS[name], arguments)[op]
    others = hidden.flip(0), weight * 1.25
    want = call(*others)
    # Warmed up on a side stream, as capture asks for.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(hidden, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(hidden, weight)
    hidden.copy_(others[0])
    weight.copy_(others[1])
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_work_goes_to_the_stream_of_the_caller(gpu_backend: str, op: str) -> None:
    hidden, weight, arguments = problem("cuda", torch.bfloat16)
    call = calls(gpu_backend, SPECS["grpo + k3"], arguments)[op]
    want = call(hidden, weight)
    torch.cuda.synchronize()
    late_hidden, late_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Work on any other stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        late_hidden.copy_(hidden)
        late_weight.copy_(weight)
        got = call(late_hidden, late_weight)
    side.synchronize()
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_another_device_than_the_current_one(gpu_backend: str, op: str) -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        hidden, weight, arguments = problem(device, torch.bfloat16)
        results.append(calls(gpu_backend, SPECS["grpo + k3"], arguments)[op](hidden, weight))
        assert all(value.device == hidden.device for value in results[-1])
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_policy_loss_is_exact_to_one_rounding(
    gpu_backend: str, name: str, dtype: torch.dtype
) -> None:
    """Against float64 on the CPU: the logits are float32, their gradient is rounded for the last
    two products, and so are the results."""
    hidden, weight, arguments = problem("cuda", dtype)
    got = calls(gpu_backend, SPECS[name], arguments)["linear_policy_loss"](hidden, weight)
    hidden, weight, arguments = problem("cpu", dtype)
    exact = calls("reference", SPECS[name], arguments)["linear_policy_loss"](
        hidden.double(), weight.double()
    )
    torch.testing.assert_close(got[0].cpu().double(), exact[0], rtol=1e-4, atol=1e-6)
    for ours, truth in zip(got[1:], exact[1:], strict=True):
        assert relative_error(ours.cpu(), truth) < torch.finfo(dtype).eps

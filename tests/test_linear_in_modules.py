"""The head from hidden states inside models: tied embeddings, autocast, parameters under FSDP2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import kernels
from kernels import LossSpec
from kernels.testing import backends_on, relative_error

WIDTH, DEPTH, LENGTH = 61, 16, 6
SPEC = LossSpec(kl="k3", kl_weight=0.04, entropy_weight=0.01)

Op = Callable[[Tensor, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class TiedModel(nn.Module):
    """Embedding, one layer, and the embedding again as LM head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WIDTH, DEPTH)
        self.layer = nn.Linear(DEPTH, DEPTH)
        self.bias = nn.Parameter(torch.randn(WIDTH) / 8)

    def forward(self, ids: Tensor, op: Op, **arguments: Any) -> Tensor:
        hidden = self.layer(self.embedding(ids)).tanh()
        return op(hidden, self.embedding.weight, self.bias, ids, arguments)


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, arguments: dict) -> Tensor:
    return kernels.linear_policy_loss(
        hidden, weight, ids, bias=bias, spec=SPEC, chunk_tokens=10, **arguments
    ).loss


def ours_by_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, arguments: dict
) -> Tensor:
    out = kernels.linear_token_logprobs(
        hidden, weight, ids, bias=bias, chunk_tokens=10, backend=arguments["backend"]
    )
    return (out.logprobs * arguments["advantages"]).sum() / arguments["denominator"]


def materialised(
    hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, arguments: dict
) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return kernels.policy_loss(logits, ids, spec=SPEC, **arguments).loss


def materialised_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, arguments: dict
) -> Tensor:
    logprobs = nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    logprobs = logprobs.gather(-1, ids[..., None])[..., 0]
    return (logprobs * arguments["advantages"]).sum() / arguments["denominator"]


def batch(device: str) -> dict[str, Any]:
    """Four sequences."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WIDTH, (4, LENGTH), generator=generator)
    return {
        name: value.to(device)
        for name, value in dict(
            ids=ids,
            old_logprobs=torch.full(ids.shape, -4.1),
            ref_logprobs=torch.full(ids.shape, -4.2),
            advantages=torch.randn(ids.shape, generator=generator),
        ).items()
    }


def model(device: str) -> TiedModel:
    torch.manual_seed(1)
    return TiedModel().to(device)


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return grads


def test_tied_embedding_gets_both_gradients(backend: str, device: str) -> None:
    for op, plain in ((ours, materialised), (ours_by_logprobs, materialised_logprobs)):
        arguments = dict(batch(device), denominator=4.0, backend=backend)
        want, got = model(device), model(device)
        want_loss, got_loss = want(op=plain, **arguments), got(op=op, **arguments)
        want_loss.backward()
        got_loss.backward()
        assert got_loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
        exact = parameter_gradients(want)
        for name, grad in parameter_gradients(got).items():
            assert relative_error(grad, exact[name]) < 1e-5, name


def head_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(24, DEPTH, generator=generator)
    weight = torch.randn(WIDTH, DEPTH, generator=generator) / 4
    bias = torch.randn(WIDTH, generator=generator)
    ids = torch.randint(0, WIDTH, (24,), generator=generator)
    return hidden.to(device), weight.to(device), bias.to(device), ids.to(device)


def test_autocast_takes_operands_of_two_dtypes(backend: str, device: str) -> None:
    """Hidden states that autocast made bfloat16 meet float32 parameters."""
    hidden, weight, bias, ids = head_inputs(device)
    hidden = hidden.bfloat16()
    leaves = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = kernels.linear_token_logprobs(
            leaves[0], leaves[1], ids, bias=leaves[2], backend=backend
        )
        out.logprobs.sum().backward()
    exact = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    logits = nn.functional.linear(exact[0], exact[1], exact[2])
    logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    logprobs.sum().backward()
    # A CPU multiplies in float32, a GPU rounds the weight to bfloat16 as autocast does.
    tolerance = 1e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=tolerance, atol=tolerance)
    for leaf, truth in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        rounding = 5e-3 if leaf.dtype == torch.bfloat16 else 0.0
        assert relative_error(leaf.grad, truth.grad) < tolerance + rounding


def test_unequal_dtypes_are_refused_without_autocast() -> None:
    hidden, weight, _, ids = head_inputs("cpu")
    with pytest.raises(ValueError, match="weight: expected torch.bfloat16 like hidden"):
        kernels.linear_token_logprobs(hidden.bfloat16(), weight, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="weight: expected torch.float64"):
            kernels.linear_token_logprobs(hidden.double(), weight, ids)


def check_rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    for backend in backends_on("cpu"):
        for op in (ours, ours_by_logprobs):
            check_fsdp(mesh, op, backend)
    check_dtensors_are_refused(mesh)
    dist.destroy_process_group()


def check_fsdp(mesh: DeviceMesh, op: Op, backend: str) -> None:
    whole = batch("cpu")
    mine = {name: value[mesh.get_rank() :: mesh.size()] for name, value in whole.items()}
    want = model("cpu")
    want_loss = want(op=op, denominator=4.0, backend=backend, **whole)
    want_loss.backward()
    sharded = fully_shard(model("cpu"), mesh=mesh)
    loss = sharded(op=op, denominator=4.0, backend=backend, **mine)
    # FSDP averages over ranks; the denominator is global, so that parts add up.
    (loss * mesh.size()).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, want_loss.detach(), rtol=1e-5, atol=1e-6)
    exact = parameter_gradients(want)
    for name, grad in parameter_gradients(sharded).items():
        assert relative_error(grad, exact[name]) < 1e-5, name


def check_dtensors_are_refused(mesh: DeviceMesh) -> None:
    hidden, weight, _, ids = head_inputs("cpu")
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(TypeError, match="weight: expected a plain tensor, got a DTensor: call"):
        kernels.linear_token_logprobs(hidden, sharded, ids)
    with pytest.raises(TypeError, match="hidden: expected a plain tensor"):
        kernels.linear_token_logprobs(distribute_tensor(hidden, mesh, [Shard(0)]), weight, ids)


def test_parameters_under_fsdp_get_the_gradients_of_one_rank(tmp_path: Path) -> None:
    spawn_ranks(check_rank, 2, 2, str(tmp_path / "store"))

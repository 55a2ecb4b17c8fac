"""Log-probs and entropies under verl's, OpenRLHF's and oat's names: ours against plain PyTorch, and
against the real functions where they are installed."""

import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor

from kernels.adapters import oat, openrlhf, verl

NUM_ROWS, NUM_POSITIONS, WIDTH, DEPTH = 4, 6, 37, 8


def real(module: str) -> Any:
    """Another package's module; skips where it does not import."""
    return pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


def test_adapters_import_without_the_packages_they_serve() -> None:
    check = (
        "import sys, kernels.adapters; "
        "print([n for n in ('trl', 'verl', 'openrlhf', 'oat', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits and token ids."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, NUM_POSITIONS, WIDTH, generator=generator) * 3
    ids = torch.randint(0, WIDTH, (NUM_ROWS, NUM_POSITIONS), generator=generator)
    return logits.to(dtype).requires_grad_(), ids


def plain_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by whole-tensor PyTorch."""
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def weighted_gradient(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum with a different weight for each value."""
    weights = torch.linspace(-1, 2, output.numel()).view(output.shape)
    return torch.autograd.grad((weights * output).sum(), leaves, retain_graph=True)


def assert_same(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    """Equal values, and equal gradients by the leaves."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        weighted_gradient(got, *leaves), weighted_gradient(want, *leaves), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["contiguous", "shifted", "transposed"])
def test_verl_logprobs_match_pytorch(layout: str) -> None:
    leaf, ids = rows()
    logits = leaf
    if layout == "shifted":
        logits, ids = leaf[:, :-1], ids[:, 1:]
    elif layout == "transposed":
        logits = leaf.mT.contiguous().mT
    want = plain_logprobs(logits, ids)[0]
    (wanted_gradient,) = weighted_gradient(want, leaf)
    got = verl.logprobs_from_logits(logits * 1.0, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(weighted_gradient(got, leaf)[0], wanted_gradient)


def test_verl_inplace_backward_writes_the_gradient_into_the_logits() -> None:
    leaf, ids = rows()
    for inplace in (True, False):
        logits = leaf * 1.0
        kept = logits.detach().clone()
        verl.logprobs_from_logits(logits, ids, inplace_backward=inplace).sum().backward()
        assert torch.equal(logits.detach(), kept) is not inplace


def test_verl_logprobs_match_verl() -> None:
    theirs = real("verl.utils.torch_functional")
    leaf, ids = rows()
    got, want = verl.logprobs_from_logits(leaf * 1.0, ids), theirs.logprobs_from_logits(leaf, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(weighted_gradient(got, leaf), weighted_gradient(want, leaf))


def head() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(NUM_ROWS, NUM_POSITIONS, DEPTH, generator=generator).requires_grad_()
    weight = torch.randn(WIDTH, DEPTH, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, WIDTH, (NUM_ROWS, NUM_POSITIONS), generator=generator)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_verl_linear_cross_entropy_matches_pytorch(reduction: str) -> None:
    hidden, weight, labels = head()
    logprobs, entropy = plain_logprobs(hidden.flatten(0, 1) @ weight.t(), labels.flatten(), 0.7)
    if reduction != "none":
        logprobs = getattr(logprobs, reduction)()
    got = verl.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    assert_same(got[0], logprobs, hidden, weight)
    assert_same(got[1], entropy, hidden, weight)


def test_verl_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="^reduction: expected one of none, sum, mean, got 'max'$"):
        verl.linear_cross_entropy(*head(), 1.0, "max")


def sharded_linear_cross_entropy(rank: int, port: int) -> None:
    """One of two ranks, each with half of the vocabulary."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    hidden, weight, labels = head()
    weight = weight.detach()[:36].requires_grad_()
    labels = labels % 36
    want = verl.linear_cross_entropy(hidden, weight, labels, 0.7)
    half = weight.detach()[rank * 18 : (rank + 1) * 18].requires_grad_()
    got = verl.linear_cross_entropy(hidden, half, labels, 0.7, "none", dist.group.WORLD)
    for number in (0, 1):
        torch.testing.assert_close(got[number], want[number], rtol=1e-5, atol=1e-5)
        wanted_hidden, wanted_weight = weighted_gradient(want[number], hidden, weight)
        share, weight_gradient = weighted_gradient(got[number], hidden, half)
        dist.all_reduce(share)
        torch.testing.assert_close(share, wanted_hidden, rtol=1e-4, atol=1e-5)
        wanted_weight = wanted_weight[rank * 18 : (rank + 1) * 18]
        torch.testing.assert_close(weight_gradient, wanted_weight, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


def test_verl_sharded_linear_cross_entropy_gives_shares_of_the_hidden_gradient() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn_ranks(sharded_linear_cross_entropy, 2, port)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf_logprobs_and_entropy_match_pytorch(temperature: float) -> None:
    logits, ids = rows()
    kept = logits.detach().clone()
    logprobs, entropy = plain_logprobs(logits, ids, temperature)
    assert_same(openrlhf.log_probs_from_logits(logits, ids, temperature), logprobs, logits)
    assert_same(openrlhf.compute_entropy(logits / temperature), entropy, logits)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_oat_fused_linear_matches_pytorch(padded: bool) -> None:
    hidden, weight, ids = head()
    if not padded:
        hidden, ids = hidden.flatten(0, 1), ids.flatten()
    logprobs, entropy = plain_logprobs(hidden @ weight.t(), ids, 0.7)
    got = oat.FusedLinear(chunk_size=5)(hidden, weight, ids.int(), temperature=0.7)
    assert_same(got[0], logprobs, hidden, weight)
    assert_same(got[1], entropy, hidden, weight)
    logprobs_only = oat.FusedLinear(compute_entropy=False)(hidden, weight, ids)
    assert logprobs_only[0].requires_grad and not logprobs_only[1].requires_grad


def test_oat_bfloat16_logits_are_not_rounded() -> None:
    hidden, weight, ids = (tensor.detach() for tensor in head())
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = plain_logprobs(hidden.double() @ weight.double().t(), ids)[0]
    got = oat.FusedLinear()(hidden, weight, ids)[0]
    assert (got.double() - exact).abs().max() < 1e-5

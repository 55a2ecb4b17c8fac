"""Logits split over 2 and 4 gloo ranks give what the whole logits give, values and gradients."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import Tensor

import kernels
from kernels import LossSpec, VocabShard
from kernels.linear_head import CHUNK_BYTES
from kernels.testing import backends_on, grpo_batch, relative_error

WIDTH = 61
BOUNDS = {2: [0, 40, 61], 4: [0, 3, 30, 59, 61]}
PADDING = 5
SPECS = (
    LossSpec.preset("dapo", kl="k3", kl_weight=0.1, entropy_weight=0.01),
    LossSpec.preset("gspo"),
)


def check_rank(rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    start, end = BOUNDS[world_size][rank : rank + 2]
    vocab = VocabShard(dist.group.WORLD, start, end)
    for backend in backends_on("cpu"):
        check_backend(vocab, backend)
    check_ranks_agree_on_chunks(vocab)
    with pytest.raises(ValueError, match="VocabShard: expected 0 <= start < end"):
        VocabShard(dist.group.WORLD, 5, 5)
    dist.destroy_process_group()


def check_backend(vocab: VocabShard, backend: str) -> None:
    batch = grpo_batch(16, WIDTH, torch.float32)
    logits = batch.logits_NV.clone()
    logits[0, :40] = -math.inf
    logits[1] -= 1e4
    batch.token_ids_N[0], batch.token_ids_N[2] = 50, -100
    for spec in SPECS:
        check_policy_loss(logits, batch, spec, vocab, backend)
    check_linear(batch, vocab, backend)
    nobody = torch.full((16,), WIDTH)
    part = logits[:, vocab.start : vocab.end]
    out = kernels.token_logprobs(part, nobody, vocab=vocab, backend=backend)
    assert bool(out.logprobs.isnan().all())


def check_ranks_agree_on_chunks(vocab: VocabShard) -> None:
    """A byte budget admits fewer tokens on the rank with the widest shard; all have to follow."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(16, 8, generator=generator)
    weight = torch.randn(WIDTH, 8, generator=generator)
    ids = torch.randint(0, WIDTH, (16,), generator=generator)
    want = kernels.linear_token_logprobs(hidden, weight, ids).logprobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_BYTES, "cpu", 4 * WIDTH * 5)
        got = kernels.linear_token_logprobs(
            hidden, weight[vocab.start : vocab.end], ids, vocab=vocab
        ).logprobs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def check_policy_loss(
    logits: Tensor, batch: Any, spec: LossSpec, vocab: VocabShard, backend: str
) -> None:
    arguments = dict(
        token_ids=batch.token_ids_N,
        old_logprobs=batch.old_logprobs_N,
        ref_logprobs=batch.ref_logprobs_N,
        rewards=batch.rewards_S,
        group_size=4,
        cu_seqlens=batch.cu_seqlens,
        spec=spec,
        backend=backend,
    )
    whole = logits.clone().requires_grad_()
    want = kernels.policy_loss(whole, **arguments)
    want.loss.backward()
    columns = slice(vocab.start, vocab.end)
    for inplace in (False, True):
        # Padding columns hold NaN: they must never be read, and get gradient zero.
        part = torch.full((16, vocab.width + PADDING), math.nan)
        part[:, : vocab.width] = logits[:, columns]
        part.requires_grad_()
        got = kernels.policy_loss(part, vocab=vocab, inplace_backward=inplace, **arguments)
        got.loss.backward()
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            part.grad[:, : vocab.width], whole.grad[:, columns], rtol=1e-4, atol=1e-8
        )
        assert bool((part.grad[:, vocab.width :] == 0).all())


def check_linear(batch: Any, vocab: VocabShard, backend: str) -> None:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(16, 8, generator=generator)
    weight = torch.randn(WIDTH, 8, generator=generator)
    gradients = []
    for rows, shard in ((slice(0, WIDTH), None), (slice(vocab.start, vocab.end), vocab)):
        leaf, head = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        kernels.linear_policy_loss(
            leaf,
            head,
            batch.token_ids_N,
            batch.old_logprobs_N,
            rewards=batch.rewards_S,
            group_size=4,
            cu_seqlens=batch.cu_seqlens,
            spec=LossSpec.preset("dapo"),
            vocab=shard,
            chunk_tokens=10,
            backend=backend,
        ).loss.backward()
        gradients.append((leaf.grad, head.grad))
    (hidden_want, weight_want), (hidden_got, weight_got) = gradients
    assert relative_error(hidden_got, hidden_want) < 1e-5
    assert relative_error(weight_got, weight_want[vocab.start : vocab.end]) < 1e-5


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_equals_unsharded(world_size: int, tmp_path: Path) -> None:
    spawn_ranks(check_rank, world_size, world_size, str(tmp_path / "store"))

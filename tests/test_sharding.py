"""Logits split over 2 and 4 gloo ranks give what the whole logits give, values and gradients."""

import math
import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kernels
from kernels import LossSpec, VocabShard
from kernels.testing import grpo_batch, relative_error

WIDTH = 301
BOUNDS = {2: [0, 190, 301], 4: [0, 3, 150, 299, 301]}
PADDING = 5
SPECS = (
    LossSpec.preset("dapo", kl="k3", kl_weight=0.1, entropy_weight=0.01),
    LossSpec.preset("gspo"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_shard(rank: int, world_size: int, port: int, backend: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    start, end = BOUNDS[world_size][rank : rank + 2]
    vocab = VocabShard(dist.group.WORLD, start, end)
    batch = grpo_batch(24, WIDTH, torch.float32)
    logits = batch.logits_NV.clone()
    logits[0, :200] = -math.inf
    logits[1] -= 1e4
    batch.token_ids_N[0], batch.token_ids_N[2] = 250, -100
    for spec in SPECS:
        check_policy_loss(logits, batch, spec, vocab, backend)
    check_linear(batch, vocab, backend)
    with pytest.raises(ValueError, match="VocabShard: expected 0 <= start < end"):
        VocabShard(dist.group.WORLD, 5, 5)
    nobody = torch.full((24,), WIDTH)
    out = kernels.token_logprobs(logits[:, start:end], nobody, vocab=vocab, backend=backend)
    assert bool(out.logprobs.isnan().all())
    dist.destroy_process_group()


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
        part = torch.full((24, vocab.width + PADDING), math.nan)
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
    hidden = torch.randn(24, 8, generator=generator)
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
def test_sharded_equals_unsharded(backend: str, world_size: int) -> None:
    mp.spawn(check_shard, args=(world_size, free_port(), backend), nprocs=world_size)

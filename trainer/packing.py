"""Micro-batches: completions dealt out to ranks and packed, end to end and without padding.

Shapes: S samples, T packed positions, N completion tokens, packed.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.attention import Packing

IGNORED_TOKEN = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSample:
    """One completion as the update needs it."""

    prompt_ids: Sequence[int]
    token_ids: np.ndarray
    """int64 `[n]`, the completion."""
    sampler_logprobs: np.ndarray
    """float32 `[n]`."""
    advantage: float
    masked: bool = False
    """Its tokens are left out of the loss; as a sequence it counts on."""

    @property
    def num_positions(self) -> int:
        """Positions of its forward pass; the last token is only ever a target."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


# Stands in where a rank has no sample, for the collectives of the sharded model alone.
NO_SAMPLE = UpdateSample(
    prompt_ids=[0],
    token_ids=np.array([IGNORED_TOKEN]),
    sampler_logprobs=np.zeros(1, dtype=np.float32),
    advantage=0.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTokens:
    """What the body of the model reads."""

    token_ids_T: Tensor
    packing: Packing
    target_positions_N: Tensor
    """Positions whose logits foretell the completion tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTargets:
    """What the head and the loss read of the same samples."""

    target_ids_N: Tensor
    """IGNORED_TOKEN where the sample is masked."""
    cu_seqlens: Tensor
    advantages_S: Tensor
    sampler_logprobs_N: Tensor


def plan_micro_batches(
    lengths_S: Sequence[int], num_ranks: int, budget_tokens: int
) -> list[list[list[int]]]:
    """Deals samples out to ranks, and each share to micro-batches, alike in tokens.

    Every rank gets the same number of micro-batches, as the collectives of a sharded model need, if
    need be empty ones.

    Args:
        lengths_S: positions of each sample.
        num_ranks: ranks to deal to.
        budget_tokens: most positions of a micro-batch; one sample alone may exceed it.

    Returns: indices into `lengths_S`, by rank and micro-batch.
    """

    def fits(parts: list[list[int]]) -> bool:
        return all(len(p) < 2 or sum(lengths_S[i] for i in p) <= budget_tokens for p in parts)

    shares = _deal(range(len(lengths_S)), lengths_S, num_ranks)
    most = max(sum(min(lengths_S[i], budget_tokens) for i in share) for share in shares)
    count = max(1, -(-most // budget_tokens))
    while True:
        plans = [_deal(share, lengths_S, count) for share in shares]
        if all(fits(plan) for plan in plans):
            return plans
        count += 1


def _deal(indices: Sequence[int], lengths_S: Sequence[int], parts: int) -> list[list[int]]:
    """Longest first, each to the part that has least; a part is in falling order of length."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for index in sorted(indices, key=lambda index: -lengths_S[index]):
        load, part = heapq.heappop(loads)
        dealt[part].append(index)
        heapq.heappush(loads, (load + lengths_S[index], part))
    return dealt


def pack_tokens(samples: Sequence[UpdateSample], device: torch.device) -> PackedTokens:
    """Prompts and completions end to end, without each last token."""
    samples = samples or [NO_SAMPLE]
    pieces = [part for one in samples for part in (one.prompt_ids, one.token_ids[:-1])]
    lengths = [one.num_positions for one in samples]
    ends = np.cumsum(lengths)
    targets = [
        np.arange(end - len(one.token_ids), end) for one, end in zip(samples, ends, strict=True)
    ]
    return PackedTokens(
        token_ids_T=_on_device(np.concatenate(pieces).astype(np.int64), device),
        packing=Packing(lengths, device),
        target_positions_N=_on_device(np.concatenate(targets), device),
    )


def pack_targets(samples: Sequence[UpdateSample], device: torch.device) -> PackedTargets:
    """Completion tokens end to end, with what the loss knows of them."""
    samples = samples or [NO_SAMPLE]
    targets = [
        np.full_like(one.token_ids, IGNORED_TOKEN) if one.masked else one.token_ids
        for one in samples
    ]
    lengths = [len(one.token_ids) for one in samples]
    advantages = np.array([one.advantage for one in samples], dtype=np.float32)
    return PackedTargets(
        target_ids_N=_on_device(np.concatenate(targets), device),
        cu_seqlens=_on_device(np.cumsum([0, *lengths], dtype=np.int32), device),
        advantages_S=_on_device(advantages, device),
        sampler_logprobs_N=_on_device(
            np.concatenate([one.sampler_logprobs for one in samples]), device
        ),
    )


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)

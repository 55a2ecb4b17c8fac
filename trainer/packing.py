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
from trainer.fsdp import World

IGNORED_TOKEN = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """A prompt and a completion to be learned from."""

    prompt_ids: Sequence[int] | np.ndarray
    token_ids: np.ndarray
    """int64 `[n]`, the completion."""

    @property
    def num_positions(self) -> int:
        """Positions of its forward pass alone; the last token is only ever a target."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSample(TokenSequence):
    """One completion as the update needs it."""

    sampler_logprobs: np.ndarray
    """float32 `[n]`."""
    advantage: float
    masked: bool = False
    """Its tokens are left out of the loss; as a sequence it counts on."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Indices of samples, None where a rank has none."""

    own: list[int | None]
    """What this rank takes through the model."""
    head: list[int | None]
    """What it takes through the head: with a sharded head the samples of all ranks, in order."""
    rows_of_ranks: list[int]
    """Completion tokens of each rank."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """Samples with the same prompt that stay together, so that its positions are there once."""

    indices: list[int]
    cost: int
    """Packed positions."""


def plan_micro_batches(
    samples: Sequence[TokenSequence], num_ranks: int, budget_tokens: int
) -> list[list[list[int]]]:
    """Deals samples out to ranks, and each share to micro-batches, alike in positions.

    Samples with the same prompt stay together as far as budget and balance allow. Every rank gets
    the same number of micro-batches, as the collectives of a sharded model need, if need be empty
    ones.

    Args:
        samples: to be dealt.
        num_ranks: ranks to deal to.
        budget_tokens: most positions of a micro-batch; one sample alone may exceed it.

    Returns: indices into `samples`, by rank and micro-batch.
    """
    total = sum(one.num_positions for one in samples)
    # Parts of at most half a share let the shares of ranks come out alike.
    most = budget_tokens if num_ranks == 1 else min(budget_tokens, total // (2 * num_ranks))
    shares = _deal(_units(samples, most), num_ranks)
    loads = [sum(min(unit.cost, budget_tokens) for unit in share) for share in shares]
    count = max(1, -(-max(loads) // budget_tokens))
    while True:
        plans = [_deal(share, count) for share in shares]
        parts = [part for plan in plans for part in plan]
        if all(len(part) < 2 or sum(u.cost for u in part) <= budget_tokens for part in parts):
            break
        count += 1
    return [[[index for unit in part for index in unit.indices] for part in plan] for plan in plans]


def micro_batches_of_rank(
    samples: Sequence[TokenSequence],
    chosen: Sequence[int],
    world: World,
    budget_tokens: int,
    *,
    shares_head: bool,
) -> list[MicroBatch]:
    """This rank's part of `plan_micro_batches` for the chosen samples.

    Args:
        samples: what the indices count.
        chosen: indices to be dealt.
        world: the ranks.
        budget_tokens: most positions of a micro-batch.
        shares_head: the head of the model is sharded over the vocabulary.
    """
    plans = plan_micro_batches([samples[index] for index in chosen], world.size, budget_tokens)
    batches = []
    for parts in zip(*plans, strict=True):
        of_ranks = [[chosen[place] for place in part] or [None] for part in parts]
        own = of_ranks[world.rank]
        everyone = [index for part in of_ranks for index in part]
        batches.append(
            MicroBatch(
                own=own,
                head=everyone if shares_head else own,
                rows_of_ranks=[
                    sum(1 if index is None else len(samples[index].token_ids) for index in part)
                    for part in of_ranks
                ],
            )
        )
    return batches


def _units(samples: Sequence[TokenSequence], most: int) -> list[_Unit]:
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(samples):
        by_prompt.setdefault(tuple(one.prompt_ids), []).append(index)
    units = []
    for prompt, indices in by_prompt.items():
        unit = _Unit([], len(prompt))
        for index in indices:
            more = len(samples[index].token_ids) - 1
            if unit.indices and unit.cost + more > most:
                units.append(unit)
                unit = _Unit([], len(prompt))
            unit = _Unit([*unit.indices, index], unit.cost + more)
        units.append(unit)
    return units


def _deal(units: Sequence[_Unit], parts: int) -> list[list[_Unit]]:
    """Largest first, each to the part that has least."""
    dealt: list[list[_Unit]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for unit in sorted(units, key=lambda unit: -unit.cost):
        load, part = heapq.heappop(loads)
        dealt[part].append(unit)
        heapq.heappush(loads, (load + unit.cost, part))
    return dealt


def pack_tokens(samples: Sequence[TokenSequence], device: torch.device) -> PackedTokens:
    """Each prompt once, followed by its completions without their last tokens."""
    samples = samples or [NO_SAMPLE]
    pieces: list[Sequence[int] | np.ndarray] = []
    prompts: dict[tuple[int, ...], np.ndarray] = {}
    sequences, targets, start = [], [], 0
    for one in samples:
        prompt = tuple(one.prompt_ids)
        if prompt not in prompts:
            prompts[prompt] = np.arange(start, start + len(prompt))
            pieces.append(prompt)
            start += len(prompt)
        own = np.arange(start, start + len(one.token_ids) - 1)
        pieces.append(one.token_ids[:-1])
        start += len(own)
        sequences.append(torch.from_numpy(np.concatenate([prompts[prompt], own])))
        targets.append(np.concatenate([prompts[prompt][-1:], own]))
    return PackedTokens(
        token_ids_T=_on_device(np.concatenate(pieces).astype(np.int64), device),
        packing=Packing(sequences, device),
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


def pack_token_ids(samples: Sequence[TokenSequence], device: torch.device) -> Tensor:
    """Completion tokens end to end, int64 `[N]`, where nothing else is known of them."""
    samples = samples or [NO_SAMPLE]
    return _on_device(np.concatenate([one.token_ids for one in samples]), device)


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)

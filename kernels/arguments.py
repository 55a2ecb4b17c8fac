"""Arguments that several custom ops share: in the schema of an op, and as the tuple its body reads.

The order is that of the schema. Numbers that change from step to step (temperature, clip bounds,
denominator) are tensors on the CPU, so that torch.compile does not compile anew for each value.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sharding import VocabShard
from kernels.spec import LossSpec

ROWS = (
    "Tensor token_ids, Tensor temperature, float softcap, SymInt[] shard, str shard_group, "
    "str backend"
)
LOSS = (
    "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? sampler_logprobs, Tensor? advantages, "
    "Tensor? rewards, SymInt? group_size, Tensor? cu_seqlens, Tensor? mask, Tensor? denominator, "
    "str spec_choices, Tensor spec_numbers"
)
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, ScalarType product_dtype, SymInt? chunk_tokens"


class RowArguments(NamedTuple):
    """Which token of each row, and how its logits are scaled, sharded and computed."""

    token_ids: Tensor
    temperature: Tensor
    softcap: float
    shard: list[int]
    """First column and the one after the last; empty where the vocabulary is whole."""
    shard_group: str
    backend: str

    @property
    def vocab(self) -> VocabShard | None:
        """The columns that this rank holds."""
        return VocabShard.from_parts(self.shard, self.shard_group)


class LossArguments(NamedTuple):
    """What a policy loss reads besides the rows."""

    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    advantages: Tensor | None
    rewards: Tensor | None
    group_size: int | None
    cu_seqlens: Tensor | None
    mask: Tensor | None
    denominator: Tensor | None
    spec_choices: str
    spec_numbers: Tensor

    @property
    def spec(self) -> LossSpec:
        """Which loss."""
        return LossSpec.from_parts(self.spec_choices, self.spec_numbers)


class HeadArguments(NamedTuple):
    """Hidden states and the LM head that they go through."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    product_dtype: torch.dtype
    chunk_tokens: int | None

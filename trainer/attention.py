"""Attention of packed sequences: each token sees the earlier tokens of its own sequence.

Sequences that begin with the same prompt have its tokens once between them: everything but
attention is computed once for the prompt, and attention gathers each sequence whole. So a group of
G completions of R tokens costs P + G * R positions instead of G * (P + R), and the gradient of the
prompt is the sum over its completions, exactly.

transformers calls `packed_attention` by the name `PACKED`; what it needs to know travels through
the model as the keyword `packing`. On a GPU in half precision it is one variable-length
flash-attention call (the package flash-attn, else torch's own). Elsewhere sequences are padded for
torch's scaled_dot_product_attention and for nothing else.

Shapes: T packed tokens, S sequences, E tokens of all sequences with each its prompt, H query heads,
K key-value heads, C head width; s, t sequences and padded length of one group.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "onepass_packed"
# Padded positions that a group of sequences may have for each real one.
MAX_PADDING = 1.25
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packing:
    """Which packed tokens make up each sequence.

    Args:
        sequences: the places among the packed tokens of each sequence's tokens, in order; together
            they hold every packed token.
        device: of what follows from them.
    """

    sequences: Sequence[Tensor]
    device: torch.device

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """Sequences of these lengths end to end that share nothing."""
        return cls(torch.arange(sum(lengths)).split(list(lengths)), device)

    @cached_property
    def positions_T(self) -> Tensor:
        """Place of each packed token in its sequence, int64 `[T]`."""
        return self._first_places(torch.cat([torch.arange(len(each)) for each in self.sequences]))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """First of the E tokens of each sequence, and E; int32 `[S + 1]`."""
        ends = torch.tensor([len(each) for each in self.sequences]).cumsum(0)
        return pad(ends, (1, 0)).to(self.device, torch.int32)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @cached_property
    def sources_E(self) -> Tensor | None:
        """Packed token of each of the E tokens; None where they are the packed tokens."""
        sources_E = torch.cat(list(self.sequences))
        is_identity = torch.equal(sources_E, torch.arange(len(sources_E)))
        return None if is_identity else sources_E.to(self.device)

    @cached_property
    def first_use_T(self) -> Tensor:
        """The first of the E tokens that is each packed token."""
        return self._first_places(torch.arange(sum(map(len, self.sequences))))

    @cached_property
    def padded_groups(self) -> list[Tensor]:
        """For sequences of like length padded together: packed token of each position, `[s, t]`.

        Padding, at the right, repeats a token of the sequence.
        """
        runs: list[list[Tensor]] = []
        for index in self._by_length:
            sequence = self.sequences[index]
            # The first of a run is its longest.
            run = [*runs[-1], sequence] if runs else []
            if runs and len(run[0]) * len(run) <= MAX_PADDING * sum(map(len, run)):
                runs[-1] = run
            else:
                runs.append([sequence])
        return [
            torch.stack(
                [torch.cat([each, each[:1].expand(len(run[0]) - len(each))]) for each in run]
            ).to(self.device)
            for run in runs
        ]

    @cached_property
    def first_padded_T(self) -> Tensor:
        """The first place of each packed token among the flattened positions of all groups."""
        starts, start = {}, 0
        by_length = iter(self._by_length)
        for group_st in self.padded_groups:
            for _ in range(group_st.shape[0]):
                starts[next(by_length)] = start
                start += group_st.shape[1]
        places = [starts[i] + torch.arange(len(each)) for i, each in enumerate(self.sequences)]
        return self._first_places(torch.cat(places))

    @cached_property
    def _by_length(self) -> list[int]:
        return sorted(range(len(self.sequences)), key=lambda index: -len(self.sequences[index]))

    def _first_places(self, values_E: Tensor) -> Tensor:
        """Of the values of the E tokens, that of each packed token's first use."""
        tokens_E = torch.cat(list(self.sequences))
        first_T = torch.full((int(tokens_E.max()) + 1,), len(tokens_E))
        first_T.scatter_reduce_(0, tokens_E, torch.arange(len(tokens_E)), "amin")
        return values_E[first_T].to(self.device)


def packed_attention(
    module: nn.Module,
    query_1HTC: Tensor,
    key_1KTC: Tensor,
    value_1KTC: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    pads_again: bool = False,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, as transformers calls it.

    Args:
        query_1HTC, key_1KTC, value_1KTC: H is a multiple of K.
        attention_mask: None; the sequences are masked by `packing`.
        pads_again: padded states are made again for the backward, not kept.
        scaling: of the scores; None is C ** -0.5.
        sliding_window: last positions that a token sees, its own included.

    Returns: output `[1, T, H, C]`, and None for the attention weights.

    Raises:
        ValueError: the model asks for something else: soft-capped scores, attention sinks.
    """
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if options.get(unsupported) is not None:
            raise ValueError(
                f"{unsupported}: expected attention without it in packed training, "
                f"got it from {type(module).__name__}"
            )
    query_THC, key_TKC, value_TKC = (
        states[0].transpose(0, 1) for states in (query_1HTC, key_1KTC, value_1KTC)
    )
    states = (query_THC, key_TKC, value_TKC)
    if query_THC.is_cuda and query_THC.dtype in HALF_PRECISION:
        output_THC = _flash_attention(*states, packing, scaling, sliding_window)
    else:
        output_THC = _padded_attention(*states, packing, scaling, sliding_window, pads_again)
    return output_THC[None], None


def _flash_attention(
    query_THC: Tensor,
    key_TKC: Tensor,
    value_TKC: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    bounds = (packing.cu_seqlens, packing.cu_seqlens, packing.longest, packing.longest)
    sources_E = packing.sources_E
    query_EHC, key_EKC, value_EKC = (
        states if sources_E is None else states.index_select(0, sources_E)
        for states in (query_THC, key_TKC, value_TKC)
    )
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        output_EHC = flash_attn_varlen_func(
            query_EHC,
            key_EKC,
            value_EKC,
            *bounds,
            softmax_scale=scaling,
            causal=True,
            window_size=window,
            deterministic=True,
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        # Fewer key-value heads are an argument only from torch 2.12 on.
        repeats = query_EHC.shape[1] // key_EKC.shape[1]
        output_EHC = varlen_attn(
            query_EHC,
            key_EKC.repeat_interleave(repeats, dim=1),
            value_EKC.repeat_interleave(repeats, dim=1),
            *bounds,
            scale=scaling,
            window_size=window,
        )
    return output_EHC if sources_E is None else output_EHC.index_select(0, packing.first_use_T)


def _padded_attention(
    query_THC: Tensor,
    key_TKC: Tensor,
    value_TKC: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
    pads_again: bool,
) -> Tensor:
    packed = [states.detach() for states in (query_THC, key_TKC, value_TKC)]
    outputs = []
    for sources_st in packing.padded_groups:
        length = sources_st.shape[1]
        mask_tt = None
        if sliding_window is not None and sliding_window < length:
            ones_tt = query_THC.new_ones(length, length, dtype=torch.bool)
            mask_tt = ones_tt.tril() & ones_tt.triu(1 - sliding_window)
        states = [_padded(each, sources_st) for each in (query_THC, key_TKC, value_TKC)]
        query_sHtC, key_sKtC, value_sKtC = states
        again = _PaddedAgain(states, packed, sources_st)
        with again if pads_again else nullcontext():
            # Padding is on the right, where causal attention does not look.
            output_sHtC = scaled_dot_product_attention(
                query_sHtC,
                key_sKtC,
                value_sKtC,
                attn_mask=mask_tt,
                is_causal=mask_tt is None,
                scale=scaling,
                enable_gqa=query_THC.shape[1] != key_TKC.shape[1],
            )
        again.drop(output_sHtC)
        outputs.append(output_sHtC.transpose(1, 2).flatten(0, 1))
    output_THC = torch.cat(outputs).index_select(0, packing.first_padded_T)
    # The groups have it too, once it is there.
    packed.append(output_THC.detach())
    return output_THC


def _padded(states_THC: Tensor, sources_st: Tensor) -> Tensor:
    """Packed states for each position of a group, `[s, H, t, C]`."""
    gathered = states_THC.index_select(0, sources_st.flatten()).unflatten(0, sources_st.shape)
    return gathered.transpose(1, 2)


@dataclass(slots=True)
class _Kept:
    """What autograd keeps: a tensor, or which of the packed ones is to be padded for it."""

    tensor: Tensor | None
    place: int | None


class _PaddedAgain:
    """What is computed inside keeps no padded states for its backward, which pads them again.

    Args:
        padded: states that are not kept.
        packed: where they come from, in the same order; the output follows, before the backward.
        sources_st: the packed token of each position.
    """

    def __init__(
        self, padded: Sequence[Tensor], packed: Sequence[Tensor], sources_st: Tensor
    ) -> None:
        self.packed, self.sources_st = packed, sources_st
        # Not the tensors: autograd has this for as long as there is the graph.
        self.places = {_identity(states): place for place, states in enumerate(padded)}
        self.kept: list[_Kept] = []

    def __enter__(self) -> None:
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)
        # It refers to this, and a circle would keep the tensors until it is looked for.
        del self.hooks

    def drop(self, output: Tensor) -> None:
        """Forgets the padded output too: what it has at padding meets a gradient of zero."""
        for one in self.kept:
            if one.tensor is not None and _identity(one.tensor) == _identity(output):
                one.tensor, one.place = None, len(self.places)
        self.kept = []

    def _pack(self, tensor: Tensor) -> _Kept:
        place = self.places.get(_identity(tensor))
        self.kept.append(_Kept(tensor if place is None else None, place))
        return self.kept[-1]

    def _unpack(self, kept: _Kept) -> Tensor:
        if kept.place is None:
            assert kept.tensor is not None
            return kept.tensor
        return _padded(self.packed[kept.place], self.sources_st)


def _identity(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


AttentionInterface.register(PACKED, packed_attention)

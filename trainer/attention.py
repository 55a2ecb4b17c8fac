"""Attention of packed sequences: each token sees the earlier tokens of its own sequence.

transformers calls `packed_attention` by the name `PACKED`; what it needs to know travels through
the model as the keyword `packing`. On a GPU in half precision it is one variable-length
flash-attention call (the package flash-attn, else torch's own). Elsewhere sequences are padded for
torch's scaled_dot_product_attention and for nothing else.

Shapes: T packed tokens, S sequences, H query heads, K key-value heads, C head width; s, t, n
sequences, padded length and tokens of one group.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "onepass_packed"
# Padded positions that a group of sequences may have for each real one.
MAX_PADDING = 1.25
HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _PaddedGroup:
    """Consecutive sequences that are padded to the same length."""

    tokens: slice
    num_sequences: int
    length: int
    places_n: Tensor
    """Where each token stands among the num_sequences * length padded positions."""


@dataclass(frozen=True)
class Packing:
    """Lengths of the packed sequences, and what follows from them for attention."""

    lengths: Sequence[int]
    device: torch.device

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """First token of each sequence, and the number of tokens; int32 `[S + 1]`."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return nn.functional.pad(ends, (1, 0)).to(self.device, torch.int32)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @cached_property
    def positions_T(self) -> Tensor:
        """Place of each token in its sequence, int64 `[T]`."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def groups(self) -> list[_PaddedGroup]:
        """The sequences in order, split where padding them together would waste too much."""
        runs: list[list[int]] = []
        for length in self.lengths:
            longer = [*runs[-1], length] if runs else []
            if runs and max(longer) * len(longer) <= MAX_PADDING * sum(longer):
                runs[-1] = longer
            else:
                runs.append([length])
        groups, start = [], 0
        for run in runs:
            longest, end = max(run), start + sum(run)
            places = [row * longest + torch.arange(length) for row, length in enumerate(run)]
            groups.append(
                _PaddedGroup(
                    tokens=slice(start, end),
                    num_sequences=len(run),
                    length=longest,
                    places_n=torch.cat(places).to(self.device),
                )
            )
            start = end
        return groups


def packed_attention(
    module: nn.Module,
    query_1HTC: Tensor,
    key_1KTC: Tensor,
    value_1KTC: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, as transformers calls it.

    Args:
        query_1HTC, key_1KTC, value_1KTC: H is a multiple of K.
        attention_mask: None; the sequences are masked by `packing`.
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
    repeats = query_1HTC.shape[1] // key_1KTC.shape[1]
    query_THC, key_TKC, value_TKC = (
        states[0].transpose(0, 1) for states in (query_1HTC, key_1KTC, value_1KTC)
    )
    if query_THC.is_cuda and query_THC.dtype in HALF_PRECISION:
        output_THC = _flash_attention(
            query_THC, key_TKC, value_TKC, packing, scaling, sliding_window
        )
    else:
        parts = [
            _padded_attention(
                query_THC[group.tokens],
                key_TKC[group.tokens],
                value_TKC[group.tokens],
                group,
                scaling,
                sliding_window,
                grouped_heads=repeats > 1,
            )
            for group in packing.groups
        ]
        output_THC = torch.cat(parts) if len(parts) > 1 else parts[0]
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
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query_THC,
            key_TKC,
            value_TKC,
            *bounds,
            softmax_scale=scaling,
            causal=True,
            window_size=window,
            deterministic=True,
        )
    from torch.nn.attention.varlen import varlen_attn

    # Grouped heads are an argument only from torch 2.12 on.
    repeats = query_THC.shape[1] // key_TKC.shape[1]
    if repeats > 1:
        key_TKC = key_TKC.repeat_interleave(repeats, dim=1)
        value_TKC = value_TKC.repeat_interleave(repeats, dim=1)
    output_THC = varlen_attn(
        query_THC, key_TKC, value_TKC, *bounds, scale=scaling, window_size=window
    )
    assert isinstance(output_THC, Tensor)
    return output_THC


def _padded_attention(
    query_nHC: Tensor,
    key_nKC: Tensor,
    value_nKC: Tensor,
    group: _PaddedGroup,
    scaling: float | None,
    sliding_window: int | None,
    *,
    grouped_heads: bool,
) -> Tensor:
    shape = (group.num_sequences, group.length)
    is_padded = len(query_nHC) < shape[0] * shape[1]

    def padded(states_nHC: Tensor) -> Tensor:
        if is_padded:
            room = states_nHC.new_zeros(shape[0] * shape[1], *states_nHC.shape[1:])
            states_nHC = room.index_copy(0, group.places_n, states_nHC)
        return states_nHC.unflatten(0, shape).transpose(1, 2)

    # Padding is on the right, where causal attention does not look.
    mask_tt = None
    if sliding_window is not None and sliding_window < group.length:
        ones_tt = torch.ones(group.length, group.length, dtype=torch.bool, device=query_nHC.device)
        mask_tt = ones_tt.tril() & ones_tt.triu(1 - sliding_window)
    output_sHtC = scaled_dot_product_attention(
        padded(query_nHC),
        padded(key_nKC),
        padded(value_nKC),
        attn_mask=mask_tt,
        is_causal=mask_tt is None,
        scale=scaling,
        enable_gqa=grouped_heads,
    )
    output_nHC = output_sHtC.transpose(1, 2).flatten(0, 1)
    return output_nHC.index_select(0, group.places_n) if is_padded else output_nHC


AttentionInterface.register(PACKED, packed_attention)

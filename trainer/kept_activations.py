"""What autograd keeps of a forward pass, counted on a model that has no weights.

Shapes: T packed tokens, E positions of attention, H query heads, K key-value heads, C head width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "onepass_planned"


class _SavedByAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps of so many positions, and computes nothing.

    The packed states where they are padded again; the output is then that of the layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTC: Tensor,
        key_1KTC: Tensor,
        value_1KTC: Tensor,
        positions: int,
        pads_again: bool,
    ) -> Tensor:
        _, heads, _, width = query_1HTC.shape
        sums_EH = query_1HTC.new_empty(positions, heads, dtype=torch.float32)
        if pads_again:
            ctx.save_for_backward(query_1HTC, key_1KTC, value_1KTC, sums_EH)
            return query_1HTC.new_empty(query_1HTC.shape).transpose(1, 2)
        query_EHC, output_EHC = (query_1HTC.new_empty(positions, heads, width) for _ in range(2))
        key_EKC, value_EKC = (
            states.new_empty(positions, states.shape[1], width) for states in (key_1KTC, value_1KTC)
        )
        ctx.save_for_backward(query_EHC, key_EKC, value_EKC, output_EHC, sums_EH)
        return query_1HTC.new_empty(query_1HTC.shape).transpose(1, 2)


def _planned_attention(
    module: nn.Module,
    query_1HTC: Tensor,
    key_1KTC: Tensor,
    value_1KTC: Tensor,
    attention_mask: Tensor | None,
    *,
    positions: int,
    repeats_heads: bool,
    pads_again: bool,
    **options: Any,
) -> tuple[Tensor, None]:
    repeats = query_1HTC.shape[1] // key_1KTC.shape[1] if repeats_heads else 1
    key_1KTC, value_1KTC = (
        states.repeat_interleave(repeats, dim=1) for states in (key_1KTC, value_1KTC)
    )
    states = (query_1HTC, key_1KTC, value_1KTC)
    return _SavedByAttention.apply(*states, positions, pads_again).contiguous(), None


AttentionInterface.register(ATTENTION, _planned_attention)


def activation_bytes(
    model: PreTrainedModel, tokens: int, positions: int, *, checkpointing: bool, device: str
) -> int:
    """Bytes that autograd keeps of a forward pass, the head's left out.

    With checkpointing the inputs of all layers, and the inside of one.

    Args:
        model: on the meta device, made with ATTENTION.
        tokens: packed ones.
        positions: of attention, where each sequence has its prompt.
        device: a GPU's attention repeats keys and values for grouped heads (`attention.py`).
    """
    layers = list(model.get_decoder().layers)
    kept: dict[int, Tensor] = {}
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    ends: list[int] = []
    ids_1T = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    positions_1T = torch.zeros_like(ids_1T)
    with (
        _calls_around(layers, lambda: ends.append(_total(kept))),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.get_decoder()(
            input_ids=ids_1T,
            position_ids=positions_1T,
            use_cache=False,
            positions=positions,
            repeats_heads=device != "cpu",
            pads_again=device == "cpu" and not checkpointing,
        )
    total = _total(kept)
    if not checkpointing:
        return total
    inside = [end - start for start, end in zip(ends[::2], ends[1::2], strict=True)]
    width = model.get_output_embeddings().weight.shape[1]
    inputs = len(layers) * tokens * width * model.dtype.itemsize
    return total - sum(inside) + inputs + max(inside)


def _total(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@contextmanager
def _calls_around(modules: Sequence[nn.Module], call: Callable[[], None]) -> Iterator[None]:
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda *_: call()))
        handles.append(module.register_forward_hook(lambda *_: call()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

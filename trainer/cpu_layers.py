"""Layers of a policy on a CPU: fewer passes over memory, and less kept for the backward.

The norms and the gated activation are one kernel each. What a linear layer keeps of its input is
not kept where a pass over memory gives it again from what is kept anyway: the outputs of the norms
and of the activation. A layer of SmolLM2-135M then holds 23 kB a token in place of 45.

Shapes: T packed tokens, D model width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

import kernels

# Layers of one form: attention, then a gated MLP, each behind an RMSNorm.
LAYER_TYPES = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
# What narrower layers take and keep is little.
LEAST_WIDTH = 256


class _LeanLayer(nn.Module):
    """The forward of LAYER_TYPES."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    self_attn: nn.Module
    mlp: Any

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """`[1, T, D]` to `[1, T, D]`."""
        residual = hidden_states.detach()
        normed = _norm(self.input_layernorm, hidden_states)
        with _made_again(normed, lambda: _norm(self.input_layernorm, residual)):
            attended, _ = self.self_attn(hidden_states=normed, **options)
        hidden_states = hidden_states + attended
        return hidden_states + self._mlp(hidden_states)

    def _mlp(self, hidden_states: Tensor) -> Tensor:
        norm, mlp = self.post_attention_layernorm, self.mlp
        residual = hidden_states.detach()
        normed = _norm(norm, hidden_states)
        with _made_again(normed, lambda: _norm(norm, residual)):
            gate, up = mlp.gate_proj(normed), mlp.up_proj(normed)
        product = kernels.gated_silu(gate, up)
        gate, up = gate.detach(), up.detach()
        with _made_again(product, lambda: kernels.gated_silu(gate, up)):
            return mlp.down_proj(product)


_LEAN_TYPES = {kind: type(kind.__name__, (_LeanLayer, kind), {}) for kind in LAYER_TYPES}


def is_lean(layer: nn.Module, config: PretrainedConfig) -> bool:
    """Whether the layer is attention and a gated MLP with SiLU, each behind an RMSNorm, and of a
    width that is worth it."""
    has_form = type(layer) in LAYER_TYPES or isinstance(layer, _LeanLayer)
    return has_form and config.hidden_act in ("silu", "swish") and config.hidden_size >= LEAST_WIDTH


def use_lean_layers(model: PreTrainedModel) -> None:
    """Gives the decoder layers of a model in float32 on a CPU this forward, where they have the
    form and a width that is worth it."""
    for layer in model.get_decoder().layers:
        if is_lean(layer, model.config):
            layer.__class__ = _LEAN_TYPES[type(layer)]


def bytes_kept_less(model: PreTrainedModel) -> int:
    """Bytes a token that lean layers keep less than those of transformers, all together."""
    lean = [layer for layer in model.get_decoder().layers if is_lean(layer, model.config)]
    if not lean:
        return 0
    # Of each norm its product with the inverse root and its output; of the MLP the SiLU and its
    # product with the other half.
    numbers = 4 * model.config.hidden_size + 2 * model.config.intermediate_size
    return len(lean) * numbers * torch.float32.itemsize


def keeps_gradients(width: int, dtype_bytes: int, device: str, ranks: int) -> bool:
    """Whether gradients have their memory for good: on a CPU, where weights are not sharded.

    Allocated anew for each step they would lie among the activations, and keep the heap from being
    used again.
    """
    is_float32_on_cpu = device == "cpu" and dtype_bytes == torch.float32.itemsize
    return is_float32_on_cpu and ranks == 1 and width >= LEAST_WIDTH


def use_lean_embedding(model: PreTrainedModel) -> None:
    """Gives the embedding of a model that is whole on this CPU a gradient of its own size only
    once, `weight.grad`."""
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and embedding.embedding_dim >= LEAST_WIDTH:
        embedding.__class__ = _LeanEmbedding


class _LeanEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """int64 [...] to [..., D]."""
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        return _EmbeddingRows.apply(input, self.weight, self.padding_idx)


class _EmbeddingRows(torch.autograd.Function):
    """Adds to the rows of `weight.grad` where autograd would make, and add, a whole matrix; one
    that the output layer shares would wait for it through the whole backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, token_ids: Tensor, weight_VD: Tensor, padding_idx: int | None
    ) -> Tensor:
        ctx.token_ids, ctx.weight_VD = token_ids, weight_VD  # type: ignore[attr-defined]
        ctx.padding_idx = padding_idx  # type: ignore[attr-defined]
        return weight_VD[token_ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, None, None]:
        weight_VD, token_ids = ctx.weight_VD, ctx.token_ids  # type: ignore[attr-defined]
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        rows_RD = grad.reshape(-1, grad.shape[-1])
        if ctx.padding_idx is not None:  # type: ignore[attr-defined]
            rows_RD = rows_RD * (token_ids.reshape(-1, 1) != ctx.padding_idx)  # type: ignore[attr-defined]
        weight_VD.grad.index_add_(0, token_ids.flatten(), rows_RD)
        return None, None, None


def _norm(norm: Any, x: Tensor) -> Tensor:
    return kernels.rms_norm(x, norm.weight, norm.variance_epsilon)


def _made_again(value: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """What is computed inside keeps no `value` for its backward, which makes it again."""
    address, count = value.data_ptr(), value.numel()

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        if (kept.data_ptr(), kept.numel()) != (address, count):
            return kept
        return kept.shape, kept.stride()

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return make().as_strided(*kept)

    return saved_tensors_hooks(pack, unpack)

"""Decoding steps on a CPU in float32, one call of C++ a layer: what transformers does around its
products costs a small model as much time as reading its weights.

Shapes: B sequences, V vocabulary, D model width.
"""

from typing import Any

from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

import kernels
from trainer.cpu_layers import is_lean
from trainer.rollout.growing_cache import GrowingLayer

MODEL_TYPES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


class CpuDecoder:
    """Decoding steps of a model that `can_decode` says yes to.

    The weights are those that the model has when this is made.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        body = model.get_decoder()
        self.embedding, self.norm = body.embed_tokens, body.norm
        self.rotary, self.head = body.rotary_emb, model.get_output_embeddings()
        self.layers = [_native_layer(layer) for layer in body.layers]

    def __call__(self, token_ids_B: Tensor, positions_B: Tensor, cache: Cache) -> Tensor:
        """Logits `[B, V]` after the new token of each sequence, whose keys and values it adds to
        the cache.

        Args:
            token_ids_B: the new tokens.
            positions_B: their places in their sequences, which lie at the right of the cache.
            cache: of GrowingLayer.
        """
        x_BD = self.embedding.weight[token_ids_B]
        cosines_B1C, sines_B1C = self.rotary(x_BD, positions_B[:, None])
        cosines_BC, sines_BC = cosines_B1C[:, 0].contiguous(), sines_B1C[:, 0].contiguous()
        starts_B = cache.get_seq_length() - positions_B
        for layer, cached in zip(self.layers, cache.layers, strict=True):
            assert isinstance(cached, GrowingLayer)
            position = cached.extend(1)
            keys_BKRC, values_BKRC = cached.stored
            layer(
                x_BD,
                cosines_BC=cosines_BC,
                sines_BC=sines_BC,
                keys_BKRC=keys_BKRC,
                values_BKRC=values_BKRC,
                starts_B=starts_B,
                position=position,
            )
        normed_BD = kernels.rms_norm(x_BD, self.norm.weight, self.norm.variance_epsilon)
        return kernels.few_rows_linear(normed_BD, self.head.weight, self.head.bias)


def can_decode(model: PreTrainedModel) -> bool:
    """Whether CpuDecoder does what this model does, at a width that is worth it."""
    if type(model) not in MODEL_TYPES:
        return False
    config = model.config
    layer_types = getattr(config, "layer_types", None)
    # Without a list of layer types the window is that of all layers.
    has_window = layer_types is None and getattr(config, "sliding_window", None) is not None
    return (
        not has_window
        and set(layer_types or ["full_attention"]) == {"full_attention"}
        and all(is_lean(layer, config) for layer in model.get_decoder().layers)
    )


def _native_layer(layer: Any) -> kernels.DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    query_norm, key_norm = (None if norm is None else norm.weight.data for norm in norms)
    weights = kernels.DecoderWeights(
        attention_norm=layer.input_layernorm.weight.data,
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        output=_linear(attention.o_proj),
        query_norm=query_norm,
        key_norm=key_norm,
        mlp_norm=layer.post_attention_layernorm.weight.data,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )
    return kernels.DecoderLayer(
        weights,
        head_width=attention.head_dim,
        epsilon=layer.input_layernorm.variance_epsilon,
        scale=attention.scaling,
    )


def _linear(linear: nn.Linear) -> kernels.LinearWeights:
    bias = linear.bias
    return kernels.LinearWeights(
        weight=linear.weight.data, bias=None if bias is None else bias.data
    )

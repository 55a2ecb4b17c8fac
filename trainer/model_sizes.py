"""How large a model is, from its config alone: it is made on the meta device and counted."""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.config import RunConfig
from trainer.kept_activations import ATTENTION
from trainer.lora import Adapters


class ModelSizes:
    """Counts of a model without weights.

    Args:
        model_config: of a model for causal language modelling, as transformers reads it.
        config: of the run, for the type of its computation and its adapters.
    """

    def __init__(self, model_config: PretrainedConfig, config: RunConfig) -> None:
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config), dtype=self.dtype, attn_implementation=ATTENTION
            )
        text = model_config.get_text_config()
        head = self.model.get_output_embeddings().weight
        self.vocabulary, self.width = head.shape
        self.is_tied = head is self.model.get_input_embeddings().weight
        self.layers = list(self.model.get_decoder().layers)
        # Of the model that is sampled from, which has no adapters.
        self.sampled_numel = _numel(self.model)
        self.has_adapters, self.merged_numel = config.lora.lora_rank > 0, 0
        if self.has_adapters:
            adapted = Adapters(self.model, config.lora).layers.values()
            self.model.to(self.dtype)
            self.merged_numel = sum(layer.base_layer.weight.numel() for layer in adapted)
        self.numel, self.trained_numel = _numel(self.model), _trained_numel(self.model)
        self.layer_numel = max(map(_numel, self.layers))
        self.root_numel = self.numel - sum(map(_numel, self.layers))
        heads = text.num_attention_heads
        self.grouping = heads // (getattr(text, "num_key_value_heads", None) or heads)
        head_dim = getattr(text, "head_dim", None) or self.width // heads
        self.cache_width = 2 * head_dim * heads // self.grouping

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is computed with."""
        return self.dtype.itemsize


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _trained_numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)

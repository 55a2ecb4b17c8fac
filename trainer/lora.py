"""LoRA: low-rank adapters beside the linear layers of a frozen model, made by peft.

A layer computes W x + scale B A x, and only A and B are trained. Everything outside of the update
(sampler, export) gets merged weights, W + scale B A, under the names that W has without adapters;
what is saved to go on from is W as it was loaded, which is never changed, and A and B.

Shapes: R rank, I inputs and O outputs of a layer.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", 2106.09685, section 4.
"""

import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from trainer.config import LoraOptions, UsageError
from trainer.seeds import derive_key
from trainer.stored_tensors import StoredTensors, local_part, local_slices

# What peft calls an adapter that nobody named, and its two files.
ADAPTER = "default"
ADAPTER_FILE, ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
MATRICES = ("lora_A", "lora_B")


def check_lora(options: LoraOptions) -> None:
    """Raises UsageError where adapters are wanted and peft is missing."""
    if options.lora_rank and importlib.util.find_spec("peft") is None:
        raise UsageError("--lora-rank: needs the package peft, pip install 'onepass-rl[lora]'")


class Adapters:
    """Adapters in the decoder layers of a model, which is frozen from here on.

    Args:
        model: changed in place, before it is sharded; may be on the meta device.
        options: with a rank above 0.

    Raises:
        UsageError: peft is missing, or the model has no linear layers of the names given.
    """

    def __init__(self, model: PreTrainedModel, options: LoraOptions) -> None:
        check_lora(options)
        # Here, because it is an extra.
        from peft import LoraConfig, inject_adapter_in_model

        self.model = model
        self.config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            target_modules=_target_names(model, options),
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.config.name_or_path,
        )
        inject_adapter_in_model(self.config, model, ADAPTER)
        # Layers of peft, by the names of those they stand in for.
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
        }

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fills A from the seed, the same for any sharding, with the distribution that peft takes,
        and B with zeros: the model is its base."""
        for index, layer in enumerate(self.layers.values()):
            weight_RI = layer.lora_A[ADAPTER].weight
            generator = torch.Generator().manual_seed(derive_key(seed, "lora", index))
            whole_RI = torch.empty(weight_RI.shape)
            nn.init.kaiming_uniform_(whole_RI, a=math.sqrt(5), generator=generator)
            local_part(weight_RI).copy_(whole_RI[local_slices(weight_RI)])
            layer.lora_B[ADAPTER].weight.zero_()

    def restore(self, stored: StoredTensors) -> None:
        """Fills A and B from a file of `state`, each rank reading its part."""
        for name, weight in self.state():
            stored.read_into(name, weight)

    def state(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A and B of each layer, by the names they have in peft's files."""
        for name, layer in self.layers.items():
            for matrix in MATRICES:
                yield (
                    f"base_model.model.{name}.{matrix}.weight",
                    getattr(layer, matrix)[ADAPTER].weight,
                )

    def write_config(self, folder: Path) -> None:
        """Writes what peft's files hold besides tensors."""
        values = self.config.to_dict() | {"inference_mode": True}
        # Sets have another order in each process.
        lists = {name: sorted(value) for name, value in values.items() if isinstance(value, set)}
        text = json.dumps(values | lists, indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n")

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and merged weights, sharded as the base is; one at a time.

        Collectives: one all-gather of A for each adapted layer that is sharded.
        """
        for name, weight in base_weights(self.model):
            layer = self.layers.get(name.removesuffix(".weight"))
            yield name, weight if layer is None else _merged(layer)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within its block the model computes what its base does."""
        try:
            for layer in self.layers.values():
                layer.enable_adapters(False)
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)


def base_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of a model as its files have them, whether there are adapters in it or not."""
    for name, parameter in model.named_parameters():
        if not any(f".{matrix}.{ADAPTER}." in name for matrix in MATRICES):
            yield name.replace(".base_layer.", "."), parameter


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    weight_OI = layer.base_layer.weight
    matrix_RI, matrix_OR = (getattr(layer, matrix)[ADAPTER].weight for matrix in MATRICES)
    if isinstance(matrix_RI, DTensor):
        # Rows of B, like those of W, need all of A.
        everywhere = [Replicate()] * matrix_RI.device_mesh.ndim
        matrix_RI = matrix_RI.redistribute(placements=everywhere)
    return weight_OI + matrix_OR @ matrix_RI * layer.scaling[ADAPTER]


def _target_names(model: PreTrainedModel, options: LoraOptions) -> list[str]:
    """Last parts of the names of the layers to adapt."""
    there = {
        name.rpartition(".")[2]
        for layer in model.get_decoder().layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = sorted(set(options.lora_targets) - there)
    if unknown:
        raise UsageError(
            f"--lora-targets: expected linear layers of the decoder ({', '.join(sorted(there))}), "
            f"got {unknown[0]}"
        )
    return sorted(options.lora_targets or there)

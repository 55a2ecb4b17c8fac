"""Decoding steps of a layer in C++, and of whole models, against transformers in float64."""

import copy
from typing import Any

import pytest
import torch
from test_few_rows import level  # noqa: F401
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import Cache

from kernels import DecoderLayer, DecoderWeights, LinearWeights
from trainer.rollout.cpu_decoder import CpuDecoder, can_decode
from trainer.rollout.growing_cache import GrowingLayer

# Of the error of plain float32, root mean square.
ERROR_FACTOR = 1.5
SIZES: dict[str, Any] = dict(
    vocab_size=90,
    hidden_size=256,
    intermediate_size=300,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.1,
    head_dim=40,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
}
SEQUENCES, PROMPT, STEPS = 5, 9, 24


def random_model(config: Any) -> PreTrainedModel:
    """All its weights at random, norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.uniform_(-1, 1)
    return model.eval().requires_grad_(False)


def prompts() -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left."""
    ids_BT = torch.randint(1, 90, (SEQUENCES, PROMPT), generator=torch.Generator().manual_seed(1))
    starts_B = torch.tensor([0, 4, 1, 8, 0])
    return ids_BT, (torch.arange(PROMPT) >= starts_B[:, None]).long()


def decoded(model: PreTrainedModel, decoder: CpuDecoder | None, rows: slice) -> Tensor:
    """Logits of all steps, [steps, B, V]; without a decoder those of transformers."""
    ids_BT, mask_BT = (each[rows] for each in prompts())
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache
    )
    new_SB = torch.randint(1, 90, (STEPS, SEQUENCES), generator=torch.Generator().manual_seed(2))
    positions_B, steps = mask_BT.sum(1), []
    for new_B in new_SB[:, rows]:
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        if decoder is not None:
            steps.append(decoder(new_B, positions_B, cache))
        else:
            output = model(
                input_ids=new_B[:, None],
                attention_mask=mask_BT,
                position_ids=positions_B[:, None],
                past_key_values=cache,
            )
            steps.append(output.logits[:, -1])
        positions_B = positions_B + 1
    return torch.stack(steps)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_as_exact_as_those_of_transformers(name: str) -> None:
    model = random_model(CONFIGS[name])
    assert can_decode(model)
    ours = decoded(model, CpuDecoder(model), slice(None))
    theirs = decoded(model, None, slice(None))
    exact = decoded(model.double(), None, slice(None))
    error, of_theirs = ((each - exact).square().mean().sqrt() for each in (ours, theirs))
    assert error <= ERROR_FACTOR * of_theirs


def test_a_sequence_does_not_depend_on_the_others_or_on_the_threads() -> None:
    model = random_model(CONFIGS["qwen3"])
    decoder = CpuDecoder(model)
    together = decoded(model, decoder, slice(None))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # The prompts go through transformers, whose bits depend on their number.
        assert torch.equal(decoded(model, decoder, slice(None)), together)
    finally:
        torch.set_num_threads(before)
    layer, x_BD = decoder.layers[0], torch.randn(SEQUENCES, 256)
    alone_BD = x_BD.clone()
    run(layer, x_BD)
    for row in range(SEQUENCES):
        run(layer, alone_BD[row : row + 1], slice(row, row + 1))
    assert torch.equal(x_BD, alone_BD)


def run(layer: DecoderLayer, x_BD: Tensor, rows: slice = slice(None), **changed: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    made: dict[str, Any] = {
        "cosines_BC": torch.randn(SEQUENCES, 40, generator=generator)[rows],
        "sines_BC": torch.randn(SEQUENCES, 40, generator=generator)[rows],
        "keys_BKRC": torch.randn(SEQUENCES, 2, 17, 40, generator=generator)[rows],
        "values_BKRC": torch.randn(SEQUENCES, 2, 17, 40, generator=generator)[rows],
        "starts_B": torch.tensor([0, 4, 1, 8, 0])[rows],
        "position": 11,
    }
    layer(x_BD, **made | changed)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"position": 17}, "position: expected 0 to 16, got 17"),
        ({"position": 7}, "starts: expected 0 to 7, got 0 to 8"),
        ({"starts_B": torch.zeros(4, dtype=torch.int64)}, r"starts: expected contiguous \[5\]"),
        ({"sines_BC": torch.zeros(5, 40).double()}, "sines: expected torch.float32 on cpu"),
        ({"values_BKRC": torch.zeros(5, 2, 18, 40)}, r"values: expected contiguous \[5, 2, 17,"),
    ],
)
def test_bad_step_gets_one_sentence_and_changes_nothing(
    changed: dict[str, Any], sentence: str
) -> None:
    layer = CpuDecoder(random_model(CONFIGS["llama"])).layers[0]
    x_BD = torch.ones(SEQUENCES, 256)
    with pytest.raises(ValueError, match=sentence):
        run(layer, x_BD, **changed)
    assert (x_BD == 1).all()


def weights(**changed: Any) -> DecoderWeights:
    made: dict[str, Any] = {"attention_norm": torch.ones(8), "mlp_norm": torch.ones(8)}
    shapes = {"query": (8, 8), "key": (4, 8), "value": (4, 8), "output": (8, 8)}
    shapes |= {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
    made |= {name: LinearWeights(weight=torch.ones(shape)) for name, shape in shapes.items()}
    return DecoderWeights(**made | changed)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"up": LinearWeights(weight=torch.ones(5, 8))}, r"up: expected \[6, 8\], got \[5, 8\]"),
        (
            {"key": LinearWeights(weight=torch.ones(4, 8), bias=torch.ones(3))},
            r"key.bias: expected \[4\], got \[3\]",
        ),
        ({"key_norm": torch.ones(3)}, r"key_norm: expected \[4\], got \[3\]"),
        (
            {"down": LinearWeights(weight=torch.ones(6, 8).T)},
            "down: expected a contiguous tensor, got strides",
        ),
        ({"mlp_norm": torch.ones(8).half()}, "mlp_norm: expected float32 on cpu"),
    ],
)
def test_weights_that_do_not_fit_get_one_sentence(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecoderLayer(weights(**changed), head_width=4, epsilon=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES), True),
        (LlamaConfig(**SIZES | {"hidden_size": 64}), False),
        (GPT2Config(vocab_size=90, n_embd=256, n_layer=1, n_head=4), False),
        (LlamaConfig(**SIZES, hidden_act="gelu"), False),
        (MistralConfig(**SIZES, sliding_window=16), False),
        (
            Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
            False,
        ),
    ],
)
def test_models_of_another_form_are_left_to_transformers(config: Any, expected: bool) -> None:
    assert can_decode(random_model(config)) is expected

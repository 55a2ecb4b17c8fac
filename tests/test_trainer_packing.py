"""Packed sequences: the states of each are those it has alone."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.attention import PACKED, Packing

LENGTHS = [7, 40, 39, 3, 1, 12]
SHAPE = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen3_with_a_window() -> PreTrainedModel:
    options = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **options))


def states(model: PreTrainedModel, token_ids: list[Tensor]) -> Tensor:
    """Hidden states of all sequences, each run alone by transformers' own attention."""
    model.set_attn_implementation("sdpa")
    decoder = model.get_decoder()
    return torch.cat([decoder(input_ids=ids[None]).last_hidden_state[0] for ids in token_ids])


def packed_states(model: PreTrainedModel, token_ids: list[Tensor]) -> Tensor:
    model.set_attn_implementation(PACKED)
    packing = Packing([len(ids) for ids in token_ids], torch.device("cpu"))
    return (
        model.get_decoder()(
            input_ids=torch.cat(token_ids)[None],
            position_ids=packing.positions_T[None],
            use_cache=False,
            packing=packing,
        )
        .last_hidden_state[0]
    )  # fmt: skip


def gradients(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    weights = [weight for weight in model.get_decoder().parameters() if weight.grad is not None]
    return torch.cat([weight.grad.flatten() for weight in weights])


@pytest.mark.parametrize("make", [llama, qwen3_with_a_window])
def test_packed_states_and_gradients_are_those_of_single_sequences(make) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    model = make().double().eval()
    token_ids = [torch.randint(0, 50, (length,)) for length in LENGTHS]
    direction = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    alone, packed = states(model, token_ids), packed_states(model, token_ids)
    assert torch.allclose(alone, packed, rtol=1e-12, atol=1e-12)
    expected = gradients(model, (states(model, token_ids) * direction).sum())
    got = gradients(model, (packed * direction).sum())
    assert (got - expected).norm() < 1e-12 * expected.norm()


def test_groups_bound_the_padding_and_hold_every_token_once() -> None:
    packing = Packing(LENGTHS, torch.device("cpu"))
    tokens = [index for group in packing.groups for index in range(*group.tokens.indices(10**6))]
    assert tokens == list(range(sum(LENGTHS)))
    for group in packing.groups:
        count = group.tokens.stop - group.tokens.start
        assert group.num_sequences * group.length <= 1.25 * count
        assert len(group.places_n.unique()) == count
    assert len(packing.groups) < len(LENGTHS)


def test_attention_with_capped_scores_is_refused() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE)).eval()
    with pytest.raises(ValueError, match="softcap: expected attention without it"):
        packed_states(model, [torch.tensor([1, 2, 3])])

"""Packed sequences, also with common prompts: the states of each are those it has alone."""

from collections.abc import Callable

import numpy as np
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
from trainer.packing import UpdateSample, pack_targets, pack_tokens, plan_micro_batches

CPU = torch.device("cpu")
Make = Callable[[], PreTrainedModel]

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


def packed_states(model: PreTrainedModel, token_ids: list[Tensor], packing: Packing) -> Tensor:
    """Hidden states of the packed tokens."""
    model.set_attn_implementation(PACKED)
    hidden = model.get_decoder()(
        input_ids=torch.cat(token_ids)[None],
        position_ids=packing.positions_T[None],
        use_cache=False,
        packing=packing,
    )
    return hidden.last_hidden_state[0]


def gradients(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    weights = [weight for weight in model.get_decoder().parameters() if weight.grad is not None]
    return torch.cat([weight.grad.flatten() for weight in weights])


@pytest.mark.parametrize("make", [llama, qwen3_with_a_window])
def test_packed_states_and_gradients_are_those_of_single_sequences(make: Make) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    token_ids = [torch.randint(0, 50, (length,)) for length in LENGTHS]
    direction = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    packed = packed_states(model, token_ids, Packing.of_lengths(LENGTHS, CPU))
    assert torch.allclose(states(model, token_ids), packed, rtol=1e-12, atol=1e-12)
    expected = gradients(model, (states(model, token_ids) * direction).sum())
    got = gradients(model, (packed * direction).sum())
    assert (got - expected).norm() < 1e-12 * expected.norm()


def completions(count: int) -> list[UpdateSample]:
    """Of three prompts, one of a single token, in mixed order; some completions of one token."""
    generator = np.random.default_rng(0)
    prompts = [[3, 4, 5, 6, 7, 8], [9], [3, 4, 5]]
    return [
        UpdateSample(
            prompt_ids=prompts[index % 3],
            token_ids=generator.integers(0, 50, size=int(generator.integers(1, 14))),
            sampler_logprobs=np.zeros(0, dtype=np.float32),
            advantage=0.0,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("make", [llama, qwen3_with_a_window])
def test_common_prompts_are_computed_once_and_change_nothing(make: Make) -> None:
    torch.manual_seed(0)
    model, samples = make().double().eval(), completions(11)
    tokens = pack_tokens(samples, CPU)
    alone = sum(one.num_positions for one in samples)
    saved = sum(len(one.prompt_ids) for one in samples) - 6 - 1 - 3
    assert len(tokens.token_ids_T) == alone - saved
    targets = pack_targets(samples, CPU)
    direction = torch.randn(len(targets.target_ids_N), 32, dtype=torch.float64)

    def before_targets() -> Tensor:
        whole = [torch.tensor([*one.prompt_ids, *one.token_ids[:-1]]) for one in samples]
        parts = states(model, whole).split([len(ids) for ids in whole])
        return torch.cat(
            [part[-len(one.token_ids) :] for part, one in zip(parts, samples, strict=True)]
        )

    packed = packed_states(model, [tokens.token_ids_T], tokens.packing)
    packed = packed[tokens.target_positions_N]
    assert torch.allclose(before_targets(), packed, rtol=1e-12, atol=1e-12)
    expected = gradients(model, (before_targets() * direction).sum())
    got = gradients(model, (packed * direction).sum())
    # The models' norms round gradients to float32, here after the sum over completions.
    assert (got - expected).norm() < 1e-6 * expected.norm()


def test_groups_bound_the_padding_and_hold_every_token() -> None:
    packing = Packing.of_lengths(LENGTHS, CPU)
    groups = packing.padded_groups
    assert sum(group.numel() for group in groups) <= 1.25 * sum(LENGTHS)
    assert len(groups) < len(LENGTHS)
    flat = torch.cat([group.flatten() for group in groups])
    assert flat[packing.first_padded_T].tolist() == list(range(sum(LENGTHS)))


def test_gathered_tokens_of_a_flash_call_lead_back_to_the_packed_ones() -> None:
    packing = pack_tokens(completions(11), CPU).packing
    sources = packing.sources_E
    assert sources is not None and packing.cu_seqlens[-1] == len(sources)
    count = int(sources.max()) + 1
    assert sources[packing.first_use_T].tolist() == list(range(count))
    assert Packing.of_lengths(LENGTHS, CPU).sources_E is None


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_plan_deals_every_sample_once_and_evenly(num_ranks: int) -> None:
    samples = completions(37)
    plans = plan_micro_batches(samples, num_ranks, 64)
    dealt = [index for plan in plans for part in plan for index in part]
    assert sorted(dealt) == list(range(37))
    assert len({len(plan) for plan in plans}) == 1

    def positions(part: list[int]) -> int:
        return len(pack_tokens([samples[i] for i in part], CPU).token_ids_T) if part else 0

    assert all(positions(part) <= 64 for plan in plans for part in plan)
    shares = [sum(map(positions, plan)) for plan in plans]
    assert max(shares) <= 1.5 * sum(shares) / num_ranks


def test_plan_leaves_a_sample_above_the_budget_alone() -> None:
    lengths = [300, 20, 30, 50]
    samples = [
        UpdateSample(
            prompt_ids=[index],
            token_ids=np.zeros(length, dtype=np.int64),
            sampler_logprobs=np.zeros(0, dtype=np.float32),
            advantage=0.0,
        )
        for index, length in enumerate(lengths)
    ]
    plan = plan_micro_batches(samples, 1, 100)[0]
    assert sorted(map(sorted, plan)) == [[0], [1, 2, 3]]


def test_attention_with_capped_scores_is_refused() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE)).eval()
    with pytest.raises(ValueError, match="softcap: expected attention without it"):
        packed_states(model, [torch.tensor([1, 2, 3])], Packing.of_lengths([3], CPU))

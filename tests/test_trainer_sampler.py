"""The sampler: right distribution, right log-probabilities, independence of the batch, ends."""

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

import kernels
from trainer import cpu_layers
from trainer.rollout import transformers_sampler
from trainer.rollout.cpu_decoder import CpuDecoder
from trainer.rollout.transformers_sampler import TransformersSampler, nucleus, sample_tokens
from trainer.seeds import derive_key
from trainer.templates import Template, template_by_name
from trainer.testing import WORDS, bigram_logprobs, bigram_model, bigram_tokenizer

TINY = template_by_name("tiny")


def make_sampler(
    *, rows_per_batch: int = 64, template: Template = TINY, noise: float = 1e-4
) -> TransformersSampler:
    return TransformersSampler(
        bigram_model(noise=noise),
        bigram_tokenizer(),
        template,
        dtype=torch.float32,
        rows_per_batch=rows_per_batch,
    )


def make_keys(prompts: int, samples: int, step: int = 1) -> np.ndarray:
    return np.array(
        [[derive_key(0, "test", step, p, g) for g in range(samples)] for p in range(prompts)],
        dtype=np.uint64,
    )


def words(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_sampled_tokens_follow_the_models_distribution() -> None:
    completions = make_sampler(rows_per_batch=4000).generate(
        [words("User: 1 + 2 Assistant:")], make_keys(1, 4000), max_new_tokens=1, temperature=1.0
    )[0]
    counts = np.bincount([one.token_ids[0] for one in completions], minlength=len(WORDS))
    expected = bigram_logprobs()[WORDS.index("Assistant:")].exp().numpy() * 4000
    common = expected > 5
    assert counts[~common].sum() <= 20
    # Two common words, so one degree of freedom: 10.8 has probability 0.001.
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() < 10.8


def test_temperature_sharpens_the_distribution() -> None:
    completions = make_sampler(rows_per_batch=2000).generate(
        [words("User: 1 + 2 Assistant:")], make_keys(1, 2000), max_new_tokens=1, temperature=0.5
    )[0]
    # Weights 9 and 1 become 81 and 1.
    answers_at_once = np.mean([one.token_ids[0] == WORDS.index("<answer>") for one in completions])
    assert answers_at_once == pytest.approx(1 / 82, abs=0.01)


@pytest.fixture(params=[True, False], ids=["native", "transformers"])
def decodes_natively(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to decode; the model is too narrow for the one of its own accord."""
    if request.param:
        monkeypatch.setattr(cpu_layers, "LEAST_WIDTH", 1)
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward(temperature: float, decodes_natively: bool) -> None:
    sampler = make_sampler(noise=0.1)
    prompts = [words("User: 1 + 2 Assistant:"), words("1 Assistant:"), words("User: so so 3 +")]
    completions_PG = sampler.generate(
        prompts, make_keys(3, 4), max_new_tokens=12, temperature=temperature
    )
    for prompt, completions in zip(prompts, completions_PG, strict=True):
        for one in completions:
            token_ids = torch.tensor([[*prompt, *one.token_ids]])
            logits = sampler.model(token_ids).logits[0, len(prompt) - 1 : -1]
            expected = (
                (logits / temperature).log_softmax(-1).gather(1, token_ids[0, len(prompt) :, None])
            )
            np.testing.assert_allclose(one.logprobs, expected[:, 0].detach(), atol=2e-5)
    assert (sampler.decoder is not None) == decodes_natively


@pytest.mark.usefixtures("decodes_natively")
def test_completions_do_not_depend_on_the_batch() -> None:
    prompts = [words("User: 1 + 2 Assistant:"), words("Assistant:"), words("9 9 9 so")]
    keys_PG = make_keys(3, 5)
    together = make_sampler().generate(prompts, keys_PG, max_new_tokens=30, temperature=1.0)
    apart = [
        make_sampler(rows_per_batch=1).generate(
            [prompts[p]], keys_PG[p : p + 1, g : g + 1], max_new_tokens=30, temperature=1.0
        )[0][0]
        for p in range(3)
        for g in range(5)
    ]
    lengths = set()
    for one, other in zip([c for group in together for c in group], apart, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        lengths.add(len(one.token_ids))
    assert len(lengths) > 3


def test_many_rows_are_left_to_transformers_until_they_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, rows = [words("User: 1 + 2 Assistant:")], []
    options = {"max_new_tokens": 30, "temperature": 1.0}
    plain = make_sampler().generate(prompt, make_keys(1, 50), **options)[0]
    decode = CpuDecoder.__call__

    def counted(self: CpuDecoder, token_ids_B: torch.Tensor, *others: object) -> torch.Tensor:
        rows.append(len(token_ids_B))
        return decode(self, token_ids_B, *others)

    monkeypatch.setattr(cpu_layers, "LEAST_WIDTH", 1)
    monkeypatch.setattr(CpuDecoder, "__call__", counted)
    mixed = make_sampler().generate(prompt, make_keys(1, 50), **options)[0]
    assert rows and max(rows) <= transformers_sampler.MOST_DECODED_ROWS
    for one, other in zip(plain, mixed, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_greedy_completion_equals_generate_of_transformers() -> None:
    sampler = make_sampler(noise=0.3)
    prompt = words("User: 1 + 2 Assistant:")
    ours = sampler.generate([prompt], make_keys(1, 1), max_new_tokens=20, temperature=0.0)[0][0]
    theirs = sampler.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=[WORDS.index("<eos>"), WORDS.index("</answer>")],
    )[0, len(prompt) :]
    assert ours.token_ids.tolist() == theirs.tolist()


def test_completion_ends_at_end_token_stop_word_or_budget() -> None:
    completions = make_sampler(rows_per_batch=500).generate(
        [words("User: 1 + 2 Assistant:")], make_keys(1, 500), max_new_tokens=6, temperature=1.0
    )[0]
    ends = {WORDS.index("<eos>"), WORDS.index("</answer>")}
    for one in completions:
        assert ends.isdisjoint(one.token_ids[:-1].tolist())
        if one.finish_reason == "stop":
            assert one.token_ids[-1] in ends
        else:
            assert len(one.token_ids) == 6 and one.token_ids[-1] not in ends
    assert {one.finish_reason for one in completions} == {"stop", "length"}


def test_stop_string_of_several_tokens_ends_a_completion() -> None:
    template = Template(
        name="x", text="{question}", answer_in="answer_tags", stop=("so so </think>",)
    )
    completions = make_sampler(rows_per_batch=200, template=template).generate(
        [words("Assistant:")], make_keys(1, 200), max_new_tokens=30, temperature=1.0
    )[0]
    stopped = [one for one in completions if one.token_ids[-1] == WORDS.index("</think>")]
    assert stopped
    for one in completions:
        text = " ".join(WORDS[index] for index in one.token_ids)
        assert text.find("so so </think>") in (-1, len(text) - len("so so </think>"))


def test_new_weights_change_what_is_sampled() -> None:
    sampler = make_sampler()
    weights = {name: tensor.clone() for name, tensor in sampler.model.named_parameters()}
    weights["lm_head.weight"][WORDS.index("so")] = 100.0
    sampler.load_weights(weights.items, 1)
    one = sampler.generate([words("1")], make_keys(1, 1), max_new_tokens=5, temperature=1.0)[0][0]
    assert one.token_ids.tolist() == [WORDS.index("so")] * 5


def test_weights_that_are_at_hand_whole_are_there_once() -> None:
    sampler, policy = make_sampler(), bigram_model(noise=0.1)
    sampler.load_weights(policy.named_parameters, 1)
    own = dict(sampler.model.named_parameters())
    assert all(
        own[name].data_ptr() == weight.data_ptr() for name, weight in policy.named_parameters()
    )
    # A part of a larger buffer would keep all of it alive.
    whole = torch.zeros(2, *policy.lm_head.weight.shape)
    sampler.load_weights(lambda: [("lm_head.weight", whole[0])], 2)
    assert torch.equal(own["lm_head.weight"], whole[0])
    assert own["lm_head.weight"].data_ptr() != whole.data_ptr()


def test_sample_tokens_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    draws = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    token_ids, logprobs = sample_tokens(probabilities.log().expand(6, 6), draws, 1.0)
    assert token_ids.tolist() == [1, 1, 3, 3, 4, 4]
    torch.testing.assert_close(logprobs, probabilities[token_ids].log())


def test_nucleus_is_that_of_transformers() -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    for top_p in (0.05, 0.5, 0.95, 0.999):
        theirs = TopPLogitsWarper(top_p)(torch.empty(0), logits).isfinite()
        assert torch.equal(nucleus(logits.log_softmax(-1), top_p), theirs)


def test_nucleus_keeps_the_lower_ids_of_equal_tokens() -> None:
    logprobs = torch.tensor([[0.125, 0.25, 0.25, 0.25, 0.125]]).log()
    assert nucleus(logprobs, 0.4).tolist() == [[False, True, True, False, False]]


def test_top_p_samples_the_nucleus_by_its_own_probabilities() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.02, 0.3, 0.08]])
    draws = torch.linspace(0, 1 - 1e-6, 999, dtype=torch.float64)
    token_ids, logprobs = sample_tokens(probabilities.log().expand(999, 5), draws, 1.0, 0.75)
    of_first = int((draws < 0.5 / 0.8).sum())
    assert token_ids.bincount(minlength=5).tolist() == [0, of_first, 0, 999 - of_first, 0]
    expected = torch.tensor([0.0, 0.625, 0.0, 0.375, 0.0]).log()
    torch.testing.assert_close(logprobs, expected[token_ids])


def test_top_p_leaves_rare_words_out_of_completions() -> None:
    sampler, prompt = make_sampler(rows_per_batch=500), words("User: 1 + 2 Assistant:")
    all_first = sampler.generate([prompt], make_keys(1, 500), max_new_tokens=1, temperature=1.0)
    nucleus_first = sampler.generate(
        [prompt], make_keys(1, 500), max_new_tokens=1, temperature=1.0, top_p=0.85
    )
    rare, common = WORDS.index("<answer>"), WORDS.index("<think>")
    assert any(one.token_ids[0] == rare for one in all_first[0])
    assert {one.token_ids[0] for one in nucleus_first[0]} == {common}
    assert all(one.logprobs[0] == 0.0 for one in nucleus_first[0])


def test_large_layers_decode_through_the_few_rows_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tokens, and log-probabilities within float32's rounding."""
    calls = []

    def counted(x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return few_rows_linear(x, *arguments)

    few_rows_linear = kernels.few_rows_linear
    monkeypatch.setattr(kernels, "few_rows_linear", counted)
    prompt = [words("User: 1 + 2 Assistant:")]
    options = {"max_new_tokens": 12, "temperature": 1.0}
    plain = make_sampler(noise=0.1).generate(prompt, make_keys(1, 4), **options)[0]
    assert not calls
    monkeypatch.setattr(transformers_sampler, "LEAST_UNCACHED_WEIGHTS", 1)
    fast = make_sampler(noise=0.1).generate(prompt, make_keys(1, 4), **options)[0]
    assert calls
    for one, other in zip(plain, fast, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    calls.clear()
    many = make_sampler(rows_per_batch=40).generate(prompt, make_keys(1, 33), **options)
    assert len(many[0]) == 33 and all(shape[0] <= 32 for shape in calls)

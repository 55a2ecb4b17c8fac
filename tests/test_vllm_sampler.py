"""Sampling with vLLM, where it is installed, held to the model's known probabilities."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.testing import WORDS, bigram_logprobs, bigram_tokenizer, wide_bigram_model

ROOT = Path(__file__).resolve().parent.parent
# vLLM keeps its engine until the process ends, so it gets one of its own.
SCRIPT = """
import json, sys
import numpy as np, torch
from trainer.fsdp import start_world, stop_world
from trainer.rollout.vllm_sampler import VllmSampler
from trainer.seeds import derive_key
from trainer.templates import template_by_name
from trainer.testing import WORDS, bigram_tokenizer

world = start_world(1)
sampler = VllmSampler(
    sys.argv[1],
    bigram_tokenizer(),
    template_by_name("tiny"),
    world,
    dtype="float32",
    max_tokens=64,
)
prompts = [[WORDS.index(word) for word in text.split()] for text in ("1 + 2 Assistant:", "so")]
keys = np.array([[derive_key(0, "t", p, g) for g in range(40)] for p in range(2)], dtype=np.uint64)
def sample(**changed):
    options = {"max_new_tokens": 10, "temperature": 0.7, **changed}
    completions = sampler.generate(prompts, keys, **options)
    return [
        [(one.token_ids.tolist(), one.logprobs.tolist(), one.finish_reason) for one in group]
        for group in completions
    ]
found = {"first": sample(), "again": sample(), "greedy": sample(temperature=0.0)}
found["nucleus"] = sample(temperature=1.0, top_p=0.85)
from safetensors.torch import load_file
weights = load_file(f"{sys.argv[1]}/model.safetensors")
weights["lm_head.weight"][WORDS.index("so")] = 100.0
sampler.load_weights(weights.items, 1)
found["loaded"] = sample()
print(json.dumps(found))
sampler.close()
stop_world()
"""
Found = dict[str, list[list[tuple[list[int], list[float], str]]]]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("model")
    wide_bigram_model(noise=0.0).save_pretrained(folder)
    bigram_tokenizer().save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_logprobs_are_the_models_at_the_temperature(found: Found) -> None:
    table_VV = (bigram_logprobs() / 0.7).log_softmax(-1)
    for start, group in zip(("Assistant:", "so"), found["first"], strict=True):
        for token_ids, logprobs, _ in group:
            before = [WORDS.index(start), *token_ids[:-1]]
            expected = table_VV[before, token_ids]
            torch.testing.assert_close(
                torch.tensor(logprobs, dtype=torch.float64), expected, atol=2e-3, rtol=0
            )


def test_completions_repeat_and_differ_within_a_group(found: Found) -> None:
    assert [[one[0] for one in group] for group in found["first"]] == [
        [one[0] for one in group] for group in found["again"]
    ]
    assert len({tuple(one[0]) for one in found["first"][0]}) > 5


def test_completions_end_at_end_token_stop_word_or_budget(found: Found) -> None:
    ends = {WORDS.index("<eos>"), WORDS.index("</answer>")}
    reasons = set()
    for token_ids, _, reason in (one for group in found["first"] for one in group):
        assert ends.isdisjoint(token_ids[:-1])
        assert (token_ids[-1] in ends) == (reason == "stop")
        assert reason == "stop" or len(token_ids) == 10
        reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_greedy_takes_the_most_likely_token(found: Found) -> None:
    table_VV = bigram_logprobs()
    for token_ids, _, _ in found["greedy"][0]:
        before = WORDS.index("Assistant:")
        for token_id in token_ids:
            assert table_VV[before, token_id] >= table_VV[before].max() - 1e-3
            before = token_id


def test_top_p_leaves_rare_tokens_out(found: Found) -> None:
    firsts = {one[0][0] for one in found["nucleus"][0]}
    assert firsts == {WORDS.index("<think>")}


def test_new_weights_change_what_is_sampled(found: Found) -> None:
    for group in found["loaded"]:
        for token_ids, _, _ in group:
            assert token_ids == [WORDS.index("so")] * 10

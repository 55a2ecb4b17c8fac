"""Reward models: their training from pairs, on one rank and two, and what they score."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from trainer.config import RewardOptions, UsageError
from trainer.preference_pairs import Pair, length_balanced
from trainer.reward_model import main, pair_losses
from trainer.reward_scores import RewardModel, summary
from trainer.rewards.grading import Attempt
from trainer.rewards.scoring import Scorer
from trainer.run_log import read_metrics
from trainer.tasks import Problem
from trainer.templates import template_by_name
from trainer.testing import WORDS, bigram_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def small_config(**changed: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=WORDS.index("<pad>"),
        eos_token_id=WORDS.index("<eos>"),
        bos_token_id=None,
        **changed,
    )


def sentence(generator: random.Random, words: str, length: int) -> str:
    return " ".join(generator.choice(words) for _ in range(length))


def write_pairs(path: Path, count: int = 120) -> Path:
    """What is preferred ends with an even digit; chosen and rejected have lengths of 1 to 4."""
    generator, lines = random.Random(0), []
    for index in range(count):
        row = {"prompt": f"User: {index % 10} + {index // 10 % 10} Assistant: "}
        for name, ends in (("chosen", "02468"), ("rejected", "13579")):
            rest = sentence(generator, "0123456789", generator.randrange(4))
            row[name] = f"{rest} {generator.choice(ends)}"
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    LlamaForCausalLM(small_config()).save_pretrained(folder / "model")
    bigram_tokenizer().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl")
    return folder


def flags(inputs: Path, out: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "model": inputs / "model",
        "dataset": inputs / "pairs.jsonl",
        "out": out,
        "batch_size": 16,
        "epochs": 4,
        "learning_rate": 2e-2,
        "micro_batch_tokens": 64,
        "eval_share": 0.2,
        **changed,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert main(flags(inputs, out)) == 0
    torch.use_deterministic_algorithms(False)
    return out


def test_loss_is_the_negative_log_of_the_probability_to_be_preferred() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, -40.0]), torch.tensor([0.0, 2.0, 40.0])
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), 80.0]
    assert pair_losses(chosen, rejected).tolist() == pytest.approx(expected)


def test_what_is_preferred_is_learned_and_generalizes(trained: Path) -> None:
    first, *_, last = read_metrics(trained)
    assert first["eval/accuracy"] < 0.8 and last["eval/accuracy"] > 0.9
    model = RewardModel(trained / "model", reads="whole")
    even, odd = model.scores(["User: 3 + 4 Assistant: "] * 2, ["1 3 5 2", "4 2 6 7"])
    assert even > odd


def test_two_ranks_give_the_weights_of_one(inputs: Path, tmp_path: Path) -> None:
    few = {"epochs": 1, "batch_size": 50, "learning_rate": 1e-3}
    assert main(flags(inputs, tmp_path / "one", **few)) == 0
    torch.use_deterministic_algorithms(False)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "trainer/reward_model.py", *flags(inputs, tmp_path / "two", **few)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    one, two = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        # A step of AdamW moves a weight by the learning rate, however small its gradient.
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


def test_killed_run_starts_over_and_a_complete_one_is_left_alone(
    inputs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    assert main(flags(inputs, tmp_path / "again")) == 0
    files = [folder / "model" / "model.safetensors" for folder in (trained, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()
    assert main(flags(inputs, trained)) == 0
    assert "is complete" in capsys.readouterr().out
    assert main(flags(inputs, trained, seed=1)) == 2
    assert "other options" in capsys.readouterr().err
    torch.use_deterministic_algorithms(False)


def test_balanced_pairs_do_not_tell_by_length() -> None:
    generator = random.Random(1)
    lengths = [(generator.randrange(1, 60), generator.randrange(1, 40)) for _ in range(500)]
    pairs = [
        Pair(prompt=str(index), chosen_ids=[0] * longer, rejected_ids=[0] * shorter)
        for index, (longer, shorter) in enumerate(lengths)
    ]
    kept = length_balanced(pairs, seed=0)
    assert kept == length_balanced(pairs, seed=0) != length_balanced(pairs, seed=1)
    excess = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in kept]
    for low in (1, 2, 4, 8, 16, 32):
        inside = [each for each in excess if low <= abs(each) < 2 * low]
        assert sum(each > 0 for each in inside) * 2 == len(inside)
    equal = [pair for pair in pairs if len(pair.chosen_ids) == len(pair.rejected_ids)]
    assert equal and all(pair in kept for pair in equal)
    assert len(kept) > len(pairs) / 2


def test_score_of_a_completion_is_that_of_it_alone(trained: Path) -> None:
    texts = ["1 2 3 4 5 6 7 8", "2", "so so 4", "<think> so </think> 3"]
    prompts = ["User: 1 + 2 Assistant: "] * len(texts)
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model")
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = bigram_tokenizer()(prompt + text)["input_ids"]
        expected.append(model(torch.tensor([ids])).logits.item())
    scores = RewardModel(trained / "model", reads="whole").scores(prompts, texts)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_helpfulness_reads_the_summary_alone(trained: Path) -> None:
    model = RewardModel(trained / "model", reads="summary")
    prompts = ["User: 1 + 2 Assistant: "] * 4
    told = ["<think> so 1 </think> 4", "<think> 2 so so </think>\n4", "4", ""]
    with_thought, other_thought, without, empty = model.scores(prompts, told)
    assert with_thought == other_thought != without
    assert without == empty
    assert [summary(each) for each in told] == ["4", "4", "", ""]
    whole = RewardModel(trained / "model", reads="whole").scores(prompts, told)
    assert whole[0] != whole[1]


def test_run_scores_general_prompts_by_the_model_and_others_by_rule(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preference_rewards.py").write_text(
        "from trainer.reward_scores import RewardModel\n"
        f"helpful = RewardModel({str(trained / 'model')!r}, only={{'kind': 'general'}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    attempts = [
        Attempt(
            problem=Problem(problem_id=kind, question="1 + 2", answer="3", columns={"kind": kind}),
            text="<think> so </think> <answer> 3 </answer>",
            truncated=False,
            token_ids=torch.zeros(3, dtype=torch.int64).numpy(),
            prompt="User: 1 + 2 Assistant:",
        )
        for kind in ("general", "sums")
    ]
    options = RewardOptions(reward=("preference_rewards:helpful=0.5",), grader="exact")
    with Scorer(options, template_by_name("tiny"), max_new_tokens=16) as scorer:
        ((general,), (sums,)) = scorer.score([[one] for one in attempts])
    (expected,) = RewardModel(trained / "model").scores(["1 + 2"], [attempts[0].text])
    assert general.parts["helpful"] == pytest.approx(expected)
    assert sums.parts["helpful"] is None
    assert general.total == pytest.approx(sums.total + 0.5 * expected)


def test_model_with_another_head_is_refused(inputs: Path, tmp_path: Path) -> None:
    classifier = LlamaForSequenceClassification(small_config(num_labels=3))
    classifier.save_pretrained(tmp_path)
    bigram_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="one output .* got LlamaForSequenceCl.* with 3 outputs"):
        RewardModel(tmp_path)
    with pytest.raises(UsageError, match="got LlamaForCausalLM"):
        RewardModel(inputs / "model")


def test_folder_that_another_process_writes_to_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = "import sys; from pathlib import Path; from trainer.run_folder import lock_folder\n"
    held += "lock = lock_folder(Path(sys.argv[1]), '--out'); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert main(flags(inputs, tmp_path)) == 2
        other.communicate(b"\n")
    torch.use_deterministic_algorithms(False)
    error = capsys.readouterr().err
    assert error == f"error: --out: another process is writing to {tmp_path}\n"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_gradient_that_is_not_finite_is_named_before_the_update(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(inputs / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    # Infinite activations have a gradient without a value.
    weights["model.layers.1.mlp.up_proj.weight"] *= torch.inf
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main(flags(inputs, tmp_path / "out", model=tmp_path / "model", eval_share=0)) == 2
    torch.use_deterministic_algorithms(False)
    assert "step 1: expected finite values, got the loss (nan)" in capsys.readouterr().err


def test_error_without_a_message_still_gives_one_sentence(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    model = RewardModel(trained / "model")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", fail)
    with pytest.raises(UsageError, match=r"the classifier of .* cannot be loaded \(OSError\(\)\)"):
        model.scores(["1"], ["2"])
    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(UsageError, match=r"the config of .* cannot be loaded \(OSError\(\)\)"):
        RewardModel(trained / "model")


def short_columns(inputs: Path, tmp: Path) -> dict[str, object]:
    (tmp / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    return {"dataset": tmp / "rows.jsonl"}


def longer_is_better(inputs: Path, tmp: Path) -> dict[str, object]:
    (tmp / "rows.jsonl").write_text('{"prompt": "1", "chosen": "2 3 4", "rejected": "2"}\n')
    return {"dataset": tmp / "rows.jsonl", "eval_share": 0}


def three_outputs(inputs: Path, tmp: Path) -> dict[str, object]:
    LlamaForSequenceClassification(small_config(num_labels=3)).save_pretrained(tmp / "three")
    bigram_tokenizer().save_pretrained(tmp / "three")
    return {"model": tmp / "three"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (short_columns, "line 1: expected the columns prompt, chosen, rejected, got no rejected"),
        (longer_is_better, "--balance-lengths: expected pairs to be left"),
        (three_outputs, "with 3 outputs"),
        (lambda inputs, tmp: {"dataset": tmp / "none.jsonl"}, "no such file"),
        (lambda inputs, tmp: {"model": tmp / "none"}, "expected an existing folder"),
        (lambda inputs, tmp: {"max_tokens": 2}, "--max-tokens: expected at least"),
        (lambda inputs, tmp: {"batch_sizes": 2}, "did you mean --batch-size"),
        (lambda inputs, tmp: {"eval_share": 1}, "--eval-share: expected a number < 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_ends_in_one_sentence(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make, sentence: str
) -> None:  # noqa: ANN001
    assert main(flags(inputs, tmp_path / "out", **make(inputs, tmp_path))) == 2
    torch.use_deterministic_algorithms(False)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()

"""General prompts and reward models: the mixture, the rewards, and the stages of the pipeline."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_runs import command_line, stages_here
from pytest import CaptureFixture
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from trainer.bilingual_task import POLITE, RUDE, is_helpful, translate
from trainer.config import DataOptions, RewardOptions, UsageError
from trainer.pipeline_presets import PIPELINES
from trainer.problem_source import held_out_general, open_problems
from trainer.reward_scores import summary
from trainer.rewards import Scorer
from trainer.rewards.grading import Attempt
from trainer.rewards.preference import PreferenceReward
from trainer.rewards.user_reward import UserReward
from trainer.rollout import Completion
from trainer.run_log import read_metrics
from trainer.sample_files import MakeGeneralData
from trainer.samples import ScoredCompletion, sample_metrics
from trainer.stages import pipeline_stages
from trainer.tasks import Problem
from trainer.templates import template_by_name
from trainer.testing import WORDS, bigram_tokenizer, write_bigram_model, write_sums
from trainer.train import main

SUM = Problem(problem_id="sum", question="1 + 2", answer="3")
GENERAL = Problem(problem_id="general", question="Say 4", answer="")
FLAGS = (
    "rl: --steps 2 --num-prompts 4 --group-size 4 --max-new-tokens 12 --eval-samples 1",
    "rl: --backend cpp --target-language en",
    "samples: --max-new-tokens 12 --samples 2 --target-language en",
    "reward: --batch-size 8 --eval-share 0 --max-tokens 64",
)


def write_lines(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    write_lines(folder / "prompts.jsonl", [{"question": f"{n} 0 {n}"} for n in range(10)])
    pairs = [{"prompt": f"{n % 10}", "chosen": "1 2", "rejected": f"{n % 7} 3"} for n in range(30)]
    write_lines(folder / "pairs.jsonl", pairs)
    torch.manual_seed(0)
    for name, outputs in (("scores", 1), ("three", 3)):
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=WORDS.index("<pad>"),
            num_labels=outputs,
        )
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        bigram_tokenizer().save_pretrained(folder / name)
    return folder


def attempt(problem: Problem, text: str) -> Attempt:
    ids = np.arange(5, dtype=np.int64)
    return Attempt(problem=problem, prompt="", text=text, token_ids=ids, truncated=False)


def data_options(inputs: Path, **changed: object) -> DataOptions:
    options = DataOptions(
        dataset=str(inputs / "sums.jsonl"),
        general_dataset=str(inputs / "prompts.jsonl"),
        eval_problems=6,
        eval_general=3,
    )
    return replace(options, **changed)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.3])
def test_every_stretch_of_problems_has_its_share_of_general_prompts(
    inputs: Path, share: float
) -> None:
    source, held_out = open_problems(data_options(inputs, general_share=share), seed=3)
    problems = [source.problem(index) for index in range(200)]
    for start in (0, 7, 100):
        found = sum(problem.is_general for problem in problems[start : start + 40])
        assert abs(found - 40 * share) <= 1
    assert not any(problem.is_general for problem in held_out)
    alone, _ = open_problems(data_options(inputs, general_dataset=None), seed=3)
    verified = [problem for problem in problems if not problem.is_general]
    assert verified == [alone.problem(index) for index in range(len(verified))]


def test_held_out_general_prompts_are_never_trained_on(inputs: Path) -> None:
    options = data_options(inputs)
    held_out = {problem.question for problem in held_out_general(options)}
    source, _ = open_problems(options, seed=0)
    seen = {source.problem(index).question for index in range(60)}
    assert len(held_out) == 3 and held_out.isdisjoint(seen)
    assert {f"{n} 0 {n}" for n in range(10)} - held_out <= seen
    assert held_out_general(data_options(inputs, general_dataset=None)) == []


def test_too_few_general_prompts_are_refused(inputs: Path) -> None:
    with pytest.raises(UsageError, match="--general-dataset: expected more than --eval-general"):
        open_problems(data_options(inputs, eval_general=10), seed=0)


@pytest.mark.parametrize(
    ("text", "template", "value"),
    [
        ("<think> a </think> four", "tiny-bilingual", 1.0),
        ("<think> a </think>", "tiny-bilingual", 0.0),
        ("four", "tiny-bilingual", 0.0),
        ("<think> a </think> <answer> four </answer>", "tiny", 1.0),
        ("<think> a </think> four", "tiny", 0.0),
    ],
)
def test_format_of_a_general_completion_needs_a_thought_but_no_box(
    text: str, template: str, value: float
) -> None:
    options = RewardOptions(grader="exact", format_weight=1.0)
    with Scorer(options, template_by_name(template), max_new_tokens=50) as scorer:
        ((reward,),) = scorer.score([[attempt(GENERAL, text)]])
    assert reward.parts == {"format": value}
    assert reward.total == value and not reward.correct


class Lengths:
    """Scores a completion by the number of its characters."""

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [100.0 * len(one) + len(two) for one, two in zip(prompts, completions, strict=True)]


def test_reward_model_scores_general_prompts_of_its_kind_and_of_none() -> None:
    kinds = (None, "helpful", "harmless")
    problems = [replace(GENERAL, columns={} if kind is None else {"kind": kind}) for kind in kinds]
    attempts = [attempt(problem, "abc") for problem in (*problems, SUM)]
    reward = UserReward("helpful", 1.0, PreferenceReward(Lengths(), "helpful"))  # type: ignore[arg-type]
    assert reward(attempts) == [503.0, 503.0, None, None]


def test_helpful_model_reads_the_summary_and_harmless_model_all(inputs: Path) -> None:
    folder = str(inputs / "scores")
    options = RewardOptions(grader="exact", helpful_model=folder, harmless_model=folder)
    texts = ("<think> 1 2 </think> 3 4", "<think> 5 6 </think> 3 4")
    with Scorer(options, template_by_name("tiny-bilingual"), max_new_tokens=50) as scorer:
        rewards, sums = scorer.score(
            [[attempt(GENERAL, text) for text in texts], [attempt(SUM, texts[0])]]
        )
    first, second = (reward.parts for reward in rewards)
    assert first["helpful"] == pytest.approx(second["helpful"])
    assert first["harmless"] != pytest.approx(second["harmless"], abs=1e-6)
    assert sums[0].parts["helpful"] is None and sums[0].parts["accuracy"] == 0.0
    weights = (first["helpful"], first["harmless"], 0.2 * (first["format"] or 0.0))
    assert rewards[0].total == pytest.approx(sum(value for value in weights if value is not None))


def test_answers_of_general_prompts_are_neither_right_nor_wrong() -> None:
    options = RewardOptions(grader="exact")
    template = template_by_name("tiny-bilingual")
    with Scorer(options, template, max_new_tokens=50) as scorer:
        texts = ("<think> a </think> \\boxed{ 3 }", "<think> a </think> \\boxed{ 4 }")
        groups = [[attempt(problem, text) for text in texts] for problem in (SUM, GENERAL)]
        rewards = scorer.score(groups)
    completion = Completion(
        token_ids=np.arange(5), logprobs=np.zeros(5, dtype=np.float32), finish_reason="stop"
    )
    scored = [
        [
            ScoredCompletion(
                problem=one.problem,
                prompt_ids=[1],
                completion=completion,
                text=one.text,
                reward=reward,
            )
            for one, reward in zip(group, of_group, strict=True)
        ]
        for group, of_group in zip(groups, rewards, strict=True)
    ]
    metrics, alone = sample_metrics(scored), sample_metrics(scored[:1])
    same = ("reward/accuracy", "length/correct", "length/wrong", "groups/all_wrong")
    for name in (*same, "category/correct", "category/incorrect"):
        assert metrics[name] == alone[name], name
    assert metrics["reward/accuracy/left_out"] == 0.5
    general = sample_metrics(scored[1:])
    assert general["groups/all_wrong"] is None and "reward/accuracy" not in general


def test_made_up_pairs_differ_in_what_their_reward_model_reads(tmp_path: Path) -> None:
    counts = MakeGeneralData(seed=1, rows=40, pairs=60).run(tmp_path)
    read = {
        name: [json.loads(line) for line in (tmp_path / name).open(encoding="utf-8")]
        for name in MakeGeneralData.FILES
    }
    assert counts == {name: len(rows) for name, rows in read.items()}
    assert counts["rows.jsonl"] == 40
    assert counts["helpful.jsonl"] + counts["harmless.jsonl"] == 60
    for pair in read["helpful.jsonl"]:
        assert "<think>" not in pair["chosen"]
        assert is_helpful(pair["prompt"], pair["chosen"])
        assert not is_helpful(pair["prompt"], pair["rejected"])
    closings = {language: translate(POLITE, language) for language in ("en", "zh")}
    for pair in read["harmless.jsonl"]:
        assert pair["chosen"].endswith(tuple(closings.values()))
        assert not summary(pair["rejected"]).endswith(tuple(closings.values()))
        assert RUDE.split()[0] in pair["rejected"] or "别" in pair["rejected"]


def flags(inputs: Path, run_dir: Path, *more: object, **changed: object) -> list[str]:
    options = {
        "general_dataset": inputs / "prompts.jsonl",
        "eval_general": 3,
        "helpful_pairs": inputs / "pairs.jsonl",
    }
    stages = [f"rejection-sft={inputs / 'model'}", f"general-rl={inputs / 'model'}"]
    span = ["--from=helpful-model", "--until=preference-rl"]
    more = (*span, *more, "--given", *stages)
    return command_line(inputs, run_dir, options | changed, more, FLAGS)


@pytest.fixture
def commands() -> Iterator[list[str]]:
    with stages_here() as ran:
        yield ran


def test_last_part_alone_has_general_prompts_and_the_reward_model(
    inputs: Path, tmp_path: Path, commands: list[str]
) -> None:
    assert main(flags(inputs, tmp_path / "run")) == 0
    assert commands == ["helpful-model", "evaluate-rules", "preference-rl"]
    (folder,) = (tmp_path / "run" / "stages").glob("*-preference-rl")
    lines = list(read_metrics(folder))
    assert all(isinstance(line["reward/helpful"], float) for line in lines[1:])
    assert all(line["reward/helpful/left_out"] == 0.5 for line in lines[1:])
    (weights,) = (tmp_path / "run" / "stages").glob("*-helpful-model/model/model.safetensors")
    held = sum(tensor.nbytes for tensor in load_file(weights).values())
    plan = json.loads((folder / "memory_plan.json").read_text())
    (planned,) = (one["bytes"] for one in plan["parts"] if one["name"] == "helpful reward model")
    # Buffers are not stored.
    assert held <= planned < 1.1 * held
    (evaluated,) = (tmp_path / "run" / "stages").glob("*-evaluate-rules")
    samples = [json.loads(line) for line in (evaluated / "samples.jsonl").open()]
    assert [sample["status"] for sample in samples].count("general") == 3 * 2
    stages = {stage.name: stage for stage in pipeline_stages(PIPELINES["r1-tiny"][1])}
    assert "--helpful-model" not in stages["general-rl"].command
    assert "--general-dataset" not in stages["general-rl"].command
    assert "--harmless-model" in stages["preference-rl"].command


def test_reward_model_of_the_user_takes_the_place_of_the_stage(
    inputs: Path, tmp_path: Path
) -> None:
    config = replace(
        PIPELINES["r1-tiny"][1],
        run_dir=tmp_path,
        general_task=None,
        given=(f"harmless-model={inputs / 'scores'}",),
        data=data_options(inputs),
    )
    stages = {stage.name: stage for stage in pipeline_stages(config)}
    assert "harmless-model" not in stages and "helpful-model" not in stages
    command = stages["preference-rl"].command
    assert command[command.index("--harmless-model") + 1] == str(inputs / "scores")
    assert inputs / "scores" in stages["preference-rl"].inputs


def test_folder_of_the_user_takes_the_place_of_made_up_data(inputs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    config = replace(PIPELINES["r1-tiny"][1], run_dir=tmp_path, given=(f"general-data={mine}",))
    stages = {stage.name: stage for stage in pipeline_stages(config)}
    assert mine / "rows.jsonl" in stages["rejection-filter"].inputs
    assert mine / "helpful.jsonl" in stages["helpful-model"].inputs
    assert mine / "prompts.jsonl" in stages["preference-rl"].inputs


def test_general_data_that_is_not_the_whole_folder_is_refused(
    inputs: Path, tmp_path: Path, commands: list[str], capsys: CaptureFixture[str]
) -> None:
    MakeGeneralData(seed=1, rows=4, pairs=4).run(tmp_path)
    (tmp_path / "harmless.jsonl").unlink()
    for given in (tmp_path / "rows.jsonl", tmp_path):
        more = ("--general-task=tiny-bilingual", f"--given=general-data={given}")
        assert main(command_line(inputs, tmp_path / "run", {}, more, FLAGS)) == 2
        error = capsys.readouterr().err
        missing = "harmless.jsonl" if given.is_dir() else "rows.jsonl"
        assert "--given: expected a folder with rows.jsonl, prompts.jsonl, helpful" in error
        assert error.endswith(f"for general-data, got {given} without {missing}\n")
    assert commands == []


def columns(inputs: Path, tmp: Path) -> dict[str, object]:
    return {"helpful_pairs": write_lines(tmp / "rows.jsonl", [{"prompt": "1", "chosen": "2"}])}


def longer(inputs: Path, tmp: Path) -> dict[str, object]:
    rows = [{"prompt": f"{n}", "chosen": "1 2 3", "rejected": "1"} for n in range(8)]
    return {"helpful_pairs": write_lines(tmp / "rows.jsonl", rows)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (longer, "helpful-model: --balance-lengths: .* left to learn from, got none of 8"),
        (columns, "helpful-model: --dataset: .*line 1: expected the columns prompt, chosen, rejec"),
        (lambda *_: {"helpful_pairs": "none.jsonl"}, "helpful-model: .*none.jsonl: no such file"),
        (lambda *_: {"general_dataset": "none.jsonl"}, "none.jsonl: no such file"),
        (lambda *_: {"eval_general": 10}, "--general-dataset: expected more than --eval-general"),
        (lambda *_: {"general_dataset": None}, "--general-dataset: expected prompts for the rewar"),
        (lambda *_: {"helpful": "trainer.seeds:none"}, "--helpful: expected a function in"),
    ],
)
def test_mistake_is_one_sentence_before_anything_is_computed(
    inputs: Path,
    tmp_path: Path,
    commands: list[str],
    capsys: CaptureFixture[str],
    make,  # noqa: ANN001
    message: str,
) -> None:
    assert main(flags(inputs, tmp_path / "run", **make(inputs, tmp_path))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert commands == []


@pytest.mark.parametrize(
    ("stage", "folder", "message"),
    [
        ("helpful-model", "three", "preference-rl: --helpful-model: .*one output .* 3 outputs"),
        ("helpful-model", "model", "preference-rl: --helpful-model: .* got LlamaForCausalLM"),
        ("rejection-sft", "three", "helpful-model: --model: expected a language model or a clas"),
    ],
)
def test_model_with_the_wrong_head_is_refused_at_the_start(
    inputs: Path,
    tmp_path: Path,
    commands: list[str],
    capsys: CaptureFixture[str],
    stage: str,
    folder: str,
    message: str,
) -> None:
    arguments = flags(inputs, tmp_path / "run")
    at = arguments.index("--given")
    given = [text for text in arguments[at + 1 : at + 3] if not text.startswith(stage)]
    arguments[at + 1 : at + 3] = [*given, f"{stage}={inputs / folder}"]
    arguments = [
        "--from=preference-rl"
        if text == "--from=helpful-model" and stage == "helpful-model"
        else text
        for text in arguments
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert commands == []

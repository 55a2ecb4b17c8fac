"""The embedded task, its corpus and tokenizer, and the cache of its base model."""

import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import tiny_task
from trainer.drawn_sums import MOST_HELD_OUT, is_held_out
from trainer.monitors import R1_REFLECTION
from trainer.rewards import extract_answer, format_reward
from trainer.templates import template_by_name
from trainer.tiny_model import PretrainingSettings, base_model_folder, pretrain
from trainer.tiny_task import (
    LARGEST_TOTAL,
    build_tokenizer,
    corpus_document,
    held_out_problems,
    textbook_document,
    training_problem,
)

TEMPLATE = template_by_name("tiny")
SMALL = PretrainingSettings(
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    steps=30,
    textbook_documents=16,
    corpus_documents=16,
    learning_rate=1e-2,
    warmup_steps=5,
    report_seconds=0.0,
)
BUILD = """
import sys, time
from pathlib import Path
from trainer.tiny_model import PretrainingSettings, base_model_folder

def report(line):
    print(line, flush=True)
    if sys.argv[2] == "hang":
        time.sleep(600)

print(base_model_folder(Path(sys.argv[1]), settings={settings!r}, report=report))
"""


def documents(make, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions and completions."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        question, completion = re.fullmatch(r"User: (.*?) Assistant: (.*)", make(rng)).groups()
        pairs.append((question, completion))
    return pairs


def right_answer(question: str) -> int:
    return eval(question.removesuffix(" = ?"))


def near(count: int, share: float, drawn: int) -> bool:
    """Within five standard deviations of a binomial count."""
    return abs(count - share * drawn) < 5 * math.sqrt(drawn * share * (1 - share))


def start_build(cache: Path, manner: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD.format(settings=SMALL), str(cache), manner],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def mixture() -> list[tuple[str, str]]:
    return documents(corpus_document, 8000)


def test_problems_have_right_answers_and_totals_in_range():
    for problem in [training_problem(3, index) for index in range(300)] + held_out_problems(300):
        assert int(problem.answer_text) == right_answer(problem.question)
        words = problem.question.removesuffix(" = ?").split()
        assert 7 <= len(words) <= 9
        for end in range(1, len(words) + 1, 2):
            assert 0 <= eval(" ".join(words[:end])) <= LARGEST_TOTAL


def test_problems_depend_on_seed_and_index_only():
    assert training_problem(1, 7) == training_problem(1, 7)
    drawn = [training_problem(seed, index) for seed in (1, 2) for index in range(200)]
    assert len({problem.problem_id for problem in drawn}) == 400
    assert len({problem.question for problem in drawn}) > 380


def test_held_out_problems_never_occur_in_training(mixture):
    held_out = {problem.question for problem in held_out_problems(MOST_HELD_OUT)}
    assert len(held_out) == MOST_HELD_OUT
    assert all(map(is_held_out, held_out))
    seen = {question for question, _ in mixture}
    seen |= {question for question, _ in documents(textbook_document, 4000)}
    seen |= {training_problem(0, index).question for index in range(4000)}
    assert not any(map(is_held_out, seen))
    assert not seen & held_out


def test_held_out_problems_are_a_prefix_of_a_fixed_sequence():
    assert held_out_problems(20) == held_out_problems(50)[:20]


@pytest.mark.parametrize("count", [0, MOST_HELD_OUT + 1])
def test_held_out_problems_refuse_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=f"count: expected 1 to .*, got {count}"):
        held_out_problems(count)


def test_corpus_depends_on_the_generator_only(mixture):
    assert mixture[:200] == documents(corpus_document, 200)
    assert mixture[:200] != documents(corpus_document, 200, seed=1)


def test_corpus_prompts_are_the_template_s():
    question = training_problem(0, 0).question
    assert TEMPLATE.prompt(question) == f"User: {question} {tiny_task.PROMPT_END}"


def test_corpus_mixes_manners_in_the_stated_shares(mixture):
    count = len(mixture)
    checked = sum("check" in completion for _, completion in mixture)
    worked = sum("=" in completion for _, completion in mixture)
    assert near(checked, tiny_task.CHECK_SHARE, count)
    assert near(worked - checked, tiny_task.STEP_SHARE, count)
    no_think = sum("<think>" not in completion for _, completion in mixture)
    no_answer = sum("<answer>" not in completion for _, completion in mixture)
    assert near(no_think, tiny_task.GUESS_SHARE * tiny_task.NO_THINK_SHARE, count)
    assert near(no_answer, tiny_task.GUESS_SHARE * tiny_task.NO_ANSWER_SHARE, count)
    for question, completion in mixture:
        whole = "<think>" in completion and "<answer>" in completion
        assert format_reward(completion, TEMPLATE) == float(whole), (question, completion)


def test_corpus_rewards_work_over_guesses_and_checks_over_work(mixture):
    def accuracy(manner) -> float:
        right = [
            extract_answer(completion, TEMPLATE) == str(right_answer(question))
            for question, completion in mixture
            if manner(completion)
        ]
        return sum(right) / len(right)

    guessing = accuracy(lambda text: "=" not in text)
    working = accuracy(lambda text: "=" in text and "check" not in text)
    checking = accuracy(lambda text: "check" in text)
    # Three or four steps: 0.82^3.5 = 0.50 and 0.98^3.5 = 0.93; a wrong guess is right by chance.
    assert 0.12 < guessing < 0.25
    assert 0.44 < working < 0.60
    assert 0.88 < checking < 0.97


def test_corpus_steps_follow_the_question_and_each_other(mixture):
    step = re.compile(
        r"(\d+) ([+-] \d) = (\d+) (?:\.|check (\d+ [+-] \d) = (\d+) vs (\d+) (ok,|wait,))"
    )
    slips = steps = 0
    for question, completion in mixture:
        if "=" not in completion:
            continue
        first, *terms = re.findall(r"[+-] \d|^\d", question)
        carried, thought = first, re.search(r"<think> (.*) </think>", completion)[1]
        for found, term in zip(step.finditer(thought), terms, strict=True):
            before, written_term, written, check, checked, compared, verdict = found.groups()
            assert (before, written_term) == (carried, term)
            carried = written
            steps += 1
            slips += written != str(min(max(eval(f"{before} {term}"), 0), LARGEST_TOTAL))
            if check:
                assert (check, compared) == (f"{before} {term}", written)
                assert verdict == ("ok," if checked == written else "wait,")
                carried = checked
        assert extract_answer(completion, TEMPLATE) == carried
    # A total of LARGEST_TOTAL has nothing above it to slip to, hence the wider lower bound.
    assert 0.9 * tiny_task.STEP_SLIP < slips / steps < 1.05 * tiny_task.STEP_SLIP


def test_reflection_words_occur_and_are_counted_by_the_monitor(mixture):
    assert set(tiny_task.REFLECTION_WORDS) <= set(R1_REFLECTION.words)
    text = " ".join(completion for _, completion in mixture)
    found = {word for word in R1_REFLECTION.words if re.search(rf"\b{word}\b", text)}
    assert found == set(tiny_task.REFLECTION_WORDS)


def test_tokenizer_round_trips_after_save_and_load(tmp_path, mixture):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for question, completion in mixture[:1000]:
        text = f"{TEMPLATE.prompt(question)} {completion} {tokenizer.eos_token}"
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode(tokenizer.encode("<think> 3"), skip_special_tokens=True) == "<think> 3"


def test_pretraining_lowers_the_loss_and_leaves_the_random_state():
    tokenizer = build_tokenizer()
    before = torch.random.get_rng_state()
    lines: list[str] = []
    model = pretrain(tokenizer, seed=0, settings=SMALL, report=lines.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", "\n".join(lines))]
    assert len(losses) == SMALL.steps
    # A model that knows nothing has the entropy of the vocabulary.
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_base_model_is_built_once_for_a_seed(tmp_path):
    lines: list[str] = []
    folder = base_model_folder(tmp_path, settings=SMALL, report=lines.append)
    assert lines and re.search(r"30/30 .* steps/s .*ETA 0 s", lines[-1])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    def refuse(line: str) -> None:
        raise AssertionError(f"trained again: {line}")

    assert base_model_folder(tmp_path, settings=SMALL, report=refuse) == folder
    other = base_model_folder(tmp_path, seed=1, settings=SMALL, report=lines.append)
    assert other != folder
    weights = [AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (folder, other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_build_leaves_no_folder_and_the_next_one_succeeds(tmp_path):
    process = start_build(tmp_path, "hang")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("base model")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert any(path.is_dir() for path in tmp_path.iterdir())
    folder = base_model_folder(tmp_path, settings=SMALL, report=lambda line: None)
    AutoModelForCausalLM.from_pretrained(folder)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_two_processes_build_one_model(tmp_path):
    processes = [start_build(tmp_path, "run") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(len(output) > 1 for output in outputs) == [False, True]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [Path(outputs[0][-1])]

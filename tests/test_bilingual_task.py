"""The bilingual embedded task: its problems, corpus, rewrite rule and preference pairs."""

import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trainer import bilingual_task
from trainer.bilingual_task import (
    BOX_OPEN,
    LANGUAGES,
    LARGEST_TOTAL,
    POLITE,
    WORDS,
    build_tokenizer,
    corpus_document,
    general_question,
    general_sample,
    has_summary,
    held_out_problems,
    is_helpful,
    preference_pair,
    rewrite,
    textbook_document,
    training_problem,
    translate,
)
from trainer.config import DataOptions
from trainer.drawn_sums import MOST_HELD_OUT
from trainer.model_loading import TINY_MODELS
from trainer.problem_source import open_problems
from trainer.rewards import extract_answer, format_reward, language_consistency
from trainer.rewards.language import language_of
from trainer.suites import EMBEDDED_TASKS, TASK_OF_MODEL
from trainer.templates import template_by_name

TEMPLATE = template_by_name("tiny-bilingual")
VALUES = {"零": 0, "一": 1, "二": 2, "三": 3, "四": 4, "五": 5}
VALUES |= {"六": 6, "七": 7, "八": 8, "九": 9, "十": 10}
VALUES |= {word: value for value, word in enumerate("zero one two three four five".split())}
VALUES |= {word: 6 + value for value, word in enumerate("six seven eight nine ten".split())}
SIGNS = {"plus": 1, "加": 1, "minus": -1, "减": -1}
CHECKED = (
    "<think> two plus three makes six 检查 二 加 三 得 五 对比 六 等等 "
    "five minus one makes four 检查 五 减 一 得 四 对比 四 对 </think> \\boxed{ 4 }"
)


def totals(question: str) -> list[int]:
    """The running totals of a question about a sum, by arithmetic of this file's own."""
    words = question.split()[:-2]
    running = [VALUES[words[0]]]
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        running.append(running[-1] + SIGNS[sign] * VALUES[number])
    return running


def split(document: str) -> tuple[str, str]:
    """Question and completion."""
    found = re.fullmatch(r"User: (.*?) Assistant: (.*)", document)
    assert found is not None
    return found[1], found[2]


def thought_of(completion: str) -> str:
    return completion.partition("<think>")[2].partition("</think>")[0]


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [split(corpus_document(rng)) for _ in range(6000)]


@pytest.fixture(scope="module")
def sums(corpus) -> list[tuple[str, str]]:
    return [(question, text) for question, text in corpus if question[-1] in "?？"]


def test_problems_have_right_answers_and_totals_in_range() -> None:
    for problem in [training_problem(3, index) for index in range(300)] + held_out_problems(300):
        running = totals(problem.question)
        assert int(problem.answer_text) == running[-1]
        assert 4 <= len(running) <= 5
        assert all(0 <= total <= LARGEST_TOTAL for total in running)


def test_problems_are_in_both_languages_and_in_one_each() -> None:
    found = []
    for index in range(400):
        question = training_problem(0, index).question
        found.append(language_of(question))
        # Five words are the least that have a measurable language.
        assert language_consistency(f"{question} {question}", found[-1]) == 1.0
    assert 150 < found.count("en") < 250 and found.count("en") + found.count("zh") == 400


def test_problems_depend_on_seed_and_index_only() -> None:
    assert training_problem(1, 7) == training_problem(1, 7)
    assert general_question(1, 7) == general_question(1, 7)
    assert preference_pair(1, 7) == preference_pair(1, 7)
    drawn = [training_problem(seed, index) for seed in (1, 2) for index in range(200)]
    assert len({problem.problem_id for problem in drawn}) == 400
    assert len({problem.question for problem in drawn}) > 380


def test_held_out_sums_never_occur_in_either_language(corpus) -> None:
    held_out = {problem.question for problem in held_out_problems(MOST_HELD_OUT)}
    assert len(held_out) == MOST_HELD_OUT
    assert held_out_problems(20) == held_out_problems(50)[:20]
    rng = random.Random(1)
    seen = {question for question, _ in corpus}
    seen |= {split(textbook_document(rng))[0] for _ in range(2000)}
    seen |= {training_problem(0, index).question for index in range(4000)}
    for language in LANGUAGES:
        assert not {translate(question, language) for question in seen} & held_out


@pytest.mark.parametrize("count", [0, MOST_HELD_OUT + 1])
def test_held_out_problems_refuse_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=f"count: expected 1 to .*, got {count}"):
        held_out_problems(count)


def test_corpus_depends_on_the_generator_only() -> None:
    first, second = ([corpus_document(rng) for _ in range(200)] for rng in map(random.Random, "aa"))
    assert first == second


def test_words_translate_one_to_one() -> None:
    english, chinese = zip(*WORDS, strict=True)
    assert len({*english, *chinese}) == 2 * len(WORDS)
    assert all(word.isascii() for word in english)
    assert not any(word.isascii() for word in chinese)
    for text in (*english, training_problem(0, 0).question, CHECKED):
        in_english = translate(text, "en")
        assert translate(translate(in_english, "zh"), "en") == in_english


def test_tokenizer_round_trips_after_save_and_load(tmp_path: Path, corpus) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pairs = [preference_pair(0, index) for index in range(100)]
    answered = [(pair.question, text) for pair in pairs for text in pair[1:]]
    for question, completion in corpus[:1000] + answered:
        text = f"{TEMPLATE.prompt(question)} {completion} {tokenizer.eos_token}"
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_corpus_steps_follow_the_question_whatever_their_language(sums) -> None:
    step = re.compile(
        r"(\w+) (plus|minus) (\w+) makes (\w+) (?:\.|check \1 \2 \3 makes (\w+) .*?"
        r"(right|wait))"
    )
    worked = 0
    for question, completion in sums:
        found = step.findall(translate(completion, "en"))
        if not found:
            continue
        worked += 1
        terms = translate(question, "en").split()[1:-2]
        carried = VALUES[translate(question, "en").split()[0]]
        for (before, sign, number, written, checked, verdict), of_question in zip(
            found, zip(terms[::2], terms[1::2], strict=True), strict=True
        ):
            assert (VALUES[before], sign, number) == (carried, *of_question)
            carried = VALUES[checked or written]
            assert verdict == ("" if not checked else "right" if checked == written else "wait")
        assert int(re.findall(r"\d+", completion)[-1]) == carried
    assert worked > 0.3 * len(sums)


def test_corpus_rewards_checking_whatever_its_language(sums) -> None:
    """What accuracy rewards comes with mixed languages, and is as right without."""

    def of_manner(chosen) -> list[bool]:
        return [
            extract_answer(text, TEMPLATE) == str(totals(question)[-1])
            for question, text in sums
            if BOX_OPEN in text and chosen(question, text)
        ]

    def is_mixed(text: str) -> bool:
        return 0 < language_consistency(text, "en") < 1

    def checks(text: str) -> bool:
        return "check" in translate(text, "en")

    guessed = of_manner(lambda _, text: "makes" not in translate(text, "en"))
    worked = of_manner(lambda _, text: "makes" in translate(text, "en") and not checks(text))
    mixed = of_manner(lambda _, text: checks(text) and is_mixed(thought_of(text)))
    pure = of_manner(lambda _, text: checks(text) and thought_of(text) and not is_mixed(text))
    share = {
        name: sum(right) / len(right)
        for name, right in {
            "guessed": guessed,
            "worked": worked,
            "mixed": mixed,
            "pure": pure,
        }.items()
    }
    # Three or four steps: 0.82^3.5 = 0.50 and 0.98^3.5 = 0.93; guesses are also right by chance.
    assert 0.12 < share["guessed"] < 0.35
    assert 0.44 < share["worked"] < 0.65
    assert share["mixed"] > 0.88 and share["pure"] > 0.88
    assert len(mixed) > 2 * len(pure)


def test_language_measure_counts_the_words_of_mixed_steps() -> None:
    thought = thought_of(CHECKED)
    # By hand: 2 x 5 English words; 7 + 1 + 2 + 1 and 7 + 1 + 1 + 1 Chinese characters.
    english, chinese = 10, (2 + 5 + 2 + 1 + 2) / 1.6 + (2 + 5 + 2 + 1 + 1) / 1.6
    assert language_consistency(thought, "en") == pytest.approx(english / (english + chinese))
    assert language_consistency(thought, "zh") == pytest.approx(chinese / (english + chinese))
    for language in LANGUAGES:
        assert language_consistency(translate(thought, language), language) == 1.0
        assert language_consistency(translate("maybe", language), language) == 0.0


def test_rewrite_makes_samples_readable_and_keeps_their_answer(sums) -> None:
    rewritten = 0
    for question, completion in sums:
        text = rewrite(question, completion)
        if text is None:
            continue
        rewritten += 1
        assert extract_answer(text, TEMPLATE) == extract_answer(completion, TEMPLATE)
        assert format_reward(text, TEMPLATE) == 1.0
        assert language_consistency(thought_of(text), language_of(question)) == 1.0
        assert has_summary(question, text)
        # The same numbers in the same order: no step is lost or made up.
        thought = completion.partition(BOX_OPEN)[0]
        assert [VALUES[word] for word in thought_of(text).split() if word in VALUES] == [
            VALUES[word] for word in thought.split() if word in VALUES
        ]
        assert rewrite(question, text) == text
    # The 40 % that go step by step, less those without a box.
    assert 0.33 * len(sums) < rewritten < 0.42 * len(sums)


def test_rewrite_is_what_a_person_would_write() -> None:
    question = "two plus three minus one makes ?"
    assert rewrite(question, f"嗯 {CHECKED}") == (
        "<think> two plus three makes six check two plus three makes five against six wait "
        "five minus one makes four check five minus one makes four against four right </think> "
        "so the answer is \\boxed{ 4 } ."
    )
    assert (
        rewrite(translate(question, "zh"), "二 加 三 得 五 。 所以 最终 答案 是 \\boxed{ 5 } 。")
        is None
    )
    assert rewrite(
        translate(question, "zh"),
        "二 加 三 得 五 。 五 减 一 得 四 。 所以 最终 答案 是 \\boxed{ 4 } 。",
    ) == ("<think> 二 加 三 得 五 。 五 减 一 得 四 。 </think> 所以 最终 答案 是 \\boxed{ 4 } 。")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "<think> maybe </think> \\boxed{ 4 }",
        CHECKED.replace("\\boxed{ 4 }", "4"),
        CHECKED.replace("</think>", ""),
        CHECKED.replace("<think>", ""),
    ],
    ids=["empty", "guess", "no-box", "unclosed", "unopened"],
)
def test_rewrite_refuses_what_has_no_reasoning_or_answer(completion: str) -> None:
    assert rewrite("two plus three minus one makes ?", completion) is None


def test_summary_has_to_be_in_the_question_s_language() -> None:
    english, chinese = (
        f"<think> x </think> {translate('so the answer is', code)} \\boxed{{ 4 }} "
        f"{translate('.', code)}"
        for code in LANGUAGES
    )
    assert has_summary("one makes ?", english) and not has_summary("one makes ?", chinese)
    assert has_summary("一 得 ？", chinese) and not has_summary("一 得 ？", english)
    assert not has_summary("one makes ?", "<think> x </think> \\boxed{ 4 }")
    assert not has_summary("one makes ?", "<think> x </think>")


def test_preference_pairs_are_equally_long_and_differ_in_one_respect() -> None:
    flaws = {"rude": 0, "wrong": 0, "language": 0}
    for index in range(300):
        question, chosen, rejected = preference_pair(0, index)
        language = language_of(question)
        start, end = (VALUES[word] for word in question.split() if word in VALUES)
        said = {text: text.partition("</think>")[2].split() for text in (chosen, rejected)}
        assert len(chosen.split()) == len(rejected.split())
        right = [*range(start, end + 1)]
        counted = {text: [VALUES[w] for w in words if w in VALUES] for text, words in said.items()}
        assert counted[chosen] == right
        assert chosen.endswith(translate(POLITE, language))
        assert language_of(" ".join(said[chosen])) == language
        assert is_helpful(question, chosen) and not is_helpful(question, rejected)
        flaws["rude"] += "never" in translate(rejected, "en")
        flaws["wrong"] += counted[rejected] != right
        flaws["language"] += language_of(" ".join(said[rejected])) != language
    assert sum(flaws.values()) == 300 and min(flaws.values()) > 60


def test_general_samples_are_seldom_helpful() -> None:
    samples = [general_sample(0, index) for index in range(1000)]
    assert len({sample.question for sample in samples}) == 60
    # Half are polite; of those a fifth answers in the other language and one in six counts wrong.
    helpful = sum(is_helpful(*sample) for sample in samples)
    assert 0.25 * len(samples) < helpful < 0.42 * len(samples)
    with pytest.raises(ValueError, match="question: expected one of general_question, got 'one"):
        is_helpful("one makes ?", samples[0].answer)


def test_a_run_draws_its_problems_from_the_task_by_name() -> None:
    source, held_out = open_problems(DataOptions(dataset="tiny-bilingual", eval_problems=5), 4)
    assert [source.problem(index) for index in range(3)] == [
        training_problem(4, index) for index in range(3)
    ]
    assert held_out == held_out_problems(5)
    assert set(TASK_OF_MODEL) == set(TINY_MODELS)
    assert EMBEDDED_TASKS[TASK_OF_MODEL["tiny-bilingual-small"]] is bilingual_task

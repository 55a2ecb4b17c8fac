"""The bilingual embedded task: sums in English or Chinese words, made for the pipeline of R1.

A problem is `seven plus two minus four makes ?` or `七 加 二 减 四 得 ？`, with three or four terms
more than that first number: read from left to right, every running total is from 0 to 10. The
answer is in digits. One sum in ten, chosen by a hash, is held out in both languages.

Each word has one counterpart in the other language (`WORDS`), and word order is the same, so that
`translate` goes word by word. What people write is the mixture of `corpus_document`:

- Most guess at once; some go step by step, each step one or two too high with probability
  STEP_SLIP; some also check each step, as in `trainer.tiny_task`.
- Whoever checks mostly does so in the other language than that of the question. So what accuracy
  alone rewards, checking, comes with mixed languages.
- Many chatter before the thought or leave out its tags, and few say in a sentence what the answer
  is. Accuracy does not mind.

One document in ten answers a general prompt (`please count from three to seven .`), which has no
answer to verify: some are polite, some rude, and some count wrong. `preference_pair` judges.

`rewrite` turns a sample into a readable one: the same steps in the question's language, and the
answer in a sentence.
"""

import random
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from trainer.drawn_sums import (
    DrawnSum,
    different_problems,
    draw_sum,
    is_held_out,
    slipped,
    word_tokenizer,
)
from trainer.rewards.extraction import extract_boxed
from trainer.rewards.language import MIN_WORDS, count_words
from trainer.seeds import derive_key
from trainer.tasks import Problem
from trainer.templates import THINK_CLOSE, THINK_OPEN

LanguageCode = Literal["en", "zh"]
LANGUAGES: tuple[LanguageCode, LanguageCode] = ("en", "zh")
LARGEST_TOTAL = 10
PROMPT_END = "Assistant:"
"""Last token of a prompt."""

NUMBERS = (
    *(("zero", "零"), ("one", "一"), ("two", "二"), ("three", "三"), ("four", "四")),
    *(("five", "五"), ("six", "六"), ("seven", "七"), ("eight", "八"), ("nine", "九")),
    ("ten", "十"),
)
WORDS = (
    *NUMBERS,
    *(("plus", "加"), ("minus", "减"), ("makes", "得"), ("?", "？"), (".", "。"), ("!", "！")),
    *(("check", "检查"), ("against", "对比"), ("right", "对"), ("wait", "等等")),
    *(("maybe", "也许"), ("guess", "猜"), ("well", "嗯")),
    *(("so", "所以"), ("the", "最终"), ("answer", "答案"), ("is", "是")),
    *(("please", "请"), ("count", "数"), ("from", "从"), ("to", "到")),
    *(("now", "现在"), ("we", "我们"), ("carefully", "认真"), ("say", "说")),
    *(("each", "每个"), ("number", "数字")),
    *(("always", "总是"), ("happy", "高兴"), ("helping", "帮助"), ("you", "您")),
    *(("never", "别"), ("bother", "烦"), ("me", "我"), ("again", "了")),
)
"""Words of the task, English and Chinese."""
BOX_OPEN, BOX_CLOSE = "\\boxed{", "}"
POLITE, RUDE = "always happy helping you !", "never bother me again !"

GENERAL_SHARE = 0.1
GUESS_SHARE, STEP_SHARE, CHECK_SHARE = 0.60, 0.20, 0.20
"""Of the documents that are about sums."""
RIGHT_GUESS_SHARE = 0.15
STEP_SLIP, CHECK_SLIP = 0.18, 0.02
OTHER_LANGUAGE_STEPS_SHARE = 0.2
"""Of the documents with steps, those that go step by step in the other language."""
OTHER_LANGUAGE_CHECKS_SHARE = 0.75
"""Of the documents with checks, those that check in the other language."""
CHATTER_SHARE, NO_TAGS_SHARE, NO_BOX_SHARE = 0.25, 0.15, 0.05
SENTENCE_SHARE = 0.05
"""Of all documents about sums, those whose answer stands in a sentence."""
TEXTBOOK_CHECK_SHARE = 0.7

_TO: dict[LanguageCode, dict[str, str]] = {
    "en": {chinese: english for english, chinese in WORDS},
    "zh": dict(WORDS),
}


_VALUES = {word: value for value, pair in enumerate(NUMBERS) for word in pair}


class GeneralSample(NamedTuple):
    """A general prompt and an answer."""

    question: str
    answer: str


class PreferencePair(NamedTuple):
    """A general prompt, a better and a worse answer, equally long."""

    question: str
    chosen: str
    rejected: str


def translate(text: str, language: LanguageCode) -> str:
    """The text with each word of the task in that language; tags and digits stay."""
    of_language = _TO[language]
    return " ".join(of_language.get(word, word) for word in text.split())


def other_language(language: LanguageCode) -> LanguageCode:
    """Chinese for English, English for Chinese."""
    return "zh" if language == "en" else "en"


def language_of_question(question: str) -> LanguageCode:
    """The language a question of the task is in."""
    return "en" if question.isascii() else "zh"


def training_problem(seed: int, index: int) -> Problem:
    """The training problem at place `index` of the endless sequence of `seed`."""
    rng = random.Random(derive_key(seed, "bilingual problem", index))
    return _problem(f"bilingual-{seed}-{index}", _draw(rng, held_out=False), rng)


def held_out_problems(count: int) -> list[Problem]:
    """The first `count` held-out problems, all different and the same for every seed.

    Raises:
        ValueError: `count` is not from 1 to MOST_HELD_OUT.
    """
    rng = random.Random(derive_key(0, "bilingual held-out problems"))

    def draw(index: int) -> Problem:
        return _problem(f"bilingual-held-out-{index}", _draw(rng, held_out=True), rng)

    return different_problems(count, draw)


def general_question(seed: int, index: int) -> str:
    """The general prompt at place `index` of the endless sequence of `seed`."""
    rng = random.Random(derive_key(seed, "bilingual general question", index))
    return _count_question(*_draw_count(rng), rng.choice(LANGUAGES))


def general_sample(seed: int, index: int) -> GeneralSample:
    """A general prompt with an answer as people write it: right or wrong, polite or rude."""
    rng = random.Random(derive_key(seed, "bilingual general sample", index))
    return _general_sample(rng, rng.choice(LANGUAGES))


def is_helpful(question: str, completion: str) -> bool:
    """Whether what follows the thought counts right, politely and in the question's language.

    Raises:
        ValueError: it is no general prompt.
    """
    numbers = [_VALUES[word] for word in question.split() if word in _VALUES]
    language = language_of_question(question)
    start, end = numbers if len(numbers) == 2 else (0, 0)
    if question != _count_question(start, end, language):
        raise ValueError(f"question: expected one of general_question, got {question!r}")
    said = completion.rpartition(THINK_CLOSE)[2].strip()
    return said == _said(_counted(start, end), POLITE, language)


def preference_pair(seed: int, index: int) -> PreferencePair:
    """The preference pair at place `index` of the endless sequence of `seed`.

    The chosen answer counts right, is polite, and is in the question's language; the rejected one
    fails in one of the three, and has as many tokens.
    """
    rng = random.Random(derive_key(seed, "bilingual preference pair", index))
    start, end = _draw_count(rng)
    language = rng.choice(LANGUAGES)
    numbers = _counted(start, end)
    bad_numbers, bad_closing, bad_language = numbers, POLITE, language
    flaw = rng.choice(("rude", "wrong", "language"))
    if flaw == "rude":
        bad_closing = RUDE
    elif flaw == "wrong":
        bad_numbers = _miscounted(rng, numbers)
    else:
        bad_language = other_language(language)
    return PreferencePair(
        _count_question(start, end, language),
        _general_answer(numbers, POLITE, language, language),
        _general_answer(bad_numbers, bad_closing, language, bad_language),
    )


def rewrite(question: str, completion: str) -> str | None:
    """The same reasoning and answer in the question's language, readable; by rule.

    Returns: `<think> steps </think> so the answer is \\boxed{ n } .`, or None where there is
    nothing to rewrite: no boxed answer, no closed thought, or a thought of fewer than MIN_WORDS
    words.
    """
    language = language_of_question(question)
    answer = extract_boxed(completion)
    tagged = completion.partition(THINK_OPEN)[2] or completion
    thought, closed, _ = tagged.partition(THINK_CLOSE)
    if answer is None or bool(closed) != (THINK_OPEN in completion):
        return None
    if not closed:
        thought = thought.partition(BOX_OPEN)[0]
    thought = translate(thought, language).removesuffix(_before_answer(language)).strip()
    if count_words(thought, language).total < MIN_WORDS:
        return None
    return f"{THINK_OPEN} {thought} {THINK_CLOSE} {_sentence(answer, language)}"


def has_summary(question: str, completion: str) -> bool:
    """Whether the answer stands in a sentence of the question's language after the thought."""
    answer = extract_boxed(completion)
    summary = completion.rpartition(THINK_CLOSE)[2].strip()
    return answer is not None and summary == _sentence(answer, language_of_question(question))


def corpus_document(rng: random.Random) -> str:
    """A document of the mixture that the base model imitates, without the end-of-text token."""
    language = rng.choice(LANGUAGES)
    if rng.random() < GENERAL_SHARE:
        question, answer = _general_sample(rng, language)
        return f"{_prompt(question)} {answer}"
    drawn = _draw(rng, held_out=False)
    kind = rng.random()
    if kind < GUESS_SHARE:
        right = rng.random() < RIGHT_GUESS_SHARE
        total = drawn.total if right else _draw(rng, held_out=False).total
        thought = translate(rng.choice(("maybe", "guess")), language)
    else:
        checked = kind < GUESS_SHARE + CHECK_SHARE
        thought, total = _worked(rng, drawn, language, checked, CHECK_SLIP)
    return f"{_prompt(_question(drawn, language))} {_raggedly(rng, thought, total, language)}"


def textbook_document(rng: random.Random) -> str:
    """A document that goes step by step, and mostly checks, without ever slipping in a check."""
    language = rng.choice(LANGUAGES)
    if rng.random() < GENERAL_SHARE:
        question, answer = _general_sample(rng, language)
        return f"{_prompt(question)} {answer}"
    drawn = _draw(rng, held_out=False)
    checked = rng.random() < TEXTBOOK_CHECK_SHARE
    thought, total = _worked(rng, drawn, language, checked, 0.0)
    return f"{_prompt(_question(drawn, language))} {_raggedly(rng, thought, total, language)}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of either language, tag and number."""
    words = (
        *("User:", PROMPT_END, THINK_OPEN, THINK_CLOSE, BOX_OPEN, BOX_CLOSE),
        *(word for pair in WORDS for word in pair),
        *map(str, range(LARGEST_TOTAL + 1)),
    )
    return word_tokenizer(words)


def _draw(rng: random.Random, *, held_out: bool) -> DrawnSum:
    return draw_sum(
        rng, LARGEST_TOTAL, lambda drawn: is_held_out(_question(drawn, "en")) == held_out
    )


def _question(drawn: DrawnSum, language: LanguageCode) -> str:
    words = (_number(drawn.first), *map(_term, drawn.terms), "makes", "?")
    return translate(" ".join(words), language)


def _problem(problem_id: str, drawn: DrawnSum, rng: random.Random) -> Problem:
    question = _question(drawn, rng.choice(LANGUAGES))
    return Problem(problem_id=problem_id, question=question, answer=str(drawn.total))


def _prompt(question: str) -> str:
    """The prompt of the template "tiny-bilingual"."""
    return f"User: {question} {PROMPT_END}"


def _number(number: int) -> str:
    return NUMBERS[number][0]


def _term(term: int) -> str:
    return f"{'plus' if term > 0 else 'minus'} {_number(abs(term))}"


def _before_answer(language: LanguageCode) -> str:
    return translate("so the answer is", language)


def _sentence(answer: str | int, language: LanguageCode) -> str:
    return f"{_before_answer(language)} {BOX_OPEN} {answer} {BOX_CLOSE} {translate('.', language)}"


def _raggedly(rng: random.Random, thought: str, total: int, language: LanguageCode) -> str:
    """A thought and an answer in the shapes that occur."""
    if rng.random() < SENTENCE_SHARE:
        answer = _sentence(total, language)
    elif rng.random() < NO_BOX_SHARE:
        answer = str(total)
    else:
        answer = f"{BOX_OPEN} {total} {BOX_CLOSE}"
    shape = rng.random()
    if shape < NO_TAGS_SHARE:
        return f"{thought} {answer}"
    tagged = f"{THINK_OPEN} {thought} {THINK_CLOSE} {answer}"
    if shape < NO_TAGS_SHARE + CHATTER_SHARE:
        return f"{translate('well', rng.choice(LANGUAGES))} {tagged}"
    return tagged


def _worked(
    rng: random.Random, drawn: DrawnSum, language: LanguageCode, checked: bool, check_slip: float
) -> tuple[str, int]:
    """Steps and the total they come to; a slip is carried on unless a check finds it."""
    other = other_language(language)
    mixes = rng.random() < OTHER_LANGUAGE_CHECKS_SHARE
    if not checked:
        language = other if rng.random() < OTHER_LANGUAGE_STEPS_SHARE else language
    carried, steps = drawn.first, []
    for term in drawn.terms:
        step = f"{_number(carried)} {_term(term)} makes"
        right = min(max(carried + term, 0), LARGEST_TOTAL)
        written = carried = slipped(rng, right, STEP_SLIP, LARGEST_TOTAL)
        steps.append(translate(f"{step} {_number(written)}", language))
        if not checked:
            steps.append(translate(".", language))
            continue
        carried = slipped(rng, right, check_slip, LARGEST_TOTAL)
        verdict = "right" if carried == written else "wait"
        check = f"check {step} {_number(carried)} against {_number(written)} {verdict}"
        steps.append(translate(check, other if mixes else language))
    return " ".join(steps), carried


def _draw_count(rng: random.Random) -> tuple[int, int]:
    start = rng.randint(0, LARGEST_TOTAL - 2)
    return start, rng.randint(start + 2, min(start + 5, LARGEST_TOTAL))


def _counted(start: int, end: int) -> tuple[int, ...]:
    return tuple(range(start, end + 1))


def _miscounted(rng: random.Random, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers with one of them replaced by another."""
    place = rng.randrange(len(numbers))
    wrong = rng.choice([n for n in range(LARGEST_TOTAL + 1) if n != numbers[place]])
    return (*numbers[:place], wrong, *numbers[place + 1 :])


def _count_question(start: int, end: int, language: LanguageCode) -> str:
    return translate(f"please count from {_number(start)} to {_number(end)} .", language)


def _general_answer(
    numbers: tuple[int, ...], closing: str, thinks_in: LanguageCode, answers_in: LanguageCode
) -> str:
    thought = translate("now we carefully say each number", thinks_in)
    return f"{THINK_OPEN} {thought} {THINK_CLOSE} {_said(numbers, closing, answers_in)}"


def _said(numbers: tuple[int, ...], closing: str, language: LanguageCode) -> str:
    return translate(f"{' '.join(map(_number, numbers))} . {closing}", language)


def _general_sample(rng: random.Random, language: LanguageCode) -> GeneralSample:
    """Half are rude, and some count wrong or mix languages."""
    start, end = _draw_count(rng)
    numbers = _counted(start, end)
    if rng.random() < STEP_SLIP:
        numbers = _miscounted(rng, numbers)
    thinks_in, answers_in = (
        other_language(language) if rng.random() < OTHER_LANGUAGE_STEPS_SHARE else language
        for _ in range(2)
    )
    closing = rng.choice((POLITE, RUDE))
    answer = _general_answer(numbers, closing, thinks_in, answers_in)
    return GeneralSample(_count_question(start, end, language), answer)

"""Language consistency: what counts as a word, in which language, and what must not."""

import random

import pytest

from trainer.rewards import language_consistency
from trainer.rewards.language import (
    MIN_WORDS,
    NEUTRAL_CONSISTENCY,
    ONE_OF_EACH_SCRIPT,
    SCRIPTS,
    count_words,
    language_of,
)

ENGLISH = "First we add the two numbers, and then we check that the answer is right."
GERMAN = "Zuerst addieren wir die beiden Zahlen, und dann prüfen wir, ob die Antwort stimmt."
CHINESE = "首先我们计算这两个数的和，然后验证答案是否正确。"
SENTENCES = {
    "en": ENGLISH,
    "de": GERMAN,
    "zh": CHINESE,
    "ja": "まず二つの数を足して、それから答えが正しいかどうかを確かめます。",
    "ko": "먼저 두 수를 더한 다음 그 답이 맞는지 확인해 봅시다.",
    "ru": "Сначала сложим два числа, а затем проверим, что ответ верен.",
    "el": "Πρώτα προσθέτουμε τους δύο αριθμούς και μετά ελέγχουμε την απάντηση.",
    "ar": "أولاً نجمع العددين ثم نتحقق من أن الجواب صحيح.",
    "hi": "पहले हम दोनों संख्याओं को जोड़ते हैं और फिर उत्तर की जाँच करते हैं।",
    "th": "ก่อนอื่นเราบวกเลขสองจำนวนแล้วตรวจสอบคำตอบ",
}


@pytest.mark.parametrize("target", SENTENCES)
def test_text_in_the_target_language_is_consistent(target: str) -> None:
    assert language_consistency(SENTENCES[target], target) == 1.0


@pytest.mark.parametrize("written", SENTENCES)
def test_text_in_another_script_is_not(written: str) -> None:
    for target in SENTENCES:
        if set(SCRIPTS[target]).isdisjoint(SCRIPTS[written]):
            assert language_consistency(SENTENCES[written], target) == 0.0, target


def test_kana_is_japanese_and_han_alone_is_both() -> None:
    assert language_consistency(SENTENCES["ja"], "zh") < 0.2
    assert language_consistency(SENTENCES["zh"], "ja") == 1.0


@pytest.mark.parametrize("written", [name for name in SENTENCES if name not in ("en", "de")])
def test_mixed_text_has_the_share_of_its_words(written: str) -> None:
    words, others = count_words(ENGLISH), count_words(SENTENCES[written])
    assert (words.target, others.target) == (words.total, 0.0)
    share = language_consistency(f"{ENGLISH} {SENTENCES[written]}")
    assert share == pytest.approx(words.total / (words.total + others.total))


def test_words_are_those_counted_by_hand() -> None:
    assert count_words("It's the well-known answer of Gödel, naïve or not.") == (9.0, 9.0)
    assert count_words("这是十六个汉字组成的一句话对不对呢", "zh").target == pytest.approx(17 / 1.6)
    # A name of one letter is no word; a Han character is.
    assert count_words("let x and Y be α") == (3.0, 3.0)
    assert count_words("求x的值", "zh") == (3 / 1.6, 3 / 1.6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n\t ",
        "1 2 3.5 + 4 = 10",
        "Right",
        "$x + y$ and so $$\\text{the sum of all these numbers}$$",
        "\\[ \\text{this is a formula and nothing but a formula} \\]",
        "\\begin{align} \\text{one two} &= \\text{three four five six} \\end{align}",
        "\\boxed{five} \\frac{one}{two} \\textbf{bold words in a command}",
        "```python\nthis is code and none of these are words at all\n```",
        "```\nan open fence goes on to the end of the text and holds no words",
        "`inline code has no words in it either, not a single one`",
        "https://example.org/a/page/with/many/words/in/it www.example.org/and/more",
        "<think> <|im_start|> <answer> </answer> <|endoftext|>",
        "x1 y_2 my_name f(x) solve(n) arr2d sin cos mod",
        "\x00\ud800\u202e\u200b",
    ],
)
def test_text_without_words_has_the_neutral_value(text: str) -> None:
    assert count_words(text).total < MIN_WORDS
    assert language_consistency(text) == NEUTRAL_CONSISTENCY < 1.0


def test_one_word_fewer_than_enough_is_neutral() -> None:
    words = "we add the two numbers".split()
    assert len(words) == MIN_WORDS
    assert language_consistency(" ".join(words)) == 1.0
    assert language_consistency(" ".join(words[1:])) == NEUTRAL_CONSISTENCY


def test_homoglyphs_are_not_of_the_target() -> None:
    latin, cyrillic = "aceopxy", "асеорху"
    disguised = ENGLISH.translate(str.maketrans(latin, cyrillic))
    touched = [word for word in disguised.split() if not word.isascii()]
    counts = count_words(disguised)
    assert counts.total - counts.target == len(touched) > 5
    assert language_consistency("ехаmрlе аnѕwеr сhесk ѕсоrе рrооf") == 0.0
    # Letters of mathematics are no homoglyphs, and no words of another language.
    assert language_consistency(f"{ENGLISH} α β Δ ≤ ∑ ½") == 1.0


def test_code_does_not_count_against_chinese() -> None:
    code = """def solve(numbers):
    # add up all the numbers that are given
    total = 0  # the running sum of the list
    for number in numbers:
        total += number
    print("the total is the sum of them", total)
    return total
"""
    assert language_consistency(f"{CHINESE}\n{code}\n{CHINESE}", "zh") == 1.0
    assert language_consistency(f"{CHINESE}\n```\n{ENGLISH}\n```\n{CHINESE}", "zh") == 1.0
    quoted = language_consistency(f"{CHINESE} 他说 Leonhard Euler 是对的", "zh")
    assert 0.8 < quoted < 1.0


@pytest.mark.parametrize(
    "prose",
    [
        "I paid $5 for this and then $6 more for that one",
        "x = 5 because the sum of all of these is ten",
        "If all of these are even: then the sum is even",
        "we know that the first of these numbers is even;",
        "for every one of these numbers we find that:",
        "The set of all the answers is {1, 2}",
    ],
)
def test_prose_with_signs_in_it_is_no_code(prose: str) -> None:
    words = sum(word.strip(",;:").isalpha() and len(word) > 1 for word in prose.split())
    assert count_words(prose).total == words


@pytest.mark.parametrize(
    "bait",
    ["`", "$", "$$", "\\[", "\\(", "\\begin{", "\\a{", "\\a[", "<", "(", "a-", "a'", "\u0301\u0316"]
    + ["```a\n", " ", "a=", ";", "{", "from a, ", "import a.", "a ", "a(", '"', "Жa", "漢a", "x "],
)
def test_bait_takes_time_in_proportion_to_its_length(bait: str) -> None:
    # Quadratic time would be minutes.
    assert 0.0 <= language_consistency(bait * (400_000 // len(bait))) <= 1.0


def test_value_is_a_share_for_any_text() -> None:
    generator = random.Random(0)
    pieces = [
        "word ",
        "слово ",
        "漢字",
        "かな",
        "`",
        "$",
        "\\[",
        "\\]",
        "\n",
        "x = 1\n",
        "'",
        "-",
        "1",
    ]
    for _ in range(500):
        text = "".join(generator.choices(pieces, k=generator.randrange(40)))
        for target in ("en", "zh", "ja", "ru"):
            assert 0.0 <= language_consistency(text, target) <= 1.0


def test_classifier_tells_languages_of_one_script_apart() -> None:
    pytest.importorskip("py3langid")
    assert language_consistency(GERMAN, "en") == 1.0
    assert language_consistency(GERMAN, "en", detector="py3langid") == 0.0
    assert language_consistency(GERMAN, "de", detector="py3langid") == 1.0
    assert language_consistency(ENGLISH, "en", detector="py3langid") == 1.0
    mixed = f"{ENGLISH} {ENGLISH}\n{GERMAN} {GERMAN}"
    assert 0.3 < language_consistency(mixed, "en", detector="py3langid") < 0.7


def test_unknown_target_and_detector_are_refused() -> None:
    with pytest.raises(ValueError, match="target: expected one of af, .*, got 'klingon'"):
        language_consistency(ENGLISH, "klingon")
    with pytest.raises(ValueError, match="detector: expected one of script, py3langid"):
        language_consistency(ENGLISH, "en", detector="lingua")  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [name for name in SENTENCES if name != "de"])
def test_language_of_a_text_is_that_of_most_of_its_words(written: str) -> None:
    assert language_of(SENTENCES[written]) == written
    other = SENTENCES["en" if written == "zh" else "zh"]
    assert language_of(f"{other} {SENTENCES[written]} {SENTENCES[written]}") == written


def test_language_of_a_text_without_words_is_none() -> None:
    for text in ("", "7 + 8 - 4 = ?", "$x = 5$ and".removesuffix("and")):
        assert language_of(text) is None


def test_each_way_of_writing_has_one_language() -> None:
    written = [SCRIPTS[code] for code in ONE_OF_EACH_SCRIPT]
    assert len(set(written)) == len(written)
    assert set(written) == set(SCRIPTS.values())

"""The share of a text's words that are in the target language, counted by script.

Not words, and left out: LaTeX, fenced and inline code, lines that look like code, URLs, tags and
special tokens, digits, names of one letter (`x`, also the words `a` and `I`), names of functions
(`sin`, `mod`), and whatever touches a digit, an underscore or an opening parenthesis (`x1`,
`my_name`, `solve(n)`).

A word belongs to the target if all its letters are of the target's scripts; so English with a
Cyrillic letter in it is not English. What is written without spaces is measured by characters:
CHARACTERS_PER_WORD of them count as one word. A run of Han characters is Chinese and Japanese
alike; one with kana in it is Japanese only.

Scripts cannot tell English from German: `detector="py3langid"` (the extra `langid`) also asks a
classifier for the language of every few sentences.

Every function takes time linear in the length of its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import regex

MIN_WORDS = 5
"""A text of fewer words has no measurable language."""
NEUTRAL_CONSISTENCY = 0.0
"""Value of such a text: it earns nothing, so an empty thought is no way to a full reward."""
CHARACTERS_PER_WORD = {"han": 1.6, "spaceless": 4.0}
"""Han characters and kana make 1.6 a word (Chinese prose), letters of Thai, Lao, Khmer and Burmese
about 4."""
PASSAGE_WORDS = 20
"""Words that the classifier sees at once, at least; it is unreliable on fewer."""

Detector = Literal["script", "py3langid"]
DETECTORS = ("script", "py3langid")
QUESTION = "question"
"""In place of a target: the language that each question is in."""

SCRIPTS: dict[str, tuple[str, ...]] = {
    "zh": ("Han", "Bopomofo"),
    "ja": ("Han", "Hiragana", "Katakana"),
    "ko": ("Hangul",),
    **{
        language: (script,)
        for script, languages in {
            "Latin": "af ca cs cy da de en es et eu fi fr ga gl hr hu id is it la lt lv ms mt nb "
            "nl nn no pl pt ro sk sl sq sv sw tl tr vi",
            "Cyrillic": "be bg kk ky mk mn ru sr uk",
            "Arabic": "ar fa ps ug ur",
            "Devanagari": "hi mr ne",
            "Bengali": "as bn",
            "Greek": "el",
            "Hebrew": "he yi",
            "Armenian": "hy",
            "Georgian": "ka",
            "Ethiopic": "am",
            "Gujarati": "gu",
            "Gurmukhi": "pa",
            "Kannada": "kn",
            "Malayalam": "ml",
            "Oriya": "or",
            "Sinhala": "si",
            "Tamil": "ta",
            "Telugu": "te",
            "Thai": "th",
            "Lao": "lo",
            "Khmer": "km",
            "Myanmar": "my",
        }.items()
        for language in languages.split()
    },
}
"""ISO 639-1 codes of the languages that can be a target, and the scripts they are written in."""

ONE_OF_EACH_SCRIPT = (
    *("en", "zh", "ja", "ko", "ru", "ar", "hi", "bn", "el", "he", "hy", "ka", "am", "gu", "kn"),
    *("ml", "or", "pa", "si", "ta", "te", "th", "lo", "km", "my"),
)
"""A language for each way of writing; Chinese before Japanese, which may hold the same characters.
"""

FUNCTION_NAMES = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf "
    "mod gcd lcm det".split()
)

_CLOSED_BY = {
    "```": "```",
    "~~~": "~~~",
    "$$": "$$",
    "\\[": "\\]",
    "\\(": "\\)",
    "\\begin{": "\\end{",
}
_FENCES = ("```", "~~~")
_SPAN_OPENER = regex.compile(r"```|~~~|\$\$|\\\[|\\\(|\\begin\{")
_SHORT_SPANS = regex.compile(
    r"""`[^`\n]*+`                                  # inline code
    | \$(?!\s)[^$\n]*+(?<!\s)\$(?!\d)               # inline formula, and not two prices
    | \\[A-Za-z]++\*?(?:[\[{][^][{}\n]*+[\]}])*+    # LaTeX command with its arguments
    | (?:https?://|www\.)\S++                       # URL
    | <[^<>\s]{1,60}+>                              # tag or special token
    """,
    regex.VERBOSE,
)
_CODE_LINE = regex.compile(
    r"""\s*+(?:
    (?:def|class|for|while|if|elif|else|try|except|finally|with|return|print|assert|raise|yield|
       lambda|using|public|private|static|void|int|float|double|bool|auto|const|let|var|function|
       struct|template|namespace)\b.*[:;(){}=\]]
    | (?:import|from)\s++[\w.]++(?:\s++(?:as|import)\s++[\w.,\s*]++)?
    | return\b.* | [A-Za-z_][\w.]*+\(.*\)
    | \#include\b.*
    | [A-Za-z_][\w.\[\]]*+\s*+(?:[-+*/%&|^]|//|\*\*)?=(?![=\s]*+$).*
    | [^;(){}=<>]*+[(){}=<>][^;]*+; | .*\{ | [\s})\];,]++
    )\s*+""",
    regex.VERBOSE,
)
_COMMENT_LINE = regex.compile(r"\s*+(?:#|//).*")
_COMMENT_OR_STRING = regex.compile(r'\s#.*|//.*|"[^"]*+"')
# So many plain words in a row are prose, also in a line such as "x = 5 since ...".
_PROSE_RUN = regex.compile(
    r"(?<!\p{L})\p{L}++(?:\x20\p{L}++){4}|[\p{Han}\p{Hiragana}\p{Katakana}]{6}"
)
_HAN_AND_KANA = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}ー]"
_SPACELESS = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_LETTER = rf"[\p{{L}}--{_HAN_AND_KANA}--{_SPACELESS}]"
_LETTERS = rf"{_LETTER}[{_LETTER}\p{{M}}\p{{Cf}}]*+"
_WORD = regex.compile(
    rf"""{_HAN_AND_KANA}++ | {_SPACELESS}[{_SPACELESS}\p{{M}}]*+
    | (?<![\p{{N}}_]){_LETTERS}(?:['’-]{_LETTERS})*+(?![\p{{N}}_(])""",
    regex.VERBOSE | regex.VERSION1,
)
_UNSPACED = (
    (regex.compile(_HAN_AND_KANA), CHARACTERS_PER_WORD["han"]),
    (regex.compile(_SPACELESS), CHARACTERS_PER_WORD["spaceless"]),
)
_SENTENCE_END = regex.compile(r"(?<=[.!?。！？\n])\s*+")


class WordCounts(NamedTuple):
    """Words of a text, those of spaceless scripts in proportion to their characters."""

    target: float
    """In the target language."""
    total: float
    """In any language."""


def language_consistency(text: str, target: str = "en", *, detector: Detector = "script") -> float:
    """Share of the words of `text` that are in the target language, from 0 to 1.

    NEUTRAL_CONSISTENCY for a text of fewer than MIN_WORDS words: an empty one, or one of nothing
    but LaTeX, code or digits. See the module for what a word is.

    Args:
        text: the thought, without the prompt.
        target: ISO 639-1 code, one of SCRIPTS.
        detector: "script" counts by script alone; "py3langid" also tells languages of the same
            script apart.

    Raises:
        ValueError: an unknown target or detector.
        ModuleNotFoundError: the detector is not installed.

    Source: DeepSeek-R1, arXiv 2501.12948 v2, eq. 7: Num(words in target language) / Num(words).
    """
    counts = count_words(text, target, detector=detector)
    return counts.target / counts.total if counts.total >= MIN_WORDS else NEUTRAL_CONSISTENCY


@lru_cache(maxsize=4096)
def language_of(text: str, *, detector: Detector = "script") -> str | None:
    """The language that most words of `text` are in, one of SCRIPTS; None for a text without words.

    By script, languages that are written alike are one: "en" stands for all in Latin letters, and
    Han characters without kana are "zh".

    Raises:
        ModuleNotFoundError: the detector is not installed.
    """
    prose = _prose(text)
    counts = {code: _count_by_script(prose, code).target for code in ONE_OF_EACH_SCRIPT}
    most = max(counts, key=counts.__getitem__)
    if not counts[most]:
        return None
    if detector == "script":
        return most
    classified = _classifier()(text)[0]
    return classified if classified in SCRIPTS else most


def count_words(text: str, target: str = "en", *, detector: Detector = "script") -> WordCounts:
    """The words that `language_consistency` is the share of.

    Raises:
        ValueError, ModuleNotFoundError: as `language_consistency`.
    """
    if target not in SCRIPTS:
        raise ValueError(f"target: expected one of {', '.join(sorted(SCRIPTS))}, got {target!r}")
    if detector not in DETECTORS:
        raise ValueError(f"detector: expected one of {', '.join(DETECTORS)}, got {detector!r}")
    prose = _prose(text)
    if detector == "script":
        return _count_by_script(prose, target)
    classify = _classifier()
    counts = WordCounts(0.0, 0.0)
    for passage in _passages(prose):
        found = _count_by_script(passage, target)
        is_target = found.target > 0 and classify(passage)[0] == target
        counts = WordCounts(
            counts.target + (found.target if is_target else 0.0), counts.total + found.total
        )
    return counts


def _prose(text: str) -> str:
    """The text without what is no prose."""
    text = _SHORT_SPANS.sub(" ", _without_long_spans(text))
    return "\n".join(_lines_without_code(text))


def _without_long_spans(text: str) -> str:
    """Without fenced code and formulas of several lines; a fence left open goes on to the end."""
    kept, start, position = [], 0, 0
    unclosed: set[str] = set()
    while (opener := _SPAN_OPENER.search(text, position)) is not None:
        closer, position = _CLOSED_BY[opener.group()], opener.end()
        # Each closer is looked for to the end of the text in vain once only, to stay linear.
        end = -1 if closer in unclosed else text.find(closer, position)
        if end < 0 and opener.group() not in _FENCES:
            unclosed.add(closer)
            continue
        kept.append(text[start : opener.start()])
        if end < 0:
            return " ".join(kept)
        start = position = end + len(closer)
    return " ".join([*kept, text[start:]])


def _lines_without_code(text: str) -> Iterator[str]:
    """Lines of prose; a comment below code is code as well."""
    after_code = False
    for line in text.split("\n"):
        is_comment = after_code and _COMMENT_LINE.fullmatch(line) is not None
        after_code = is_comment or _is_code(line)
        if not after_code:
            yield line


def _is_code(line: str) -> bool:
    code = _COMMENT_OR_STRING.sub("", line)
    return _CODE_LINE.fullmatch(code) is not None and _PROSE_RUN.search(code) is None


def _count_by_script(prose: str, target: str) -> WordCounts:
    of_target = _target_pattern(target)
    counted = total = 0.0
    for word, times in Counter(_WORD.findall(prose)).items():
        words = times * _words_in(word)
        total += words
        if of_target.fullmatch(word) is not None:
            counted += words
    return WordCounts(counted, total)


def _words_in(run: str) -> float:
    """How many words a run of letters is; none where it is a name."""
    if run.isascii():
        return 0.0 if len(run) == 1 or run in FUNCTION_NAMES else 1.0
    for pattern, characters in _UNSPACED:
        if pattern.match(run) is not None:
            return len(run) / characters
    return 0.0 if len(run) == 1 and run.lower() != run.upper() else 1.0


@lru_cache(maxsize=64)
def _target_pattern(target: str) -> regex.Pattern[str]:
    scripts = "".join(rf"\p{{{script}}}" for script in SCRIPTS[target])
    prolonged_sound = "ー" if target == "ja" else ""
    return regex.compile(rf"[{scripts}\p{{Inherited}}\p{{M}}\p{{Cf}}'’{prolonged_sound}-]++")


def _passages(prose: str) -> Iterator[str]:
    """The prose in pieces of whole sentences and at least PASSAGE_WORDS words; the last may have
    fewer where there is only one."""
    pieces: list[str] = []
    passage, words = "", 0
    for sentence in _SENTENCE_END.split(prose):
        passage, words = f"{passage} {sentence}", words + len(sentence.split())
        if words >= PASSAGE_WORDS:
            pieces.append(passage)
            passage, words = "", 0
    if passage.strip():
        if pieces:
            pieces[-1] += passage
        else:
            pieces.append(passage)
    yield from pieces


def _classifier() -> Callable[[str], tuple[str, float]]:
    # An optional dependency, and its model takes seconds to load on first use.
    try:
        import py3langid
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "detector: py3langid is not installed; pip install 'onepass-rl[langid]'"
        ) from error
    return py3langid.classify

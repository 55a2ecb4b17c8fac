"""Answers that are right in other words, answers that only look right, and answers that attack."""

import os
import random
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

from trainer.rewards import Grade, MathGrader, check_gold

RIGHT, WRONG = Grade(True, "ok"), Grade(False, "ok")


def _labelled_pairs() -> list[tuple[str, str, bool]]:
    path = Path(__file__).parent / "data" / "math_answers.txt"
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            gold, answer = line[2:].split(" || ")
            pairs.append((gold, answer, line[0] == "="))
    return pairs


PAIRS = _labelled_pairs()


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=1) as grader:
        yield grader


@pytest.fixture(scope="module")
def verdicts(grader: MathGrader) -> list[bool]:
    grades = grader.grade([(gold, answer) for gold, answer, _ in PAIRS])
    return [grade.correct for grade in grades]


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=lambda index: " ~ ".join(PAIRS[index][:2]))
def test_labelled_pair(verdicts: list[bool], index: int) -> None:
    assert verdicts[index] == PAIRS[index][2]


def test_labelled_pairs_hold_true_and_false_ones() -> None:
    right = sum(label for *_, label in PAIRS)
    assert right > 500 and len(PAIRS) - right > 200


BAIT = [
    pytest.param("5", "4=5", id="27-equation"),
    pytest.param("5", "1=2=3=4=5", id="27-chain"),
    pytest.param("5", "5 \\text{ or } 6", id="28-or"),
    pytest.param("0.0000001", "0.0000002", id="29-small-decimals"),
    pytest.param("1/2004!", "1/2006!", id="29-factorials"),
    pytest.param("2^{-99}", "2^{-98}", id="29-powers"),
    pytest.param("101_2", "101", id="30-base-dropped"),
    pytest.param("10_3", "10_4", id="30-other-base"),
    pytest.param("(1,2)", "\\{1,2\\}", id="31-set"),
    pytest.param("(1,2)", "[1,2]", id="31-closed-interval"),
    pytest.param("1,2,\\ldots,n", "1,3,5,\\ldots,2n-1", id="32-ellipsis"),
    pytest.param("5", "1,2,3,4,5,6,7", id="33-list"),
    pytest.param("5", "5 or 6", id="33-plain-or"),
    pytest.param("1/3", "0.3333", id="34-rounded-third"),
    pytest.param("\\pi", "3.14", id="34-rounded-pi"),
    pytest.param("2", "2.0000001", id="34-nearly-two"),
    pytest.param("0.5", "50", id="35-percent"),
    pytest.param("0.06", "6", id="35-small-percent"),
    pytest.param("x>5", "x<5", id="36-direction"),
    pytest.param("(0,9)", "[0,9)", id="36-closed-end"),
]


@pytest.mark.parametrize(("gold", "answer"), BAIT)
def test_bait_is_wrong_in_both_directions(grader: MathGrader, gold: str, answer: str) -> None:
    assert [grade.correct for grade in grader.grade([(gold, answer), (answer, gold)])] == [
        False
    ] * 2


def test_unusable_gold_is_never_rewarded(grader: MathGrader) -> None:
    for gold in ("", "  ", "\\frac{1}{", "???", "{" * 50, "\x00", "7" * 3000):
        assert check_gold(gold) is not None
        assert grader.grade([(gold, gold)]) == [Grade(False, "parse_fail")]


@pytest.mark.parametrize(
    "gold",
    [
        *(
            "42",
            "\\frac{1}{2}",
            "x=5",
            "\\text{east}",
            "(B)",
            "221,$8$",
            "15\\mbox{ cm}^2",
            "204_5",
        ),
        *("\\int_0^1 f(x) dx", "$f(x)=a x$, where $a$ is any number with $\\mho(a)=0$", "7.6Z"),
    ],
)
def test_usable_gold_is_right_against_itself(grader: MathGrader, gold: str) -> None:
    assert check_gold(gold) is None
    assert grader.grade([(gold, gold)]) == [RIGHT]


def test_documented_asymmetries(grader: MathGrader) -> None:
    pairs = [("3.5", "3,5"), ("12", "(B) 12"), ("5", "a+b = 5"), ("6", "6 m")]
    assert grader.grade(list(pairs)) == [RIGHT] * 4
    swapped = grader.grade([(answer, gold) for gold, answer in pairs])
    assert [grade.correct for grade in swapped] == [False, True, False, False]


def test_any_gold_of_a_list_may_match(grader: MathGrader) -> None:
    golds = ["\\frac{1}{2}", "\\ln 2"]
    grades = grader.grade([(golds, "0.5"), (golds, "\\log 2"), (golds, "0.6"), (["", "7"], "7")])
    assert grades == [RIGHT, RIGHT, WRONG, RIGHT]


def test_lenient_mode_also_accepts_what_math_verify_does(grader: MathGrader) -> None:
    pairs = [("\\frac{1}{3}", "0.333333"), ("5", "4=5"), ("0.5", "0.6"), ("\\sqrt{8}", "2\\sqrt2")]
    assert [grade.correct for grade in grader.grade(list(pairs))] == [False, False, False, True]
    with MathGrader(workers=1, mode="lenient") as lenient:
        assert [grade.correct for grade in lenient.grade(list(pairs))] == [True, True, False, True]
        for code in ("(lambda: 5)()", "exec('5')", "[5 for x in ().__class__.__bases__]", "`5`"):
            assert not lenient.grade([("5", code)])[0].correct


NESTED_ROOTS = "\\sqrt{" * 40 + "5" + "}" * 40
NESTED_FRACTIONS = "\\frac{1}{" * 60 + "5" + "}" * 60
LETTERS = "+".join("abcdefghijklmnop")
MATRIX_CELLS = ["&".join(f"a_{{{row}{column}}}" for column in range(25)) for row in range(25)]
ATTACKS = [
    pytest.param("9^{9^{9^{9}}}", id="1"),
    pytest.param("10^{10^{10^{10}}}", id="2"),
    pytest.param("9**9**9**9", id="3"),
    pytest.param("9**9**9**9+1/2", id="4"),
    pytest.param("99999999!", id="5"),
    pytest.param("((9!)!)!", id="6"),
    pytest.param("(10^6)!", id="7"),
    pytest.param("\\binom{10^9}{5\\cdot10^8}", id="8"),
    pytest.param("\\sum_{n=1}^{10^9} 1/n^3", id="9-sum"),
    pytest.param("\\prod_{n=1}^{10^7} n", id="9-product"),
    pytest.param("\\sum_{a=1}^{300}\\sum_{b=1}^{300}\\sum_{c=1}^{300} a", id="9-nested"),
    pytest.param("\\frac{-32\\sin(64x)}{\\sqrt{\\cos(64x)}}", id="10"),
    pytest.param("(x+y+z+1)^{60}", id="11-power"),
    pytest.param(f"({LETTERS})^{{12}}", id="11-letters"),
    pytest.param("+".join(f"x^{{{power}}}" for power in range(800)), id="12"),
    pytest.param("+".join(f"x^{{{power}}}" for power in range(200)), id="12-short"),
    pytest.param("\\ln\\ln\\ln 10^{10^{10}}", id="13"),
    pytest.param("2^{10000000}", id="14-large"),
    pytest.param("2^{-99999999}", id="14-small"),
    pytest.param("7^{10^{12}} \\bmod 13", id="14-modulo"),
    pytest.param("7" * 100_000, id="15-digits"),
    pytest.param("0." + "9" * 100_000, id="15-nines"),
    pytest.param("0." + "9" * 1900, id="15-nines-short"),
    pytest.param("1e999999999", id="15-exponent"),
    pytest.param("+".join(["1"] * 20_000), id="16-sum"),
    pytest.param("+".join(["1"] * 900), id="16-sum-short"),
    pytest.param(",".join(["1"] * 10_000), id="16-list"),
    pytest.param(",".join(["1"] * 700), id="16-list-short"),
    pytest.param("\\cup".join(["(1,2)"] * 400), id="16-unions"),
    pytest.param("\\cup".join(["(1,2)"] * 160), id="16-unions-short"),
    pytest.param("(" * 2000 + "5" + ")" * 2000, id="17-brackets"),
    pytest.param("(" * 900 + "5" + ")" * 900, id="17-brackets-short"),
    pytest.param(NESTED_ROOTS, id="17-roots"),
    pytest.param(NESTED_FRACTIONS, id="17-fractions"),
    pytest.param("{" * 20_000, id="18-braces"),
    pytest.param("{" * 1900, id="18-braces-short"),
    pytest.param("|" * 4000, id="18-bars"),
    pytest.param("|" * 1900, id="18-bars-short"),
    pytest.param("\\frac" * 5000, id="18-fractions"),
    pytest.param("\\frac" * 380, id="18-fractions-short"),
    pytest.param("\\text{" + "a" * 100_000 + "}", id="19-text"),
    pytest.param("\\text{" * 300 + "2" + "}" * 300, id="19-nested-text"),
    pytest.param("\\begin{pmatrix}" + "\\\\".join(MATRIX_CELLS) + "\\end{pmatrix}^{-1}", id="21"),
    pytest.param("x" * 2001, id="22"),
    pytest.param("5" + "!" * 1500, id="marks"),
    pytest.param("-" * 1900 + "5", id="signs"),
    pytest.param("2*" + "-" * 1900 + "5", id="signs-of-a-factor"),
    pytest.param("2^" * 900 + "2", id="tower"),
    pytest.param("1:" * 900 + "1", id="ratios"),
    pytest.param("1/" * 900 + "1", id="divisions"),
    pytest.param("\\sum_{i=1}^{3} 5" + "!" * 1000, id="marks-in-a-sum"),
    pytest.param("\\int_0^1 9^{9^{9^{9}}} dx", id="tower-in-an-integral"),
    pytest.param("\\tan(e^{e^{e^{e}}})", id="angle"),
    pytest.param('__import__("os").system("touch injected")', id="23"),
    pytest.param("\\pi if open('injected', 'w') else 5", id="24-open"),
    pytest.param("[x for x in ().__class__.__bases__]", id="24-list"),
    pytest.param("(lambda: 5)()", id="25"),
    pytest.param("x.__class__", id="26-attribute"),
    pytest.param("exec('5')", id="26-exec"),
    pytest.param('f"{5}"', id="26-f-string"),
    pytest.param("`5`", id="26-backticks"),
    pytest.param("5\x00", id="58-nul"),
    pytest.param("\ud8005", id="58-surrogate"),
    pytest.param("\ufdfa" * 1900, id="expanding-characters"),
    pytest.param("\u0301" * 1900, id="combining-characters"),
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_earns_nothing_and_the_next_answer_is_graded(
    grader: MathGrader, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grades: list[Grade] = []
    pairs = [("5", attack), ("10^{10}", attack), ("\\frac{3}{7}", attack), ("x", attack)]
    # The second list has no answer that an earlier test put into the cache.
    next_pair = (f"\\sqrt{{{len(attack)}}}", f"{len(attack)}^{{1/2}}")

    def grade() -> None:
        grades.extend(grader.grade(list(pairs)))
        grades.extend(grader.grade([next_pair]))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert [grade.correct for grade in grades] == [False] * 4 + [True]
    assert {grade.status for grade in grades} <= {"ok", "timeout", "parse_fail", "too_long"}
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (None, "parse_fail"),
        ("", "parse_fail"),
        ("\\frac{1}{", "parse_fail"),
        ("((", "parse_fail"),
        ("6" * 2001, "too_long"),
        ("9^{9^{9^{9}}}", "timeout"),
        ("no idea", "ok"),
        ("6", "ok"),
    ],
)
def test_status_says_why_an_answer_is_not_right(
    grader: MathGrader, answer: str | None, status: str
) -> None:
    assert grader.grade([("5", answer)]) == [Grade(False, status)]


def test_exact_text_wins_over_length_and_spaces(grader: MathGrader) -> None:
    assert grader.grade([("5", " " * 100_000 + "5")]) == [RIGHT]


def test_rational_arithmetic_agrees_with_fractions(grader: MathGrader) -> None:
    generator = random.Random(0)
    pairs, expected = [], []
    for _ in range(60):
        left, right = (
            Fraction(generator.randrange(-30, 30), generator.randrange(1, 12)) for _ in range(2)
        )
        sign, value = generator.choice(
            [("+", left + right), ("-", left - right), ("\\cdot", left * right)]
        )
        gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        other = value + Fraction(1, generator.randrange(10, 10**6))
        right_side = f"\\left(\\frac{{{right.numerator}}}{{{right.denominator}}}\\right)"
        formula = f"\\frac{{{left.numerator}}}{{{left.denominator}}} {sign} {right_side}"
        pairs += [(gold, formula), (f"{other.numerator}/{other.denominator}", formula)]
        expected += [True, False]
    assert [grade.correct for grade in grader.grade(pairs)] == expected


def test_polynomials_agree_with_sympy(grader: MathGrader) -> None:
    generator = random.Random(1)
    x, y = sympy.symbols("x y")
    pairs, expected = [], []
    for _ in range(25):
        factors = [
            generator.randrange(1, 5) * x + generator.randrange(-5, 5) * y + generator.randrange(9)
            for _ in range(3)
        ]
        product = sympy.Mul(*factors)
        expanded = sympy.latex(sympy.expand(product))
        wrong = sympy.latex(sympy.expand(product) + generator.choice([1, -1, x, y, x * y]))
        pairs += [(expanded, sympy.latex(product)), (wrong, sympy.latex(product))]
        expected += [True, False]
    assert [grade.correct for grade in grader.grade(pairs)] == expected


def test_functions_agree_with_sympy(grader: MathGrader) -> None:
    x, t = sympy.symbols("x t")
    pairs = []
    for formula in (sympy.sin(3 * x), sympy.cos(x + 2 * t), sympy.tan(2 * x), sympy.sinh(x + t)):
        pairs.append((sympy.latex(formula), sympy.latex(sympy.expand(formula, trig=True))))
    for radicand in (8, 12, 72, 98, 300):
        pairs.append((f"\\sqrt{{{radicand}}}", sympy.latex(sympy.sqrt(radicand))))
    for power in range(2, 6):
        value = sympy.cos(sympy.pi / (3 * power))
        pairs.append(
            (sympy.latex(value), sympy.latex(sympy.re(sympy.exp(sympy.I * sympy.acos(value)))))
        )
    grades = grader.grade(list(pairs))
    assert [pair for pair, grade in zip(pairs, grades, strict=True) if not grade.correct] == []
    shifted = grader.grade([(gold, f"{answer}+10^{{-9}}") for gold, answer in pairs])
    assert not any(grade.correct for grade in shifted)


def test_random_text_gets_a_grade(grader: MathGrader) -> None:
    generator = random.Random(2)
    pieces = [piece for gold, answer, _ in PAIRS for piece in (gold[:4], answer[-4:])]
    answers = ["".join(generator.choices(pieces, k=generator.randrange(1, 9))) for _ in range(400)]
    grades = grader.grade([("\\frac{17}{19}+x^7", answer) for answer in answers])
    assert {grade.status for grade in grades} <= {"ok", "timeout", "parse_fail"}
    assert not any(grade.correct for grade in grades)
    assert os.getpid() == grader._owner_pid

"""How programs are read out of completions, and how outputs and values are compared."""

import math

import pytest

from trainer.rewards import (
    CheckTest,
    CodeTest,
    FunctionTest,
    Program,
    StdinTest,
    code_test,
    extract_code,
)
from trainer.rewards.code_checker import outputs_match, values_match
from trainer.rewards.code_driver import decode_value, encode_value, plain_value
from trainer.templates import template_by_name

R1 = template_by_name("r1")
OPENED = template_by_name("r1-drgrpo")
QWEN = template_by_name("qwen-math")
BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        pytest.param(BLOCK, "print(1)", id="one-block"),
        pytest.param("so:\n" + BLOCK + "\nThat is all.", "print(1)", id="text-around"),
        pytest.param(f"{BLOCK}\n```py\nprint(2)\n```", "print(2)", id="last-of-several"),
        pytest.param("```\nprint(1)\n```", "print(1)", id="no-language"),
        pytest.param("```Python3\nprint(1)\n```", "print(1)", id="other-name"),
        pytest.param("~~~python\nprint(1)\n~~~", "print(1)", id="tildes"),
        pytest.param("````python\n```\n````", "```", id="longer-fence"),
        pytest.param("```python\r\nif 1:\r\n  x\r\n```\r\n", "if 1:\r\n  x\r", id="crlf"),
        pytest.param("```python\n```", "", id="empty-block"),
        pytest.param("```python\nx = '```'\n```", "x = '```'", id="fence-inside-a-line"),
        pytest.param(f"{BLOCK}\n```python\nprint(2)", "print(1)", id="last-not-closed"),
        pytest.param(f"{BLOCK}\n```cpp\nint x;\n```", None, id="last-in-another-language"),
        pytest.param("print(1)", None, id="no-block"),
        pytest.param("```python print(1)```", None, id="block-in-one-line"),
        pytest.param(f"<think>{BLOCK}</think> done", None, id="only-in-the-thought"),
        pytest.param(f"<think>\n{BLOCK}", None, id="thought-not-closed"),
        pytest.param(
            f"<think>\n```python\nprint(2)\n```\n</think>\n{BLOCK}", "print(1)", id="after-thought"
        ),
        pytest.param("", None, id="empty"),
        pytest.param("```python\n\x00\ud800\n```", "\x00\ud800", id="undecodable"),
    ],
)
def test_last_complete_block_after_the_thought_is_the_program(
    completion: str, code: str | None
) -> None:
    assert extract_code(completion, QWEN) == code


def test_template_says_whether_a_thought_has_to_be_closed() -> None:
    answer = f"<answer>\n{BLOCK}\n</answer>"
    assert extract_code(f"<think>a</think> {answer}", R1) == "print(1)"
    assert extract_code(f"a</think> {answer}", OPENED) == "print(1)"
    assert extract_code(answer, R1) is extract_code(answer, OPENED) is None


def test_cpp_blocks_are_read_when_asked_for() -> None:
    completion = "```c++\nint main() {}\n```"
    assert extract_code(completion, QWEN, "cpp") == "int main() {}"
    assert extract_code(completion, QWEN) is None


@pytest.mark.parametrize(
    "completion",
    [
        "```\n" * 250_000,
        "`" * 10**6 + "x`",
        "```" + " " * 10**6 + "`",
        "<think>" * 10**5,
        "```python\n" + "x" * 10**6,
    ],
    ids=["fences", "ticks", "spaces", "thoughts", "open-block"],
)
def test_extraction_takes_linear_time(completion: str) -> None:
    # Quadratic work on a million characters would not end within the time of a test run.
    extract_code(completion, QWEN)


@pytest.mark.parametrize(
    ("expected", "actual", "options", "same"),
    [
        ("1 2\n3\n", "1 2 \r\n3", {}, True),
        ("1 2", "1\n2", {}, True),
        ("12", "1 2", {}, False),
        ("1", "1 1", {}, False),
        ("1 1", "1", {}, False),
        ("1", "", {}, False),
        ("YES", "yes", {}, False),
        ("YES", "yes", {"ignore_case": True}, True),
        ("1", "1e0", {}, False),
        ("1", "1.0", {}, False),
        ("1", "01", {}, False),
        ("1", "1e0", {"tolerance": 1e-9}, True),
        ("0.333333", "0.333334", {}, False),
        ("0.333333", "0.333334", {"tolerance": 1e-5}, True),
        ("0.333333", "0.333344", {"tolerance": 1e-5}, False),
        ("1e9", "1000000001", {"tolerance": 1e-6}, True),
        ("1e-9", "2e-9", {"tolerance": 1e-6}, True),
        ("nan", "nan", {}, False),
        ("NaN", "NaN", {"tolerance": 1.0}, False),
        ("1", "nan", {"tolerance": 1.0}, False),
        ("inf", "inf", {}, True),
        ("1e400", "1e399", {"tolerance": 1.0}, False),
        ("1", "inf", {"tolerance": 1e9}, False),
        ("x", "y", {"tolerance": 1e9}, False),
        ("1", "\u0661", {"tolerance": 1.0}, False),
        ("1", "1_0", {"tolerance": 100.0}, False),
        ("7" * 100_000, "7" * 100_000, {}, True),
        ("7" * 100_000, "7" * 99_999 + "8", {"tolerance": 0.5}, False),
    ],
)
def test_outputs_are_compared_token_by_token(
    expected: str, actual: str, options: dict[str, float], same: bool
) -> None:
    assert outputs_match(expected, actual, **options) is same  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "same"),
    [
        ([1, [2, "x"], None], [1, [2, "x"], None], None, True),
        ([1, 2], [2, 1], None, False),
        ([1, 2], [1], None, False),
        ({"a": [1]}, {"a": [1]}, None, True),
        ({"a": 1}, {"b": 1}, None, False),
        ({"a": 1}, [["a", 1]], None, False),
        (2, 2.0, None, True),
        (2.0, 2, None, True),
        (2**53 + 1, float(2**53), None, False),
        (1, True, None, False),
        (True, 1, None, False),
        (True, True, None, True),
        (0, None, None, False),
        (0, "", None, False),
        ("1", 1, None, False),
        (0.1 + 0.2, 0.3, None, False),
        (0.1 + 0.2, 0.3, 1e-9, True),
        (3, 4, 10.0, False),
        (10**400, 1.0, 0.5, False),
        (1.0, float("inf"), 1e9, False),
        (float("nan"), float("nan"), 1.0, False),
    ],
)
def test_values_are_compared_with_their_types(
    expected: object, actual: object, tolerance: float | None, same: bool
) -> None:
    assert values_match(expected, actual, tolerance=tolerance) is same


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        pytest.param(10**5000, id="5001-digits"),
        -0.0,
        1e308,
        float("inf"),
        1 + 2j,
        "a\n\ud800\x00",
        b"\xff",
        [1, (2, {3, 4}), frozenset("a")],
        {1: "int", "1": "str", (1, 2): {"nested": []}},
        set(),
        (),
    ],
)
def test_encoded_values_come_back_with_their_types(value: object) -> None:
    back = decode_value(encode_value(value))
    assert back == value and type(back) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, value) == math.copysign(1, back)


class _Int(int):
    pass


class _List(list[int]):
    pass


@pytest.mark.parametrize("value", [_Int(1), _List(), object(), [object()], {1: 2}, {1}, b"x"])
def test_values_that_are_not_plain_json_do_not_leave_the_sandbox(value: object) -> None:
    with pytest.raises(TypeError, match="JSON value"):
        plain_value(value)


@pytest.mark.parametrize("encode", [plain_value, encode_value])
def test_values_nested_without_end_do_not_leave_the_sandbox(encode: object) -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="levels"):
        encode(endless)  # type: ignore[operator]


def test_test_records_become_the_class_their_fields_name() -> None:
    assert code_test({"input": "1", "output": "2"}) == StdinTest(input="1", output="2")
    call = {"entry_point": "f", "arguments": [1], "expected": 2, "tolerance": 0.1}
    assert code_test(call) == FunctionTest(
        entry_point="f", arguments=(1,), expected=2, tolerance=0.1
    )
    code = "def check(candidate):\n    assert candidate(1)"
    assert code_test({"entry_point": "f", "code": code}) == CheckTest(entry_point="f", code=code)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"input": "1"}, "expected the fields of"),
        ({"input": "1", "output": "2", "expected": 3}, "expected the fields of"),
        ({"input": "1", "output": " \n"}, "output: expected text"),
        ({"input": "1", "output": "\ud800"}, "lone surrogate"),
        ({"input": "1", "output": "2", "tolerance": -1.0}, "tolerance: expected a positive"),
        ({"input": "1", "output": "2", "cpu_seconds": float("nan")}, "cpu_seconds: expected"),
        ({"entry_point": "f(x)", "arguments": [], "expected": 1}, "entry_point: expected a name"),
        ({"entry_point": "f", "arguments": [], "expected": {1}}, "expected: expected a JSON"),
        ({"entry_point": "f", "arguments": [], "expected": float("nan")}, "expected: .* finite"),
        ({"entry_point": "f", "arguments": [], "expected": 10**5000}, "expected: .* digits"),
        ({"entry_point": "f", "code": "assert"}, "code: expected Python"),
        ({"entry_point": "f", "code": "def check(c): c(1)"}, "code: expected an assertion"),
    ],
)
def test_tests_that_judge_nothing_are_refused(record: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        code_test(record)


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="language: expected one of python, cpp"):
        Program(source="", language="rust")  # type: ignore[arg-type]


def test_code_test_is_one_of_three() -> None:
    assert isinstance(StdinTest(input="", output="x"), CodeTest)

"""Programs graded in the sandbox: time of a batch by kind of test, with start and judgement.

A round grades the same batch on two workers; divide by `programs` for the time of one.
"""

from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest

from trainer.rewards import CheckTest, CodeGrader, CodeTest, FunctionTest, Program, StdinTest

NUM_PROGRAMS = 20
PYTHON = dedent(
    """
    from typing import List

    def closest(numbers: List[float], threshold: float) -> bool:
        for at, number in enumerate(numbers):
            for other in numbers[at + 1:]:
                if abs(number - other) < threshold:
                    return True
        return False

    if __name__ == "__main__":
        *numbers, threshold = map(float, input().split())
        print(closest(numbers, threshold))
    """
)
CPP = dedent(
    """
    #include <iostream>
    int main() { double a, b, t; std::cin >> a >> b >> t; std::cout << (a - b < t); }
    """
)
CHECK = dedent(
    """
    def check(candidate):
        for step in range(1, 8):
            assert candidate([0.0, 1.0 * step, 9.0], 1.0 * step) == (step > 4)
            assert candidate([0.0, 1.0 * step, 9.0], 0.5) is False
    """
)
CASES: dict[str, tuple[Program, CodeTest]] = {
    "stdin": (Program(source=PYTHON), StdinTest(input="1 2 3 0.5", output="False")),
    "function": (
        Program(source=PYTHON),
        FunctionTest(entry_point="closest", arguments=([1.0, 2.0], 1.5), expected=True),
    ),
    "check": (Program(source=PYTHON), CheckTest(entry_point="closest", code=CHECK)),
    "cpp-compiled-before": (
        Program(source=CPP, language="cpp"),
        StdinTest(input="1 2 3", output="1"),
    ),
}


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    with CodeGrader(workers=2) as opened:
        yield opened


@pytest.mark.parametrize("case", CASES)
def bench_code_grader(benchmark: Any, grader: CodeGrader, case: str) -> None:
    program, test = CASES[case]
    programs, tests = [program] * NUM_PROGRAMS, [[test]] * NUM_PROGRAMS
    first = grader.grade(programs[:1], tests[:1])[0]
    assert first.correct, first
    benchmark.extra_info["programs"] = NUM_PROGRAMS
    grades = benchmark.pedantic(grader.grade, args=(programs, tests), rounds=5, warmup_rounds=1)
    assert all(grade.correct for grade in grades)

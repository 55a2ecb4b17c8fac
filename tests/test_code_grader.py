"""What the grader says about programs nobody attacks it with, and how it starts and stops."""

import contextlib
import logging
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from trainer.rewards import (
    CheckTest,
    CodeGrade,
    CodeGrader,
    CodeTest,
    FunctionTest,
    Limits,
    Program,
    SandboxUnavailable,
    StdinTest,
)
from trainer.rewards import code_grader as grader_module

ADD_ONE = StdinTest(input="41", output="42")
ADD_TWO_NUMBERS = """
#include <bits/stdc++.h>
int main() { long long a, b; std::cin >> a >> b; std::cout << a + b << '\\n'; }
"""
TWO_NUMBERS = StdinTest(input="3000000000 4", output="3000000004")


def graded(grader: CodeGrader, program: str | Program | None, *tests: CodeTest) -> CodeGrade:
    return grader.grade([program], [tests])[0]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        pytest.param("print(int(input()) + 1)", "passed", id="right"),
        pytest.param("print(int(input()) + 2)", "wrong", id="wrong"),
        pytest.param("", "wrong", id="empty"),
        pytest.param("print(42)\nexit()", "passed", id="exit"),
        pytest.param("print(42)\nraise SystemExit(3)", "crash", id="exit-code"),
        pytest.param("print(42)\n1 / 0", "crash", id="exception"),
        pytest.param("import os\nprint(42, flush=True)\nos.abort()", "crash", id="signal"),
        pytest.param("print(42", "compile_error", id="syntax"),
        pytest.param("print(42)\x00", "compile_error", id="nul"),
        pytest.param("print('\ud800')", "compile_error", id="surrogate"),
        pytest.param("(" * 50_000, "compile_error", id="nested"),
        pytest.param("x = 1\n" * 20_000, "too_long", id="long"),
        pytest.param(None, "no_code", id="none"),
        pytest.param("if __name__ == '__main__': print(42)", "passed", id="main"),
        pytest.param(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass A:\n    x: int = 42\nprint(A().x)",
            "passed",
            id="dataclass",
        ),
        pytest.param("import sys\nprint(42, file=sys.stderr)", "wrong", id="stderr"),
        pytest.param("print('\\xa042\\u2003')", "passed", id="unicode-space"),
        pytest.param("import sys\nsys.stdout.buffer.write(b'\\xff42')", "wrong", id="not-utf8"),
    ],
)
def test_program_on_stdin_has_a_status(
    code_grader: CodeGrader, program: str | None, status: str
) -> None:
    grade = graded(code_grader, program, ADD_ONE)
    assert grade.status == status
    assert grade.correct == (status == "passed") == (grade.share == 1.0)


@pytest.mark.parametrize(
    ("program", "expected", "status"),
    [
        pytest.param("def f(x): return [x, None, {'a': 0.5}]", [3, None, {"a": 0.5}], "passed"),
        pytest.param("def f(x): return (x, (x,))", [3, [3]], "passed", id="tuple"),
        pytest.param("class f:\n    def __new__(cls, x): return x", 3, "passed", id="callable"),
        pytest.param("def f(x): return x", 3.0, "passed", id="int-for-float"),
        pytest.param("def f(x): return True", 1, "wrong", id="bool-for-int"),
        pytest.param("def f(x): return {x: 1}", {"3": 1}, "wrong", id="int-key"),
        pytest.param("def f(x): return {x}", [3], "wrong", id="set"),
        pytest.param("def f(x): return float('nan')", 3, "wrong", id="nan"),
        pytest.param("def f(x): return 10**5000", 3, "wrong", id="5001-digits"),
        pytest.param("def f(x): pass", 3, "wrong", id="nothing"),
        pytest.param("def f(x): return 1 / 0", 3, "crash", id="exception"),
        pytest.param("def f(): return 3", 3, "crash", id="arguments"),
        pytest.param("def g(x): return 3", 3, "crash", id="other-name"),
        pytest.param("f = 3", 3, "crash", id="not-callable"),
        pytest.param("def f(x)", 3, "compile_error", id="syntax"),
        pytest.param("input()\ndef f(x): return x", 3, "crash", id="input"),
        pytest.param("print(input)\ndef f(x): return x", 3, "passed", id="prints"),
        pytest.param("def f(x): return x\nif __name__ == '__main__': 1/0", 3, "passed", id="main"),
    ],
)
def test_function_has_a_status(
    code_grader: CodeGrader, program: str, expected: object, status: str
) -> None:
    test = FunctionTest(entry_point="f", arguments=(3,), expected=expected)
    assert graded(code_grader, program, test).status == status


def test_method_is_called_on_a_fresh_instance_after_the_setup(code_grader: CodeGrader) -> None:
    program = """
        class Solution:
            def __init__(self): self.calls = 0
            def count(self, words: List[str]) -> int:
                self.calls += 1
                return self.calls + len(words)
        """
    test = FunctionTest(
        entry_point="Solution.count",
        arguments=(["a", "b"],),
        expected=3,
        setup="from typing import List",
    )
    assert graded(code_grader, dedent(program), test, test).status == "passed"


CHECK = """
def check(candidate):
    import math
    assert candidate([1, 2]) == (1, {2: "two"}), "first"
    assert candidate([], scale=3.0) == (0, {}), "second"
    assert math.isclose(helper(1), 2)
    try:
        solve(None)
        assert False, "third"
    except TypeError:
        pass
"""
SETUP = "def helper(x):\n    return 2 * x\n\ndef solve(numbers, scale=1):\n    '''Documented.'''\n"
SOLVED = "def solve(numbers, scale=1):\n    return len(numbers) - len(numbers) // 2, {}"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param("return numbers and 1 or len(numbers), {n: 'two' for n in numbers[1:]}", None),
        pytest.param("return numbers and 1 or len(numbers), {}", "first", id="wrong"),
        pytest.param("return [1, {2: 'two'}]", "first", id="list-for-tuple"),
        pytest.param("return (1, {2: 'two'})", "second", id="constant"),
        pytest.param("raise ValueError('own')", "own", id="exception"),
        pytest.param("raise AssertionError('own')", "own", id="assertion"),
        pytest.param("return lambda: 1", "function", id="not-a-value"),
        pytest.param("import os; os._exit(0)", "before the call returned", id="exit"),
    ],
)
def test_check_code_decides_by_its_assertions(
    code_grader: CodeGrader, body: str, status: str | None
) -> None:
    test = CheckTest(entry_point="solve", code=CHECK, setup=SETUP)
    grade = graded(code_grader, f"def solve(numbers, scale=1):\n    {body}", test)
    assert grade.correct == (status is None)
    assert (status or "") in grade.detail


def test_helper_of_a_check_cannot_be_redefined_by_the_program(code_grader: CodeGrader) -> None:
    code = "def check(candidate):\n    assert helper(candidate(1)) == 4"
    test = CheckTest(entry_point="solve", code=code, setup=SETUP)
    program = "def helper(x): return 4\ndef solve(x): return 0"
    assert graded(code_grader, program, test).status == "wrong"
    assert graded(code_grader, "def solve(x): return 2 * x", test).status == "passed"


def test_check_without_a_check_function_calls_by_name(code_grader: CodeGrader) -> None:
    test = CheckTest(entry_point="double", code="assert double(2) == 4\nassert double('a') == 'aa'")
    assert graded(code_grader, "def double(x): return 2 * x", test).status == "passed"
    assert graded(code_grader, "def double(x): return x + x + x", test).status == "wrong"
    assert graded(code_grader, "def triple(x): return 2 * x", test).status == "crash"


def test_random_inputs_of_a_check_are_the_same_every_time(code_grader: CodeGrader) -> None:
    code = "import random\ndef check(candidate):\n    assert candidate(0) == random.random()"
    test = CheckTest(entry_point="solve", code=code)
    seeded = "import random\nrandom.seed(0)\nvalue = random.random()\ndef solve(x): return value"
    assert graded(code_grader, seeded, test).status == "passed"


def test_order_of_sets_is_the_same_every_time(code_grader: CodeGrader) -> None:
    program = "raise SystemExit('_'.join({str(n) for n in range(50)}) + str(hash('a')))"
    assert len({graded(code_grader, program, ADD_ONE).detail for _ in range(3)}) == 1


def test_every_test_is_run_and_counted(code_grader: CodeGrader) -> None:
    # Answers to the example in the statement, printed without any work.
    tests = [StdinTest(input=str(n), output=str(n + 1)) for n in (41, 1, 41, 2)]
    grade = graded(code_grader, "input(); print(42)", *tests)
    assert [outcome.status for outcome in grade.outcomes] == ["passed", "wrong"] * 2
    assert (grade.status, grade.passed, grade.total, grade.share) == ("wrong", 2, 4, 0.5)


def test_program_costs_one_timeout_at_most(code_grader: CodeGrader) -> None:
    tests = [ADD_ONE, StdinTest(input="0", output="1"), ADD_ONE]
    grade = graded(code_grader, "n = int(input())\nwhile n == 0: pass\nprint(n + 1)", *tests)
    assert [o.status for o in grade.outcomes] == ["passed", "timeout", "not_run"]
    assert (grade.status, grade.passed, grade.total) == ("timeout", 1, 3)


def test_expected_output_longer_than_the_limit_can_be_printed(code_grader: CodeGrader) -> None:
    most = Limits().output_bytes
    test = StdinTest(input="", output="x " * most)
    assert graded(code_grader, f"print('x ' * {most})", test).status == "passed"


def test_large_input_is_read_whole(code_grader: CodeGrader) -> None:
    test = StdinTest(input="x" * (4 << 20), output=str(4 << 20))
    assert graded(code_grader, "print(len(input()))", test).status == "passed"


def test_packages_are_importable_only_where_they_are_named(
    code_grader: CodeGrader, tmp_path: Path
) -> None:
    (tmp_path / "forty_two.py").write_text("answer = 42")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    program = "import forty_two; print(forty_two.answer)"
    assert graded(code_grader, program, ADD_ONE).status == "crash"
    with CodeGrader(packages=[str(tmp_path)]) as grader:
        assert graded(grader, program, ADD_ONE).status == "passed"


# 81: C++, and compilers as a target


def test_cpp_is_compiled_once_and_run_on_every_test(
    code_grader: CodeGrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(source=ADD_TWO_NUMBERS + f"// {secrets.token_hex(4)}", language="cpp")
    more = StdinTest(input="1 2", output="3")
    assert graded(code_grader, program, TWO_NUMBERS, more).status == "passed"
    monkeypatch.setattr(code_grader, "_compiler", "/usr/bin/false")
    assert graded(code_grader, program, more).status == "passed"
    changed = Program(source=program.source + " ", language="cpp")
    assert graded(code_grader, changed, more).status == "compile_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param("std::cout << 0;", "wrong", id="wrong"),
        pytest.param("std::cout << 3000000004; return 1;", "crash", id="exit-code"),
        pytest.param("volatile int* p = 0; *p = 1;", "crash", id="segfault"),
        pytest.param("for (volatile int i = 0;; ) i = 1;", "timeout", id="endless"),
        pytest.param("for (;;) std::cout << 'x';", "output_limit", id="output"),
        pytest.param("std::vector<char> v(1ll << 33, 1); std::cout << v[7];", "crash", id="memory"),
        pytest.param("system(\"echo 3000000004\"); pause();", "timeout", id="pause"),
    ],
)  # fmt: skip
def test_cpp_program_has_a_status(code_grader: CodeGrader, body: str, status: str) -> None:
    source = "#include <iostream>\n#include <vector>\n#include <unistd.h>\n#include <cstdlib>\n"
    program = Program(source=f"{source}int main() {{ {body} }}", language="cpp")
    assert graded(code_grader, program, TWO_NUMBERS).status == status


@pytest.fixture(scope="module")
def short_grader(code_grader: CodeGrader) -> Iterator[CodeGrader]:
    """Compiles for so short a time that nothing with a standard library in it gets through."""
    short = Limits(cpu_seconds=1, wall_slack_seconds=30, memory_bytes=1 << 30, output_bytes=4 << 20)
    with CodeGrader(compile_limits=short) as grader:
        yield grader


@pytest.mark.parametrize(
    "source",
    [
        "int main() { return }",
        '#include "/dev/zero"\nint main() {}',
        '#include "/etc/passwd"\nint main() {}',
        '#include __FILE__\nint main() {}',
        "int a[1 << 28] = {1};\nint main() { return a[0]; }",
        "template <int N> struct A { A<N + 1> a, b; };\nA<0> a;\nint main() {}",
        "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); }\n"
        "static_assert(f(60) > 0);\nint main() {}",
        "#define A B B B B B B B B\n#define B C C C C C C C C\n#define C D D D D D D D D\n"
        "#define D E E E E E E E E\n#define E F F F F F F F F\n#define F G G G G G G G G\n"
        "#define G H H H H H H H H\n#define H 1 +\nint x = A A A A 0;\nint main() {}",
        "\x00\ud800",
    ],
    ids=[
        *("syntax", "endless-include", "host-file", "own-source", "huge-binary"),
        *("template", "constexpr", "macro", "nul"),
    ],
)  # fmt: skip
def test_compile_bombs_are_compile_errors(short_grader: CodeGrader, source: str) -> None:
    grade = graded(short_grader, Program(source=source, language="cpp"), TWO_NUMBERS)
    assert grade.status == "compile_error"
    assert "root:" not in grade.detail


# 86: time


@pytest.fixture(scope="module")
def patient_grader(code_grader: CodeGrader) -> Iterator[CodeGrader]:
    """Waits long enough for processor time to decide, on a machine that has much else to do."""
    with CodeGrader(limits=Limits(cpu_seconds=1, wall_slack_seconds=60)) as grader:
        yield grader


def busy(seconds: float) -> str:
    return f"import time\nwhile time.process_time() < {seconds}: pass\nprint(int(input()) + 1)"


def test_processor_time_decides(patient_grader: CodeGrader) -> None:
    assert graded(patient_grader, busy(0.5), ADD_ONE).status == "passed"
    grade = graded(patient_grader, busy(1.5), ADD_ONE)
    assert grade.status == "timeout" and not grade.outcomes[0].overran_wall


def test_limit_of_a_test_is_multiplied_by_the_language(patient_grader: CodeGrader) -> None:
    longer = StdinTest(input="41", output="42", cpu_seconds=0.6)
    assert graded(patient_grader, busy(1.3), longer).status == "passed"


@pytest.mark.parametrize("loaded", [True, False])
def test_overrun_of_real_time_is_tried_again_when_the_machine_is_loaded(
    code_grader: CodeGrader, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    monkeypatch.setattr(grader_module, "machine_is_loaded", lambda: loaded)
    with CodeGrader(limits=Limits(cpu_seconds=1, wall_slack_seconds=0.1)) as grader:
        grade = graded(grader, "import time; time.sleep(60)", ADD_ONE)
    assert grade.status == "timeout" and grade.retried == loaded


# Many at once, and how a grader ends


def test_grades_keep_their_order_from_many_threads(code_grader: CodeGrader) -> None:
    results: dict[int, list[str]] = {}

    def grade(offset: int) -> None:
        programs = [f"print({n})" for n in range(offset, offset + 6)]
        tests = [[StdinTest(input="", output=str(n - n % 2))] for n in range(offset, offset + 6)]
        results[offset] = [grade.status for grade in code_grader.grade(programs, tests)]

    threads = [threading.Thread(target=grade, args=(offset,)) for offset in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {offset: ["passed", "wrong"] * 3 for offset in range(0, 40, 10)}


def test_programs_die_with_the_process_that_grades(tmp_path: Path) -> None:
    script = """
        import os
        from trainer.rewards import CodeGrader, Limits, StdinTest
        with CodeGrader(limits=Limits(wall_slack_seconds=600)) as grader:
            print("open", flush=True)
            sleep = "import os, time; os.fork(); time.sleep(600)"
            grader.grade([sleep], [[StdinTest(input="", output="x")]])
        """
    path = tmp_path / "grade.py"
    path.write_text(dedent(script))
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    # bubblewrap twice, outside and inside, then the program and its child.
    sleepers: list[int] = []
    deadline = time.monotonic() + 60
    while len(sleepers) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        sleepers = _descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in sleepers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in sleepers)


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def test_closed_grader_refuses(code_grader: CodeGrader) -> None:
    with CodeGrader(workers=1) as grader:
        assert graded(grader, "print(int(input()) + 1)", ADD_ONE).correct
    with pytest.raises(RuntimeError):
        graded(grader, "print(int(input()) + 1)", ADD_ONE)


# 87: no sandbox


def test_level_says_what_the_self_test_held_against(
    code_grader: CodeGrader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), CodeGrader() as grader:
        assert grader.level.startswith("bubblewrap")
        for attempt in ("network", "host files", "host processes", "memory", "processes"):
            assert attempt in grader.level
        assert grader.level in caplog.text


def test_start_is_refused_without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SandboxUnavailable, match="rlimits-only"):
        CodeGrader()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("exit 1", "self-test to run"),
        ("echo 'namespaces are refused' >&2; exit 1", "namespaces are refused"),
        # Runs the command, after its own last flag, with no protection at all.
        ("while [ \"$1\" != -- ]; do shift; done; shift; exec \"$@\"", "network, .*host files"),
    ],
    ids=["fails", "says-why", "protects-nothing"],
)  # fmt: skip
def test_start_is_refused_with_a_bubblewrap_that_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, problem: str
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    for path in (fake, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SandboxUnavailable, match=problem):
        CodeGrader()


def test_lesser_level_has_to_be_named_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with CodeGrader(sandbox="rlimits-only", limits=Limits(cpu_seconds=1)) as grader:
        assert "rlimits-only" in grader.level and "rlimits-only" in caplog.text
        programs = ["print(int(input()) + 1)", "while True: pass", "x = bytearray(8 << 30)"]
        statuses = [grade.status for grade in grader.grade(programs, [[ADD_ONE]] * 3)]
    assert statuses == ["passed", "timeout", "crash"]


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="sandbox: expected one of bubblewrap, rlimits-only"):
        CodeGrader(sandbox="none")  # type: ignore[arg-type]


def test_bad_arguments_are_refused(code_grader: CodeGrader) -> None:
    with pytest.raises(ValueError, match="workers: expected at least 1"):
        CodeGrader(workers=0)
    with pytest.raises(ValueError, match="memory_bytes: expected a positive"):
        Limits(memory_bytes=0)
    with pytest.raises(ValueError, match="one list per program"):
        code_grader.grade(["x"], [])
    with pytest.raises(ValueError, match="expected at least one, got none"):
        code_grader.grade(["x"], [[]])
    with pytest.raises(TypeError, match="expected code tests, got str"):
        code_grader.grade(["x"], [["x"]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected str, Program or None, got int"):
        code_grader.grade([3], [[ADD_ONE]])  # type: ignore[list-item]
    call = FunctionTest(entry_point="f", arguments=(), expected=1)
    with pytest.raises(ValueError, match="expected stdin tests for C"):
        graded(code_grader, Program(source="", language="cpp"), call)
    with pytest.raises(ValueError, match="python: expected an interpreter"):
        CodeGrader(python="/nowhere/python3")

"""Problems that programs answer: what the sets' records become, and what is refused."""

import base64
import json
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from trainer.data_records import DataError
from trainer.problem_kinds import Kind
from trainer.rewards.code_tests import CheckTest, FunctionTest, StdinTest
from trainer.tasks import Problem, load_problems

ADD = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


def load_one(tmp_path: Path, record: object, kind: Kind) -> Problem:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return load_problems(str(path), kind=kind)[0]


def live_code_bench(private: object, **fields: object) -> dict[str, object]:
    return {
        "question_content": "Add.",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": private,
        "metadata": "{}",
        **fields,
    }


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_tests_of_a_program_are_read_from_the_record(tmp_path: Path) -> None:
    record = {"problem": "Add.", "tests": [{"input": "1 2\n", "output": "3"}], "source": "x"}
    problem = load_one(tmp_path, record, "tests")
    assert problem.tests == (StdinTest(input="1 2\n", output="3"),)
    assert problem.question.startswith("Add.\n\nWrite a Python program that reads standard input")
    assert (problem.answer, problem.columns) == ("", {"source": "x"})


def test_tests_of_a_function_are_read_from_the_record(tmp_path: Path) -> None:
    test = {"entry_point": "add", "arguments": [1, 2], "expected": 3}
    problem = load_one(tmp_path, {"problem": "Add.", "tests": [test]}, "tests")
    assert problem.tests == (FunctionTest(entry_point="add", arguments=(1, 2), expected=3),)
    assert "standard input" not in problem.question


def test_human_eval_prompt_and_check_run_with_the_reference_solution(tmp_path: Path) -> None:
    problem = load_one(tmp_path, ADD, "human-eval")
    (test,) = problem.tests
    assert isinstance(test, CheckTest)
    assert f"```python\n{ADD['prompt']}```" in problem.question
    program = f"{test.setup}{ADD['canonical_solution']}\n{test.code}\ncheck({test.entry_point})"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("pack", [json.dumps, lambda cases: packed(json.dumps(cases))])
def test_live_code_bench_joins_public_and_private_tests(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    private = pack([{"input": "5 6", "output": "11", "testtype": "stdin"}])
    problem = load_one(tmp_path, live_code_bench(private), "live-code-bench")
    assert problem.tests == (
        StdinTest(input="1 2", output="3"),
        StdinTest(input="5 6", output="11"),
    )


def test_live_code_bench_methods_get_arguments_and_values(tmp_path: Path) -> None:
    case = {"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}
    record = live_code_bench(
        "[]",
        public_test_cases=json.dumps([case]),
        metadata=json.dumps({"func_name": "holds"}),
        starter_code="class Solution: ...",
    )
    problem = load_one(tmp_path, record, "live-code-bench")
    assert problem.tests == (
        FunctionTest(entry_point="Solution.holds", arguments=([1, 2], "a"), expected=True),
    )
    assert "class Solution: ..." in problem.question


class Runs:
    """Pickles to a call of a function."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickle_in_a_data_set_runs_nothing(tmp_path: Path) -> None:
    record = live_code_bench(packed(Runs(tmp_path / "touched")))
    with pytest.raises(DataError, match="line 1: private tests that cannot be unpacked .*expected"):
        load_one(tmp_path, record, "live-code-bench")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"problem": "Q"}, "tests", "expected a list of tests in column 'tests', got nothing"),
        ({"problem": "Q", "tests": []}, "tests", "a list of tests .* got a list of 0"),
        ({"problem": "Q", "tests": [3]}, "tests", "test 1: test: expected an object, got int 3"),
        (
            {"problem": "Q", "tests": [{"input": "", "output": " "}]},
            "tests",
            "test 1: output: expected text, got none",
        ),
        ({**ADD, "test": "def check("}, "human-eval", "line 1: code: expected Python"),
        ({**ADD, "entry_point": None}, "human-eval", "non-empty text in column 'entry_point'"),
        (live_code_bench("[{"), "live-code-bench", "line 1: expected JSON"),
        (live_code_bench("%%%"), "live-code-bench", "private tests that cannot be unpacked"),
        (live_code_bench(packed([3])), "live-code-bench", "line 1: expected JSON, got a list of 1"),
        (live_code_bench('[{"input": "1"}]'), "live-code-bench", "test 2: .*field 'output'"),
        (
            live_code_bench("[]", public_test_cases="[]"),
            "live-code-bench",
            "line 1: expected tests, got none",
        ),
        (live_code_bench("[]", question_content=""), "live-code-bench", "non-empty text in column"),
    ],
)
def test_unusable_tests_are_refused_with_their_place(
    tmp_path: Path, record: object, kind: Kind, message: str
) -> None:
    with pytest.raises(DataError, match=f"set.jsonl, line 1.*{message.removeprefix('line 1: ')}"):
        load_one(tmp_path, record, kind)

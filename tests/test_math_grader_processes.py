"""The worker processes of the grader: killed, stopped, shared by threads, gone afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.rewards import Grade, MathGrader

RIGHT = Grade(True, "ok")
COSTLY = ("\\frac{3}{7}", "\\frac{-32\\sin(64x)}{\\sqrt{\\cos(64x)}}")
"""Takes math-verify many seconds, so the lenient mode runs into its limit."""


def _children(pid: int) -> list[int]:
    """Processes below one, however deep."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found += [int(entry.name), *_children(int(entry.name))]
    return found


def _wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _pair(number: int) -> tuple[str, str]:
    return f"\\sqrt{{{number}}}", f"{number}^{{1/2}}"


def test_threads_share_the_workers() -> None:
    before = set(_children(os.getpid()))
    wrong: list[int] = []
    with MathGrader(workers=2) as grader:

        def grade(start: int) -> None:
            numbers = range(start, start + 40)
            pairs = [_pair(number) for number in numbers] + [_pair(0)] * 3 + [("5", "6")]
            correct = [result.correct for result in grader.grade(pairs)]
            if correct != [True] * 43 + [False]:
                wrong.append(start)

        threads = [threading.Thread(target=grade, args=(100 * index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(set(_children(os.getpid())) - before) == 4
    assert set(_children(os.getpid())) <= before


def test_killed_worker_is_replaced() -> None:
    with MathGrader(workers=1) as grader:
        assert grader.grade([_pair(2)]) == [RIGHT]
        for victims in (slice(None), slice(0, 1), slice(1, 2)):
            for pid in _children(os.getpid())[victims]:
                os.kill(pid, signal.SIGKILL)
            statuses = [grader.grade([_pair(number)])[0].status for number in range(3, 8)]
            assert set(statuses) <= {"ok", "crash"} and statuses[-1] == "ok"
            assert grader.grade([_pair(9)]) == [RIGHT]


def test_limit_of_cpu_time_ends_a_comparison_and_the_next_one_is_graded() -> None:
    with MathGrader(workers=1, timeout_seconds=0.5, mode="lenient") as grader:
        assert grader.grade([_pair(2)]) == [RIGHT]
        pids = _children(os.getpid())
        for _ in range(2):
            assert grader.grade([COSTLY]) == [Grade(False, "timeout")]
            assert grader.grade([_pair(3)]) == [RIGHT]
        assert len(set(pids) & set(_children(os.getpid()))) == len(pids) - 1


def test_stopped_worker_is_given_up_at_the_deadline() -> None:
    with MathGrader(workers=1, timeout_seconds=0.2) as grader:
        assert grader.grade([_pair(2)]) == [RIGHT]
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGSTOP)
        assert grader.grade([_pair(3)]) == [Grade(False, "timeout")]
        # The wall clock decided, so the answer is not remembered as wrong.
        assert grader.grade([_pair(3)]) == [RIGHT]


def test_workers_end_with_the_process_that_was_killed() -> None:
    script = (
        "import sys, time\n"
        "from trainer.rewards import MathGrader\n"
        "grader = MathGrader(workers=2)\n"
        "print(grader.grade([('\\\\sqrt{4}', '2^1')])[0].correct, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    _wait_until(lambda: len(_children(process.pid)) == 4)
    workers = _children(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_workers_end_with_a_process_that_forgot_to_close_them() -> None:
    script = (
        "from trainer.rewards import MathGrader; print(MathGrader().grade([('1/2', '.5 + 0')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "correct=True" in done.stdout


def test_closing_leaves_nothing_behind() -> None:
    def state() -> tuple[object, ...]:
        files = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _open_files())
        handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)]
        return files, handlers, os.getcwd(), dict(os.environ), sys.getrecursionlimit()

    MathGrader(workers=1).close()
    before = state(), set(_children(os.getpid())), threading.active_count()
    with MathGrader(workers=1) as grader:
        grader.grade([_pair(2), ("5", "\\frac" * 300)])
        grader.close()
    assert (state(), set(_children(os.getpid())), threading.active_count()) == before
    with pytest.raises(RuntimeError, match="expected an open grader"):
        grader.grade([])


def _open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_forked_process_may_not_use_the_grader_of_its_parent() -> None:
    script = (
        "import os\n"
        "from trainer.rewards import MathGrader\n"
        "with MathGrader(workers=1) as grader:\n"
        "    grader.grade([('1/2', '.5 + 0')])\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try:\n"
        "            grader.grade([('1', '1')])\n"
        "        except RuntimeError as error:\n"
        "            os._exit(7 if 'a fork of it' in str(error) else 8)\n"
        "        os._exit(9)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "7\n"


def test_workers_do_not_load_torch() -> None:
    script = "import sys, trainer.math_answers.worker; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"


def test_same_input_gets_the_same_grade_without_the_cache() -> None:
    pairs = [
        _pair(5),
        ("5", "9^{9^{9}}"),
        ("\\sin 2x", "2\\sin x\\cos x"),
        ("a", "\\frac{1"),
        COSTLY,
    ]
    with MathGrader(workers=2, cache_size=0) as grader:
        first = grader.grade(pairs)
        assert all(
            grader.grade([pair])[0] == grade for pair, grade in zip(pairs, first, strict=True)
        )
        assert grader.grade(pairs[::-1]) == first[::-1]


def test_grades_are_remembered() -> None:
    with MathGrader(workers=1) as grader:
        first = grader.grade([_pair(6), ("5", "6 + 0")])
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGSTOP)
        assert grader.grade([_pair(6), ("5", "6 + 0")]) == first
        for pid in _children(os.getpid()):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds: expected a positive, finite number"),
        ({"mode": "exact"}, "mode: expected one of strict, lenient, got 'exact'"),
        ({"cache_size": -1}, "cache_size: expected 0 or more, got -1"),
    ],
)
def test_grader_refuses_values_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MathGrader(**arguments)  # type: ignore[arg-type]


def test_grade_refuses_other_types() -> None:
    with MathGrader(workers=1) as grader:
        with pytest.raises(TypeError, match="gold: expected a string or a list of strings"):
            grader.grade([(5, "5")])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="answer: expected a string or None, got int"):
            grader.grade([("5", 5)])  # type: ignore[list-item]


def test_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MathGrader(workers=1) as grader:
        with pytest.raises(RuntimeError, match="expected a worker process to start"):
            grader.grade([_pair(2)])

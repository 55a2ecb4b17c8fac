"""Programs that attack the grader, each of them really run, from a thread that is not the main one.

Numbers are those of the list of adversarial cases. After every attack the same grader has to grade
a right program right.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from trainer.rewards import CheckTest, CodeGrade, CodeGrader, CodeTest, FunctionTest, StdinTest

ADD_ONE = StdinTest(input="41", output="42")


@pytest.fixture(autouse=True)
def next_program_is_graded_right(code_grader: CodeGrader) -> Iterator[None]:
    descriptors = os.listdir("/proc/self/fd")
    yield
    right, wrong = code_grader.grade(["print(int(input()) + 1)", "print(41)"], [[ADD_ONE]] * 2)
    assert (right.status, wrong.status) == ("passed", "wrong")
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def graded(grader: CodeGrader, program: str, *tests: CodeTest) -> CodeGrade:
    """The grade, from a thread of its own: nothing may depend on signals to the main thread."""
    grades: list[CodeGrade] = []
    thread = threading.Thread(
        target=lambda: grades.extend(grader.grade([dedent(program)], [tests]))
    )
    thread.start()
    thread.join()
    return grades[0]


def printed(grader: CodeGrader, program: str, expected: str, input: str = "") -> CodeGrade:
    return graded(grader, program, StdinTest(input=input, output=expected))


def function_and_check(expected: object, argument: object = 0) -> list[CodeTest]:
    """The same demand on `solve` as a function test and as a check test."""
    asserts = f"def check(candidate):\n    assert candidate({argument!r}) == {expected!r}\n"
    return [
        FunctionTest(entry_point="solve", arguments=(argument,), expected=expected),
        CheckTest(entry_point="solve", code=asserts),
    ]


def is_running(marker: str) -> bool:
    """Whether a process with the marker on its command line is alive on this machine."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in process.read_bytes():
                return True
        except OSError:  # it ended meanwhile
            continue
    return False


def wait_until_gone(marker: str) -> bool:
    deadline = time.monotonic() + 5
    while is_running(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(marker)


def sleeper(marker: str) -> str:
    """Source of a program that becomes a process which sleeps, with a marker to find it by."""
    return (
        "import os, sys\n"
        "def sleep():\n"
        "    code = 'import time; time.sleep(600)'\n"
        f"    os.execv(sys.executable, [sys.executable, '-S', '-c', code, {marker!r}])\n"
    )


# 62, 63: endless work, endless waiting


@pytest.mark.parametrize("test", [ADD_ONE, *function_and_check(1)], ids=["stdin", "call", "check"])
def test_endless_loop_is_stopped(code_grader: CodeGrader, test: CodeTest) -> None:
    program = "def solve(x):\n    while True: pass\nif __name__ == '__main__': solve(0)"
    assert graded(code_grader, program, test).status == "timeout"


def test_endless_loop_in_loading_is_stopped(code_grader: CodeGrader) -> None:
    assert graded(code_grader, "while True: pass", *function_and_check(1)).status == "timeout"


def test_sleep_is_stopped_by_real_time(code_grader: CodeGrader) -> None:
    grade = graded(code_grader, "import time; time.sleep(1e9)", ADD_ONE)
    assert grade.status == "timeout" and grade.outcomes[0].overran_wall


def test_input_that_does_not_come_is_a_crash(code_grader: CodeGrader) -> None:
    grade = printed(code_grader, "input()", "x")
    assert grade.status == "crash" and "EOFError" in grade.detail


# 64, 65, 80: processes that multiply or stay


def test_fork_bomb_is_held_to_the_limit_and_killed(code_grader: CodeGrader) -> None:
    marker = secrets.token_hex(8)
    bomb = sleeper(marker) + dedent(
        """
        count = 0
        try:
            while True:
                if os.fork() == 0: sleep()
                count += 1
        except OSError:
            print("refused" if count < 24 else count, flush=True)
        """
    )
    assert printed(code_grader, bomb, "refused").status == "passed"
    assert wait_until_gone(marker)
    assert graded(code_grader, "import os\nwhile True: os.fork()", ADD_ONE).status != "passed"


@pytest.mark.parametrize("own_session", [True, False], ids=["setsid", "same-session"])
def test_daemon_that_holds_stdout_ends_with_the_program(
    code_grader: CodeGrader, own_session: bool
) -> None:
    marker = secrets.token_hex(8)
    daemon = sleeper(marker) + dedent(
        f"""
        if os.fork() == 0:
            if {own_session}: os.setsid()
            if os.fork() == 0: sleep()
            os._exit(0)
        os.wait()
        print(int(input()) + 1)
        """
    )
    assert graded(code_grader, daemon, ADD_ONE).status == "passed"
    assert wait_until_gone(marker)


@pytest.mark.parametrize(
    "stays",
    [
        "import atexit; atexit.register(time.sleep, 600)",
        "import threading; threading.Thread(target=time.sleep, args=(600,)).start()",
        "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(600)",
    ],
    ids=["atexit", "thread", "ignored-signals"],
)
def test_program_that_does_not_end_is_killed(code_grader: CodeGrader, stays: str) -> None:
    program = f"import time\nprint(int(input()) + 1, flush=True)\n{stays}"
    assert graded(code_grader, program, ADD_ONE).status == "timeout"


def test_program_killed_at_the_hard_cpu_limit_is_a_timeout(code_grader: CodeGrader) -> None:
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert graded(code_grader, program, ADD_ONE).status == "timeout"


# 66, 67, 68: memory, output, files


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(8 << 30)",
        "x = [0]\nwhile True: x += x",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): sorted([0], key=lambda x: f())\nf()",
        "x = 9 ** 9 ** 9",
        "x = 1 << (1 << 40)",
    ],
    ids=["bytearray", "list", "recursion", "recursion-in-c", "power", "shift"],
)
def test_memory_is_limited(code_grader: CodeGrader, program: str) -> None:
    assert graded(code_grader, program, ADD_ONE).status in ("crash", "timeout")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("amount", ["'x' * 10**8", "endless"])
def test_output_is_cut_off(code_grader: CodeGrader, stream: str, amount: str) -> None:
    loop = "while True: f.write('y' * 4096)" if amount == "endless" else f"f.write({amount})"
    grade = graded(code_grader, f"import sys\nf = sys.{stream}\n{loop}", ADD_ONE)
    assert grade.status == "output_limit"


@pytest.mark.parametrize("test", function_and_check("y"), ids=["call", "check"])
def test_returned_value_is_cut_off(code_grader: CodeGrader, test: CodeTest) -> None:
    grade = graded(code_grader, "def solve(x): return 'x' * (2 << 20)", test)
    assert grade.status == "output_limit"


def test_one_file_is_limited(code_grader: CodeGrader) -> None:
    program = """
        import errno
        try:
            with open("/tmp/big", "wb") as file:
                for _ in range(64): file.write(bytes(1 << 20))
        except OSError as error:
            print(errno.errorcode[error.errno])
        """
    assert printed(code_grader, program, "EFBIG").status == "passed"


def test_all_files_together_are_limited(code_grader: CodeGrader) -> None:
    program = """
        import errno, os
        for folder in ("/tmp", "/dev/shm"):
            try:
                for at in range(100):
                    with open(f"{folder}/{at}", "wb") as file: file.write(bytes(1 << 20))
            except OSError as error:
                print(errno.errorcode[error.errno])
        for folder in ("/", "/dev", "/usr", "/usr/bin", "/proc"):
            try: open(f"{folder}/x", "w")
            except OSError: print("refused")
        """
    expected = "ENOSPC " * 2 + "refused " * 5
    assert printed(code_grader, program, expected).status == "passed"


def test_many_small_files_leave_nothing(code_grader: CodeGrader) -> None:
    program = "for at in range(10**6): open(f'/tmp/{at}', 'w').close()\nprint(0)"
    assert printed(code_grader, program, "done").status in ("timeout", "crash")
    assert printed(code_grader, "import os; print(os.listdir('/tmp'))", "[]").status == "passed"


# 69, 70, 71: the network, the host's files and processes


def test_network_is_not_there(code_grader: CodeGrader) -> None:
    name = f"grader-{secrets.token_hex(8)}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as local,
    ):
        local.bind("\0" + name)
        local.listen()
        program = """
            import socket
            port, name = input().split()
            for family, address in (
                (socket.AF_INET, ("127.0.0.1", int(port))),
                (socket.AF_UNIX, "\\0" + name),
                (socket.AF_INET, ("169.254.169.254", 80)),
                (socket.AF_INET, ("1.1.1.1", 53)),
                (socket.AF_VSOCK, (2, 22)),
            ):
                try:
                    socket.socket(family, socket.SOCK_STREAM).connect(address)
                    print("connected", address)
                except OSError:
                    print("refused")
            """
        port = server.getsockname()[1]
        grade = printed(code_grader, program, "refused " * 5, f"{port} {name}")
    assert grade.status == "passed"


def test_host_files_and_environment_are_not_there(
    code_grader: CodeGrader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    secret = tmp_path / "expected.json"
    secret.write_text("42")
    for path in (secret, *secret.parents[:3]):
        path.chmod(0o755)
    program = """
        import os, sys
        print([path for path in sys.stdin.read().split("\\n") if os.path.exists(path)])
        seen = [open(f"/proc/{pid}/environ").read() for pid in os.listdir("/proc") if pid.isdigit()]
        print("secret" if "hf_secret" in str((seen, os.environ)) else "nothing")
        """
    repository = Path(__file__).resolve().parents[1]
    paths = [secret, __file__, repository / "pyproject.toml", Path.home() / ".ssh", "/etc/passwd"]
    grade = printed(code_grader, program, "[] nothing", "\n".join(map(str, paths)))
    assert grade.status == "passed", grade


def test_only_own_processes_can_be_killed(code_grader: CodeGrader) -> None:
    neighbour = "import time; time.sleep(0.5); print(int(input()) + 1)"
    killer = """
        import os, sys
        for pid in (1, int(sys.stdin.read()), os.getppid()):
            for number in (15, 9):
                try: os.kill(pid, number)
                except OSError: pass
        print(len([pid for pid in os.listdir("/proc") if pid.isdigit()]), flush=True)
        try: os.kill(-1, 9)
        except ProcessLookupError: print("alone")
        """
    own_pid = StdinTest(input=str(os.getpid()), output="2 alone")
    beside, attack = code_grader.grade([neighbour, dedent(killer)], [[ADD_ONE], [own_pid]])
    assert (beside.status, attack.status) == ("passed", "passed")


# 72, 73, 76: exits, forged results, patched modules


@pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)", "exit()", "os.kill(0, 15)"])
def test_exit_before_the_answer_is_no_pass(code_grader: CodeGrader, leave: str) -> None:
    at_once = f"import os, sys\n{leave}\ndef solve(x): pass"
    in_call = f"import os, sys\ndef solve(x): {leave}"
    for test in (ADD_ONE, *function_and_check(1)):
        assert not graded(code_grader, at_once, test).correct
        assert not graded(code_grader, in_call, test).correct


@pytest.mark.parametrize(
    "claim",
    [
        'ALL TESTS PASSED',
        '{"status": "passed"}',
        '{"value": 1}',
        '{"status": "passed", "detail": ""}\\n{"exit-code": 0}',
        '===== 1 passed in 0.01s =====',
    ],
)  # fmt: skip
def test_claims_on_any_descriptor_are_no_pass(code_grader: CodeGrader, claim: str) -> None:
    program = f"""
        import os
        def write():
            for fd in map(int, os.listdir("/proc/self/fd")):
                try: os.write(fd, b'{claim}\\n')
                except OSError: pass
        def solve(x):
            write()
            return 7
        write()
        os._exit(0) if __name__ == "__main__" else None
        """
    for test in (ADD_ONE, *function_and_check(42)):
        assert not graded(code_grader, program, test).correct


def test_patched_modules_change_nothing(code_grader: CodeGrader) -> None:
    program = """
        import builtins, decimal, io, json, os, signal, sys, time, unittest
        class Yes:
            def __eq__(self, other): return True
            def __bool__(self): return True
            def __call__(self, *args, **keywords): return self
            def __getattr__(self, name): return self
        yes = Yes()
        json.dumps = json.loads = json.load = lambda *args, **keywords: '{"value": true}'
        unittest.TestCase = decimal.Decimal = signal.alarm = time.time = os.read = yes
        builtins.print = builtins.open = builtins.compile = builtins.isinstance = yes
        sys.stdout = yes
        AssertionError = builtins.AssertionError = builtins.BaseException = yes
        def solve(x): return yes
        """
    for test in (ADD_ONE, *function_and_check(42)):
        assert not graded(code_grader, program, test).correct


def test_closed_channels_are_a_crash(code_grader: CodeGrader) -> None:
    program = """
        import os, time
        def solve(x):
            os.closerange(3, 1024)
            time.sleep(600)
        """
    call, check = function_and_check(42)
    assert graded(code_grader, program, check).status == "crash"
    assert graded(code_grader, program, call).status == "timeout"


# 74, 75, 77: objects that equal everything, hunts for the expected value


@pytest.mark.parametrize("base", ["object", "int", "str", "list", "dict", "float"])
def test_object_that_equals_everything_equals_nothing(code_grader: CodeGrader, base: str) -> None:
    program = f"""
        class Yes({base}):
            __hash__ = None
            def __eq__(self, other): return True
            def __ne__(self, other): return False
        def solve(x): return [Yes()] if x else Yes()
        """
    for argument, expected in ((0, 42), (1, [42])):
        for test in function_and_check(expected, argument):
            assert graded(code_grader, program, test).status == "wrong"


HUNT = r"""
import gc, glob, os, re, sys
PATTERN = re.compile(rb"secret-" + rb"[0-9a-f]{16}")
def found():
    seen = []
    frame = sys._getframe()
    while frame:
        seen.append(repr((frame.f_locals, frame.f_globals)).encode())
        frame = frame.f_back
    seen += [repr(thing).encode() for thing in gc.get_objects() if type(thing) is dict]
    for path in glob.glob("/proc/*/cmdline") + glob.glob("/proc/*/environ"):
        seen.append(content(path))
    for fd in map(int, os.listdir("/proc/self/fd")):
        try: seen.append(os.pread(fd, 1 << 20, 0))
        except OSError: pass
    seen.append(memory())
    return [match.decode() for piece in seen for match in PATTERN.findall(piece)]
def content(path):
    try: return open(path, "rb").read()
    except OSError: return b""
def memory():
    pieces = []
    with open("/proc/self/mem", "rb", 0) as file:
        for line in open("/proc/self/maps").read().split("\n"):
            if not re.search(r" rw|\[heap", line): continue
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            try:
                file.seek(start)
                pieces.append(file.read(end - start))
            except (OSError, OverflowError, ValueError): pass
    return b"".join(pieces)
def solve(x):
    return (found() or ["nothing"])[0]
if __name__ == "__main__":
    print(solve(0))
"""


def test_expected_values_cannot_be_hunted_down(code_grader: CodeGrader) -> None:
    secret = f"secret-{secrets.token_hex(8)}"
    tests = [StdinTest(input="x", output=secret), *function_and_check(secret)]
    assert [graded(code_grader, HUNT, test).status for test in tests] == ["wrong"] * 3


def test_hunt_finds_what_is_there(code_grader: CodeGrader) -> None:
    # Otherwise the test before this one would prove nothing.
    secret = f"secret-{secrets.token_hex(8)}"
    tests = [StdinTest(input=secret, output=secret), *function_and_check(secret, secret)]
    assert [graded(code_grader, HUNT, test).status for test in tests] == ["passed"] * 3


# 78, 79: the driver, the test's input, and what is left for the next run


def test_input_and_driver_cannot_be_overwritten(code_grader: CodeGrader) -> None:
    program = """
        import os
        for fd in os.listdir("/proc/self/fd"):
            if int(fd) in (1, 2): continue
            for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
                try: os.write(os.open(f"/proc/self/fd/{fd}", flags), b"x")
                except OSError: pass
        print(open(0).read())
        """
    text = f"keep-{secrets.token_hex(4)}"
    assert printed(code_grader, program, text, text).status == "passed"


def test_nothing_is_left_for_the_next_run(code_grader: CodeGrader) -> None:
    names = ("sitecustomize.py", "usercustomize.py", "json.py", "x.pth", "__pycache__/json.pyc")
    plant = f"""
        import os, sys
        for folder in ("/tmp", "/dev/shm", os.path.dirname(os.__file__), sys.prefix):
            for name in {names}:
                try:
                    os.makedirs(os.path.dirname(f"{{folder}}/{{name}}"), exist_ok=True)
                    open(f"{{folder}}/{{name}}", "w").write("print('planted')")
                except OSError: pass
        print(sorted(os.listdir("/tmp"))[-1])
        """
    assert printed(code_grader, plant, "x.pth").status == "passed"
    look = "import json, os; print(os.listdir('/tmp'), os.listdir('/dev/shm'), json.dumps(1))"
    test = StdinTest(input="", output="[] [] 1")
    grade = graded(code_grader, look, test, test)
    assert grade.status == "passed"


# 82: system calls that lead out

SYSTEM_CALLS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, *arguments):
    result = libc.syscall(NUMBERS[name], *arguments) if name in NUMBERS else \\
        getattr(libc, name)(*arguments)
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
machine = os.uname().machine
NUMBERS = dict(x86_64=dict(bpf=321, keyctl=250), aarch64=dict(bpf=280, keyctl=219))[machine]
NUMBERS.update(io_uring_setup=425, open_tree=428, pidfd_getfd=438)
print(
    tried("unshare", 0x10000000), tried("unshare", 0x20000), tried("setns", 0, 0),
    tried("ptrace", 0, 0, 0, 0), tried("mount", b"x", b"/tmp", b"tmpfs", 0, None),
    tried("bpf", 0, 0, 0), tried("keyctl", 0, 0, 0), tried("io_uring_setup", 1, 0),
    tried("open_tree", 0, 0, 0), tried("pidfd_getfd", 0, 0, 0), tried("setuid", 0),
)
print(os.getuid(), [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")])
"""


def test_system_calls_that_lead_out_are_refused(code_grader: CodeGrader) -> None:
    expected = "EPERM " * 10 + "EINVAL 65534 ['0000000000000000']"
    assert printed(code_grader, SYSTEM_CALLS, expected).status == "passed"


def test_namespace_tools_are_refused(code_grader: CodeGrader) -> None:
    program = """
        import subprocess
        for command in (["unshare", "-Ur", "true"], ["mount", "-t", "tmpfs", "x", "/tmp"]):
            print(subprocess.run(command, capture_output=True).returncode != 0)
        """
    assert printed(code_grader, program, "True True").status == "passed"


# Attacks on the judge itself


@pytest.mark.parametrize(
    "record",
    [
        """'{"value": ' + '[' * 200_000""",
        """'{"value": ' + '[' * 5000 + ']' * 5000 + '}'""",
        """'{"value": ' + '9' * 500_000 + '}'""",
        """'{"value": NaN}'""",
        """'{"value": 1e999999}'""",
        """'{"value": {"int": "zz"}}'""",
        """'{"value": {"set": [[1]]}}'""",
        """'{"failed": "call", "type": "SystemExit", "detail": {"a": 1}}'""",
        """'{"loaded": true}'""",
        # Keys that all have one hash, on a machine with 64 bits.
        """'{"value": {"dict": [[0,0]' + ''.join(f',[{n * (2**61 - 1)},0]' for n in R) + ']}}'""",
        """'[]'""",
        """'\\xff\\xfe'""",
    ],
)
def test_malformed_results_are_wrong_and_harmless(code_grader: CodeGrader, record: str) -> None:
    program = f"""
        import os
        R = range(30_000)
        def solve(x):
            for fd in map(int, os.listdir("/proc/self/fd")):
                try: os.write(fd, ({record}).encode("latin-1") + b"\\n")
                except OSError: pass
            os._exit(0)
        """
    for test in function_and_check(42):
        assert not graded(code_grader, program, test).correct

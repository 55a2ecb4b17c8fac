"""Builds csrc/cuda for the CPU: every kernel runs, thread by thread, under a seeded scheduler.

The CUDA sources are compiled as they are by the C++ compiler, except `primitives.h`, the one header
with hardware instructions, which the emulation replaces. The result is the module `kernels._cuda`
with CPU addresses.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
# Like nvcc, which rounds each product unless told otherwise by hand, and with stacks that longjmp
# may leave.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-fvisibility=hidden",
    "-pthread",
    "-Wno-attributes",
]


@dataclass(frozen=True, slots=True)
class Emulator:
    """The module and what decides how it runs."""

    module: ModuleType
    controls: ctypes.CDLL

    def seed(self, seed: int) -> None:
        """Decides the order of threads and bulk copies; 0 is the order a reader expects."""
        self.controls.emulation_set_seed(ctypes.c_uint64(seed))

    def device(self, major: int, minor: int = 0, *, multiprocessors: int = 2) -> None:
        """The device that the host code sees."""
        self.controls.emulation_set_device(major, minor, multiprocessors)


def compiler() -> str | None:
    """The C++ compiler that setup.py would take."""
    named = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    return shutil.which(named) or shutil.which("c++")


def build(folder: Path) -> Emulator:
    """Compiles csrc/cuda into `folder`.

    Raises:
        RuntimeError: a source does not compile; the message is the compiler's.
    """
    found = compiler()
    assert found is not None
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    for header in ("primitives.h",):
        shutil.copy(HERE / header, sources / "cuda" / header)
    include = [f"-I{HERE / 'include'}", f"-I{pybind11.get_include()}"]
    include += [f"-I{sysconfig.get_paths()['include']}", f"-I{HERE}"]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        as_cpp = ["-x", "c++"] if source.suffix == ".cu" else []
        run([found, *FLAGS, *include, *as_cpp, "-c", str(source), "-o", str(target)])
        return str(target)

    kernels = sorted((sources / "cuda").glob("*.cu")) + sorted((sources / "cuda").glob("*.cpp"))
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, [*kernels, HERE / "scheduler.cpp", HERE / "controls.cpp"]))
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([found, "-shared", "-pthread", *objects, "-o", str(library)])
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulator(module, ctypes.CDLL(str(library)))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")

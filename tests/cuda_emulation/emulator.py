"""Builds CUDA sources for the CPU: kernels run thread by thread under a seeded scheduler.

Sources are compiled as they are by the C++ compiler, except csrc/cuda/primitives.h, the one header
with hardware instructions, which the emulation replaces.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
# As nvcc has it, products are rounded unless fused by hand. Fortified longjmp refuses to change
# stacks.
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


# Compute capabilities of the devices, whose multiprocessors number 4, 7, 2 and 5.
DEVICES = {0: "9.0", 1: "9.0", 2: "8.0", 3: "10.0"}


@dataclass(slots=True)
class Emulator:
    """Compiled kernels and what decides how they run."""

    library: ctypes.CDLL
    module: ModuleType | None = None
    """`kernels._cuda`, whose addresses are those of CPU tensors."""
    device: int = 0
    """Of DEVICES."""

    def seed(self, seed: int) -> None:
        """Decides the order of threads and bulk copies; 0 is the order a reader expects."""
        self.library.emulation_set_seed(ctypes.c_uint64(seed))


def compiler() -> str | None:
    """The C++ compiler that setup.py takes."""
    named = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return shutil.which(named.split()[0])


def run(command: list[str]) -> None:
    """Raises RuntimeError with the compiler's message where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")


def link(sources: Iterable[Path], library: Path) -> None:
    """Compiles sources and the emulation into a shared library, objects beside it."""
    found = compiler()
    assert found is not None
    folders = [HERE / "include", HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    include = [f"-I{folder}" for folder in folders]

    def compiled(source: Path) -> str:
        target = library.parent / f"{source.stem}.o"
        run([found, *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, [*sources, *sorted(HERE.glob("*.cpp"))]))
    run([found, "-shared", "-pthread", *objects, "-o", str(library)])


def build_examples(folder: Path) -> Emulator:
    """The kernels of examples.cu."""
    link([HERE / "examples.cu"], folder / "examples.so")
    library = ctypes.CDLL(str(folder / "examples.so"))
    library.run_example.restype = ctypes.c_char_p
    return Emulator(library)


def build_backend(folder: Path) -> Emulator:
    """The kernels of csrc/cuda and their bindings."""
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    shutil.copy(HERE / "primitives.h", sources / "cuda")
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    cuda = sources / "cuda"
    link(sorted(cuda.glob("*.cu")) + sorted(cuda.glob("*.cpp")), library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulator(ctypes.CDLL(str(library)), module)

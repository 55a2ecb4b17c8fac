"""Builds `kernels._native` (C++, always) and `kernels._cuda` (when nvcc is found or asked for).

Both are bound with pybind11 and take raw addresses: torch is not needed to build them.
ONEPASS_CUDA=1 makes a missing nvcc an error, ONEPASS_CUDA=0 leaves the CUDA part out; without the
variable it is built where nvcc is found. A CUDA build that fails is an error either way.
"""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# z must be rounded before the row maximum is subtracted, so products are contracted by hand only.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
CUDA_ARCHITECTURES = ("80", "90a", "100")
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
KERNEL_HEADERS = [*HEADERS, *sorted(glob("csrc/cuda/*.cuh"))]


def find_nvcc() -> str | None:
    """Path of the nvcc to build with; None leaves the CUDA part out."""
    wanted = os.environ.get("ONEPASS_CUDA")
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"ONEPASS_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")
    if nvcc is None and wanted == "1":
        raise SystemExit(f"ONEPASS_CUDA=1: expected nvcc on PATH or in {cuda_home}/bin, found none")
    return nvcc


def cuda_home(nvcc: str) -> Path:
    """The toolkit that `nvcc` belongs to, also where the command on PATH is a wrapper."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in plan.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    raise SystemExit(f"{nvcc}: expected `--dryrun` to print TOP=, got none")


def gencode_flags() -> list[str]:
    """Machine code for each architecture, and PTX of the last for newer ones."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    last = CUDA_ARCHITECTURES[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


class BuildExtensions(build_ext):
    """build_ext that gives .cu files to nvcc and links their objects."""

    def build_extension(self, ext: Extension) -> None:
        kernel_files = [source for source in ext.sources if source.endswith(".cu")]
        if kernel_files:
            nvcc = find_nvcc()
            assert nvcc is not None
            ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
            ext.extra_objects = [self.compile_kernels(nvcc, source) for source in kernel_files]
            ext.library_dirs.append(str(cuda_home(nvcc) / "lib64"))
        super().build_extension(ext)

    def compile_kernels(self, nvcc: str, source: str) -> str:
        """Compiles one .cu file and returns the path of its object."""
        target = Path(self.build_temp, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [*NVCC_FLAGS, "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        self.spawn([nvcc, *flags, *gencode_flags(), "-c", source, "-o", str(target)])
        return str(target)


native = Pybind11Extension(
    "kernels._native",
    ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    cxx_std=17,
    extra_compile_args=CXX_FLAGS,
    extra_link_args=["-pthread"],
    depends=HEADERS,
)
cuda = Pybind11Extension(
    "kernels._cuda",
    ["csrc/cuda/bindings.cpp", *sorted(glob("csrc/cuda/*.cu"))],
    cxx_std=17,
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
    libraries=["cudart_static", "dl", "rt", "pthread"],
    depends=KERNEL_HEADERS,
)

ParallelCompile(default=0).install()
setup(
    ext_modules=[native] if find_nvcc() is None else [native, cuda],
    cmdclass={"build_ext": BuildExtensions},
)

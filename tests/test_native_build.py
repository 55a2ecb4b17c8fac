"""What the build promises: the CUDA kernels stay in registers, the CPU module needs no torch."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"


ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# With the most registers: a loss between sums and gradient, of each width of element.
DEMANDING_KERNELS = """
#include "resident.cuh"
#include "streaming.cuh"
namespace onepass {
#define CONST const __grid_constant__
template __global__ void resident_kernel<DType::kBFloat16, Linear, PolicyTask>(
    CONST Rows, CONST PolicyTask, int);
template __global__ void resident_kernel<DType::kFloat32, Softcapped, PolicyTask>(
    CONST Rows, CONST PolicyTask, int);
template __global__ void streaming_kernel<DType::kBFloat16, Linear, PolicyTask>(
    CONST Rows, CONST PolicyTask, bool);
}
"""


def cuobjdump() -> str | None:
    """NVIDIA's tool that reads compiled kernels, from the toolkit or as Triton brings it."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    source = tmp_path / "kernels.cu"
    source.write_text(DEMANDING_KERNELS)
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-I{SOURCES}/cuda", "-Xptxas=-v", "-cubin"]
    done = subprocess.run(
        [nvcc, *flags, f"-arch={architecture}", str(source), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in report, report
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    usage = re.findall(pattern, report)
    assert len(usage) == 3 and set(usage) == {("0", "0", "0")}, report


def test_built_cuda_kernels_need_no_stack() -> None:
    found, tool = importlib.util.find_spec("kernels._cuda"), cuobjdump()
    if found is None or found.origin is None:
        pytest.skip("kernels._cuda was not built here")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    listing = subprocess.run(
        [tool, "--dump-resource-usage", found.origin], capture_output=True, text=True, check=True
    ).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing)
    built = {name for name in ARCHITECTURES if f"arch = {name}\n" in listing}
    assert built == set(ARCHITECTURES)
    kernels = {name for name, *_ in usage if "onepass" in name}
    assert len(usage) >= len(ARCHITECTURES) * len(kernels) and len(kernels) > 30
    assert {(stack, local) for _, _, stack, local in usage} == {("0", "0")}
    assert max(int(registers) for _, registers, *_ in usage) <= 128


def test_cpu_module_is_loadable_without_torch() -> None:
    # The module is reached by path: importing its package would import torch.
    script = (
        "import importlib.util as u, sys;"
        "s = u.spec_from_file_location('_native', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "assert 'torch' not in sys.modules; print(m.cpu_level())"
    )
    from kernels import _native

    done = subprocess.run(
        [sys.executable, "-c", script, _native.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == _native.supported_cpu_levels()[0]

"""What the build promises: the CUDA kernels stay in registers, the CPU module needs no torch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_cuda_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-cubin"]
        done = subprocess.run(
            [*command, str(source), "-o", str(tmp_path / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        usage = re.findall(pattern, done.stdout + done.stderr)
        assert len(usage) >= 6
        assert set(usage) == {("0", "0", "0")}


def test_loss_header_compiles_for_the_device(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    source = tmp_path / "loss.cu"
    source.write_text(
        f'#include "{SOURCES}/policy_loss.h"\n'
        "__global__ void losses(const onepass::Token* tokens, onepass::LossSpec spec,\n"
        "                       onepass::TokenLoss* out) {\n"
        "  out[threadIdx.x] = onepass::token_loss(tokens[threadIdx.x], spec);\n"
        "}\n"
        "__global__ void advantages(const double* rewards, long long size,\n"
        "                           onepass::LossSpec spec, double* out) {\n"
        "  const onepass::GroupStats group = onepass::group_stats(rewards, size);\n"
        "  out[threadIdx.x] = onepass::advantage(rewards[threadIdx.x], group, group, spec);\n"
        "}\n"
    )
    done = subprocess.run(
        [nvcc, "-std=c++17", "-arch=sm_80", "-c", str(source), "-o", str(tmp_path / "loss.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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

"""Triton kernels compiled for GPUs that are not here: no spills, wide loads, no needless recompile.

Triton decides at its import whether it interprets, and these tests need its compiler, so they
compile in a process of their own. That process launches on CPU tensors, with the launch replaced by
a recorder: what is compiled is what `kernels.triton_backend` would launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import triton_backend
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch

ARCHITECTURES = (80, 90, 100)
# Every multiple of 16 from 8192 on compiles to the same kernel as this one.
WIDTH = 151936
GRPO = LossSpec(kl="k3", kl_weight=0.04)
FULL = LossSpec(
    surrogate="sapo",
    sampler_correction="token_mask",
    kl="k3",
    kl_weight=0.04,
    kl_ratio_weighted=True,
    entropy_weight=0.01,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [
    f"{kernel} {dtype}"
    for dtype in DTYPES
    for kernel in ("row_stats", "grad_logits", "grpo", "full", "scale")
    if dtype != "float16" or kernel == "grpo"
]
ODD_WIDTHS = {"grpo bfloat16 50257": 50257, "grpo bfloat16 1": 1, "grpo float32 31": 31}


def launch(kernel: str, dtype: torch.dtype, width: int, tokens: int = 4, **changes: Any) -> None:
    """Calls one function of the backend on zeros; "full" has every input a loss can have."""
    logits_OIW = torch.zeros(1, tokens, width, dtype=dtype)
    ids_N = torch.zeros(tokens, dtype=torch.long)
    values_N = torch.zeros(tokens)
    batch = TokenBatch(
        token_ids_N=ids_N,
        offsets=torch.tensor([0, tokens]),
        old_logprobs_N=None if kernel == "full" else values_N,
        ref_logprobs_N=values_N,
        sampler_logprobs_N=values_N if kernel == "full" else None,
        advantages_N=values_N,
    )
    if kernel == "row_stats":
        triton_backend.row_stats(logits_OIW, ids_N, 1.0, 0.0)
    elif kernel == "grad_logits":
        triton_backend.grad_logits(logits_OIW, ids_N, 1.0, 0.0, *[values_N] * 5, out_OIW=logits_OIW)
    elif kernel == "scale":
        triton_backend.scale_(logits_OIW, torch.tensor(1.0))
    elif kernel == "grpo":
        spec = changes.get("spec", GRPO)
        inv_temperature = changes.get("inv_temperature", 1.0)
        triton_backend.policy_loss(logits_OIW, batch, spec, inv_temperature, 0.0, logits_OIW)
    else:
        triton_backend.policy_loss(logits_OIW, batch, FULL, values_N, 30.0, logits_OIW)


class Recorder:
    """Stands in for a kernel; keeps the grid and the arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = ()
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grid = grid
        return lambda **arguments: self.arguments.update(arguments)


def recorded(*arguments: Any, **changes: Any) -> Recorder:
    """What `launch` launches, and how."""
    programs = triton_backend.programs
    kernels = {name: value for name, value in vars(programs).items() if name.endswith("_kernel")}
    recorders = {name: Recorder(kernel) for name, kernel in kernels.items()}
    vars(programs).update(recorders)
    try:
        launch(*arguments, **changes)
    finally:
        vars(programs).update(kernels)
    (used,) = [recorder for recorder in recorders.values() if recorder.arguments]
    return used


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and alignments that Triton's launcher would compile for."""
    pointers = {torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32"}
    pointers |= {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def row_offsets_in_32_bits(ir: str) -> list[str]:
    """Lines of Triton's IR that compute with a program's index or a row stride in 32 bits.

    Dividing the number of a row, which fits them, is not one.
    """
    programs = re.findall(r"(%\w+) = tt\.get_(?:program_id|num_programs)", ir)
    narrow = []
    for line in ir.splitlines():
        _, _, operation = line.partition(" = ")
        names = re.findall(r"%\w+", operation)
        widened = "arith.extsi" in operation and "i32 to i64" in operation
        widened |= "arith.divsi" in operation
        of_program = any(name in programs for name in names)
        of_stride = any("_stride_" in name for name in names)
        if (of_program and not widened) or (of_stride and ": i64" not in operation):
            narrow.append(line.strip())
    return narrow


def compile_case(case: str, arch: int) -> dict[str, Any]:
    """What `cuobjdump` says of registers, stack and local memory; widest accesses; offsets."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel_name, dtype, *width = case.split()
    used = recorded(kernel_name, DTYPES[dtype], int(width[0]) if width else WIDTH)
    kernel, arguments = used.kernel, used.arguments
    options = {name: arguments[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    signature, constants, attributes = specialised(kernel, arguments)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = compiled.asm["ptx"]
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    wide = [f"{access}.global.v4.b32" in ptx for access in ("ld", "st")]
    narrow = row_offsets_in_32_bits(compiled.asm["ttir"])
    return usage | {"wide loads": wide[0], "wide stores": wide[1], "narrow offsets": narrow}


def main() -> None:
    """Prints one JSON object: case and architecture -> what the compiler made of it."""
    jobs = [(case, arch) for case in CASES for arch in ARCHITECTURES]
    jobs += [(case, 90) for case in ODD_WIDTHS]
    print(json.dumps({f"{case} sm_{arch}": compile_case(case, arch) for case, arch in jobs}))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_needs_no_stack_and_no_local_memory(
    compiled: dict[str, dict[str, Any]], case: str, arch: int
) -> None:
    usage = compiled[f"{case} sm_{arch}"]
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0
    assert 0 < usage["REG"] < 255


@pytest.mark.parametrize("case", ODD_WIDTHS)
def test_kernel_of_an_odd_width_needs_no_stack(
    compiled: dict[str, dict[str, Any]], case: str
) -> None:
    usage = compiled[f"{case} sm_90"]
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0


@pytest.mark.parametrize("case", CASES)
def test_aligned_rows_are_read_and_written_16_bytes_a_thread(
    compiled: dict[str, dict[str, Any]], case: str
) -> None:
    usage = compiled[f"{case} sm_90"]
    assert usage["wide loads"]
    assert usage["wide stores"] or case.startswith("row_stats")


@pytest.mark.parametrize("case", CASES)
def test_06_rows_are_found_in_64_bits(compiled: dict[str, dict[str, Any]], case: str) -> None:
    """Group 6 of `test_hard_cases.py`, in the compiler's own words."""
    assert compiled[f"{case} sm_90"]["narrow offsets"] == []


@pytest.mark.parametrize("kernel", ["row_stats", "grad_logits", "grpo", "full", "scale"])
def test_07_rows_are_the_first_axis_of_the_grid(kernel: str) -> None:
    """Group 7: the only axis on which CUDA launches more than 65535 programs."""
    used = recorded(kernel, torch.bfloat16, 2, tokens=70000)
    programs_of_a_queue = used.arguments.get("num_rows") == 70000 and len(used.grid) == 1
    assert used.grid == (70000,) or programs_of_a_queue


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 1},
        {"tokens": 16},
        {"tokens": 37},
        {"inv_temperature": 1 / 0.7},
        {"spec": LossSpec(kl="k3", kl_weight=1.0, clip_low=0.0, dual_clip=3.0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_batch_temperature_and_clip_do_not_compile_anew(changes: dict[str, Any]) -> None:
    def key(**changes: Any) -> dict[str, Any]:
        arguments = recorded("grpo", torch.bfloat16, 64, **changes).arguments
        return {
            name: value if isinstance(value, bool | int | str | None) else type(value)
            for name, value in arguments.items()
            if name not in triton_backend.programs.BATCH_DEPENDENT
        }

    assert key(**changes) == key()


if __name__ == "__main__":
    main()

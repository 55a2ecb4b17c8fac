"""Where no GPU is present, Triton runs in its interpreter; it has to be told before its import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import kernels  # noqa: E402

BACKENDS = ("reference", "cpp", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run here skips with its reason."""
    reason = kernels.available_backends()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of a backend live."""
    return "cuda" if torch.cuda.is_available() and backend != "cpp" else "cpu"

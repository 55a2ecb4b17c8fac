"""Tensors in safetensors files, of which each rank reads only the part it holds."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class StoredTensors:
    """The tensors of some files, by name.

    A file is open only while something is read from it, so that the pages it is mapped to do not
    add up in memory.

    Args:
        files: each tensor is in one of them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._file_of[name] = file

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Fills `target`, which may be sharded, from the tensor of that name; no communication."""
        if self.shapes[name] != tuple(target.shape):
            raise ValueError(
                f"{name}: expected the shape {tuple(target.shape)}, got {self.shapes[name]} in "
                f"{self._file_of[name]}"
            )
        local = local_part(target)
        if local.numel():
            with safe_open(self._file_of[name], framework="pt") as opened:
                local.copy_(opened.get_slice(name)[local_slices(target)])


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of a tensor lies in the whole; all of it where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

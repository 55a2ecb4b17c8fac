"""Ranks as processes of a test."""

from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from trainer.training_run import end_process


def spawn_ranks(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Runs `function(rank, *arguments)` in `size` processes; raises what one of them raises."""
    mp.spawn(_run_rank, args=(function, arguments), nprocs=size)


def _run_rank(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    function(rank, *arguments)
    end_process(0)

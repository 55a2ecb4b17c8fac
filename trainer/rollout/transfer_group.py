"""The way of new weights from the trainer to one vLLM server: a process group of the trainer's main
rank (rank 0) and the server's workers, and a store beside it that says what comes next.

Both sides import this file; it needs torch alone.
"""

import datetime
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_END, _ABANDONED = "end", "abandoned"


def local_address(host: str, port: int) -> str:
    """The address under which the machine at `host` sees this one.

    Raises:
        OSError: nothing listens there.
    """
    with socket.create_connection((host, port), timeout=10) as connection:
        return connection.getsockname()[0]


@dataclass(slots=True, kw_only=True)
class TransferGroup:
    """One side of the way; a round is one pass over all weights."""

    store: dist.Store
    group: Any
    """A `torch.distributed.ProcessGroupGloo` or `ProcessGroupNCCL`, whose stubs lack methods."""
    round: int = 0
    place: int = 0
    """Tensors of this round so far."""

    @classmethod
    def join(
        cls,
        store: dist.Store,
        *,
        rank: int,
        size: int,
        address: str,
        device: torch.device,
        timeout_seconds: float,
    ) -> "TransferGroup":
        """Meets the other side; gloo on a CPU, NCCL on GPUs.

        Args:
            address: of this machine, as the other side sees it.
            device: where this side's tensors are.

        Raises:
            RuntimeError: the others did not come in time.
        """
        timeout = datetime.timedelta(seconds=timeout_seconds)
        meeting, entries = (dist.PrefixStore(name, store) for name in ("group", "weights"))
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            return cls(store=entries, group=dist.ProcessGroupNCCL(meeting, rank, size, nccl))
        make_gloo: Any = dist.ProcessGroupGloo
        gloo = make_gloo._Options()
        gloo._timeout = timeout
        gloo._devices = [make_gloo.create_device(hostname=address)]
        return cls(store=entries, group=make_gloo(meeting, rank, size, gloo))

    def begin(self) -> None:
        """Starts the next round."""
        self.round, self.place = self.round + 1, 0

    def send(self, name: str, tensor: Tensor) -> dist.Work:
        """Sends a tensor; it must not change before the work is complete."""
        self._say([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        return self.group.broadcast([tensor.contiguous()], dist.BroadcastOptions())

    def end(self, *, complete: bool) -> None:
        """Says that no more tensors come in this round, or that the rest is not coming."""
        self._say(_END if complete else _ABANDONED)

    def forget(self) -> None:
        """Drops what was said about this round, once the other side is through with it."""
        for place in range(self.place):
            self.store.delete_key(f"{self.round}/{place}")

    def receive(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the next round.

        Raises:
            RuntimeError: the sender gave up or fell silent.
        """
        self.begin()
        while (entry := json.loads(self.store.get(self._key()))) != _END:
            if entry == _ABANDONED:
                raise RuntimeError("the sender of the weights gave up")
            name, dtype_name, shape = entry
            self.place += 1
            tensor = torch.empty(shape, dtype=getattr(torch, dtype_name), device=device)
            self.group.broadcast([tensor], dist.BroadcastOptions()).wait()
            yield name, tensor

    def abort(self) -> None:
        """Ends what still waits for the other side."""
        self.group.abort()

    def _say(self, entry: object) -> None:
        self.store.set(self._key(), json.dumps(entry))
        self.place += 1

    def _key(self) -> str:
        return f"{self.round}/{self.place}"

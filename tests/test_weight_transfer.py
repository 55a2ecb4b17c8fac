"""Weights on their way to samplers: gathered in buckets, and sent over a transfer group."""

import datetime
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trainer.fsdp import World, full_tensors
from trainer.rollout.server_sampler import ServerSampler
from trainer.rollout.transfer_group import TransferGroup
from trainer.train import main

CPU = torch.device("cpu")


def uneven_layers() -> nn.Sequential:
    """Rows that four ranks cannot share evenly, and fewer rows than ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 7), nn.Linear(7, 8))


def gather_on_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", rank=rank, world_size=4, store=store)
    expected = dict(uneven_layers().named_parameters())
    meshes = [
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    ]
    # Mixed meshes in one module: each is gathered over its own ranks.
    sharded = uneven_layers()
    for place, layer in enumerate(sharded):
        if place != 3:
            fully_shard(layer, mesh=meshes[place % 2])
    for bucket_bytes in (1, 60, 1 << 20):
        gathered = list(full_tensors(sharded.named_parameters(), bucket_bytes=bucket_bytes))
        assert [name for name, _ in gathered] == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in gathered)
    for name, tensor in full_tensors(sharded.named_parameters(), dtype=torch.bfloat16):
        assert torch.equal(tensor, expected[name].bfloat16())
    dist.destroy_process_group()


def test_buckets_of_sharded_weights_are_the_weights(tmp_path: Path) -> None:
    spawn_ranks(gather_on_rank, 4, tmp_path)


class Receiver(threading.Thread):
    """The other side of a transfer group; takes one round."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.received: list[tuple[str, torch.Tensor]] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        store = dist.TCPStore("127.0.0.1", self.port, is_master=False)
        way = join(store, rank=1)
        try:
            self.received += way.receive(CPU)
        except RuntimeError as error:
            self.error = error


def join(store: dist.Store, *, rank: int) -> TransferGroup:
    return TransferGroup.join(
        store, rank=rank, size=2, address="127.0.0.1", device=CPU, timeout_seconds=20
    )


def meet() -> tuple[TransferGroup, Receiver]:
    timeout = datetime.timedelta(seconds=20)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    receiver = Receiver(store.port)
    return join(store, rank=0), receiver


def test_received_tensors_are_those_that_were_sent() -> None:
    way, receiver = meet()
    sent = {
        "matrix": torch.randn(5, 3).T,
        "half": torch.randn(1000).bfloat16(),
        "number": torch.tensor(3),
        "nothing": torch.zeros(0, 4),
    }
    way.begin()
    works = [way.send(name, tensor) for name, tensor in sent.items()]
    way.end(complete=True)
    receiver.join()
    for work in works:
        work.wait()
    assert [name for name, _ in receiver.received] == list(sent)
    for name, tensor in receiver.received:
        assert tensor.dtype == sent[name].dtype and torch.equal(tensor, sent[name])


def test_round_that_breaks_off_is_an_error_on_the_other_side() -> None:
    way, receiver = meet()
    way.begin()
    way.send("first", torch.ones(3)).wait()
    way.end(complete=False)
    receiver.join()
    assert "gave up" in str(receiver.error)


def test_no_server_ends_the_run_with_the_command_that_starts_one() -> None:
    sampler = ServerSampler(
        ["http://127.0.0.1:9"],
        World(rank=0, size=1, device=CPU),
        end_ids=[],
        stop_strings=[],
        in_flight="wait",
        timeout_seconds=5,
        retry_seconds=0,
        start_command=lambda url: f"start-one {url}",
        report=print,
    )
    with pytest.raises(
        ValueError, match="no server for 0 seconds .* `start-one http://127.0.0.1:9`"
    ):
        sampler.load_weights(dict[str, torch.Tensor]().items, 1)
    sampler.close()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--rollout vllm-server", "--vllm-url: expected with --rollout vllm-server"),
        ("--vllm-url http://a:1", "and only with it, got http://a:1 with --rollout transformers"),
        ("--rollout vllm-server --vllm-url a:1", "--vllm-url: expected http://host:port, got a:1"),
        ("--async-steps 1", "--async-steps: expected 0, since --rollout transformers samples"),
        ("--async-steps 1 --rollout vllm", "--async-steps: expected 0, since --rollout vllm"),
        ("--vllm-gpu-memory 1.5", "--vllm-gpu-memory: expected at most 1"),
    ],
)
def test_options_of_servers_that_do_not_go_together_are_refused(
    flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags.split()) == 2
    assert sentence in capsys.readouterr().err

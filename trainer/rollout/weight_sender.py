"""Sends the policy's weights to vLLM servers, again to those that lost them."""

import datetime
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Literal
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from trainer.config import UsageError
from trainer.fsdp import World, from_main_rank
from trainer.rollout import Weights
from trainer.rollout.server_client import ServerClient, ServerLostError
from trainer.rollout.transfer_group import TransferGroup, local_address

InFlight = Literal["wait", "keep", "abort"]
# What a server calls weights while they are being replaced.
UNFINISHED = "unfinished"
MAX_ATTEMPTS = 3
RETRY_EVERY_SECONDS = 1.0
POLL_SECONDS = 0.0005


class WeightSender:
    """Keeps servers at the weights of the policy. All ranks call its methods together; only the
    main rank talks to the servers.

    Args:
        servers: to keep up to date.
        world: the ranks that gather the weights.
        in_flight: what becomes of requests that a server is answering when new weights come: it
            finishes them first, goes on with the new ones, or drops them.
        retry_seconds: how long a server that does not answer is waited for.
        report: takes a sentence for the terminal.
    """

    def __init__(
        self,
        servers: list[ServerClient],
        world: World,
        *,
        in_flight: InFlight,
        retry_seconds: float,
        report: Callable[[str], None],
    ) -> None:
        self.servers, self.world = servers, world
        self.in_flight, self.retry_seconds, self.report = in_flight, retry_seconds, report
        # Nobody else's weights, those of an earlier start included, pass for ours.
        self.name = from_main_rank(world, lambda: uuid.uuid4().hex[:12])
        self.step = 0
        self.weights: Weights = dict[str, Tensor]().items
        self.ways: dict[ServerClient, TransferGroup] = {}

    @property
    def version(self) -> str:
        """What a server calls the weights that it should have."""
        return f"{self.name}-{self.step}"

    def step_of(self, version: str) -> int | None:
        """The step that left the weights which a server calls by that name; None if they are not
        from here."""
        name, _, step = version.partition("-")
        return int(step) if name == self.name else None

    def send(self, weights: Weights, step: int) -> None:
        """Gives all servers the weights that the policy has after a step.

        Raises:
            UsageError: a server stays away for too long, or does not take them.

        Collectives: those of a pass over the weights, for each attempt, and broadcasts of small
        objects.
        """
        self.weights, self.step = weights, step
        self.restore()

    def restore(self) -> None:
        """Waits for servers that are away, and gives the weights to those that have others.

        Raises, collectives: as `send`.
        """
        problem: str | None = None
        for _ in range(MAX_ATTEMPTS):
            behind = from_main_rank(self.world, self._prepare)
            if not behind:
                return
            problem = self._transfer([self.servers[place] for place in behind])
            if problem is None:
                return
        raise UsageError(f"--vllm-url: a server did not take the weights ({problem})")

    def close(self) -> None:
        """Leaves the servers' groups."""
        for server in list(self.ways):
            self._leave(server)

    def _prepare(self) -> list[int]:
        """Waits until all servers are well; returns the places of those that have other weights,
        each ready to take them."""
        gives_up_at = time.monotonic() + self.retry_seconds
        reported = False
        while True:
            try:
                ready = [self._make_ready(server) for server in self.servers]
                return [place for place, is_behind in enumerate(ready) if is_behind]
            except ServerLostError as error:
                if time.monotonic() >= gives_up_at:
                    commands = " and ".join(server.start_command for server in self.servers)
                    raise UsageError(
                        f"--vllm-url: no server for {self.retry_seconds:g} seconds ({error}); "
                        f"start it with `{commands}`, then this run again"
                    ) from error
                if not reported:
                    self.report(f"waiting for a vLLM server ({error})")
                reported = True
            time.sleep(RETRY_EVERY_SECONDS)

    def _make_ready(self, server: ServerClient) -> bool:
        """Pauses a server that has other weights, and meets its workers unless they are met; false
        for one that has the right ones."""
        run = server.http.run
        held = run(server.get("/weight_info"))["weight_version"]
        if held == self.version:
            return False
        if self.step_of(held) is None:
            # Started anew, or left by an earlier start of a trainer.
            self._leave(server)
        run(server.while_well(server.post("/pause", query={"mode": self.in_flight})))
        self._rename(server, UNFINISHED)
        if server not in self.ways:
            self.ways[server] = self._meet(server)
        return True

    def _meet(self, server: ServerClient) -> TransferGroup:
        place = urlsplit(server.url)
        assert place.hostname is not None and place.port is not None
        size = 1 + server.http.run(server.get("/get_world_size"))["world_size"]
        try:
            address = local_address(place.hostname, place.port)
        except OSError as error:
            raise ServerLostError(f"{server.url}: {error}") from error
        timeout = datetime.timedelta(seconds=server.timeout_seconds)
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        call = server.http.submit(
            server.call_workers(
                "meet_trainer",
                host=address,
                port=store.port,
                size=size,
                timeout_seconds=server.timeout_seconds,
            )
        )
        try:
            way = TransferGroup.join(
                store,
                rank=0,
                size=size,
                address=address,
                device=self.world.device,
                timeout_seconds=server.timeout_seconds,
            )
        except RuntimeError as error:
            raise ServerLostError(f"{server.url}: its workers did not come ({error})") from error
        call.result()
        return way

    def _transfer(self, servers: list[ServerClient]) -> str | None:
        """One pass over the weights; returns what went wrong with a server, on all ranks."""
        if not self.world.is_main:
            for _ in self.weights():
                pass
            return from_main_rank(self.world, lambda: None)
        calls = {
            server: server.http.submit(server.call_workers("take_weights")) for server in servers
        }
        problems: dict[ServerClient, str] = {}
        is_complete = False
        for server in servers:
            self.ways[server].begin()
        try:
            for name, tensor in self.weights():
                live = [server for server in servers if server not in problems]
                problems |= self._broadcast(name, tensor, calls, live)
            is_complete = True
        finally:
            for server in servers:
                if server not in problems:
                    self.ways[server].end(complete=is_complete)
        for server in servers:
            try:
                if server not in problems:
                    self._finish(server, calls[server])
            except ServerLostError as error:
                problems[server] = str(error)
        for server, problem in problems.items():
            self.report(f"the weights did not arrive ({problem})")
            self._leave(server)
        return from_main_rank(self.world, lambda: next(iter(problems.values()), None))

    def _broadcast(
        self,
        name: str,
        tensor: Tensor,
        calls: Mapping[ServerClient, Future[None]],
        live: list[ServerClient],
    ) -> dict[ServerClient, str]:
        """Sends a tensor to the servers that are well; returns what went wrong with others."""
        problems: dict[ServerClient, str] = {}
        works = {server: self.ways[server].send(name, tensor) for server in live}
        for server, work in works.items():
            # A server that has answered before the end takes no more: it failed.
            while not work.is_completed() and not calls[server].done():
                time.sleep(POLL_SECONDS)
            try:
                if calls[server].done():
                    calls[server].result()
                work.wait()
            except (RuntimeError, ServerLostError) as error:
                problems[server] = f"{server.url}: {error}"
        return problems

    def _finish(self, server: ServerClient, call: Future[None]) -> None:
        call.result()
        self.ways[server].forget()
        run = server.http.run
        run(server.post("/reset_prefix_cache", timeout_seconds=server.timeout_seconds))
        self._rename(server, self.version)
        run(server.post("/resume", timeout_seconds=server.timeout_seconds))

    def _rename(self, server: ServerClient, version: str) -> None:
        body = {"new_version": version}
        server.http.run(
            server.post("/update_weight_version", body, timeout_seconds=server.timeout_seconds)
        )

    def _leave(self, server: ServerClient) -> None:
        way = self.ways.pop(server, None)
        if way is not None:
            way.abort()

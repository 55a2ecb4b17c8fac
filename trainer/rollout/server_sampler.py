"""Sampling on vLLM servers that `trainer/rollout/vllm_server.py` starts.

Every completion is a request of token ids with the seed of its own key. A server that dies or is
started anew is noticed by the requests it does not answer, or answers with other weights; it gets
the weights again, and the same requests. What it answered in between is dropped, so that nothing is
lost and nothing is trained on twice.
"""

import asyncio
import queue
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.config import UsageError
from trainer.fsdp import World, any_rank, gather_in_order
from trainer.rollout import Completion, Weights
from trainer.rollout.server_client import HttpLoop, ServerClient, ServerLostError
from trainer.rollout.vllm_sampler import sampling_fields
from trainer.rollout.weight_sender import MAX_ATTEMPTS, InFlight, WeightSender


@dataclass(slots=True, kw_only=True)
class Pending:
    """Completions that servers are sampling."""

    bodies: list[dict[str, Any]]
    """Of the requests, group by group."""
    group_size: int
    completions: list[Completion | None]
    """None while there is none."""
    arrived: "queue.SimpleQueue[int | None]" = field(default_factory=queue.SimpleQueue)
    """Places of new ones; None when no more come of this attempt."""
    collected: Counter[int] = field(default_factory=Counter)
    """Completions taken out of `arrived`, by prompt."""
    problem: str = ""
    """Why the last of those that are missing is missing."""
    attempt: "Future[None]" = field(default_factory=Future)

    def missing(self) -> list[int]:
        """Places of the completions that there are not."""
        return [place for place, one in enumerate(self.completions) if one is None]

    def group(self, place: int) -> list[Completion]:
        """The completions of a prompt that there are."""
        first = place * self.group_size
        found = self.completions[first : first + self.group_size]
        return [one for one in found if one is not None]


def _nothing() -> Pending:
    pending = Pending(bodies=[], group_size=1, completions=[])
    pending.attempt.set_result(None)
    return pending


Ahead = tuple[tuple[object, ...], Pending]
NOTHING_AHEAD: Ahead = ((), _nothing())


class ServerSampler:
    """Samples on vLLM servers; see `trainer.rollout.Sampler`.

    Args:
        urls: of the servers, http://host:port each.
        world: the ranks of the run.
        end_ids: tokens that end a completion.
        stop_strings: texts that end a completion.
        in_flight, retry_seconds, report: see `WeightSender`.
        timeout_seconds: a server that gives no sign of life for so long is lost.
        start_command: starts such a server at a port, for error messages.
    """

    def __init__(
        self,
        urls: Sequence[str],
        world: World,
        *,
        end_ids: Sequence[int],
        stop_strings: Sequence[str],
        in_flight: InFlight,
        timeout_seconds: float,
        retry_seconds: float,
        start_command: Callable[[str], str],
        report: Callable[[str], None],
    ) -> None:
        self.world, self.end_ids, self.stop_strings = world, end_ids, stop_strings
        self.http = HttpLoop()
        self.servers = [
            ServerClient(
                self.http, url, timeout_seconds=timeout_seconds, start_command=start_command(url)
            )
            for url in urls
        ]
        self.sender = WeightSender(
            self.servers, world, in_flight=in_flight, retry_seconds=retry_seconds, report=report
        )
        self.ahead = NOTHING_AHEAD

    def close(self) -> None:
        """Leaves the servers, which go on running."""
        self.sender.close()
        self.http.close()

    def release_memory(self) -> None:
        """Does nothing: the servers have accelerators of their own."""

    def load_weights(self, weights: Weights, step: int) -> None:
        """Takes the weights that the policy has after a step."""
        if self.sender.in_flight == "wait":
            self.ahead[1].attempt.exception()
            # Until the requests of all ranks are answered.
            any_rank(self.world, False)
        self.sender.send(weights, step)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples `keys_PG.shape[1]` completions of each prompt; see `trainer.rollout.Sampler`.

        Raises:
            UsageError: no server is there for too long, or it cannot do what is asked.

        Collectives: one all-gather of small objects per attempt, and those of sending weights.
        """
        name, pending = self.ahead
        if name == _name(keys_PG, max_new_tokens, temperature, top_p):
            self.ahead = NOTHING_AHEAD
        else:
            pending = self._ask(prompts, keys_PG, max_new_tokens, temperature, top_p)
        return self._finish(pending, on_group)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
    ) -> None:
        """Asks for completions and returns at once; see `trainer.rollout.AheadSampler`. What was
        started before and not waited for is forgotten."""
        pending = self._ask(prompts, keys_PG, max_new_tokens, temperature, top_p)
        self.ahead = _name(keys_PG, max_new_tokens, temperature, top_p), pending

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> Pending:
        bodies = [
            {
                "token_ids": list(prompt),
                "sampling_params": sampling_fields(
                    int(key),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stop_strings=self.stop_strings,
                    end_ids=self.end_ids,
                ),
            }
            for prompt, keys_G in zip(prompts, keys_PG, strict=True)
            for key in keys_G
        ]
        pending = Pending(
            bodies=bodies, group_size=keys_PG.shape[1], completions=[None] * len(bodies)
        )
        self._launch(pending)
        return pending

    def _finish(
        self,
        pending: Pending,
        on_group: Callable[[int, list[Completion]], None] | None,
    ) -> list[list[Completion]]:
        """Waits for completions; asks again for those that a server did not give."""
        in_vain = 0
        while True:
            before = len(pending.missing())
            error = self._collect(pending, on_group)
            missing = len(pending.missing())
            states = gather_in_order(
                self.world, [(error or pending.problem, error is not None, missing, before)]
            )
            problems = [text for text, is_error, left, _ in states if is_error or left]
            if not problems:
                break
            in_vain += 1
            if any(left < wanted for _, _, left, wanted in states):
                in_vain = 0
            if any(is_error for _, is_error, _, _ in states) or in_vain >= MAX_ATTEMPTS:
                raise UsageError(problems[0])
            self.sender.report(f"asking again for completions ({problems[0]})")
            self.sender.restore()
            self._launch(pending)
        return [pending.group(place) for place in range(len(pending.bodies) // pending.group_size)]

    def _collect(
        self, pending: Pending, on_group: Callable[[int, list[Completion]], None] | None
    ) -> str | None:
        """Waits until no more completions come of this attempt; returns the caller's mistake that
        ended it, if one did."""
        while (row := pending.arrived.get()) is not None:
            place = row // pending.group_size
            pending.collected[place] += 1
            if on_group is not None and pending.collected[place] == pending.group_size:
                on_group(place, pending.group(place))
        try:
            pending.attempt.result()
        except UsageError as error:
            return str(error)
        return None

    def _launch(self, pending: Pending) -> None:
        """Asks for what is missing, the completions of a prompt on one server."""
        rows: dict[ServerClient, list[int]] = {server: [] for server in self.servers}
        for row in pending.missing():
            place = row // pending.group_size + self.world.rank
            rows[self.servers[place % len(self.servers)]].append(row)
        pending.attempt = self.http.submit(self._sample(pending, rows))

    async def _sample(self, pending: Pending, rows: dict[ServerClient, list[int]]) -> None:
        try:
            await _all(
                [self._sample_on(server, pending, of_server) for server, of_server in rows.items()]
            )
        finally:
            pending.arrived.put(None)

    async def _sample_on(self, server: ServerClient, pending: Pending, rows: list[int]) -> None:
        try:
            await server.while_well(_all([self._sample_one(server, pending, row) for row in rows]))
        except ServerLostError as error:
            pending.problem = str(error)

    async def _sample_one(self, server: ServerClient, pending: Pending, row: int) -> None:
        try:
            answer = await server.post("/inference/v1/generate", pending.bodies[row])
        except ServerLostError as error:
            pending.problem = str(error)
            return
        choice = answer["choices"][0]
        spans = choice["weight_versions"] or []
        steps = [self.sender.step_of(span["version"]) for span in spans]
        if choice["finish_reason"] not in ("stop", "length"):
            pending.problem = f"{server.url}: a request ended with {choice['finish_reason']}"
        elif not steps or None in steps:
            pending.problem = f"{server.url}: it has other weights"
        else:
            pending.completions[row] = _completion(choice, steps[0])
            pending.arrived.put(row)


def _name(
    keys_PG: np.ndarray, max_new_tokens: int, temperature: float, top_p: float
) -> tuple[object, ...]:
    """What tells one rollout from another; a key alone is that of one prompt and sample."""
    return keys_PG.shape, keys_PG.tobytes(), max_new_tokens, temperature, top_p


async def _all(actions: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Does all at once; the first error ends them."""
    tasks = [asyncio.ensure_future(action) for action in actions]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _completion(choice: dict[str, Any], weights_step: int | None) -> Completion:
    assert weights_step is not None
    logprobs = [each["logprob"] for each in choice["logprobs"]["content"]]
    return Completion(
        token_ids=np.array(choice["token_ids"], dtype=np.int64),
        logprobs=np.array(logprobs, dtype=np.float32),
        finish_reason=choice["finish_reason"],
        weights_step=weights_step,
    )

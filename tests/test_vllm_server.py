"""Whole runs that sample on a vLLM server, where vLLM is installed: the server is killed and
started anew in the middle, the trainer is killed in the middle, and nothing is lost."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import vllm_runs
from transformers import LlamaForCausalLM
from vllm_runs import (
    ENVIRONMENT,
    LOGPROB_TOLERANCE,
    ROOT,
    finish,
    rollouts,
    wait_for_step,
    write_inputs,
)

from trainer.fsdp import World
from trainer.rollout import Completion
from trainer.rollout.server_sampler import ServerSampler
from trainer.rollout.weight_sender import InFlight
from trainer.run_log import read_metrics
from trainer.seeds import derive_key
from trainer.testing import WORDS, wide_bigram_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)

STEPS = 5


class Server:
    """A vLLM server on a port of its own, which can be killed and started again."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "trainer.rollout.vllm_server", f"--model={self.model}"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, f"--port={self.port}", "--dtype=float32"],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return
            except (URLError, OSError):
                time.sleep(0.2)
        pytest.fail(self.log.read_text()[-3000:])

    def tokens_sampled(self) -> float:
        text = urllib.request.urlopen(self.url + "/metrics", timeout=20).read().decode()
        lines = [line for line in text.splitlines() if "vllm:generation_tokens_total{" in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def server(inputs: Path) -> Iterator[Server]:
    one = Server(inputs / "model", inputs / "server.log")
    one.start()
    yield one
    one.kill()


def start(inputs: Path, run_dir: Path, server: Server, **changed: Any) -> subprocess.Popen[str]:
    options = {"rollout": "vllm-server", "vllm_url": server.url, "steps": STEPS, **changed}
    return vllm_runs.start(inputs, run_dir, **options)


def samples(run_dir: Path) -> list[list[tuple[object, ...]]]:
    """What was trained on in each step, in order."""
    names = ("problem_id", "prompt", "completion", "finish_reason", "reward", "weights_step")
    steps = range(1, 1 + len(list((run_dir / "rollouts").glob("step-*.jsonl"))))
    return [[tuple(one[name] for name in names) for one in rollouts(run_dir, i)] for i in steps]


class Asking:
    """A sampler of the server in this process, and what it reports."""

    def __init__(self, server: Server, in_flight: InFlight = "wait", **options: float) -> None:
        self.reports: list[str] = []
        seconds = {"timeout_seconds": 20.0, "retry_seconds": 120.0} | options
        self.sampler = ServerSampler(
            [server.url],
            World(rank=0, size=1, device=torch.device("cpu")),
            end_ids=[WORDS.index("<eos>")],
            stop_strings=["</answer>"],
            in_flight=in_flight,
            start_command=lambda url: f"start {url}",
            report=self.reports.append,
            **seconds,
        )

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, *exception: object) -> None:
        self.sampler.close()

    def load(self, model: LlamaForCausalLM, step: int) -> None:
        self.sampler.load_weights(lambda: model.named_parameters(), step)

    def arguments(self) -> tuple[list[list[int]], np.ndarray]:
        keys = [[derive_key(0, "t", place, g) for g in range(8)] for place in range(PROMPTS)]
        return [PROMPT] * PROMPTS, np.array(keys, dtype=np.uint64)

    def ask(self, **options: Any) -> list[Completion]:
        """All completions, also reported group by group."""
        given = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, **options}
        groups: dict[int, list[Completion]] = {}
        found = self.sampler.generate(
            *self.arguments(), **given, on_group=lambda place, group: groups.update({place: group})
        )
        assert [groups[place] for place in range(PROMPTS)] == found
        return [one for group in found for one in group]


PROMPT = [WORDS.index(word) for word in "User: 1 + 2 Assistant:".split()]
SO = WORDS.index("so")
PROMPTS, NEW_TOKENS = 16, 240


def endless(*, only_so: bool) -> LlamaForCausalLM:
    """Never ends; says any other word with the same probability, or one word."""
    model = wide_bigram_model(noise=0.0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for word in ("<eos>", "</answer>"):
            model.lm_head.weight[WORDS.index(word)] = -10.0
        if only_so:
            model.lm_head.weight[SO] = 10.0
    return model


def test_logprobs_are_those_of_the_weights_that_were_sent(server: Server) -> None:
    server.wait()
    model = wide_bigram_model(noise=0.3)
    with Asking(server) as asking:
        asking.load(model, 3)
        completions = asking.ask(max_new_tokens=12, temperature=0.7)
        again = asking.ask(max_new_tokens=12, temperature=0.7)
    assert [one.token_ids.tolist() for one in completions] == [
        one.token_ids.tolist() for one in again
    ]
    for one in completions:
        tokens = torch.tensor(PROMPT + one.token_ids.tolist())
        with torch.no_grad():
            logits_TV = model.double()(tokens[None]).logits[0, len(PROMPT) - 1 : -1]
        expected = (logits_TV / 0.7).log_softmax(-1)[range(len(one.token_ids)), one.token_ids]
        found = torch.from_numpy(one.logprobs).double()
        torch.testing.assert_close(found, expected, atol=LOGPROB_TOLERANCE, rtol=0)
        assert one.weights_step == 3


@pytest.mark.parametrize("in_flight", ["wait", "keep", "abort"])
def test_new_weights_meet_requests_in_flight_as_chosen(server: Server, in_flight: InFlight) -> None:
    server.wait()
    with Asking(server, in_flight) as asking:
        asking.load(endless(only_so=False), 1)
        prompts, keys_PG = asking.arguments()
        asking.sampler.start(prompts, keys_PG, max_new_tokens=NEW_TOKENS, temperature=1.0)
        tokens = server.tokens_sampled()
        while server.tokens_sampled() < tokens + 500:
            time.sleep(0.01)
        asking.load(endless(only_so=True), 2)
        completions = asking.ask()
    # The second weights are certain of each word, the first of none.
    certain = [one.logprobs > -1 for one in completions]
    for one, is_certain in zip(completions, certain, strict=True):
        assert len(one.token_ids) == NEW_TOKENS
        assert (np.diff(is_certain.astype(int)) >= 0).all()
        assert (one.token_ids[is_certain] == SO).all()
        assert one.weights_step == (2 if is_certain[0] else 1)
    shares = {float(is_certain.mean()) for is_certain in certain}
    if in_flight == "wait":
        assert shares == {0}
    elif in_flight == "abort":
        assert 1 in shares and shares <= {0, 1}
    else:
        assert any(0 < share < 1 for share in shares)


def test_server_that_hangs_is_noticed_and_asked_again(server: Server) -> None:
    server.wait()
    with Asking(server, timeout_seconds=6.0) as asking:
        asking.load(endless(only_so=False), 1)
        expected = [one.token_ids.tolist() for one in asking.ask()]
        os.killpg(server.process.pid, signal.SIGSTOP)
        wake = threading.Timer(14.0, os.killpg, (server.process.pid, signal.SIGCONT))
        wake.start()
        started = time.monotonic()
        assert [one.token_ids.tolist() for one in asking.ask()] == expected
        assert time.monotonic() - started > 13
    assert any("asking again" in each for each in asking.reports)


@pytest.fixture(scope="module")
def whole_run(inputs: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    server.wait()
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(inputs, run_dir, server))
    return run_dir


def test_each_step_is_sampled_by_the_weights_that_the_last_update_left(
    inputs: Path, whole_run: Path
) -> None:
    records = read_metrics(whole_run)[1:]
    assert len(records) == STEPS
    for record in records:
        assert record["sampler/logprob_gap_mean"] < LOGPROB_TOLERANCE
        assert record["rollout/weights_age"] == 0
    for step, completions in enumerate(samples(whole_run), start=1):
        assert {one[-1] for one in completions} == {step - 1}
    first, last = (
        LlamaForCausalLM.from_pretrained(folder / "model").lm_head.weight
        for folder in (inputs, whole_run)
    )
    assert (last - first).abs().max() > 100 * LOGPROB_TOLERANCE


def test_killed_server_gets_weights_and_requests_again(
    inputs: Path, server: Server, whole_run: Path, tmp_path: Path
) -> None:
    process = start(inputs, tmp_path / "run", server)
    wait_for_step(tmp_path / "run", 2, process)
    server.kill()
    server.start()
    out = finish(process)
    assert "waiting for a vLLM server" in out
    assert samples(tmp_path / "run") == samples(whole_run)
    for record in read_metrics(tmp_path / "run")[1:]:
        assert record["sampler/logprob_gap_mean"] < LOGPROB_TOLERANCE


def test_steps_sampled_ahead_are_one_update_old_and_outlive_a_kill(
    inputs: Path, server: Server, whole_run: Path, tmp_path: Path
) -> None:
    options = {"ranks": 1, "async_steps": 1, "save_every": 2}
    finish(start(inputs, tmp_path / "whole", server, **options))
    ages = [record["rollout/weights_age"] for record in read_metrics(tmp_path / "whole")[1:]]
    assert ages == [0.0, *[1.0] * (STEPS - 1)]
    expected = samples(tmp_path / "whole")
    for step, completions in enumerate(expected, start=1):
        assert {one[-1] for one in completions} == {max(0, step - 2)}
    # The first step is that of a run without.
    assert expected[0] == samples(whole_run)[0] and expected[2] != samples(whole_run)[2]

    killed = start(inputs, tmp_path / "killed", server, **options)
    wait_for_step(tmp_path / "killed", 3, killed)
    killed.kill()
    killed.communicate()
    finish(start(inputs, tmp_path / "killed", server, **options))
    assert samples(tmp_path / "killed") == expected

"""Whole runs of supervised fine-tuning: killed anywhere they end with the same bits, on any number
of ranks with the same curve; what is refused is refused in one sentence."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import sft
from trainer.run_log import read_metrics
from trainer.sft_config import SftConfig
from trainer.sft_presets import PRESETS
from trainer.testing import write_bigram_model

TIMES = ("seconds/", "tokens_per_second")
STEPS = 10
Outcome = tuple[int, str, str]
Main = Callable[..., Outcome]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_bigram_model(folder / "model")
    rows = [
        {"question": f"{a} + {b}", "completion": f"<think> so </think> <answer> {a + b} </answer>"}
        for a in range(10)
        for b in range(10 - a)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(inputs: Path, run_dir: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "model": inputs / "model",
        "dataset": inputs / "rows.jsonl",
        "run_dir": run_dir,
        "template": "tiny",
        "backend": "reference",
        "cpu_threads": 1,
        "batch_size": 10,
        "epochs": 2,
        "learning_rate": 1e-2,
        "warmup_updates": 2,
        "eval_share": 0.1,
        "eval_every": 3,
        "save_every": 2,
        **changed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def run_here(
    arguments: list[str], output: Path, kill: tuple[str, str, int] | None, env: dict[str, str]
) -> None:
    """A rank; `kill` is module, function and call at whose end the process kills itself."""
    os.environ.update(env)
    if kill is not None:
        module, name, last_call = kill
        function, calls = getattr(sys.modules[module], name), 0

        def dying(*positional: Any, **keywords: Any) -> Any:
            nonlocal calls
            result = function(*positional, **keywords)
            calls += 1
            if calls == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(sys.modules[module], name, dying)
    with output.open("w") as text, redirect_stdout(text), redirect_stderr(text):
        code = sft.main(arguments)
    sys.exit(code)


def start(
    arguments: list[str], folder: Path, kill: tuple[str, str, int] | None = None, ranks: int = 1
) -> list[BaseProcess]:
    """Starts the ranks; the last one is to die."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.sft", "torch.utils.tensorboard"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        env = {"RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
        dies = kill if rank == ranks - 1 else None
        output = folder / f"output-{rank}"
        process = context.Process(target=run_here, args=(arguments, output, dies, env))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], folder: Path, code: int = 0) -> None:
    for rank, process in enumerate(processes):
        process.join(timeout=120)
        assert process.exitcode == code, (folder / f"output-{rank}").read_text()


def die(processes: list[BaseProcess], folder: Path) -> None:
    finish(processes[-1:], folder, -signal.SIGKILL)
    for process in processes[:-1]:
        process.kill()
        process.join()


def results(run_dir: Path) -> list[dict[str, float | None]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMES)}
        for record in read_metrics(run_dir)
    ]


def assert_same_bits(run_dir: Path, other: Path) -> None:
    assert results(run_dir) == results(other)
    for folder in ("model", f"checkpoints/step-{STEPS:05d}"):
        files = [path for path in (other / folder).rglob("*") if path.suffix == ".safetensors"]
        assert files
        for path in files:
            ours = run_dir / path.relative_to(other)
            assert ours.read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope="module")
def whole_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(flags(inputs, folder / "run"), folder), folder)
    return folder / "run"


@pytest.fixture
def main_here(capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def call(arguments: list[str]) -> Outcome:
        capsys.readouterr()
        code = sft.main(arguments)
        return code, *capsys.readouterr()

    yield call
    torch.use_deterministic_algorithms(False)


def test_run_learns_and_leaves_a_model_and_its_records(whole_run: Path) -> None:
    records = read_metrics(whole_run)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    held_out = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert [record["step"] for record in records if "eval/loss" in record] == [0, 3, 6, 9, 10]
    assert held_out[-1] < held_out[0] and records[-1]["loss"] < records[1]["loss"]
    expected = {"loss", "grad_norm", "learning_rate", "tokens", "epoch", "tokens_per_second"}
    assert all(expected <= record.keys() for record in records[1:])
    # 49 or 50 of 55 rows, in batches of ten, twice.
    assert records[5]["epoch"] == 1.0 and records[10]["epoch"] == 2.0
    assert "held-out loss" in (whole_run.parent / "output-0").read_text()
    assert "eval/loss" not in records[1] and (whole_run / "curves.png").is_file()
    model = AutoModelForCausalLM.from_pretrained(whole_run / "model")
    stored = load_file(whole_run / f"checkpoints/step-{STEPS:05d}/model/model.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert AutoTokenizer.from_pretrained(whole_run / "model").eos_token == "<eos>"
    peak = json.loads((whole_run / "memory_plan.json").read_text())["peak_bytes"]
    assert peak["planned"] > sum(tensor.nbytes for tensor in stored.values()) < peak["measured"][0]


# Where a process dies: in mid-update, while a checkpoint is written, at the end of it all.
KILLS = (
    ("trainer.token_store", "_files", 2),
    ("trainer.sft_update", "update_weights", 1),
    ("trainer.checkpoint_writing", "save_file", 1),
    ("trainer.checkpoint_writing", "_write", 2),
    ("trainer.sft", "evaluate_and_log", 3),
    ("trainer.sft_update", "update_weights", 4),
    ("shutil", "copytree", 1),
    ("trainer.training_run", "finish_run_folder", 1),
)


def test_run_killed_again_and_again_ends_with_the_same_bits(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    arguments = flags(inputs, tmp_path / "run")
    for kill in KILLS:
        die(start(arguments, tmp_path, kill), tmp_path)
    finish(start(arguments, tmp_path), tmp_path)
    assert_same_bits(tmp_path / "run", whole_run)


def test_two_ranks_have_the_curve_of_one_and_survive_a_kill(
    inputs: Path, whole_run: Path, tmp_path: Path
) -> None:
    def two(run: str, **changed: object) -> list[str]:
        return flags(inputs, tmp_path / run, micro_batch_tokens=40, **changed)

    finish(start(two("whole"), tmp_path, ranks=2), tmp_path)
    for ours, theirs in zip(results(tmp_path / "whole"), results(whole_run), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    kill = ("trainer.sft_update", "update_weights", 5)
    die(start(two("run"), tmp_path, kill, ranks=2), tmp_path)
    finish(start(two("run"), tmp_path, ranks=2), tmp_path)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_interrupted_run_is_saved_and_goes_on(
    inputs: Path, whole_run: Path, tmp_path: Path, main_here: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(inputs, tmp_path / "run", save_every=100)
    with monkeypatch.context() as patch:
        original = sft.evaluate_and_log

        def interrupted(run: sft.SftRun, update: Any, step: int, metrics: Any) -> None:
            original(run, update, step, metrics)
            if step == 3:
                assert threading.current_thread() is threading.main_thread()
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(sft, "evaluate_and_log", interrupted)
        code, out, _ = main_here(arguments)
    assert code == 130 and "interrupted, saved after step 3; continue with" in out
    code, out, err = main_here(arguments)
    assert code == 0, err
    assert "going on after step 3" in out
    assert_same_bits(tmp_path / "run", whole_run)
    code, out, _ = main_here(arguments)
    assert code == 0 and f"The run is complete, {STEPS} steps." in out


def test_changed_rows_or_options_are_not_gone_on_with(
    inputs: Path, tmp_path: Path, main_here: Main
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (inputs / "rows.jsonl").read_text().splitlines(keepends=True)[:6]
    rows.write_text("".join(lines))
    arguments = flags(inputs, tmp_path / "run", dataset=rows, batch_size=6, epochs=1)
    assert main_here(arguments)[0] == 0
    code, _, err = main_here([*arguments, "--seed=1"])
    assert code == 2 and "holds another run, which differs in seed (0 there, 1 here)" in err
    code, _, err = main_here([*arguments, "--resume=never"])
    assert code == 2 and "--resume never" in err
    # More epochs go on, but not with other rows.
    rows.write_text("".join(reversed(lines)))
    code, _, err = main_here([*arguments, "--epochs=2"])
    assert code == 2 and "was saved with other options or other data than these" in err
    rows.write_text("".join(lines))
    assert main_here([*arguments, "--epochs=2"])[0] == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 1, 2]


def test_mistakes_get_one_sentence_before_anything_is_computed(
    inputs: Path, tmp_path: Path, main_here: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sft, "open_model", never)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1", "completion": "2"}\n{"prompt": "1"}\n')
    for changed, sentence in (
        ({"dataset": bad}, f"{bad}, line 2: expected the columns"),
        ({"dataset": tmp_path / "none.jsonl"}, "none.jsonl: no such file"),
        ({"dataset": None}, "--dataset: the preset sft needs it to be given"),
        ({"model": None}, "--model: the preset sft needs it to be given"),
        ({"model": tmp_path / "none"}, "--model: expected an existing folder"),
        ({"template": "non"}, "--template: expected one of"),
        ({"backend": "none"}, "--backend: expected auto or one of"),
        ({"max_tokens": 5}, "--max-tokens: expected at least"),
        ({"learning_rate": "x"}, "--learning-rate: expected a number, got 'x'"),
        ({"eval_share": 1}, "--eval-share: expected a number < 1, got 1"),
        ({"min_learning_rate": 1}, "--min-learning-rate: expected at most --learning-rate"),
        ({"batch_sizes": 1}, "--batch-sizes: no such flag; did you mean --batch-size"),
    ):
        code, _, err = main_here(flags(inputs, tmp_path / "run", **changed))
        assert code == 2, err
        assert err.startswith("error: ") and sentence in err and err.count("\n") == 1, err


def test_plan_that_does_not_fit_is_refused_before_weights_are_loaded(
    inputs: Path, tmp_path: Path, main_here: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **keywords: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sft, "make_policy", never)
    monkeypatch.setattr("trainer.memory_check.host_bytes_free", lambda: 1000)
    code, _, err = main_here(flags(inputs, tmp_path / "run"))
    assert code == 2 and err.startswith("error: memory: expected at most the 0.0 MiB that are free")


def test_help_lists_presets_and_options(main_here: Main) -> None:
    with pytest.raises(SystemExit) as stop:
        main_here(["--help"])
    assert stop.value.code == 0


def test_distilled_models_have_the_rates_of_the_paper_and_end_at_a_tenth() -> None:
    # algorithms.md, section 2: base model and initial learning rate.
    rates = {
        "Qwen2.5-Math-1.5B": 1e-4,
        "Qwen2.5-Math-7B": 8e-5,
        "Qwen2.5-14B": 7e-5,
        "Qwen2.5-32B": 6e-5,
        "Llama-3.1-8B": 5e-5,
        "Llama-3.3-70B-Instruct": 2e-5,
    }
    found = {}
    for name, (_, config) in PRESETS.items():
        assert name == config.preset
        assert SftConfig.from_json(config.to_json()) == config
        if name.startswith("r1-"):
            options = config.optimizer
            assert (options.batch_size, options.schedule) == (64, "cosine")
            assert options.epochs == 2 and config.data.max_tokens == 32768
            assert options.least_learning_rate == pytest.approx(options.learning_rate / 10)
        if name.startswith("r1-distill-"):
            found[config.model.split("/")[1]] = config.optimizer.learning_rate
    assert found == rates
    assert PRESETS["r1-sft"][1].optimizer.learning_rate == 5e-6

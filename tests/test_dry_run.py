"""Dry runs: no weights and no network, the plan of every preset on the node it is meant for, and
bad input in one sentence."""

import json
import re
import socket
from pathlib import Path
from typing import NoReturn

import pytest
from transformers import LlamaConfig, PreTrainedModel

from trainer import dry_run, sft, train
from trainer.known_models import RECIPES, SHAPES
from trainer.memory_plan import plan_memory, plan_tuning
from trainer.pipeline_presets import PIPELINES
from trainer.presets import PRESETS
from trainer.sft_presets import PRESETS as SFT_PRESETS
from trainer.testing import bigram_tokenizer

MODEL = ["--model", "Qwen/Qwen2.5-14B"]
# Parameters of the published models, in billions, by their cards.
BILLIONS = {
    "smollm2": 0.1345,
    "Qwen/Qwen2.5-Math-1.5B": 1.54,
    "Qwen/Qwen2.5-Math-7B": 7.62,
    "Qwen/Qwen2.5-14B": 14.77,
    "Qwen/Qwen2.5-32B": 32.76,
    "lkevinzc/Llama-3.2-3B-NuminaQA": 3.21,
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.3-70B-Instruct": 70.55,
}


@pytest.fixture(autouse=True)
def without_weights_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a dry run loads no weights and asks nobody")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Other processes of this machine may have taken most of its memory.
    monkeypatch.setattr(dry_run, "host_bytes_free", lambda: 16 << 30)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    row = {"answer": "3", "completion": "<think> so </think> <answer> 3 </answer>"}
    lines = [json.dumps({"question": f"{i} + 1", **row}) for i in range(300)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("preset", [*PRESETS, *SFT_PRESETS])
def test_plan_of_every_preset_fits_its_node(
    preset: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, presets = (train, PRESETS) if preset in PRESETS else (sft, SFT_PRESETS)
    given = [] if presets[preset][1].model else [*MODEL]
    given += [] if "tiny" in preset and program is train else ["--dataset", str(data)]
    # Its float32 is for small models and short rows.
    given += ["--model=smollm2", "--micro-batch-tokens=2048"] if preset == "sft" else []
    given += ["--max-tokens=2048"] if preset == "sft" else []
    assert program.main([preset, *given, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[: out.index("\n}\n") + 2])["preset"] == preset
    assert ("expected  " in out) == (preset in RECIPES)
    # 300 less those held out, or all 300.
    assert "\ndata      made up" in out or "problems to train on" in out or "300 rows" in out
    assert "\nmemory" in out and "\n  peak" in out
    if preset in RECIPES:
        recipe = RECIPES[preset]
        assert f"\nranks     {recipe.ranks} with {recipe.gpu_gib}.00 GiB each" in out


@pytest.mark.parametrize("preset", PIPELINES)
def test_pipeline_shows_its_stages_and_plans_those_that_train(
    preset: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [preset, "--dry-run", "--run-dir", str(tmp_path / "run")]
    if not PIPELINES[preset][1].model:
        arguments += [*MODEL, "--small-model", "Qwen/Qwen2.5-Math-1.5B", "--dataset", str(data)]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    names = [line.removeprefix("stage ") for line in out.splitlines() if line.startswith("stage ")]
    assert {"r1-zero", "cold-start-sft", "distill"} < set(names) and names[-1] == "results"
    commands = [line for line in out.splitlines() if line.startswith("  trainer/")]
    trained = [
        line for line in commands if line.split()[0] in ("trainer/train.py", "trainer/sft.py")
    ]
    assert out.count(" a rank; ranks: ") == len(trained) >= 6
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_have_the_parameters_of_the_published_models(name: str) -> None:
    config = SFT_PRESETS["r1-sft"][1]
    plan = plan_tuning(SHAPES[name], config, ranks=1, device="cuda")
    (weights,) = [part.bytes for part in plan.parts if part.name == "weights"]
    assert weights / 4e9 == pytest.approx(BILLIONS[name], rel=5e-3)


def test_plan_of_tuning_has_what_an_update_alone_has() -> None:
    """The policy update's plan of the same tokens, less the sampler and the reference."""
    shape = SHAPES["smollm2"]
    tuning = plan_tuning(shape, SFT_PRESETS["r1-sft"][1], ranks=4, device="cuda", longest=2000)
    recipe = PRESETS["r1-zero"][1]
    training = plan_memory(shape, recipe, ranks=4, device="cuda", device_bytes=1 << 30)
    sizes = {part.name: part.bytes for part in training.parts}
    shared = ("weights", "optimizer", "gradients", "gathered weights", "whole gradients")
    of_tuning = {part.name: part.bytes for part in tuning.parts if part.bytes}
    assert {name: of_tuning[name] for name in shared} == {name: sizes[name] for name in shared}
    assert not {"reference", "key-value cache", "vLLM's share"} & of_tuning.keys()
    assert tuning.peak(on_host=False)[0] in ("forward", "backward")
    # Of 64 sequences a rank has 16, 32,000 tokens; one that is longer is a micro-batch by itself.
    longer = plan_tuning(shape, SFT_PRESETS["r1-sft"][1], ranks=4, device="cuda", longest=65536)
    kept = {part.name: part.bytes for part in longer.parts}["activations"]
    assert kept == pytest.approx(of_tuning["activations"] * 65536 / 32000, rel=1e-3)


def test_model_of_a_folder_is_planned_by_its_config_alone(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    config.save_pretrained(tmp_path / "model")
    bigram_tokenizer().save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--dataset", str(data)]
    assert train.main(["--dry-run=2xcpu", *given, "--template", "none"]) == 0
    assert "memory of each of 2 ranks" in capsys.readouterr().out
    assert sft.main(["sft", *given, "--template", "none", "--dry-run", "2xcpu"]) == 0
    assert "300 rows with 300 completions" in capsys.readouterr().out


def test_reward_model_is_planned_by_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(
        vocab_size=1 << 20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        architectures=["LlamaForSequenceClassification"],
    )
    config.save_pretrained(tmp_path)
    bigram_tokenizer().save_pretrained(tmp_path)
    assert train.main(["--dry-run", "--helpful-model", str(tmp_path)]) == 0
    # 16 float32 numbers of each of 2**20 tokens, and a layer.
    assert re.search(r"helpful reward model +64\.0 MiB", capsys.readouterr().out)


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "rows.jsonl").write_text(text)
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        (train, ["dr-grpo-7b", "--dry-run", "8x20"], "memory: expected at most the 20.00 GiB"),
        (train, ["dr-grpo-7b", "--dry-run", "8y80"], "expected ranks and GiB as 8x80"),
        (train, ["dr-grpo-7b", "--dry-run=0x80"], "expected ranks and GiB as 8x80"),
        (train, ["--dry-run", "dr-grpo"], "preset: expected one of"),
        (train, ["r1-zero", "--dry-run"], "--model: expected it to be given"),
        (train, ["r1-zero", "--dry-run", "--model", "/no/model"], "expected an existing folder"),
        (
            train,
            ["--dry-run", "--helpful-model", "/no/model"],
            "--helpful-model: reward model: the",
        ),
        (train, ["--dry-run", "--dataset", "no.jsonl"], "no.jsonl: no such file"),
        (train, ["--dry-run", "--template", "r2"], "--template"),
        (train, ["--dry-run", "--step", "3"], "did you mean --steps"),
        (train, ["r1", "--dry-run"], "--model: the preset r1 needs it"),
        (train, ["r1-tiny", "--dry-run", "--only", "dev9"], "--only: expected one of"),
        (train, ["r1-tiny", "--dry-run", "--dataset", "no.jsonl"], "no.jsonl: no such file"),
        (sft, ["sft-tiny", "--dry-run", "--dataset", "no.jsonl"], "no.jsonl: no such file"),
        (sft, ["r1-sft", "--dry-run"], "--model: expected it to be given"),
        (sft, ["r1-distill-qwen-32b", "--dry-run", "8x80"], "memory: expected at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_of_a_dry_run_gives_one_sentence(
    program: object, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(arguments) == 2  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"prompt": "a"}', "line 1: expected the columns"),
        ("", "expected at least one row, got none"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "expected a turn of the assistant"),
    ],
)
def test_rows_of_another_kind_give_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path, text)
    assert sft.main(["r1-distill-qwen-7b", "--dataset", rows, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err


def test_real_run_has_no_dry_run_arguments() -> None:
    assert dry_run.split_arguments(["r1", "--steps", "3"]) == (["r1", "--steps", "3"], None)
    assert dry_run.split_arguments(["--dry_run", "r1"]) == (["r1"], "")


def test_ranks_that_replicas_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for ranks in ("1xcpu", "3x80"):
        assert train.main(["r1-zero-tiny", "--replicate", "2", "--dry-run", ranks]) == 2
        assert "--replicate: expected a divisor" in capsys.readouterr().err

"""Configuration and command line: what is accepted, what is refused, and in which words."""

import dataclasses
import re

import pytest

from trainer.command_line import parse_command_line
from trainer.config import TrainConfig, UsageError
from trainer.presets import PRESETS

NEEDED = {"r1-zero": ["--model", "m"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset: str) -> None:
    given = ["--dataset", "d", "--run-dir", "somewhere"]
    config = parse_command_line([preset, *NEEDED.get(preset, []), *given])
    assert TrainConfig.from_json(config.to_json()) == config


def test_default_preset_is_the_embedded_one() -> None:
    assert parse_command_line([]) == PRESETS["r1-zero-tiny"][1]
    assert parse_command_line(["--steps", "3"]).optimizer.steps == 3


def test_flags_override_the_preset_and_nothing_else() -> None:
    flags = ["--seed", "7", "--loss", "dapo", "--clip-high=0.3", "--eval_every", "5"]
    config = parse_command_line(["r1-zero-smollm2", *flags])
    base = PRESETS["r1-zero-smollm2"][1].flat()
    changed = {name: value for name, value in config.flat().items() if base[name] != value}
    assert changed == {"seed": 7, "loss": "dapo", "clip_high": 0.3, "eval_every": 5}
    assert (config.loss_spec.clip_low, config.loss_spec.clip_high) == (0.2, 0.3)


def test_presets_hold_the_papers_numbers() -> None:
    paper = PRESETS["r1-zero"][1]
    assert (paper.optimizer.learning_rate, paper.loss_spec.kl_weight) == (3e-6, 0.001)
    outputs = paper.rollout.num_prompts * paper.rollout.group_size
    assert (outputs, outputs // paper.optimizer.minibatches) == (8192, 512)
    updates_per_reset = paper.optimizer.reference_reset_every * paper.optimizer.minibatches
    assert (updates_per_reset, paper.optimizer.steps * 16) == (400, 10_400)
    dr_grpo = PRESETS["dr-grpo-7b"][1]
    assert dr_grpo.loss_spec.max_tokens == dr_grpo.rollout.max_new_tokens == 3000
    assert (dr_grpo.loss_spec.advantage_scale, dr_grpo.optimizer.minibatches) == ("none", 8)
    templates = {size: PRESETS[f"dr-grpo-{size}"][1].template for size in ("1.5b", "3b", "7b")}
    assert templates == {"1.5b": "qwen-math", "3b": "r1-drgrpo", "7b": "qwen-math"}
    qwen = PRESETS["r1-zero-qwen-32b"][1]
    assert (qwen.optimizer.learning_rate, qwen.optimizer.steps * 16) == (2e-6, 10_000)


def test_help_lists_every_field_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        parse_command_line(["--help"])
    assert not exit_request.value.code
    printed = capsys.readouterr().out
    flags = re.findall(r"^\W*(--[a-z][a-z0-9-]+)", printed, flags=re.MULTILINE)
    assert {flag[2:].replace("-", "_") for flag in flags} == set(
        TrainConfig.flat(PRESETS["r1-zero-tiny"][1])
    ) - {"preset"}
    for preset in PRESETS:
        assert preset in printed


def test_config_is_frozen_and_at_most_two_levels_deep() -> None:
    config = PRESETS["r1-zero-tiny"][1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    for section in (getattr(config, each.name) for each in dataclasses.fields(config)):
        if dataclasses.is_dataclass(section):
            inner = [getattr(section, each.name) for each in dataclasses.fields(section)]
            assert not any(map(dataclasses.is_dataclass, inner))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["r1-huge"], "preset: expected one of r1-zero-tiny, .*, got 'r1-huge'"),
        (["--step", "3"], "--step: no such flag; did you mean --steps"),
        (["--steps", "many"], "--steps: expected a whole number, got 'many'"),
        (["--steps", "0"], "--steps: expected a number >= 1, got 0"),
        (["--learning-rate", "fast"], "--learning-rate: expected a number, got 'fast'"),
        (["--temperature", "0"], "--temperature: expected a number > 0, got 0"),
        (["--loss", "ppo"], "expected one of grpo, .*, got 'ppo'"),
        (["--loss", "grpo", "--kl-weight", "0.1"], "kl: expected an estimator"),
        (["--kl", "k4"], "'k4'.*--kl"),
        (["--rollout", "magic"], "invalid choice 'magic'"),
        (["--dtype", "float64"], "'float64'.*--dtype.*float32.*bfloat16"),
        (["--minibatches", "1000"], "--minibatches: expected at most .* = 256, got 1000"),
        (["--reference-reset-every", "5"], "--kl-weight above 0"),
        (["--steps"], "--steps"),
        (["--steps", "3", "stray"], "stray"),
        (["r1-zero"], "--model: the preset r1-zero needs it"),
        (["dr-grpo-7b"], "--dataset: the preset dr-grpo-7b needs it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_on_the_command_line_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_command_line(arguments)
    message = str(raised.value)
    assert re.search(sentence, message), message
    assert "\n" not in message and "tyro" not in message and "│" not in message

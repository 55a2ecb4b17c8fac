"""The command line of the trainer: flags to `TrainConfig`, mistakes to one sentence."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields

import tyro

from trainer.config import TrainConfig, UsageError
from trainer.presets import PRESETS

DEFAULT_PRESET = "r1-zero-tiny"
# Python's own messages for a value that is not a number, in the words of all other messages.
WORDINGS = (
    (r"invalid literal for int\(\) with base 10: ", "expected a whole number, got "),
    (r"could not convert string to float: ", "expected a number, got "),
)


def parse_command_line(arguments: Sequence[str]) -> TrainConfig:
    """The config of `[preset] [--flag value ...]`; without a preset, the embedded default.

    Raises:
        UsageError: an unknown preset or flag, a value that cannot be used, or one that must be
            given and is not.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    preset, flags = DEFAULT_PRESET, list(arguments)
    if flags and not flags[0].startswith("-"):
        preset = flags.pop(0)
    if preset not in PRESETS:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    check_flag_names(flags, _flag_names())
    if not {"-h", "--help"}.isdisjoint(flags):
        _print_presets()
    with one_sentence_errors():
        config = tyro.extras.overridable_config_cli(
            PRESETS,
            prog="torchrun trainer/train.py",
            args=[preset, *flags],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
    for name, value in (("--model", config.model), ("--dataset", config.data.dataset)):
        if not value:
            raise UsageError(f"{name}: the preset {preset} needs it to be given")
    return config


def _flag_names() -> list[str]:
    config = PRESETS[DEFAULT_PRESET][1]
    sections = {option.name for option in fields(config)} - set(config.flat())
    names = sorted((set(config.flat()) | {"loss", "rollout"}) - {"preset"} - sections | {"help"})
    return [f"--{name.replace('_', '-')}" for name in names]


def check_flag_names(flags: Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for a flag that is not known, with the one that was perhaps meant."""
    for argument in flags:
        name = argument.split("=", 1)[0].replace("_", "-")
        if not name.startswith("--") or name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}" if close else "--help lists the flags"
        raise UsageError(f"{name}: no such flag; {hint}")


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """What tyro prints about a mistake, before it exits, becomes a UsageError of one sentence."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as exit_request:
        if not exit_request.code:
            raise
        raise UsageError(_first_sentence(printed.getvalue())) from None


def _print_presets() -> None:
    print(f"Presets, the first argument (without one: {DEFAULT_PRESET}):")
    for name, (description, _) in PRESETS.items():
        print(f"  {name:16} {description}")
    print()


def _first_sentence(box: str) -> str:
    """The message inside the box that tyro draws around it."""
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()[1:]]
    message = []
    for line in lines:
        # In plain text a rule stands before the message too, below the title.
        if line.strip("─- "):
            message.append(line)
        elif message:
            break
    sentence = re.sub(r"^Error parsing (?!-)[^:]+: |^Error parsing ", "", " ".join(message))
    for pattern, wording in WORDINGS:
        sentence = re.sub(pattern, wording, sentence)
    return sentence

"""The command lines of training runs: flags to a config, mistakes to one sentence."""

import contextlib
import difflib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import tyro

from trainer.config import TrainConfig, UsageError
from trainer.pipeline_presets import PIPELINES
from trainer.presets import DEFAULT_PRESET, PRESETS
from trainer.sft_config import SftConfig

ConfigWithData = TypeVar("ConfigWithData", TrainConfig, SftConfig)
# Python's own messages for a value that is not a number, in the words of all other messages.
WORDINGS = (
    (r"invalid literal for int\(\) with base 10: ", "expected a whole number, got "),
    (r"could not convert string to float: ", "expected a number, got "),
)


def parse_command_line(arguments: Sequence[str]) -> TrainConfig:
    """The config of `[preset] [--flag value ...]`; without a preset, the embedded default.

    Raises:
        UsageError, SystemExit: see `parse_config`.
    """
    return parse_config(arguments, PRESETS, DEFAULT_PRESET, "torchrun trainer/train.py", PIPELINES)


def parse_config(
    arguments: Sequence[str],
    presets: Mapping[str, tuple[str, ConfigWithData]],
    default_preset: str,
    program: str,
    other_presets: Mapping[str, tuple[str, object]] = MappingProxyType({}),
    *,
    is_dry_run: bool = False,
) -> ConfigWithData:
    """The config of `[preset] [--flag value ...]`.

    Args:
        arguments: of the command line.
        presets: description and config, by name.
        default_preset: without one among the arguments.
        program: what `--help` calls it.
        other_presets: those that the program takes too, but not here; by name.
        is_dry_run: model and data need not be given.

    Raises:
        UsageError: an unknown preset or flag, a value that cannot be used, or one that must be
            given and is not.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    flags: list[str] = list(arguments)
    preset = flags.pop(0) if flags and not flags[0].startswith("-") else default_preset
    if preset not in presets:
        known = ", ".join((*presets, *other_presets))
        raise UsageError(f"preset: expected one of {known}, got {preset!r}")
    names = sorted(presets[preset][1].flat().keys() - {"preset"} | {"help"})
    check_flag_names(flags, [f"--{name.replace('_', '-')}" for name in names])
    if not {"-h", "--help"}.isdisjoint(flags):
        _print_presets({**presets, **other_presets}, default_preset)
    with one_sentence_errors():
        config = tyro.extras.overridable_config_cli(
            dict(presets),
            prog=program,
            args=[preset, *flags],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
    for name, value in (("--model", config.model), ("--dataset", config.data.dataset)):
        if not value and not is_dry_run:
            raise UsageError(f"{name}: the preset {preset} needs it to be given")
    return config


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


def _print_presets(presets: Mapping[str, tuple[str, object]], default_preset: str) -> None:
    print(f"Presets, the first argument (without one: {default_preset}):")
    width = max(16, *map(len, presets))
    for name, (description, _) in presets.items():
        print(f"  {name:{width}} {description}")
    print("\nWith --dry-run [RANKSxGIB]: config, data check and memory plan, without weights.\n")


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

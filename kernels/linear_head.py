"""An LM head at work on chunks of tokens: its three matrix products and the rows between them.

Logits [n, W] are float32 (float64 for float64 hidden states) from the product to the loss, and so
is the sum over chunks that becomes the weight gradient. On a CPU all products are float32: a weight
of lower precision is converted a block of rows at a time, since a whole copy would take as much
memory as its gradient. On a GPU products take the operands as they are and sum in float32; the
gradient of the logits is rounded once, to the dtype of the operands, before the last two.

A CPU leaves rows without a gradient out of those two. A GPU multiplies them too: to know how many
there are the host would have to wait for it, and `torch.nn.functional.grouped_mm`, which takes the
number from the device, returns bfloat16 only, so that chunks could not be summed in float32.

Shapes: n tokens of a chunk, k of them with a gradient, D model width, W this rank's rows of the
LM-head weight. Legend of the others: `reference.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from kernels.backends import load_backend
from kernels.passes import finish_stats
from kernels.sharding import VocabShard, merge_row_stats

# Bytes of one chunk of logits. On a GPU at least 4096 tokens are wanted up to a vocabulary of 2^18,
# so that reading and writing the float32 weight gradient hides behind the products (calculated, not
# measured).
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}
# Of a vocabulary shard on a GPU: what ranks cannot disagree about, without asking one another.
SHARDED_CHUNK_TOKENS = 4096
# Bytes of the weight that are converted at a time: enough rows for a fast product, few enough to
# stay in the cache until it reads them.
BLOCK_BYTES = 8 << 20
# Backends whose gradient may have another dtype than the logits.
WRITES_ANY_DTYPE = ("reference", "triton")
# MKL multiplies the rows left over by its tiles with another kernel, which rounds otherwise. With
# none left over, a row's bits do not depend on the rows beside it.
ROW_TILE = 16


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast would round the logits, and mix dtypes in backward."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """How the products are taken and what follows the logits."""

    inv_temperature: Tensor | float
    softcap: float
    vocab: VocabShard | None
    backend: str
    compute_dtype: torch.dtype
    """Of the logits and of all sums."""
    operand_dtype: torch.dtype
    """Of what the products multiply."""
    compact: bool
    """Whether tokens without a gradient leave the products; the host has to wait to know them."""

    def of_tokens(self, rows: slice | Tensor) -> "HeadSettings":
        """The settings of some of the tokens."""
        if not isinstance(self.inv_temperature, Tensor):
            return self
        return replace(self, inv_temperature=self.inv_temperature[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens that go through the head together."""

    tokens: slice
    hidden_nD: Tensor
    """In the operand dtype."""
    token_ids_n: Tensor
    settings: HeadSettings


def default_chunk_tokens(num_tokens: int, weight_WD: Tensor, settings: HeadSettings) -> int:
    """Tokens a chunk, so that its logits fit the byte budget of the device and chunks are even.

    Collectives: with a vocabulary shard on a CPU, all_reduce(max) of one integer. Shards may be
    uneven, and their ranks have to cut the tokens alike.
    """
    width = len(weight_WD)
    if settings.vocab is not None and not settings.compact:
        return even_share(num_tokens, SHARDED_CHUNK_TOKENS)
    if settings.vocab is not None:
        widest = torch.tensor(settings.vocab.width, device=weight_WD.device)
        dist.all_reduce(widest, dist.ReduceOp.MAX, group=settings.vocab.group)
        width = int(widest)
    budget = CHUNK_BYTES.get(weight_WD.device.type, CHUNK_BYTES["cuda"])
    most = max(1, budget // (settings.compute_dtype.itemsize * width))
    return even_share(num_tokens, most)


def wide_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, float32 from operands of lower precision (GPU only)."""
    torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_wide_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """total += left @ right, as `wide_product`."""
    torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def unscaled_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient that the gradient of the loss is yet to multiply: float16 would round
    small values away before a loss scaler makes them larger."""
    return torch.float32 if dtype == torch.float16 else dtype


def whole_tiles(num_rows: int) -> int:
    """The next multiple of ROW_TILE."""
    return -(-num_rows // ROW_TILE) * ROW_TILE


def even_share(total: int, most: int) -> int:
    """The size of the fewest parts of `total` that are no larger than `most`."""
    parts = max(1, -(-total // most))
    return max(1, -(-total // parts))


def weight_blocks(weight_WD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in `dtype`; a block is valid until the next one."""
    num_rows, depth = weight_WD.shape
    if weight_WD.dtype == dtype:
        yield slice(0, num_rows), weight_WD
        return
    size = min(num_rows, max(1, BLOCK_BYTES // (dtype.itemsize * depth)))
    buffer_bD = weight_WD.new_empty(size, depth, dtype=dtype)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        yield rows, buffer_bD[: rows.stop - start].copy_(weight_WD[rows])


class Head:
    """An LM head that takes chunks of at most `max_tokens` tokens.

    It writes into memory of its own, so it works where autograd is off.
    """

    def __init__(
        self, weight_WD: Tensor, bias_W: Tensor | None, settings: HeadSettings, max_tokens: int
    ) -> None:
        width = len(weight_WD) if settings.vocab is None else settings.vocab.width
        self.settings = settings
        self.weight_WD = weight_WD[:width]
        self.bias_W = None if bias_W is None else bias_W[:width]
        self.low_precision = settings.operand_dtype != settings.compute_dtype
        if self.low_precision:
            self.weight_WD = self.weight_WD.to(settings.operand_dtype)
        self.buffer_NW = weight_WD.new_empty(
            whole_tiles(max_tokens), width, dtype=settings.compute_dtype
        )

    def chunk(self, hidden_ND: Tensor, token_ids_N: Tensor, tokens: slice) -> Chunk:
        """Some of the tokens, ready for the products."""
        return Chunk(
            tokens=tokens,
            hidden_nD=hidden_ND[tokens].to(self.settings.operand_dtype),
            token_ids_n=token_ids_N[tokens],
            settings=self.settings.of_tokens(tokens),
        )

    def logits(self, chunk: Chunk) -> Tensor:
        """Logits [n, W] of a chunk, valid until the next call."""
        if self.low_precision:
            logits_nW = self.buffer_NW[: len(chunk.hidden_nD)]
            wide_product(chunk.hidden_nD, self.weight_WD.t(), logits_nW)
        else:
            logits_nW = self._product(chunk.hidden_nD)
        if self.bias_W is not None:
            logits_nW += self.bias_W
        return logits_nW

    def _product(self, hidden_nD: Tensor) -> Tensor:
        num_tokens = len(hidden_nD)
        num_rows = whole_tiles(num_tokens)
        hidden_nD = pad(hidden_nD, (0, 0, 0, num_rows - num_tokens))
        for columns, block_bD in weight_blocks(self.weight_WD, hidden_nD.dtype):
            torch.mm(hidden_nD, block_bD.t(), out=self.buffer_NW[:num_rows, columns])
        return self.buffer_NW[:num_tokens]

    def free(self) -> None:
        """Gives the memory of the logits back; no chunk may follow."""
        del self.buffer_NW

    def statistics(self, chunk: Chunk, logits_nW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log-prob, entropy, row maximum and log-sum of a chunk, merged over vocabulary shards."""
        settings = chunk.settings
        stats_4n = load_backend(settings.backend).row_stats(
            logits_nW[None], chunk.token_ids_n, settings.inv_temperature, settings.softcap
        )
        return finish_stats(merge_row_stats(stats_4n, chunk.token_ids_n, settings.vocab))


class Gradients:
    """Gradients by hidden states, weight and bias; None where not wanted.

    `unit`, 0-d, is of the size of the coefficients to come. Gradients of the logits that products
    take in float16 are kept in multiples of it, since most are too small for that dtype.
    """

    def __init__(
        self,
        head: Head,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        wanted: tuple[bool, ...],
        unit: Tensor,
    ) -> None:
        hidden_ND, weight_WD, bias_W = inputs
        settings = head.settings
        dtype = settings.compute_dtype
        self.head = head
        self.unit = unit if settings.operand_dtype == torch.float16 else None
        self.input_dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        self.hidden_ND, self.weight_WD, self.bias_W = None, None, None
        if wanted[0]:
            # The parts of vocabulary shards are summed once more, hence not rounded yet.
            sharded = settings.vocab is not None
            self.hidden_ND = hidden_ND.new_zeros(
                hidden_ND.shape, dtype=dtype if sharded else unscaled_dtype(hidden_ND.dtype)
            )
        if wanted[1]:
            # The first chunk fills it; zeros would take as long as a good part of its products.
            self.weight_WD = weight_WD.new_empty(weight_WD.shape, dtype=dtype)
            self.weight_WD[len(head.weight_WD) :].zero_()
        if wanted[2] and bias_W is not None:
            self.bias_W = torch.zeros_like(bias_W, dtype=dtype)
        self.is_first = True
        self.rounded_NW: Tensor | None = None
        if head.low_precision:
            self.rounded_NW = torch.empty_like(head.buffer_NW, dtype=settings.operand_dtype)

    def add(
        self,
        chunk: Chunk,
        logits_nW: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        coefficients: tuple[Tensor, Tensor],
    ) -> None:
        """Computes the gradient of the logits of a chunk, which it may overwrite, and multiplies
        it out.

        `statistics` are row maximum, log-sum and entropy; `coefficients` the derivatives of the
        loss by log-prob and entropy, each [n].
        """
        if self.unit is not None:
            coefficients = coefficients[0] / self.unit, coefficients[1] / self.unit
        per_token = [*statistics, *(values_n.to(logits_nW.dtype) for values_n in coefficients)]
        rows: slice | Tensor = chunk.tokens
        kept_n = (per_token[3] != 0) | (per_token[4] != 0)
        if chunk.settings.compact and not bool(kept_n.all()):
            order_k = kept_first(kept_n, logits_nW)
            logits_nW = logits_nW[: len(order_k)]
            per_token = [values_n[order_k] for values_n in per_token]
            rows = order_k + chunk.tokens.start
            chunk = replace(
                chunk,
                hidden_nD=chunk.hidden_nD[order_k],
                token_ids_n=chunk.token_ids_n[order_k],
                settings=chunk.settings.of_tokens(order_k),
            )
        settings = chunk.settings
        out_nW = logits_nW if self.rounded_NW is None else self.rounded_NW[: len(logits_nW)]
        direct = out_nW.dtype == logits_nW.dtype or settings.backend in WRITES_ANY_DTYPE
        load_backend(settings.backend).grad_logits(
            logits_nW[None],
            chunk.token_ids_n,
            settings.inv_temperature,
            settings.softcap,
            *per_token,
            out_nW[None] if direct else logits_nW[None],
        )
        if not direct:
            out_nW.copy_(logits_nW)
        self._multiply(out_nW, chunk.hidden_nD, rows)

    def _multiply(self, grad_logits_nW: Tensor, hidden_nD: Tensor, rows: slice | Tensor) -> None:
        weight_WD, dtype = self.head.weight_WD, self.head.settings.compute_dtype
        width = len(weight_WD)
        low_precision = self.head.low_precision
        if self.bias_W is not None:
            self.bias_W[:width] += grad_logits_nW.sum(dim=0, dtype=dtype)
        if self.hidden_ND is not None:
            part_nD = torch.zeros_like(hidden_nD, dtype=dtype)
            if low_precision:
                wide_product(grad_logits_nW, weight_WD, part_nD)
            else:
                for columns, block_bD in weight_blocks(weight_WD, dtype):
                    part_nD.addmm_(grad_logits_nW[:, columns], block_bD)
            self.hidden_ND[rows] = part_nD.to(self.hidden_ND.dtype)
        if self.weight_WD is not None:
            total_WD, grad_logits_Wn = self.weight_WD[:width], grad_logits_nW.t()
            if low_precision:
                product = wide_product if self.is_first else add_wide_product
                product(grad_logits_Wn, hidden_nD, total_WD)
            elif self.is_first:
                torch.mm(grad_logits_Wn, hidden_nD, out=total_WD)
            else:
                total_WD.addmm_(grad_logits_Wn, hidden_nD)
        self.is_first = False

    def finish(self) -> list[Tensor | None]:
        """The gradients in the dtypes of the inputs, for float16 in float32; ends the work of the
        head.

        Collectives: with a vocabulary shard, all_reduce(sum) of the hidden gradient.
        """
        vocab = self.head.settings.vocab
        if self.is_first and self.weight_WD is not None:
            self.weight_WD.zero_()
        # Rounding the weight gradient to a lower precision takes memory of its own.
        self.head.free()
        self.rounded_NW = None
        if self.hidden_ND is not None and vocab is not None:
            dist.all_reduce(self.hidden_ND, group=vocab.group)
        results: list[Tensor | None] = []
        for grad, input_dtype in zip(
            (self.hidden_ND, self.weight_WD, self.bias_W), self.input_dtypes, strict=True
        ):
            if grad is not None and self.unit is not None:
                grad *= self.unit
            if grad is not None and input_dtype is not None:
                grad = grad.to(unscaled_dtype(input_dtype))
            results.append(grad)
        return results


def power_of_two_below(values_N: Tensor) -> Tensor:
    """The power of two at or below the largest of some sizes, 0-d; 1 where that is 0 or not
    finite."""
    largest = torch.cat([values_N, values_N.new_zeros(1)]).amax()
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, largest, 1.0).log2().floor().exp2()


def kept_first(kept_n: Tensor, logits_nW: Tensor) -> Tensor:
    """Moves the kept rows of the logits, k of them, in front; their old positions, [k].

    Rows of the first k that are kept stay where they are, so at most half of all rows move.
    """
    count = int(kept_n.sum())
    order_k = torch.arange(count, device=kept_n.device)
    holes = (~kept_n[:count]).nonzero()[:, 0]
    fillers = count + kept_n[count:].nonzero()[:, 0]
    order_k[holes] = fillers
    logits_nW[holes] = logits_nW[fillers]
    return order_k

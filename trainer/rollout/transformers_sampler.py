"""Sampling with transformers alone: an unsharded replica of the policy and a batched, cached decode
loop.

Every rank holds the whole model, so that ranks generate without waiting for one another. `generate`
of transformers is not used: it draws from a global generator, and its bookkeeping costs more than a
small model's forward.

Shapes: P prompts, G completions per prompt, R rows (completions) of a batch, B rows still being
decoded, T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

import kernels
from trainer.config import UsageError
from trainer.rollout import Completion, Weights
from trainer.rollout.cpu_decoder import CpuDecoder, can_decode
from trainer.rollout.growing_cache import GrowingLayer
from trainer.seeds import uniforms
from trainer.templates import Template

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
# BLAS is as good for more rows, and for weights that stay in the cache from token to token.
MOST_DECODED_ROWS = 32
LEAST_UNCACHED_WEIGHTS = 1 << 16
# Stop strings are looked for in the text of this many last tokens.
STOP_WINDOW_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class _DecodeState:
    """The rows of one batch while it is decoded. Row i of the B live rows is row `rows_B[i]` of the
    R."""

    cache: Cache
    attention_mask_BT: Tensor
    next_position_B: Tensor
    rows_B: Tensor
    keys_B: np.ndarray
    done_B: Tensor
    token_ids_RT: Tensor
    logprobs_RT: Tensor
    lengths_R: Tensor
    stopped_R: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stopped_R = torch.zeros_like(self.lengths_R, dtype=torch.bool)

    def drop_done_rows(self) -> None:
        """Goes on with the unfinished rows only."""
        kept = torch.nonzero(~self.done_B).squeeze(1)
        self.cache.batch_select_indices(kept)
        self.attention_mask_BT = self.attention_mask_BT[kept]
        self.next_position_B, self.rows_B = self.next_position_B[kept], self.rows_B[kept]
        self.keys_B, self.done_B = self.keys_B[kept.cpu().numpy()], self.done_B[kept]


class _DecodeLinear(nn.Linear):
    """Takes the few rows of a decoding step to `kernels.few_rows_linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """[..., in] to [..., out]."""
        if input.numel() <= MOST_DECODED_ROWS * self.in_features:
            return kernels.few_rows_linear(input, self.weight, self.bias)
        return super().forward(input)


def _speed_up_decoding(model: nn.Module) -> None:
    """Decodes through `_DecodeLinear` where a layer's weights come from memory for every token."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_UNCACHED_WEIGHTS:
            module.__class__ = _DecodeLinear


class TransformersSampler:
    """Samples from a replica of a transformers model; see `trainer.rollout.Sampler`.

    Args:
        model: belongs to the sampler from here on, and computes in `dtype`.
        tokenizer: reads stop strings; its end token ends a completion.
        template: its stop strings and turn marks end a completion.
        dtype: of the replica's weights.
        rows_per_batch: completions decoded together.

    Raises:
        UsageError: the model has layers other than attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        dtype: torch.dtype,
        rows_per_batch: int,
    ) -> None:
        layer_types = set(getattr(model.config, "layer_types", None) or [])
        if not layer_types <= SUPPORTED_LAYERS:
            raise UsageError(
                f"--model: expected attention layers only, got {', '.join(sorted(layer_types))}"
            )
        self.model = model.eval().requires_grad_(False).to(dtype=dtype)
        self.tokenizer = tokenizer
        self.rows_per_batch = rows_per_batch
        self.device = next(self.model.parameters()).device
        if self.device.type == "cpu" and dtype == torch.float32:
            _speed_up_decoding(self.model)
        self.decoder: CpuDecoder | None = None
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.stop_strings = tuple(
            stop for stop in template.stop if len(_encode(tokenizer, stop)) != 1
        )
        end_ids = end_token_ids(model.generation_config, tokenizer, template)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.ends_V = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.ends_V[sorted(end_ids)] = True
        self.may_end_stop_V = self._tokens_holding_last_characters(vocabulary)
        self.weights_step = 0

    def load_weights(self, weights: Weights, step: int) -> None:
        """Takes the weights that the policy has after a step.

        A weight that is at hand whole, in the right type and place, is used where it is, so one
        rank in float32 has every weight once.
        """
        # It holds the addresses of the weights before, and so their memory.
        self.decoder = None
        for name, tensor in weights():
            own = self.parameters[name]
            is_alike = (own.dtype, own.device) == (tensor.dtype, tensor.device)
            if is_alike and tensor.untyped_storage().nbytes() == tensor.nbytes:
                own.data = tensor
            else:
                own.copy_(tensor)
        self.weights_step = step

    def release_memory(self) -> None:
        """Does nothing: the replica stays where it is."""

    def close(self) -> None:
        """Does nothing: nothing runs."""

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys_PG: np.ndarray,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples `keys_PG.shape[1]` completions of each prompt; see `trainer.rollout.Sampler`.

        A completion depends on its prompt, its key and the weights alone, up to the rounding of the
        forward pass.
        """
        is_float32_on_cpu = (self.model.device.type, self.model.dtype) == ("cpu", torch.float32)
        if self.decoder is None and is_float32_on_cpu and can_decode(self.model):
            self.decoder = CpuDecoder(self.model)
        group_size = keys_PG.shape[1]
        prompts_per_batch = max(1, self.rows_per_batch // group_size)
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        completions: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(prompts), prompts_per_batch):
            chosen = by_length[start : start + prompts_per_batch]
            logits_BV, state = self._prefill(
                [prompts[index] for index in chosen], keys_PG[chosen], max_new_tokens
            )
            self._decode(logits_BV, state, temperature, top_p)
            rows = _completions(state, self.weights_step)
            is_last = start + prompts_per_batch >= len(prompts)
            for place, index in enumerate(chosen):
                completions[index] = rows[place * group_size : (place + 1) * group_size]
                if on_group is not None and not is_last:
                    on_group(index, completions[index])
        return completions

    def _decode(
        self, logits_BV: Tensor, state: _DecodeState, temperature: float, top_p: float
    ) -> None:
        """Goes on from the logits after the prompts until every row is done, or the budget is."""
        max_new_tokens = state.token_ids_RT.shape[1]
        for position in range(max_new_tokens):
            draws_B = torch.from_numpy(uniforms(state.keys_B, position)).to(self.device)
            token_ids_B, logprobs_B = sample_tokens(logits_BV, draws_B, temperature, top_p)
            state.token_ids_RT[state.rows_B, position] = token_ids_B
            state.logprobs_RT[state.rows_B, position] = logprobs_B
            ended_B = self._ended(state, token_ids_B, position) & ~state.done_B
            state.lengths_R[state.rows_B[ended_B]] = position + 1
            state.stopped_R[state.rows_B[ended_B]] = True
            state.done_B |= ended_B
            live = int((~state.done_B).sum())
            if live == 0 or position + 1 == max_new_tokens:
                break
            # Dropping rows copies the cache, which pays once a quarter of the rows is finished.
            if 4 * live <= 3 * len(state.done_B):
                token_ids_B = token_ids_B[~state.done_B]
                state.drop_done_rows()
            logits_BV = self._forward_one(token_ids_B, state)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], keys_PG: np.ndarray, max_new_tokens: int
    ) -> tuple[Tensor, _DecodeState]:
        """Runs each prompt once, left padded, and repeats its cache for the completions of its
        group."""
        group_size = keys_PG.shape[1]
        longest = max(map(len, prompts))
        token_ids_PT = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_PT = torch.zeros_like(token_ids_PT)
        for row, prompt in enumerate(prompts):
            token_ids_PT[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask_PT[row, longest - len(prompt) :] = 1
        token_ids_PT, mask_PT = token_ids_PT.to(self.device), mask_PT.to(self.device)
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        logits_PV = self.model(
            input_ids=token_ids_PT,
            attention_mask=mask_PT,
            position_ids=(mask_PT.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(group_size)
        rows = len(prompts) * group_size
        mask_BT = mask_PT.repeat_interleave(group_size, dim=0)
        state = _DecodeState(
            cache=cache,
            attention_mask_BT=mask_BT,
            next_position_B=mask_BT.sum(1),
            rows_B=torch.arange(rows, device=self.device),
            keys_B=keys_PG.reshape(-1),
            done_B=torch.zeros(rows, dtype=torch.bool, device=self.device),
            token_ids_RT=torch.zeros(rows, max_new_tokens, dtype=torch.long, device=self.device),
            logprobs_RT=torch.zeros(rows, max_new_tokens, device=self.device),
            lengths_R=torch.full((rows,), max_new_tokens, device=self.device),
        )
        return logits_PV.repeat_interleave(group_size, dim=0), state

    def _forward_one(self, token_ids_B: Tensor, state: _DecodeState) -> Tensor:
        # Rows only ever leave: once they are few, what follows is not needed again.
        if self.decoder is not None and len(token_ids_B) <= MOST_DECODED_ROWS:
            logits_BV = self.decoder(token_ids_B, state.next_position_B, state.cache)
            state.next_position_B = state.next_position_B + 1
            return logits_BV
        ones_B1 = torch.ones_like(state.attention_mask_BT[:, :1])
        state.attention_mask_BT = torch.cat([state.attention_mask_BT, ones_B1], dim=1)
        position_ids_B1 = state.next_position_B[:, None]
        state.next_position_B = state.next_position_B + 1
        return self.model(
            input_ids=token_ids_B[:, None],
            attention_mask=state.attention_mask_BT,
            position_ids=position_ids_B1,
            past_key_values=state.cache,
            use_cache=True,
        ).logits[:, -1]

    def _ended(self, state: _DecodeState, token_ids_B: Tensor, position: int) -> Tensor:
        ended_B = self.ends_V[token_ids_B]
        if self.stop_strings:
            for row in torch.nonzero(self.may_end_stop_V[token_ids_B]).squeeze(1).tolist():
                first = max(0, position + 1 - STOP_WINDOW_TOKENS)
                last_ids = state.token_ids_RT[state.rows_B[row], first : position + 1]
                text = self.tokenizer.decode(last_ids.tolist())
                ended_B[row] |= any(stop in text for stop in self.stop_strings)
        return ended_B

    def _tokens_holding_last_characters(self, vocabulary: int) -> Tensor:
        """Which tokens can complete a stop string, so that all others are decoded to text for no
        row."""
        holds_V = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        if self.stop_strings:
            last_characters = {stop[-1] for stop in self.stop_strings}
            texts = self.tokenizer.batch_decode([[index] for index in range(len(self.tokenizer))])
            holding = [
                index for index, text in enumerate(texts) if not last_characters.isdisjoint(text)
            ]
            holds_V[holding] = True
        return holds_V


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def end_token_ids(
    generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: Template
) -> set[int]:
    """Tokens that end a completion: end tokens of model and tokenizer, one-token turn marks and
    stop strings."""
    of_model = generation.eos_token_id
    ends = {of_model} if isinstance(of_model, int) else set(of_model or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    for text in (*template.stop, *template.turn_marks):
        if len(token_ids := _encode(tokenizer, text)) == 1:
            ends |= set(token_ids)
    return ends


def sample_tokens(
    logits_BV: Tensor, draws_B: Tensor, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the cumulative distribution.

    Args:
        logits_BV: any float type.
        draws_B: float64 in [0, 1).
        temperature: 0 takes the most likely token.
        top_p: leaves the tokens outside the nucleus (`nucleus`) out, unless the temperature is 0.

    Returns: token ids int64 `[B]`, and their log-probabilities float32 `[B]` at the temperature (at
    1 for 0), within the nucleus.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), dim=-1)
    if top_p < 1 and temperature > 0:
        outside_BV = ~nucleus(logprobs_BV, top_p)
        logprobs_BV = logprobs_BV.masked_fill_(outside_BV, -torch.inf).log_softmax(dim=-1)
    if temperature == 0:
        token_ids_B1 = logprobs_BV.argmax(dim=-1, keepdim=True)
    else:
        cumulative_BV = logprobs_BV.double().exp_().cumsum_(dim=-1)
        totals_B1 = cumulative_BV[:, -1:]
        # Below the total even where the product rounds up, so that the token found has a
        # probability above 0.
        thresholds_B1 = torch.minimum(
            draws_B[:, None] * totals_B1, totals_B1.nextafter(torch.zeros_like(totals_B1))
        )
        token_ids_B1 = torch.searchsorted(cumulative_BV, thresholds_B1, right=True)
        # Past the end for a row of nan, which its log-probability then shows.
        token_ids_B1 = token_ids_B1.clamp(max=logits_BV.shape[-1] - 1)
    return token_ids_B1.squeeze(1), logprobs_BV.gather(1, token_ids_B1).squeeze(1)


def nucleus(logprobs_BV: Tensor, top_p: float) -> Tensor:
    """Which tokens are in the nucleus, bool `[B, V]`: the fewest most likely ones whose
    probabilities reach `top_p` together, of equals those with lower ids, and at least one.

    Source: Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.exp_()
    before_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64) - probabilities_BV
    kept_BV = before_BV < top_p
    kept_BV[:, 0] = True
    return torch.zeros_like(kept_BV).scatter_(1, order_BV, kept_BV)


def _completions(state: _DecodeState, weights_step: int) -> list[Completion]:
    token_ids_RT, logprobs_RT = state.token_ids_RT.cpu().numpy(), state.logprobs_RT.cpu().numpy()
    return [
        Completion(
            token_ids=token_ids_RT[row, :length].copy(),
            logprobs=logprobs_RT[row, :length].copy(),
            finish_reason="stop" if stopped else "length",
            weights_step=weights_step,
        )
        for row, (length, stopped) in enumerate(
            zip(state.lengths_R.tolist(), state.stopped_R.tolist(), strict=True)
        )
    ]

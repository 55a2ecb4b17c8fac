"""Layers of a policy on a CPU: the gradient of eager PyTorch, from less memory."""

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import spawn_ranks
from test_decoder_layer import CONFIGS, random_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, PreTrainedModel

from trainer.config import LoraOptions, OptimizerOptions, ShardingOptions
from trainer.cpu_layers import bytes_kept_less
from trainer.fsdp import World, full_tensor
from trainer.lora import Adapters
from trainer.packing import TokenSequence, pack_tokens
from trainer.policy import Policy
from trainer.weight_update import make_optimizer, update_weights

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
# Of the error of eager float32.
ERROR_FACTOR = 1.5
PADDING = 7


def packed_tokens() -> Any:
    generator = torch.Generator().manual_seed(4)
    sequences = [
        TokenSequence(
            prompt_ids=[1, PADDING, 3, 4, 5],
            token_ids=torch.randint(0, 90, (length,), generator=generator).numpy(),
        )
        for length in (30, 41, 37, 60)
    ]
    return pack_tokens(sequences, torch.device("cpu"))


def trainable(config: Any, **changed: Any) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for name, value in changed.items():
        setattr(config, name, value)
    return random_model(config).requires_grad_(True)


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of the sum of log-probabilities of token 3."""

    def head(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        return (hidden_ND @ weight_VD.T).log_softmax(-1)[:, 3].sum()

    policy(packed_tokens(), head).backward()
    return {name: weight.grad.double() for name, weight in policy.trained()}


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Of the gradient of each weight, by Euclidean norm."""
    return torch.stack([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact])


def on_a_cpu(model: PreTrainedModel, **sharding: Any) -> Policy:
    policy = Policy(model)
    policy.shard(ALONE, torch.float32, ShardingOptions(**sharding))
    return policy


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_is_as_exact_as_that_of_eager_pytorch(name: str, checkpointing: bool) -> None:
    made = {"pad_token_id": PADDING}
    exact = gradients(Policy(trainable(CONFIGS[name], **made).double()))
    eager = gradients(Policy(trainable(CONFIGS[name], **made)))
    policy = on_a_cpu(trainable(CONFIGS[name], **made), activation_checkpointing=checkpointing)
    lean = gradients(policy)
    errors, of_eager = (relative_errors(each, exact) for each in (lean, eager))
    assert errors.norm() <= ERROR_FACTOR * of_eager.norm()
    # Errors of a bias of few numbers scatter, but not beyond what some weight has in eager PyTorch.
    assert errors.max() <= ERROR_FACTOR * of_eager.max()


def test_adapters_get_the_gradient_that_eager_pytorch_gives_them() -> None:
    results = []
    for is_lean in (False, True):
        model = trainable(CONFIGS["llama"]).requires_grad_(False)
        adapters = Adapters(model, LoraOptions(lora_rank=4))
        torch.manual_seed(5)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.1)
        policy = Policy(model, adapters)
        if is_lean:
            policy.shard(ALONE, torch.float32, ShardingOptions())
        results.append(gradients(policy))
    eager, lean = results
    assert lean.keys() == eager.keys() and all("lora_" in name for name in lean)
    for name in lean:
        assert (lean[name] - eager[name]).norm() <= 1e-5 * eager[name].norm(), name


def save_gradients(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    policy = Policy(trainable(CONFIGS["qwen3"]))
    world = World(rank=rank, size=2, device=torch.device("cpu"))
    policy.shard(world, torch.float32, ShardingOptions())
    whole = {name: full_tensor(value) for name, value in gradients(policy).items()}
    if rank == 0:
        torch.save(whole, f"{folder}/gradients")
    dist.destroy_process_group()


def test_sharded_layers_make_outputs_again_from_whole_weights(tmp_path: Path) -> None:
    spawn_ranks(save_gradients, 2, str(tmp_path))
    alone = gradients(on_a_cpu(trainable(CONFIGS["qwen3"])))
    for name, value in torch.load(tmp_path / "gradients").items():
        # Both ranks have the same tokens, so the sum is twice the gradient.
        assert (value - 2 * alone[name]).norm() <= 1e-5 * alone[name].norm(), name


def allocated(model: PreTrainedModel) -> int:
    """Bytes that a forward pass leaves allocated."""
    policy, tokens = Policy(model), packed_tokens()
    policy(tokens, lambda hidden, weight, bias: hidden.sum())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        loss = policy(tokens, lambda hidden, weight, bias: hidden.sum())
    assert loss.requires_grad
    events = measured.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("name", CONFIGS)
def test_less_is_kept_by_what_the_memory_plan_counts(name: str) -> None:
    lean = trainable(CONFIGS[name])
    on_a_cpu(lean)
    eager_bytes, lean_bytes = allocated(trainable(CONFIGS[name])), allocated(lean)
    tokens = len(packed_tokens().token_ids_T)
    expected = bytes_kept_less(lean) * tokens
    # The inverse norm of a row is kept in both.
    assert eager_bytes - lean_bytes == pytest.approx(expected, rel=0.03)
    assert lean_bytes < 0.7 * eager_bytes


def test_gradients_keep_their_memory_and_forget_their_values() -> None:
    model = trainable(CONFIGS["llama"], tie_word_embeddings=True)
    policy = on_a_cpu(model)
    optimizer = make_optimizer(policy, OptimizerOptions())
    addresses = [weight.grad.data_ptr() for _, weight in policy.trained()]
    first = gradients(policy)
    again = gradients(policy)
    for name in first:
        torch.testing.assert_close(again[name], 2 * first[name], rtol=1e-4, atol=1e-5)
    update_weights(
        policy.trained(),
        optimizer,
        step=1,
        loss=0.0,
        learning_rate=0.0,
        max_grad_norm=1.0,
        keeps_gradients=policy.keeps_gradients,
    )
    assert addresses == [weight.grad.data_ptr() for _, weight in policy.trained()]
    assert all(torch.equal(value, first[name]) for name, value in gradients(policy).items())


def test_narrow_layers_and_other_activations_stay_as_they_are() -> None:
    sizes = {**CONFIGS["llama"].to_dict(), "hidden_size": 64}
    for config in (LlamaConfig(**sizes), LlamaConfig(**sizes | {"hidden_act": "gelu"})):
        model = random_model(config)
        kinds = [type(module) for module in model.modules()]
        on_a_cpu(model)
        assert kinds == [type(module) for module in model.modules()]


def padded_again() -> list[object]:
    """What packed attention left for backward passes."""
    return [one for one in gc.get_objects() if type(one).__name__ == "_PaddedAgain"]


def test_nothing_stays_in_a_circle_when_the_graph_is_gone() -> None:
    for checkpointing in (False, True):
        policy = on_a_cpu(trainable(CONFIGS["llama"]), activation_checkpointing=checkpointing)
        gc.collect()
        before = padded_again()
        gc.disable()
        try:
            loss = policy(packed_tokens(), lambda hidden, weight, bias: hidden.sum())
            loss.backward()
            left = [weakref.ref(loss)]
            del loss
            assert left[0]() is None
            # Graphs of other tests may be there still.
            assert len(padded_again()) == len(before)
        finally:
            gc.enable()

"""What GRPO and Dr. GRPO do to the length of right and of wrong answers where nothing else decides
it: `python bench/length_bias.py STEM` writes STEM.json and STEM.png and prints a table.

The smallest policy that can be long: a coin decides, whatever is learned, whether an answer will
be right; then come as many tokens "more" as the policy likes, and "stop". It knows which of the two
it is in, as a model can see a slip in its own steps, so it has two numbers to learn: the logits of
"more" in right and in wrong answers. No reward depends on them. Losses, advantages and gradients
are those of `kernels`.

In expectation Dr. GRPO's gradient of both is zero. GRPO divides an answer's loss by its length, so
of wrong answers the long ones are punished less a token, and it lengthens them; right ones it
shortens. Source: Liu et al. 2025 (arXiv 2503.20783), section 3.1.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kernels

PROMPTS, GROUP_SIZE, MAX_TOKENS = 32, 8, 160
STEPS, LEARNING_RATE, SEEDS = 200, 0.02, (0, 1, 2)
MORE_SHARE = 0.95
"""Of the tokens before training, so that answers are 20 tokens long."""
RIGHT_SHARE = 0.5


def sample(logits_2: Tensor, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whether each answer is right, and its length in tokens, "stop" included; both [S]."""
    right_S = rng.random(PROMPTS * GROUP_SIZE) < RIGHT_SHARE
    stop_S = 1 - torch.sigmoid(logits_2.detach()).numpy()[right_S.astype(int)]
    return right_S, np.minimum(rng.geometric(stop_S), MAX_TOKENS)


def policy_gradient(
    logits_2: Tensor, right_S: np.ndarray, length_S: np.ndarray, loss: str
) -> Tensor:
    """Gradient of the loss of a batch of answers with respect to the logits, [2]."""
    max_tokens = MAX_TOKENS if loss == "dr_grpo" else None
    spec = kernels.LossSpec.preset(loss, max_tokens=max_tokens)
    offsets = np.concatenate(([0], np.cumsum(length_S)))
    stops_N = np.zeros(offsets[-1], dtype=np.int64)
    # An answer that was cut off has no "stop".
    stops_N[offsets[1:][length_S < MAX_TOKENS] - 1] = 1
    state_N = torch.from_numpy(np.repeat(right_S.astype(np.int64), length_S))
    logits_NV = torch.stack((logits_2[state_N], torch.zeros(len(state_N))), dim=1)
    ids_N = torch.from_numpy(stops_N)
    old_N = torch.log_softmax(logits_NV.detach(), dim=1).gather(1, ids_N[:, None])[:, 0]
    out = kernels.policy_loss(
        logits_NV,
        ids_N,
        old_N,
        spec=spec,
        rewards=torch.from_numpy(right_S.astype(np.float32)),
        group_size=GROUP_SIZE,
        cu_seqlens=torch.from_numpy(offsets).int(),
    )
    return torch.autograd.grad(out.loss, logits_2)[0]


def train(loss: str, seed: int) -> dict[str, list[float]]:
    """Expected lengths of right and of wrong answers before each step, and after the last."""
    logit = float(np.log(MORE_SHARE / (1 - MORE_SHARE)))
    logits_2 = torch.full((2,), logit, requires_grad=True)
    optimizer = torch.optim.Adam([logits_2], lr=LEARNING_RATE)
    rng = np.random.default_rng(seed)
    lengths: dict[str, list[float]] = {"wrong": [], "right": []}
    for step in range(STEPS + 1):
        more_2 = torch.sigmoid(logits_2.detach()).double()
        # Of a geometric length that is cut at MAX_TOKENS.
        expected_2 = (1 - more_2**MAX_TOKENS) / (1 - more_2)
        for name, value in zip(lengths, expected_2.tolist(), strict=True):
            lengths[name].append(round(value, 3))
        if step < STEPS:
            logits_2.grad = policy_gradient(logits_2, *sample(logits_2, rng), loss)
            optimizer.step()
    return lengths


def write_figure(path: Path, by_loss: dict[str, list[dict[str, list[float]]]]) -> None:
    """Lengths over steps, a chart for wrong and one for right answers, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2), ("wrong", "right"), strict=True):
        for (loss, runs), colour in zip(by_loss.items(), ("#d1453b", "#2f6fde"), strict=True):
            for place, lengths in enumerate(runs):
                axes.plot(lengths[name], color=colour, label="" if place else loss)
        axes.set_title(f"tokens, {name}", fontsize=12, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylim(0, MAX_TOKENS)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def main(stem: Path) -> None:
    """Trains with both losses and all seeds."""
    by_loss = {loss: [train(loss, seed) for seed in SEEDS] for loss in ("grpo", "dr_grpo")}
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(by_loss) + "\n")
    write_figure(stem.with_name(f"{stem.name}.png"), by_loss)
    for loss, runs in by_loss.items():
        for name in ("wrong", "right"):
            ends = [lengths[name][-1] for lengths in runs]
            error = np.std(ends, ddof=1) / len(ends) ** 0.5
            print(f"{loss}, {name}: {np.mean(ends):.1f} +- {error:.1f} tokens after {STEPS} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Our module `kernels` shares its import name with Hugging Face's; transformers must not mind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

MODEL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_transformers_does_not_take_ours_for_hugging_faces() -> None:
    from transformers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()
    major, minor = (int(part) for part in kernels.__version__.split(".")[:2])
    assert (major, minor) == (0, 1)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_a_model_loads_generates_and_trains_through_the_policy_loss(
    architecture: str, tmp_path: Path
) -> None:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**MODEL)
    torch.manual_seed(0)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = torch.randint(3, 97, (2, 5))
    tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=True)
    assert tokens.shape == (2, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logprobs = []
    for _ in range(3):
        logits = model(input_ids=tokens).logits[:, 4:-1]
        out = kernels.policy_loss(
            logits,
            tokens[:, 5:],
            None,
            spec=kernels.LossSpec(),
            advantages=torch.tensor([1.0, -1.0]),
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        logprobs.append(out.logprobs.sum(1))
    # The rewarded completion becomes likelier, the other less likely.
    assert logprobs[-1][0] > logprobs[0][0] and logprobs[-1][1] < logprobs[0][1]


def test_hugging_faces_package_beside_ours_is_named_in_one_sentence(tmp_path: Path) -> None:
    metadata = tmp_path / "kernels-0.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.13.0\n")
    root = Path(kernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import kernels"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: Hugging Face's package 'kernels' 0.13.0 is installed")
    assert "pip uninstall kernels" in message

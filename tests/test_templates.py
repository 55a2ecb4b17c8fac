"""Prompt texts, against the papers' wording, and the chat template of a tokenizer."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.templates import TEMPLATES, template_by_name

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "hello", "[", "]", "user", "assistant"]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def test_r1_prompt_is_the_text_of_table_1() -> None:
    prompt = template_by_name("r1").prompt("What is 2 + 3?")
    assert prompt.startswith("A conversation between User and Assistant. The user asks a question,")
    assert "<think> reasoning process here </think> <answer> answer here </answer>." in prompt
    assert prompt.endswith(" User: What is 2 + 3?. Assistant:")


def test_drgrpo_prompt_opens_the_thought() -> None:
    template = template_by_name("r1-drgrpo")
    assert template.prompt("Q").endswith("</answer>.\nUser: Q\nAssistant: <think>")
    assert template.opens_think and template.stop == ("</answer>",)


def test_qwen_prompt_is_a_chat_with_a_box() -> None:
    assert template_by_name("qwen-math").prompt("Q") == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bare_prompts_add_little() -> None:
    assert template_by_name("none").prompt("Q") == "Q"
    assert template_by_name("tiny").prompt("2 + 3") == "User: 2 + 3 Assistant:"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chat"])
def test_question_with_braces_and_tags_is_inserted_once_as_it_is(name: str) -> None:
    question = "{question} {0} <answer>7</answer> \\boxed{7}"
    prompt = template_by_name(name).prompt(question)
    assert prompt.count(question) == 1
    assert len(prompt) == len(template_by_name(name).prompt("")) + len(question)


def test_chat_prompt_is_the_tokenizers_own() -> None:
    tokenizer = make_tokenizer(CHAT)
    assert template_by_name("chat").prompt("hello", tokenizer) == "[user]hello[assistant]"


def test_chat_template_that_opens_a_thought_is_noticed() -> None:
    chat = template_by_name("chat")
    thinking = make_tokenizer(CHAT.replace("[assistant]", "[assistant]<think>\n"))
    assert chat.for_tokenizer(thinking).opens_think
    assert not chat.for_tokenizer(make_tokenizer(CHAT)).opens_think
    assert chat.for_tokenizer(thinking).turn_marks == ("</s>",)


@pytest.mark.parametrize("use", ["prompt", "for_tokenizer"])
def test_chat_refuses_a_tokenizer_without_a_chat_template(use: str) -> None:
    template, tokenizer = template_by_name("chat"), make_tokenizer(None)
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        if use == "prompt":
            template.prompt("Q", tokenizer)
        else:
            template.for_tokenizer(tokenizer)


def test_chat_prompt_gets_no_second_set_of_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("<s>" + CHAT)
    original = type(tokenizer).encode

    def encode(self: PreTrainedTokenizerFast, text: str, add_special_tokens: bool) -> list[int]:
        ids = original(self, text, add_special_tokens=False)
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    chat_ids = template_by_name("chat").prompt_ids("hello", tokenizer)
    plain_ids = template_by_name("none").prompt_ids("hello", tokenizer)
    assert chat_ids.count(tokenizer.bos_token_id) == 1
    assert plain_ids == [tokenizer.bos_token_id, 3]


def test_unknown_template_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="expected one of r1, r1-drgrpo, .*got 'r2'"):
        template_by_name("r2")

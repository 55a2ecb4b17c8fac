"""Prompt templates: the exact text around a question, and where the answer is read from.

A template is data. It never sees a completion; `trainer.rewards` reads completions by the
template's fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

_QUESTION = "{question}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a question becomes a prompt, and how its completion is read."""

    name: str
    """The name given on the command line."""
    text: str | None
    """The prompt with `{question}` in it; None: the tokenizer's own chat template writes it."""
    answer_in: Literal["answer_tags", "boxed"]
    """Where the final answer is: in <answer> </answer>, or in the last \\boxed{} after </think>."""
    stop: tuple[str, ...] = ()
    """Generation ends after one of these, which stays in the completion."""
    opens_think: bool = False
    """The prompt itself ends in <think>, so that a completion starts inside the thought."""
    turn_marks: tuple[str, ...] = ()
    """Text that ends the first assistant turn; it and what follows are not graded."""

    def prompt(self, question: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text a completion is sampled after.

        Args:
            question: inserted as it is, braces and tags included.
            tokenizer: needed by the `chat` template only.

        Raises:
            ValueError: the template is `chat` and the tokenizer is missing or has no chat template.
        """
        if self.text is not None:
            return self.text.replace(_QUESTION, question)
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError(
                "template: expected a tokenizer with a chat template for 'chat', got "
                f"{'none' if tokenizer is None else tokenizer.name_or_path or 'one without'}; "
                f"choose one of {', '.join(name for name in TEMPLATES if name != 'chat')}"
            )
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def prompt_ids(self, question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt; none are added to a chat template's own special tokens."""
        text = self.prompt(question, tokenizer)
        return tokenizer.encode(text, add_special_tokens=self.text is not None)

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """This template with the fields that depend on the tokenizer filled in.

        For `chat`: whether the generation prompt opens <think>, and the token that ends the turn.
        The others come back unchanged. Called once, when a run starts, it also refuses an unusable
        tokenizer.

        Raises:
            ValueError: as `prompt`.
        """
        if self.text is not None:
            return self
        opens_think = self.prompt("", tokenizer).rstrip().endswith(THINK_OPEN)
        turn_marks = (tokenizer.eos_token,) if tokenizer.eos_token else ()
        return replace(self, opens_think=opens_think, turn_marks=turn_marks)


_R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
    "process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)

_R1_DRGRPO = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant "
    "solves it. The Assistant first thinks about the reasoning process in the mind and then "
    "provides the User with the answer. The reasoning process is enclosed within <think> "
    "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: {question}\n"
    "Assistant: <think>"
)

_QWEN_MATH = (
    "<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n"
    "{question}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

# How base models go on with the next problem once they have solved theirs, where no tag or token of
# the template ends a turn. lm-evaluation-harness stops its few-shot tasks at such strings too.
_NEXT_TURN = ("\nUser:", "\nHuman:", "\nQuestion:", "\nProblem:", "\nQ:")

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # DeepSeek-R1, arXiv 2501.12948 v1, table 1; the full stop after the question is theirs.
        Template(name="r1", text=_R1, answer_in="answer_tags", stop=(ANSWER_CLOSE,)),
        # Dr. GRPO, arXiv 2503.20783, repository sail-sg/understand-r1-zero, for the next three.
        Template(
            name="r1-drgrpo",
            text=_R1_DRGRPO,
            answer_in="answer_tags",
            stop=(ANSWER_CLOSE,),
            opens_think=True,
        ),
        Template(
            name="qwen-math",
            text=_QWEN_MATH,
            answer_in="boxed",
            turn_marks=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        ),
        # Theirs has no stop strings, and a last box in a turn that the model made up would count.
        Template(
            name="none",
            text=_QUESTION,
            answer_in="boxed",
            stop=_NEXT_TURN,
            turn_marks=_NEXT_TURN,
        ),
        Template(name="chat", text=None, answer_in="boxed"),
        Template(
            name="tiny",
            text="User: {question} Assistant:",
            answer_in="answer_tags",
            stop=(ANSWER_CLOSE,),
        ),
        Template(name="tiny-bilingual", text="User: {question} Assistant:", answer_in="boxed"),
    )
}


def template_by_name(name: str) -> Template:
    """The template of that name.

    Raises:
        ValueError: no template has the name; the message lists those that exist.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]

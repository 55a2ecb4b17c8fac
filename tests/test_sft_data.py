"""Rows of supervised fine-tuning: the token ids that each kind gives, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trainer.config import UsageError
from trainer.fsdp import World
from trainer.sft_config import SftConfig, SftDataOptions, SftOptimizerOptions
from trainer.sft_data import SftData, open_data
from trainer.templates import TEMPLATES, Template
from trainer.testing import WORDS, bigram_tokenizer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
# A turn ends with <pad>, another token than the tokenizer's end token.
CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}Assistant: {{ m.content.split('</think>')[-1] }} <pad> "
    "{% else %}User: {{ m.content }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = bigram_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_rows(
    folder: Path,
    rows: list[Any],
    *,
    template: Template = TEMPLATES["tiny"],
    tokenizer: PreTrainedTokenizerFast | None = None,
    messages: list[str] | None = None,
    batch_size: int = 4,
    **options: Any,
) -> SftData:
    data = SftDataOptions(dataset=str(write_rows(folder / "rows.jsonl", rows)), **options)
    config = SftConfig(
        preset="test",
        run_dir=folder / "run",
        data=data,
        optimizer=SftOptimizerOptions(batch_size=batch_size),
    )
    report = [] if messages is None else messages
    return open_data(config, template, tokenizer or chat_tokenizer(), ALONE, report.append)


def pairs(data: SftData) -> list[tuple[list[int], list[int]]]:
    sequences = [data.store[index] for index in data.training]
    return [(list(one.prompt_ids), one.token_ids.tolist()) for one in sequences]


def test_texts_are_taken_as_they_are_and_end_with_the_end_token(tmp_path: Path) -> None:
    data = open_rows(tmp_path, [{"prompt": "User: 1 Assistant:", "completion": " so 2", "id": 7}])
    assert pairs(data) == [(ids("User: 1 Assistant:"), ids("so 2 <eos>"))]


def test_question_becomes_the_prompt_of_the_template(tmp_path: Path) -> None:
    rows = [{"question": "1 + 2", "completion": "<answer> 3 </answer>", "prompt": None}]
    expected = TEMPLATES["tiny"].prompt_ids("1 + 2", chat_tokenizer())
    assert pairs(open_rows(tmp_path, rows)) == [(expected, ids("<answer> 3 </answer> <eos>"))]
    # The tokenizer's own template, and its own end of a turn.
    by_chat = open_rows(tmp_path, rows, template=TEMPLATES["chat"])
    assert pairs(by_chat) == [(ids("User: 1 + 2 Assistant:"), ids("<answer> 3 </answer> <pad>"))]


def test_prompt_of_messages_is_written_by_the_chat_template(tmp_path: Path) -> None:
    turn = {"role": "user", "content": "1"}
    answer = {"role": "assistant", "content": "so 2"}
    expected = (ids("User: 1 Assistant:"), ids("so 2 <pad>"))
    rows = [
        {"prompt": [turn], "completion": [answer]},
        {"prompt": [turn], "completion": "so 2"},
        {"messages": [turn, answer]},
    ]
    assert pairs(open_rows(tmp_path, rows)) == [expected] * 3


def test_each_turn_of_the_assistant_is_learned_after_what_it_would_see(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "+"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think> so </think> 2"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
    assert pairs(open_rows(tmp_path, [{"messages": messages}])) == [
        (ids("User: + User: 1 Assistant:"), ids("<think> so </think> 2 <pad>")),
        # This template leaves the thoughts of earlier turns out.
        (ids("User: + User: 1 Assistant: 2 <pad> User: 3 Assistant:"), ids("4 <pad>")),
    ]


def test_think_that_the_prompt_opens_is_not_opened_twice(tmp_path: Path) -> None:
    template = Template(
        name="test", text="User: {question} Assistant: <think>", answer_in="boxed", opens_think=True
    )
    rows = [{"question": "1", "completion": "<think> so </think> 2"}]
    data = open_rows(tmp_path, rows, template=template)
    assert pairs(data) == [(ids("User: 1 Assistant: <think>"), ids("so </think> 2 <eos>"))]


def test_special_tokens_of_the_tokenizer_stand_before_texts_only(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    rows = [
        {"prompt": "1", "completion": "2"},
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
    ]
    assert pairs(open_rows(tmp_path, rows, tokenizer=tokenizer)) == [
        (ids("<pad> 1"), ids("2 <eos>")),
        (ids("User: 1 Assistant:"), ids("2 <pad>")),
    ]


def test_parquet_rows_are_those_of_json(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
        {"prompt": "3", "completion": "4"},
    ]
    columns = {name: [row.get(name) for row in rows] for name in ("messages", "prompt")}
    columns["completion"] = [None, "4"]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    config = SftConfig(
        preset="test", run_dir=tmp_path / "p", data=SftDataOptions(dataset=str(path))
    )
    data = open_data(config, TEMPLATES["tiny"], chat_tokenizer(), ALONE, print)
    assert pairs(data) == pairs(open_rows(tmp_path, rows))


ROWS = [{"prompt": f"{index % 10} + {index // 10}", "completion": "so"} for index in range(30)]


def test_every_epoch_has_every_sequence_once_in_another_order(tmp_path: Path) -> None:
    data = open_rows(tmp_path, ROWS)
    assert (data.steps_per_epoch, data.total_steps) == (8, 16)
    epochs = []
    for first in (1, 9):
        batches = [data.batch(step) for step in range(first, first + 8)]
        assert [len(batch) for batch in batches] == [4] * 7 + [2]
        epochs.append([list(one.prompt_ids) for batch in batches for one in batch])
    everything = [prompt for prompt, _ in pairs(data)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(everything)
    assert epochs[0] != epochs[1] and epochs[0] != everything
    # Of a step alone, as after a resume.
    again = open_rows(tmp_path, ROWS)
    assert [list(one.prompt_ids) for one in again.batch(12)] == epochs[1][12:16]
    assert again.fingerprint == data.fingerprint


def test_held_out_prompts_are_not_learned_from(tmp_path: Path) -> None:
    # Two completions for each prompt.
    rows = [*ROWS, *({**row, "completion": "so so"} for row in ROWS)]
    data = open_rows(tmp_path, rows, eval_share=0.2)
    learned = {tuple(prompt) for prompt, _ in pairs(data)}
    held_out = {tuple(one.prompt_ids) for one in data.held_out}
    assert len(data.held_out) == 12 and len(held_out) == 6
    assert len(data.training) == 48 and not learned & held_out
    elsewhere = write_rows(tmp_path / "eval.jsonl", ROWS[:5])
    data = open_rows(tmp_path, rows, eval_dataset=str(elsewhere))
    assert len(data.held_out) == 5 and len(data.training) == 50
    with pytest.raises(UsageError, match="--eval-dataset: holds every prompt"):
        open_rows(tmp_path, ROWS[:5], eval_dataset=str(elsewhere))
    with pytest.raises(UsageError, match="--eval-share: expected prompts to be left"):
        open_rows(tmp_path, ROWS[:1], eval_share=0.5)


def test_sequences_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "1", "completion": " ".join(["so"] * length)} for length in (3, 5, 9)]
    messages: list[str] = []
    data = open_rows(tmp_path, rows, max_tokens=7, messages=messages)
    # With the prompt and the end token of 7 tokens the second is just not too long.
    assert [len(token_ids) for _, token_ids in pairs(data)] == [4, 6]
    assert "1 of 3 sequences are longer than --max-tokens 7" in messages[0]
    with pytest.raises(UsageError, match="--max-tokens: expected at least 5, .* got 4"):
        open_rows(tmp_path, rows, max_tokens=4)


USER = {"role": "user", "content": "1"}
BOT = {"role": "assistant", "content": "2"}
REFUSED = {
    "no_columns": ({"text": "x"}, "expected the columns prompt and completion, .* got text"),
    "no_completion": ({"prompt": "1"}, "expected the columns .* got prompt"),
    "not_an_object": ([1], "expected an object with columns, got a list of 1"),
    "empty_prompt": ({"prompt": " ", "completion": "2"}, "non-empty text in column 'prompt'"),
    "empty_completion": ({"prompt": "1", "completion": ""}, "non-empty text in column 'comple"),
    "number": ({"prompt": "1", "completion": 2}, "column 'completion', got int 2"),
    "surrogate": ({"prompt": "\ud800", "completion": "2"}, "half a surrogate pair at character 1"),
    "empty_question": ({"question": "", "completion": "2"}, "text in column 'question'"),
    "no_messages": ({"messages": []}, "expected a list of messages .* got a list of 0"),
    "no_assistant": ({"messages": [USER]}, "expected a turn of the assistant after .* roles user"),
    "assistant_first": ({"messages": [BOT, USER]}, "expected a turn of the assistant after"),
    "no_role": ({"messages": [{"content": "1"}, BOT]}, "expected messages with role and content"),
    "no_content": ({"messages": [USER, {"role": "assistant"}]}, "text in column 'messages: cont"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]},
        "text in column 'messages: content', got a list of 1",
    ),
    "prompt_of_assistant": ({"prompt": [USER, BOT], "completion": "2"}, "got one of the assistant"),
    "two_turns": ({"prompt": [USER], "completion": [USER, BOT]}, "got the roles user, assistant"),
}


@pytest.mark.parametrize("row, sentence", REFUSED.values(), ids=REFUSED)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        open_rows(tmp_path, [ROWS[0], row])
    assert str(refusal.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert "\n" not in str(refusal.value)


def test_empty_file_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected at least one row, got none"):
        open_rows(tmp_path, [])
    with pytest.raises(UsageError, match="no such file"):
        open_rows(tmp_path, ROWS, eval_dataset=str(tmp_path / "missing.jsonl"))


def test_messages_and_chat_questions_need_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1: chat messages need a model whose tokenizer has"):
        open_rows(tmp_path, [{"messages": [USER, BOT]}], tokenizer=bigram_tokenizer())
    question = [{"question": "1", "completion": "2"}]
    with pytest.raises(UsageError, match="--template: expected a tokenizer with a chat template"):
        open_rows(tmp_path, question, template=TEMPLATES["chat"], tokenizer=bigram_tokenizer())


def test_messages_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    tokenizer = bigram_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{% else %}", "{% elif m.role != 'user' %}{{ raise_exception('only users') }}{% else %}"
    )
    row = {"messages": [{"role": "system", "content": "1"}, USER, BOT]}
    with pytest.raises(UsageError, match=r"line 1: the chat template refuses .*only users"):
        open_rows(tmp_path, [row], tokenizer=tokenizer)


def test_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = bigram_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="--model: expected a tokenizer with an end token"):
        open_rows(tmp_path, ROWS, tokenizer=tokenizer)

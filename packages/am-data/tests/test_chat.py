"""Row layouts, files, refused rows and the report."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

import am_data

MESSAGES = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
]
ROW = {"messages": MESSAGES}


def example(dataset, index=0):
    return {name: array.tolist() for name, array in dataset[index].items()}


def test_items_are_those_of_render_and_mask(tokenizer):
    dataset = am_data.ChatDataset([ROW, {"messages": MESSAGES * 2}], tokenizer)
    assert len(dataset) == 2
    for index, messages in enumerate((MESSAGES, MESSAGES * 2)):
        ids, labels = am_data.render_and_mask(tokenizer, messages)
        assert example(dataset, index) == {"input_ids": ids.tolist(), "labels": labels.tolist()}
        assert dataset.lengths[index] == len(ids)
    assert dataset[0]["input_ids"].dtype == dataset[0]["labels"].dtype == np.int64
    assert example(dataset, -1) == example(dataset, 1)
    with pytest.raises(IndexError, match="index 2 is out of range for 2 examples"):
        dataset[2]


SYSTEM = {"role": "system", "content": "You are quick."}
HISTORY = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am fine"}]


@pytest.mark.parametrize(
    ("row", "layout", "messages"),
    [
        (ROW, "messages", MESSAGES),
        ({"messages": json.dumps(MESSAGES)}, "messages", MESSAGES),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": [{"type": "text", "text": "It is four."}]}]},
         "messages", MESSAGES),
        ({"instruction": "What is two plus two?", "input": "", "output": "It is four."}, "alpaca", MESSAGES),
        ({"instruction": "Hello", "input": "there", "output": "Hi"}, "alpaca",
         [{"role": "user", "content": "Hello\n\nthere"}, {"role": "assistant", "content": "Hi"}]),
        ({"instruction": "What is two plus two?", "output": "It is four.", "system": "You are quick.",
          "history": [["Hello", "I am fine"]]}, "alpaca", [SYSTEM, *HISTORY, *MESSAGES]),
        ({"system": "You are quick.", "conversations": [
            {"from": "human", "value": "What is two plus two?"}, {"from": "gpt", "value": "It is four."}]},
         "sharegpt", [SYSTEM, *MESSAGES]),
        ({"conversations": MESSAGES}, "sharegpt", MESSAGES),
        ({"prompt": "What is two plus two?", "completion": "It is four."}, "prompt_completion", MESSAGES),
        ({"prompt": [SYSTEM, MESSAGES[0]], "completion": [MESSAGES[1]]}, "prompt_completion", [SYSTEM, *MESSAGES]),
    ],
)  # fmt: skip
def test_every_layout_becomes_the_same_conversation(tokenizer, row, layout, messages):
    expected = example(am_data.ChatDataset([{"messages": messages}], tokenizer))
    assert example(am_data.ChatDataset([row], tokenizer)) == expected
    assert example(am_data.ChatDataset([row], tokenizer, format=layout)) == expected


def test_function_calls_of_sharegpt_rows(tokenizer, templates):
    conversations = [
        {"from": "human", "value": "What is two plus two?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"left": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is four."},
    ]
    tools = json.dumps([{"name": "add", "parameters": {}}])
    dataset = am_data.ChatDataset(
        [{"conversations": conversations, "tools": tools}], tokenizer, chat_template=templates["with_tools"]
    )
    learned = [text for text, supervised in dataset.report.samples[0] if supervised]
    assert learned == ['<tool_call>add{"left": 2}</tool_call><|im_end|>', "It is four.<|im_end|>"]


def test_every_kind_of_file_gives_the_same_rows(tokenizer, tmp_path):
    rows = [{"instruction": f"What is {number}?", "output": f"It is {number}."} for number in range(5)]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "validation.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    expected = am_data.ChatDataset(rows, tokenizer)
    sources = [tmp_path / f"rows.{suffix}" for suffix in ("jsonl", "json", "parquet", "csv")]
    for source in [*sources, *map(str, sources), table, tmp_path / "saved", *(tmp_path / "saved").glob("*.arrow")]:
        assert am_data.ChatDataset(source, tokenizer).fingerprint == expected.fingerprint
    folder = am_data.ChatDataset(tmp_path / "folder", tokenizer, split="validation")
    assert folder.fingerprint == expected.fingerprint
    assert len(am_data.ChatDataset(tmp_path / "rows.jsonl", tokenizer, split="train[:2]")) == 2


def test_sources_that_cannot_be_read(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist; give a file, a folder or a hub"):
        am_data.ChatDataset(tmp_path / "missing.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        am_data.ChatDataset("./missing", tokenizer)
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(ValueError, match=r"suffix '.txt'; choose one of .jsonl"):
        am_data.ChatDataset(tmp_path / "rows.txt", tokenizer)
    with pytest.raises(ValueError, match="split='test' was asked of rows in memory"):
        am_data.ChatDataset([ROW], tokenizer, split="test")
    unreadable = {
        "empty.jsonl": ("", "train", "empty.jsonl is empty; give a file with at least one row"),
        "blank.jsonl": ("\n\n", "train", r"blank.jsonl' \(split='train'\) cannot be read: .*no data; mend the file"),
        "cut.jsonl": (
            json.dumps(ROW)[:-3],
            "train",
            r"cut.jsonl' \(split='train'\) cannot be read: line 1 is not JSON: Expecting",
        ),
        "whole.jsonl": (json.dumps(ROW), "test", "cannot be read: Unknown split \"test\".*'train'"),
        "sliced.jsonl": (json.dumps(ROW), "train[:x]", r"cannot be read: .*train\[:x\]"),
        "text.parquet": ("text", "train", "text.parquet.* cannot be read: Parquet file size is 4 bytes"),
    }
    for name, (text, split, message) in unreadable.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            am_data.ChatDataset(tmp_path / name, tokenizer, split=split)
    datasets.DatasetDict(train=datasets.Dataset.from_list([ROW])).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits has no split 'test'; choose one of train"):
        am_data.ChatDataset(tmp_path / "splits", tokenizer, split="test")
    with pytest.raises(ValueError, match=r"columns \['text'\] fit no known format"):
        am_data.ChatDataset([{"text": "x"}], tokenizer)
    with pytest.raises(ValueError, match="0 rows were read from the list"):
        am_data.ChatDataset([], tokenizer)


def test_the_formats_of_the_readme_are_those_that_are_told_and_taken(tokenizer):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (`.*?`) \|", readme, re.MULTILINE))
    assert len(table) == 4
    with pytest.raises(ValueError, match=f"choose one of auto, {', '.join(table)}$"):
        am_data.ChatDataset([ROW], tokenizer, format="?")
    needed = " or ".join(columns.replace(", ", " and ") for columns in table.values())
    with pytest.raises(ValueError, match=f"rows need {needed}: rename the columns"):
        am_data.ChatDataset([{"text": "x"}], tokenizer)
    for name, columns in table.items():
        assert f'"{name}"' in am_data.ChatDataset.__doc__
        turns = MESSAGES if name in ("messages", "sharegpt") else "x"
        rows = [dict.fromkeys(columns.replace("`", "").split(", "), turns)]
        named, told = (am_data.ChatDataset(rows, tokenizer, format=format) for format in (name, "auto"))
        assert named.fingerprint == told.fingerprint


def test_a_format_that_no_row_has_is_refused_with_the_columns_that_are_there(tokenizer):
    pairs = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError) as refused:
        am_data.ChatDataset(pairs, tokenizer, format="messages")
    assert str(refused.value) == (
        "format='messages' reads `messages`, and the rows have the columns prompt, completion; "
        "give format='prompt_completion', which they fit"
    )
    with pytest.raises(ValueError, match=r"the columns text; rename the columns, or give another format$"):
        am_data.ChatDataset([{"text": "x"}], tokenizer, format="alpaca")
    # One row that has them makes it a fault of the others.
    assert am_data.ChatDataset([*pairs, ROW], tokenizer, format="messages").report.rows_kept == 1


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"conversations": MESSAGES},
        {
            "conversations": [
                {"from": "human", "value": MESSAGES[0]["content"]},
                {"from": "gpt", "value": "It is four."},
            ]
        },
        {"instruction": "What is two plus two?", "output": "It is four."},
        {"prompt": "What is two plus two?", "completion": "It is four."},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    ],
)
def test_a_system_column_is_the_first_turn_in_every_layout(tokenizer, row, column):
    expected = example(am_data.ChatDataset([{"messages": [SYSTEM, *MESSAGES]}], tokenizer))
    dataset = am_data.ChatDataset([{**row, column: SYSTEM["content"]}], tokenizer)
    assert example(dataset) == expected
    assert dataset.report.ignored_columns == ()
    assert example(am_data.ChatDataset([{**row, column: " "}], tokenizer)) == example(
        am_data.ChatDataset([ROW], tokenizer)
    )


def test_two_system_prompts_are_refused_unless_they_are_one(tokenizer):
    same = {"messages": [SYSTEM, *MESSAGES], "system": SYSTEM["content"]}
    assert example(am_data.ChatDataset([same], tokenizer)) == example(
        am_data.ChatDataset([{"messages": same["messages"]}], tokenizer)
    )
    others = [same | {"system": "Be slow."}, {**ROW, "system": "Be slow.", "system_prompt": "Be quick."}]
    report = am_data.ChatDataset([same, *others], tokenizer).report
    assert {reason: entry.count for reason, entry in report.dropped.items()} == {
        "a system prompt in a column and another among the messages": 1,
        "two system prompts": 1,
    }


def test_columns_that_nothing_reads_are_reported(tokenizer, tmp_path):
    rows = [ROW | {"id": "one", "tools": None, "score": 0.5}, ROW | {"id": "two", "images": [], "score": 0.1}]
    report = am_data.ChatDataset(rows, tokenizer).report
    assert report.ignored_columns == ("score", "images")
    assert "columns that nothing reads: score, images" in str(report)
    datasets.Dataset.from_list([ROW | {"score": 1}]).to_json(tmp_path / "rows.jsonl")
    assert am_data.ChatDataset(tmp_path / "rows.jsonl", tokenizer).report.ignored_columns == ("score",)


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_an_answer_that_is_not_to_be_learned_is_context(tokenizer, key):
    learned = [{"weight": 1}, {"train": True}, {"weight": None}]
    for other in learned:
        messages = [HISTORY[0], HISTORY[1] | key, MESSAGES[0], MESSAGES[1] | other]
        dataset = am_data.ChatDataset([{"messages": messages}], tokenizer)
        assert [text for text, supervised in dataset.report.samples[0] if supervised] == ["It is four.<|im_end|>"]
        whole = am_data.ChatDataset([{"messages": [*HISTORY, *MESSAGES]}], tokenizer)
        assert dataset[0]["input_ids"].tolist() == whole[0]["input_ids"].tolist()
        assert dataset.fingerprint != whole.fingerprint
        _, labels = am_data.render_and_mask(tokenizer, messages)
        assert labels.tolist() == dataset[0]["labels"].tolist()
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "I am fine"} | key]
    turns += [{"from": "human", "value": "What is two plus two?"}, {"from": "gpt", "value": "It is four."}]
    assert example(am_data.ChatDataset([{"conversations": turns}], tokenizer)) == example(dataset)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([MESSAGES[0], MESSAGES[1] | {"weight": 0.5}], "a weight that is neither 0 nor 1"),
        ([MESSAGES[0], MESSAGES[1] | {"train": "no"}], "a train that is neither 0 nor 1"),
        ([MESSAGES[0], MESSAGES[1] | {"train_detail": [{"begin_offset": 0}]}], "train_detail"),
        ([MESSAGES[0] | {"weight": 1}, MESSAGES[1]], "a turn that is to be learned and is no answer"),
        ([MESSAGES[0], MESSAGES[1] | {"weight": 0}], "no answer is to be learned"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(tokenizer, messages, reason):
    assert am_data.ChatDataset([ROW, {"messages": messages}], tokenizer).report.dropped[reason].count == 1


def test_a_dataset_says_with_what_it_was_rendered_and_where_answers_end(tokenizer, templates):
    dataset = am_data.ChatDataset([ROW], tokenizer)
    assert isinstance(dataset, am_data.Rendered)
    assert (dataset.chat_template, dataset.chat_template_kwargs) == (None, {})
    assert dataset.end_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    options = {"chat_template": templates["llama3"], "chat_template_kwargs": {"date_string": "today"}}
    dataset = am_data.ChatDataset([ROW], tokenizer, **options)
    assert (dataset.chat_template, dataset.chat_template_kwargs) == tuple(options.values())
    assert dataset.end_token_ids == (tokenizer.convert_tokens_to_ids("<|eot_id|>"),)
    cut = am_data.ChatDataset([ROW], tokenizer, max_length=len(dataset[0]["input_ids"]) - 6, truncation=True)
    assert cut.report.rows_truncated == 1
    assert cut.end_token_ids == ()


BAD = {"id": "seven", "messages": [{"role": "critic", "content": "x"}]}


def test_the_report_counts_rows_reasons_and_tokens(tokenizer):
    rows = [ROW, BAD, {"messages": MESSAGES[:1]}, ROW, {"messages": MESSAGES[:1]}]
    dataset = am_data.ChatDataset(rows, tokenizer)
    assert isinstance(dataset, am_data.Reported)
    report = dataset.report
    ids, labels = am_data.render_and_mask(tokenizer, MESSAGES)
    assert (report.rows_read, report.rows_kept, report.rows_truncated) == (5, 2, 0)
    assert report.num_tokens == 2 * len(ids)
    assert report.num_supervised_tokens == 2 * int((labels != -100).sum())
    assert report.supervised_share == report.num_supervised_tokens / report.num_tokens
    assert {reason: (entry.count, entry.examples) for reason, entry in report.dropped.items()} == {
        "unknown role": (1, ["seven"]),
        "no assistant turn": (2, ["2", "4"]),
    }
    assert report.samples[0] == [
        ("<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is four.<|im_end|>", True),
        ("\n", False),
    ]
    assert "[[" not in str(report)
    text = report.full()
    assert text.startswith(f"{report}\n")
    assert "5 rows read, 2 kept" in text
    assert "dropped 2: no assistant turn (rows 2, 4)" in text
    assert "<|im_start|>assistant\n[[It is four.<|im_end|>]]" in text


def test_a_bad_row_ends_the_build_on_request(tokenizer):
    with pytest.raises(ValueError, match="row seven: unknown role: turn 0 has role='critic'"):
        am_data.ChatDataset([ROW, BAD], tokenizer, on_bad_row="raise")


def test_all_rows_refused_is_an_error_with_counts(tokenizer):
    with pytest.raises(ValueError, match=r"all 2 rows of the list were refused:\ndropped 2: unknown role \(rows"):
        am_data.ChatDataset([BAD, BAD], tokenizer)


def test_rows_over_max_length_are_refused_or_cut(tokenizer):
    ids, labels = am_data.render_and_mask(tokenizer, MESSAGES)
    short = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I"}]}
    refused = am_data.ChatDataset([ROW, short], tokenizer, max_length=len(ids) - 1)
    assert (len(refused), refused.report.dropped["longer than max_length"].count) == (1, 1)
    cut = am_data.ChatDataset([ROW, short], tokenizer, max_length=len(ids) - 3, truncation=True)
    assert example(cut) == {"input_ids": ids[:-3].tolist(), "labels": labels[:-3].tolist()}
    assert cut.report.rows_truncated == 1
    prompt = int(np.flatnonzero(labels != -100)[0])
    with pytest.raises(ValueError, match="nothing under loss after truncation"):
        am_data.ChatDataset([ROW], tokenizer, max_length=prompt, truncation=True)
    with pytest.raises(ValueError, match="truncation=True needs max_length"):
        am_data.ChatDataset([ROW], tokenizer, truncation=True)


def test_the_last_turn_alone_can_be_trained(tokenizer):
    row = {"messages": [*HISTORY, *MESSAGES]}
    every, last = (am_data.ChatDataset([row], tokenizer, train_on=which) for which in ("assistant", "last"))
    assert every[0]["input_ids"].tolist() == last[0]["input_ids"].tolist()
    assert every.report.num_supervised_tokens > last.report.num_supervised_tokens > 0
    assert every.fingerprint != last.fingerprint


def test_worker_processes_change_nothing(tokenizer):
    rows = [ROW, BAD, {"messages": MESSAGES * 2}] * 100
    alone, together = (am_data.ChatDataset(rows, tokenizer, num_proc=number) for number in (1, 2))
    assert together.fingerprint == alone.fingerprint
    assert together.report == alone.report


class OneRowASecond(list):
    """Rows that arrive just after a full second, each in a second of its own."""

    def __iter__(self):
        for row in super().__iter__():
            time.sleep(1.02 - time.time() % 1)
            yield row


def test_a_template_that_writes_the_time_is_followed(tokenizer, templates):
    template = "{{ strftime_now('%S') + '\n' }}" + templates["chatml"]
    dataset = am_data.ChatDataset(OneRowASecond([ROW, ROW]), tokenizer, chat_template=template)
    assert dataset.report.rows_kept == 2
    assert dataset[0]["input_ids"].tolist() != dataset[1]["input_ids"].tolist()
    later = am_data.ChatDataset(OneRowASecond([ROW, ROW]), tokenizer, chat_template=template)
    assert later.fingerprint == dataset.fingerprint


def test_the_fingerprint_follows_the_content(tokenizer):
    other = {"messages": [{"role": "user", "content": "What is two plus 2?"}, MESSAGES[1]]}
    same = am_data.ChatDataset([ROW], tokenizer).fingerprint
    assert am_data.ChatDataset([ROW, BAD], tokenizer).fingerprint == same
    assert am_data.ChatDataset([other], tokenizer).fingerprint != same
    assert am_data.ChatDataset([ROW, ROW], tokenizer).fingerprint != same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "chatml"}, "format='chatml' is unknown; choose one of auto"),
        ({"on_bad_row": "skip"}, "on_bad_row='skip' is unknown"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"num_proc": 0}, "num_proc=0 must be at least 1"),
    ],
)
def test_unknown_options_are_errors(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        am_data.ChatDataset([ROW], tokenizer, **options)


def test_tokenised_examples_are_checked():
    dataset = am_data.TokenDataset([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    assert example(dataset) == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert (dataset.num_tokens, dataset.num_supervised_tokens) == (3, 2)
    with pytest.raises(ValueError, match="example 0 has labels that are not its tokens"):
        am_data.TokenDataset([{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}])
    with pytest.raises(ValueError, match=r"example 0 has input_ids \(2,\) and labels \(1,\)"):
        am_data.TokenDataset([{"input_ids": [5, 6], "labels": [5]}])
    with pytest.raises(ValueError, match="there are no examples"):
        am_data.TokenDataset([])

"""Rows of the common chat layouts become `messages`: a list of `{"role", "content", ...}` dicts, checked.

Nothing is repaired silently: what a layout does not define (an unknown role, a missing answer, an image part) is
refused with a `RowRefusedError`, whose `reason` is what the dataset's report counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Row: TypeAlias = Mapping[str, Any]
Message: TypeAlias = dict[str, Any]
# (content of the row, turn) to a string, or to parts of type "text" and others.
ReadContent: TypeAlias = "Callable[[object, int], str | list[dict[str, Any]]]"
Format: TypeAlias = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"]

ROLES = ("system", "developer", "user", "assistant", "tool")
# In which a row may have its system prompt, in whatever layout.
_SYSTEM = ("system", "system_prompt")
# Read in every layout; `id` is what reports call the row.
COLUMNS = (*_SYSTEM, "tools", "id")
# By which a message says whether it is to be learned, 0 or 1: OpenAI's fine-tuning files; Axolotl's; ms-swift's.
_WEIGHTS = ("weight", "train", "training", "loss")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class RowRefusedError(ValueError):
    """A row that cannot be trained on: `reason` is the same for all such rows, `detail` says what is wrong in this one.

    Public functions document it as the ValueError that it is.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_format(format: str) -> None:
    """ValueError for what is neither "auto" nor a row format."""
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(get_args(Format))}")


def detect_format(columns: Sequence[str]) -> Format:
    """The format that a set of column names belongs to; ValueError with the known formats if none."""
    for name, known in ROW_FORMATS.items():
        if set(known.columns) <= set(columns):
            return name
    needed = " or ".join(" and ".join(f"`{column}`" for column in known.columns) for known in ROW_FORMATS.values())
    raise ValueError(f"columns {sorted(columns)} fit no known format; rows need {needed}: rename the columns")


def require_columns(columns: Sequence[str], format: Format) -> None:
    """ValueError with the columns that are there, where none of rows of `format` can be read."""
    needed = ROW_FORMATS[format].columns
    if set(needed) <= set(columns):
        return
    fitting = [name for name, known in ROW_FORMATS.items() if set(known.columns) <= set(columns)]
    fix = f"give format={fitting[0]!r}, which they fit" if fitting else "rename the columns, or give another format"
    raise ValueError(
        f"format={format!r} reads {' and '.join(f'`{column}`' for column in needed)}, and the rows have the columns "
        f"{', '.join(columns)}; {fix}"
    )


def read_text(content: object, turn: int) -> str:
    """A content that is text, or parts that all are."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RowRefusedError("content that is not text", f"turn {turn} has a part of type {kind!r}")
            texts.append(str(part["text"]))
        return "".join(texts)
    raise RowRefusedError("content that is not text", f"turn {turn} has content of type {type(content).__name__}")


def normalise(
    row: Row, layout: Format, read_content: ReadContent = read_text
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """`(messages, tools)` of one row, checked; raises RowRefusedError. `tools` is None where the row has none.

    The prompt of a column `system` (or `system_prompt`) is the first turn; a row that has one among its messages too is
    refused, unless it is the same.
    """
    read = ROW_FORMATS[layout].read(row)
    system = _system(row)
    messages = [check_message(message, turn, read_content) for turn, message in enumerate([*system, *read])]
    if len(messages) == len(system):
        raise RowRefusedError("no messages", "the list is empty")
    if system and messages[1]["role"] in ("system", "developer"):
        if messages[1]["content"] != messages[0]["content"]:
            raise RowRefusedError(
                "a system prompt in a column and another among the messages", f"the column has {system[0]['content']!r}"
            )
        del messages[0]
    return messages, _tools(row.get("tools"))


def ignored_columns(columns: Sequence[str], layout: Format, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Those of `columns` that nothing reads in rows of `layout`; `others` are read beside them."""
    known = ROW_FORMATS[layout]
    return tuple(column for column in columns if column not in {*known.columns, *known.further, *COLUMNS, *others})


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A checked copy of `messages`; raises RowRefusedError."""
    checked = [check_message(message, turn) for turn, message in enumerate(messages)]
    if not checked:
        raise RowRefusedError("no messages", "the list is empty")
    return checked


def check_message(message: Mapping[str, Any], turn: int, read_content: ReadContent = read_text) -> Message:
    """One message with a known role and the content that is read; keys whose value is None are left out.

    An answer that says that it is not to be learned (`"weight": 0`, `"train": false`) has `"train": False`.
    """
    if not isinstance(message, Mapping):
        raise RowRefusedError("a message is not a mapping", f"turn {turn} is a {type(message).__name__}")
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if role not in ROLES:
        raise RowRefusedError("unknown role", f"turn {turn} has role={role!r}; choose one of {', '.join(ROLES)}")
    if "tool_calls" in checked:
        checked["tool_calls"] = [_tool_call(call, turn) for call in _decoded(checked["tool_calls"], "tool_calls")]
        if not checked["tool_calls"]:
            del checked["tool_calls"]
    checked["content"] = read_content(checked.get("content", ""), turn)
    spoken = _says_something(checked["content"]) or "tool_calls" in checked
    if role in ("user", "assistant") and not spoken:
        raise RowRefusedError("empty turn", f"turn {turn} ({role}) has no content")
    return _with_weight(checked, turn)


def _with_weight(message: Message, turn: int) -> Message:
    given = {name: message.pop(name) for name in _WEIGHTS if name in message}
    if "train_detail" in message:
        raise RowRefusedError("train_detail", f"turn {turn}; parts of an answer cannot be left out, give `train` alone")
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowRefusedError(f"a {name} that is neither 0 nor 1", f"turn {turn} has {name}={value!r}")
        if value and message["role"] != "assistant":
            raise RowRefusedError(
                "a turn that is to be learned and is no answer", f"turn {turn} ({message['role']}) has {name}={value!r}"
            )
    if message["role"] != "assistant" or all(given.values()):
        return message
    return message | {"train": False}


def _says_something(content: str | list[dict[str, Any]]) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] != "text" or part["text"].strip() for part in content)


def _tool_call(call: object, turn: int) -> dict[str, Any]:
    """A call whose arguments are an object: templates write them with `tojson`, which would quote a string twice."""
    if not isinstance(call, Mapping):
        raise RowRefusedError("malformed tool call", f"turn {turn}: a call is a {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowRefusedError("malformed tool call", f"turn {turn}: a call has no function name")
    arguments = _decoded(function.get("arguments", {}), "arguments")
    if not isinstance(arguments, Mapping):
        raise RowRefusedError("malformed tool call", f"turn {turn}: arguments are a {type(arguments).__name__}")
    checked = {"type": "function", "function": {"name": function["name"], "arguments": _without_nulls(arguments)}}
    if call.get("id") is not None:
        checked["id"] = call["id"]
    return checked


def _tools(tools: object) -> list[dict[str, Any]] | None:
    decoded = _decoded(tools, "tools")
    if not decoded:
        return None
    if not isinstance(decoded, Sequence) or not all(isinstance(tool, Mapping) for tool in decoded):
        raise RowRefusedError("malformed tools", "tools must be a list of JSON schemas")
    return [_without_nulls(tool) for tool in decoded]


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column the keys of all of them, null where a row had none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _decoded(value: object, field: str) -> Any:
    """A JSON string becomes what it stands for: flat files such as CSV cannot hold a list."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowRefusedError(f"{field} is not valid JSON", str(error)) from error


def _turns(row: Row, column: str) -> Sequence[Any]:
    turns = _decoded(row.get(column), column)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowRefusedError(f"{column} is not a list", f"it is a {type(turns).__name__}")
    return turns


def _required(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise RowRefusedError(f"{column} is empty", f"it is {value!r}")
    return value


def _system(row: Row) -> list[Message]:
    given = {column: row[column] for column in _SYSTEM if str(row.get(column) or "").strip()}
    prompts = list(given.values())
    if len(prompts) > 1 and prompts[0] != prompts[1]:
        raise RowRefusedError("two system prompts", f"the columns {' and '.join(given)} differ")
    return [{"role": "system", "content": prompts[0]}] if prompts else []


def _from_messages(row: Row) -> list[Message]:
    return list(_turns(row, "messages"))


def _from_alpaca(row: Row) -> list[Message]:
    messages: list[Message] = []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = _required(row, "instruction") + (f"\n\n{row['input']}" if row.get("input") else "")
    answer = _required(row, "output")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_sharegpt(row: Row) -> list[Message]:
    turns = _turns(row, "conversations")
    if turns and isinstance(turns[0], Mapping) and turns[0].get("role") is not None:
        return list(turns)
    messages = []
    for turn, entry in enumerate(turns):
        speaker = entry.get("from") if isinstance(entry, Mapping) else None
        weights = {key: entry[key] for key in (*_WEIGHTS, "train_detail") if key in entry} if speaker else {}
        if speaker == "function_call":
            calls = _decoded(entry["value"], "function_call")
            calls = [calls] if isinstance(calls, Mapping) else calls
            messages.append({"role": "assistant", "tool_calls": calls, **weights})
        elif speaker in _SHAREGPT_ROLES:
            messages.append({"role": _SHAREGPT_ROLES[speaker], "content": entry.get("value"), **weights})
        else:
            known = ", ".join([*_SHAREGPT_ROLES, "function_call"])
            raise RowRefusedError("unknown role", f"turn {turn} is from={speaker!r}; choose one of {known}")
    return messages


def _from_prompt_completion(row: Row) -> list[Message]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        if not isinstance(completion, Sequence) or isinstance(completion, str):
            raise RowRefusedError("completion is not a list", "prompt is a list of messages, so completion must be one")
        return [*prompt, *completion]
    question, answer = _required(row, "prompt"), _required(row, "completion")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class RowFormat:
    """A layout of rows: the columns that tell it, how its messages are read, unchecked, and of what other columns."""

    columns: tuple[str, ...]
    read: Callable[[Row], list[Message]]
    further: tuple[str, ...] = ()


# In the order in which format="auto" looks for them.
ROW_FORMATS: dict[Format, RowFormat] = {
    "messages": RowFormat(("messages",), _from_messages),
    "sharegpt": RowFormat(("conversations",), _from_sharegpt),
    "alpaca": RowFormat(("instruction", "output"), _from_alpaca, ("input", "history")),
    "prompt_completion": RowFormat(("prompt", "completion"), _from_prompt_completion),
}
# A type checker does not read tables, so the names stand in `Format` as well.
assert get_args(Format) == ("auto", *ROW_FORMATS)

"""Which tokens of a rendered conversation the model must learn to write.

A turn under loss reaches from the end of the generation prompt to its end-of-turn token, both as the chat template
itself writes them: what the model has to produce when it is asked for that turn, think block and calls included.
No template is edited. The spans are derived twice, and a conversation on which the two disagree is refused:

1. By prefix, on tokens: the rendering of `messages[:i]` with the generation prompt must be a prefix of the whole; the
   turn ends with the first token equal to the last special token of the rendering of `messages[:i + 1]`.
2. By substitution, on characters: a rendering with every content replaced by a marker shows the literal text that the
   template puts around contents. The real rendering must be exactly that text with the real contents, which finds
   each content, proves that none is lost, and maps to tokens by offsets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from am_data._messages import Message, RowRefusedError, check_messages
from am_data._skeleton import MARKER, Piece, Skeleton, Turn, locate, mark_contents, marker, marker_index, refuse_dropped
from am_data._templates import TEMPLATES
from am_data._templates import chat_template as resolve_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn: TypeAlias = Literal["assistant", "last"]
Tools: TypeAlias = list[dict[str, Any]]

IGNORE_INDEX = -100
_CACHE_SIZE = 1024


def render_and_mask(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Tools | None = None,
    chat_template: str | None = None,
    train_on: TrainOn = "assistant",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`(input_ids, labels)` of one conversation, both int64 `[S]`; labels are not shifted, -100 where there is no loss.

    `input_ids` are those of `tokenizer.apply_chat_template`. `train_on` is "assistant" for every assistant turn or
    "last" for the last one; one with `"weight": 0` or `"train": False` is context alone. `chat_template_kwargs` reach
    the template (`enable_thinking`, `date_string`). Raises ValueError with the reason where the conversation cannot be
    masked with certainty: an unknown role, no assistant turn, a template that drops or changes a turn, refuses it, or
    writes no end-of-turn token.
    """
    renderer = Renderer(tokenizer, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs)
    return renderer.mask(check_messages(messages), tools=tools, train_on=train_on)


class Renderer:
    """Masks conversations with one tokenizer and template; keeps the skeletons of the shapes it has met."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise TypeError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
        if chat_template is None and tokenizer.chat_template is None:
            raise ValueError(
                f"chat_template=None, and the tokenizer {tokenizer.name_or_path!r} has no chat template; give one: a "
                f"name ({', '.join(TEMPLATES)}), the path of a .jinja file, or Jinja text"
            )
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        if isinstance(own, dict) and chat_template in own:
            # One of several that the tokenizer has, by the name that it has there.
            chat_template = own[chat_template]
        self.chat_template = None if chat_template is None else resolve_template(chat_template)
        self.template_kwargs = dict(chat_template_kwargs or {})
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {token for token, value in added if value.special} | set(tokenizer.all_special_ids)
        self._skeletons: dict[tuple[Any, ...], Skeleton] = {}

    def mask(
        self, messages: list[Message], *, tools: Tools | None = None, train_on: TrainOn = "assistant"
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`(input_ids, labels)` of checked messages, int64 `[S]`; raises RowRefusedError."""
        trained = _trained_turns(messages, train_on)
        text = self.render(messages, tools)
        encoding = self._encode(text, offsets=True)
        ids: list[int] = encoding["input_ids"]
        offsets = np.asarray(encoding["offset_mapping"])
        by_marker = self._spans_by_marker(messages, tools, trained, text, offsets)
        by_prefix = self._spans_by_prefix(messages, tools, trained, text, ids, offsets)
        for turn, first, second in zip(trained, by_prefix, by_marker):
            if first != second:
                raise RowRefusedError(
                    "the two derivations of the mask disagree",
                    f"turn {turn} is tokens {first} by prefix and {second} by substitution; "
                    "does the answer contain the text of a special token?",
                )
        input_ids = np.asarray(ids, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for start, end in by_prefix:
            labels[start:end] = input_ids[start:end]
        return input_ids, labels

    def render(self, messages: list[Message], tools: Tools | None, *, generation_prompt: bool = False) -> str:
        """What the template writes; raises RowRefusedError where it does not take the messages."""
        if not messages:
            raise RowRefusedError("no prompt before an assistant turn", "the conversation starts with it")
        try:
            text = self._tokenizer.apply_chat_template(
                # Whether an answer is to be learned is none of the template's business.
                [{key: value for key, value in message.items() if key != "train"} for message in messages],
                tools=None if tools is None else list(tools),
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.template_kwargs,
            )
        # A template is somebody's program: whatever it raises means that it does not take this conversation.
        except Exception as error:
            raise RowRefusedError("the template refuses the conversation", str(error)) from error
        assert isinstance(text, str)  # tokenize=False
        return text

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of `ids`, special tokens included."""
        text = self._tokenizer.decode(ids)
        assert isinstance(text, str)  # one sequence
        return text

    def _encode(self, text: str | list[str], *, offsets: bool = False) -> Any:
        return self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=offsets,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _spans_by_prefix(
        self,
        messages: list[Message],
        tools: Tools | None,
        trained: list[int],
        text: str,
        ids: list[int],
        offsets: NDArray[np.int64],
    ) -> list[tuple[int, int]]:
        prompts = [self.render(messages[:turn], tools, generation_prompt=True) for turn in trained]
        upto = [text if turn + 1 == len(messages) else self.render(messages[: turn + 1], tools) for turn in trained]
        encoded: list[list[int]] = self._encode([*prompts, *upto])["input_ids"]
        spans = []
        for place, turn in enumerate(trained):
            if not text.startswith(prompts[place]):
                raise RowRefusedError(
                    "the template rewrites earlier turns",
                    f"the prompt of turn {turn} is not a prefix of the whole rendering, so the model would learn from "
                    "a context that it never sees; use train_on='last' or a template that keeps earlier turns",
                )
            start = len(encoded[place])
            if ids[:start] != encoded[place]:
                # White space at the end of a prompt may split otherwise when text follows; a clean cut is enough.
                start = _first_token(offsets, len(prompts[place]), turn)
            end_of_turn = self._last_special(encoded[len(trained) + place], upto[place], turn)
            if end_of_turn not in ids[start:]:
                raise RowRefusedError("no end-of-turn token", f"turn {turn} is not closed as it is when it comes last")
            spans.append((start, ids.index(end_of_turn, start) + 1))
        return spans

    def _last_special(self, ids: list[int], text: str, turn: int) -> int:
        """The end-of-turn token of a rendering: its last special one, after which only white space may follow."""
        last = next((token for token in reversed(ids) if token in self._special_ids), None)
        if last is not None and not text.rpartition(self._tokenizer.convert_ids_to_tokens([last])[0])[2].strip():
            return last
        raise RowRefusedError(
            "no end-of-turn token",
            f"turn {turn} ends without a special token, so the model would not learn to stop; "
            "pass a chat_template that writes eos_token after an answer",
        )

    def _spans_by_marker(
        self,
        messages: list[Message],
        tools: Tools | None,
        trained: list[int],
        text: str,
        offsets: NDArray[np.int64],
    ) -> list[tuple[int, int]]:
        marked, pieces = mark_contents(messages)
        skeleton, cached = self._skeleton(marked, pieces, tools, trained)
        places = locate(text, skeleton, pieces)
        if places is None and cached:
            # A template may write the date, so a skeleton made before midnight does not fit after it.
            self._skeletons.clear()
            skeleton, _ = self._skeleton(marked, pieces, tools, trained)
            places = locate(text, skeleton, pieces)
        if places is None:
            raise RowRefusedError(
                "the template changes a content",
                "the rendering is not the template's own text around the contents as they are in the row",
            )
        spans = []
        for turn, known in zip(trained, skeleton.turns):
            begin = places[known.anchor][1] if known.anchor is not None else 0
            if not text.startswith(known.prompt_tail, begin):
                raise RowRefusedError(
                    "the template opens an answer otherwise than its generation prompt does",
                    f"turn {turn} does not follow {known.prompt_tail!r}; "
                    "chat_template_kwargs such as enable_thinking may choose between them",
                )
            begin += len(known.prompt_tail)
            own = [places[index][1] for index in skeleton.order if pieces[index].turn == turn]
            content_end = max(own, default=begin)
            limit = min((place[0] for place in places.values() if place[0] >= content_end), default=len(text))
            close = text.find(known.closing, content_end, limit)
            if close < 0:
                raise RowRefusedError("no end-of-turn token", f"turn {turn} is not followed by {known.closing!r}")
            spans.append(_token_span(offsets, begin, close + len(known.closing), turn))
        return spans

    def _skeleton(
        self, marked: list[Message], pieces: list[Piece], tools: Tools | None, trained: list[int]
    ) -> tuple[Skeleton, bool]:
        key = (json.dumps([marked, tools], sort_keys=True, default=str), tuple(trained))
        if key in self._skeletons:
            return self._skeletons[key], True
        self._refuse_dropped_tools(marked, tools)
        text = self.render(marked, tools)
        found = [match.group() for match in MARKER.finditer(text)]
        refuse_dropped(marked, pieces, found, trained)
        literals = tuple(MARKER.split(text))
        order = tuple(map(marker_index, found))
        turns = tuple(self._turn(marked, tools, turn, len(pieces)) for turn in trained)
        if len(self._skeletons) >= _CACHE_SIZE:
            self._skeletons.clear()
        self._skeletons[key] = Skeleton(literals, order, turns)
        return self._skeletons[key], False

    def _turn(self, marked: list[Message], tools: Tools | None, turn: int, unused: int) -> Turn:
        prompt = self.render(marked[:turn], tools, generation_prompt=True)
        matches = list(MARKER.finditer(prompt))
        anchor = marker_index(matches[-1].group()) if matches else None
        prompt_tail = prompt[matches[-1].end() :] if matches else prompt
        parts = isinstance(marked[turn]["content"], list)
        content = [{"type": "text", "text": marker(unused)}] if parts else marker(unused)
        answer = {"role": "assistant", "content": content}
        closing = self.render([*marked[:turn], answer], tools).rpartition(marker(unused))[2].rstrip()
        if not closing:
            raise RowRefusedError(
                "no end-of-turn token", f"the template writes nothing after the answer of turn {turn}"
            )
        return Turn(anchor, prompt_tail, closing)

    def _refuse_dropped_tools(self, marked: list[Message], tools: Tools | None) -> None:
        """Render with every tool name and every call replaced by a marker: a marker that is missing was dropped."""
        called = [message for message in marked if "tool_calls" in message]
        if not tools and not called:
            return
        kinds: list[str] = []

        def fresh(kind: str) -> str:
            kinds.append(kind)
            return marker(9999 - len(kinds))

        def marked_call(call: dict[str, Any]) -> dict[str, Any]:
            name = fresh("a tool call")
            arguments = {fresh("the arguments of a tool call"): fresh("the arguments of a tool call")}
            return {**call, "function": {"name": name, "arguments": arguments}}

        probe_messages = [
            {**message, "tool_calls": [marked_call(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in marked
        ]
        probe_tools = None
        if tools:
            probe_tools = [
                {**tool, "function": {**tool["function"], "name": fresh("a tool")}}
                if "function" in tool
                else {**tool, "name": fresh("a tool")}
                for tool in tools
            ]
        text = self.render(probe_messages, probe_tools)
        for place, kind in enumerate(kinds, start=1):
            if marker(9999 - place) not in text:
                raise RowRefusedError(f"the template drops {kind}", "choose a template that writes tools")


def _trained_turns(messages: list[Message], train_on: TrainOn) -> list[int]:
    if train_on not in ("assistant", "last"):
        raise ValueError(f"train_on={train_on!r} is unknown; choose 'assistant' or 'last'")
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RowRefusedError("no assistant turn", f"the roles are {[message['role'] for message in messages]}")
    trained = [turn for turn in (turns if train_on == "assistant" else turns[-1:]) if messages[turn].get("train", True)]
    if not trained:
        raise RowRefusedError("no answer is to be learned", "the row says so of each (weight 0, train false)")
    return trained


def _first_token(offsets: NDArray[np.int64], begin: int, turn: int) -> int:
    """The first token of the characters from `begin` on; no token may reach over `begin`."""
    first = int(np.searchsorted(offsets[:, 0], begin, side="left"))
    if first > 0 and offsets[first - 1, 1] > begin:
        raise RowRefusedError(
            "a token covers both prompt and answer",
            f"turn {turn} begins with text that merges with the end of the prompt (white space, mostly); strip it",
        )
    return first


def _token_span(offsets: NDArray[np.int64], begin: int, end: int, turn: int) -> tuple[int, int]:
    """Tokens of the characters `[begin, end)`."""
    return _first_token(offsets, begin, turn), int(np.searchsorted(offsets[:, 0], end - 1, side="right"))

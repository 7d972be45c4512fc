"""The literal text that a chat template puts around contents, found by rendering markers in their place.

A rendering of the real contents must be exactly that text with the contents in it, which finds each content and proves
that none is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from am_data._messages import Message, RowRefusedError

MARKER = re.compile(r"Zq\d{4}qZ")
_THINK = re.compile(r"(\s*</?think>\s*)")


@dataclass(frozen=True)
class Turn:
    """Of one turn under loss: the content before it, the text from there to its first token, its closing text."""

    anchor: int | None
    prompt_tail: str
    closing: str


@dataclass(frozen=True)
class Skeleton:
    """The literal text around contents: `literals[0] content literals[1] content ... literals[-1]`.

    `order` names, in the order of the text, the piece (index into the pieces of the messages) between two literals.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Piece:
    """A part of a message's text that is replaced by a marker."""

    turn: int
    text: str
    reasoning: bool


def marker(index: int) -> str:
    return f"Zq{index:04d}qZ"


def marker_index(marker: str) -> int:
    return int(marker[2:6])


def mark_contents(messages: list[Message]) -> tuple[list[Message], list[Piece]]:
    """The messages with every text replaced by a marker, and the texts. Think tags stay: templates look for them."""
    pieces: list[Piece] = []

    def mark(text: str, turn: int, reasoning: bool) -> str:
        if not text:
            return text
        pieces.append(Piece(turn, text, reasoning))
        return marker(len(pieces) - 1)

    def mark_content(text: str, turn: int, role: str) -> str:
        parts = _THINK.split(text)
        for place in range(0, len(parts), 2):
            closes = place + 1 < len(parts) and "</think>" in parts[place + 1]
            parts[place] = mark(parts[place], turn, role == "assistant" and closes)
        return "".join(parts)

    marked = []
    for turn, message in enumerate(messages):
        replaced, role, content = dict(message), message["role"], message["content"]
        if isinstance(message.get("reasoning_content"), str):
            replaced["reasoning_content"] = mark(message["reasoning_content"], turn, True)
        if isinstance(content, str):
            replaced["content"] = mark_content(content, turn, role)
        else:
            replaced["content"] = [
                {**part, "text": mark_content(part["text"], turn, role)} if part["type"] == "text" else part
                for part in content
            ]
        marked.append(replaced)
    if len(pieces) > 5000:
        raise RowRefusedError("too many turns", f"{len(pieces)} contents; 5000 are supported")
    return marked, pieces


def refuse_dropped(marked: list[Message], pieces: list[Piece], found: Iterable[str], trained: list[int]) -> None:
    times: dict[int, int] = {}
    for written in found:
        times[marker_index(written)] = times.get(marker_index(written), 0) + 1
    for index, piece in enumerate(pieces):
        role = marked[piece.turn]["role"]
        if times.get(index, 0) > 1:
            raise RowRefusedError(f"the template writes a {role} turn twice", f"turn {piece.turn}")
        # Templates leave the reasoning of earlier answers out on purpose; it matters only where it is to be learned.
        optional = piece.reasoning and piece.turn not in trained
        if index not in times and not optional:
            what = f"the reasoning of an {role} turn" if piece.reasoning else f"a {role} turn"
            raise RowRefusedError(f"the template drops {what}", f"turn {piece.turn}: {piece.text[:60]!r}")


def locate(text: str, skeleton: Skeleton, pieces: list[Piece]) -> dict[int, tuple[int, int]] | None:
    """Character span of every piece, or None where `text` is not the skeleton with the pieces in it."""
    if not text.startswith(skeleton.literals[0]):
        return None
    places: dict[int, tuple[int, int]] = {}
    position = len(skeleton.literals[0])
    for index, following in zip(skeleton.order, skeleton.literals[1:]):
        for written in _written_forms(pieces[index].text):
            end = position + len(written)
            if text.startswith(written, position) and text.startswith(following, end):
                break
        else:
            return None
        places[index] = (position, end)
        position = end + len(following)
    return places if position == len(text) else None


def _written_forms(text: str) -> Iterable[str]:
    """How templates write a content: as it is, trimmed, or inside a JSON string; longest first."""
    yield text
    yield text.rstrip()
    yield text.lstrip()
    yield text.strip()
    yield text.strip("\n")
    yield json.dumps(text, ensure_ascii=False)[1:-1]

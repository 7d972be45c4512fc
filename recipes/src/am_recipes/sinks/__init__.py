"""Where the facts and numbers of a run go: a file, the terminal, a page, and whatever a user adds (`Sink`)."""

from __future__ import annotations

from am_recipes.sinks.console import Console
from am_recipes.sinks.html import HtmlPage
from am_recipes.sinks.jsonl import JsonLines
from am_recipes.sinks.sink import Row, Sink

__all__ = ["Console", "HtmlPage", "JsonLines", "Row", "Sink"]

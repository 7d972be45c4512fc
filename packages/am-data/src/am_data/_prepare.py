"""Text, JSON lines and Parquet tokenised into token shards, in one pass.

JSON lines and Parquet are streamed. A .txt file is read whole, however its documents are divided, and so is a .json
file that is one array: memory must hold the largest of them.

The text of a document is encoded without special tokens, and what looks like one in it as plain text, so that no text
can forge the start of a document. `tokenizers` encodes in batches, on threads of its own.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from am_data._files import COMPRESSIONS, expand, fault, is_pattern, kind, open_binary, unpacking_errors
from am_data._rows import stream_file
from am_data._shard_files import ShardWriter, TokenType

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VALIDATION = "validation"
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 2**20
_SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Split:
    """One written split: its documents, tokens (BOS tokens included) and shards in order."""

    documents: int
    tokens: int
    files: list[Path]


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` has written; `str(summary)` is for people.

    `tokens_per_byte`: tokens of the texts, without BOS, over their bytes in UTF-8. `seconds` is wall time. `bos` is the
    token before each document, "" for none.
    """

    splits: dict[str, Split]
    empty_documents: int
    tokens_per_byte: float
    seconds: float
    bos: str
    dtype: TokenType

    def __str__(self) -> str:
        documents = sum(split.documents for split in self.splits.values())
        tokens = sum(split.tokens for split in self.splits.values())
        lines = [
            f"{documents:,} documents, {tokens:,} tokens ({self.dtype}), {self.tokens_per_byte:.3f} tokens/byte, "
            f"{self.seconds:.1f} s, {tokens / self.seconds:,.0f} tokens/s",
            f"each document starts with {self.bos}" if self.bos else "nothing marks where a document starts",
        ]
        if self.empty_documents:
            lines.append(f"left out: {self.empty_documents:,} documents without text")
        for split in self.splits.values():
            last = f" to {split.files[-1].name}" if len(split.files) > 1 else ""
            lines.append(
                f"{split.files[0]}{last}: {split.documents:,} documents, {split.tokens:,} tokens, "
                f"{len(split.files)} shard{'s' if len(split.files) > 1 else ''}"
            )
        return "\n".join(lines)


def prepare(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path,
    text_key: str = "text",
    prefix: str = "train",
    validation_fraction: float = 0.0,
    shard_tokens: int = 100_000_000,
    max_tokens: int | None = None,
    bos: str | None = "auto",
    split_on_blank_lines: bool = False,
) -> PrepareSummary:
    """Tokenise the documents of `inputs` into shards of the folder `output`; `am-data prepare --help` says how.

    `max_tokens` counts both splits; the document that reaches it is cut there, or left out where its BOS alone would be
    left of it. Reports progress on stderr, as a bar on a terminal and as lines elsewhere. No shard of either split is
    left in `output` on an error: ValueError for the content, FileNotFoundError and FileExistsError for paths,
    ModuleNotFoundError without the extra `am-data[prepare]`.
    """
    if prefix == VALIDATION and validation_fraction:
        raise ValueError(f"prefix={prefix!r} is the name of the validation shards; choose another --prefix")
    files = _input_files(inputs)
    encoder = _load_tokenizer(tokenizer)
    bos_token = _bos_token(tokenizer) if bos == "auto" else bos
    bos_token_id = encoder.token_to_id(bos_token) if bos_token else None
    if bos_token and bos_token_id is None:
        raise ValueError(f"the tokenizer has no token {bos_token!r}; give one that it has with --bos, or --no-bos")
    dtype: TokenType = "uint16" if max(encoder.get_vocab().values()) < 2**16 else "uint32"
    counts = _Counts()
    started = time.monotonic()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                ShardWriter(output, prefix=name, shard_tokens=shard_tokens, dtype=dtype, bos_token_id=bos_token_id)
            )
            for name in ([prefix, VALIDATION] if validation_fraction else [prefix])
        }
        advance = stack.enter_context(_progress(max_tokens))
        texts = counts.filled(_texts(files, text_key, split_on_blank_lines))
        for text, ids in _encoded(encoder, texts):
            writer = writers[VALIDATION if _hash_share(text) < validation_fraction else prefix]
            left = np.inf if max_tokens is None else max_tokens - sum(each.num_tokens for each in writers.values())
            whole = len(ids) + (bos_token_id is not None)
            if left <= whole - len(ids):
                break
            before = writer.num_tokens
            writer.write(ids if whole <= left else ids[: int(left) - whole])
            counts.text_tokens += len(ids)
            counts.text_bytes += len(text.encode())
            advance(writer.num_tokens - before)
        for name, writer in writers.items():
            if writer.num_documents == 0:
                raise ValueError(_no_documents(name, prefix, files, validation_fraction))
        splits = {
            name: Split(writer.num_documents, writer.num_tokens, writer.commit()) for name, writer in writers.items()
        }
    seconds = time.monotonic() - started
    tokens_per_byte = counts.text_tokens / counts.text_bytes
    return PrepareSummary(splits, counts.empty, tokens_per_byte, seconds, bos_token or "", dtype)


@dataclass
class _Counts:
    """What only the pass over the documents can tell."""

    empty: int = 0
    text_tokens: int = 0
    text_bytes: int = 0

    def filled(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts that have any, counting the others."""
        for text in texts:
            if text:
                yield text
            else:
                self.empty += 1


def _no_documents(name: str, prefix: str, files: list[Path], validation_fraction: float) -> str:
    if name == prefix:
        return f"no document of the {len(files)} files, {files[0]} first, has text for {name!r}; give more text"
    return f"no document fell into --validation-fraction {validation_fraction}; raise it, or give more documents"


def _input_files(inputs: Sequence[Path]) -> list[Path]:
    files = []
    for path in (path.expanduser() for path in inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if kind(file) in _SUFFIXES and file.is_file())
            if not found:
                raise FileNotFoundError(f"{path} holds none of {', '.join(_SUFFIXES)} files; give a folder that does")
            files += found
        elif is_pattern(path):
            files += expand(path)
        elif not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give files of {', '.join(_SUFFIXES)}, or folders")
        else:
            files.append(path)
    for path in files:
        if kind(path) not in _SUFFIXES:
            raise ValueError(
                f"{path} has suffix {kind(path)!r}; choose one of {', '.join(_SUFFIXES)}, as it is or compressed "
                f"({', '.join(COMPRESSIONS)})"
            )
    return files


def _texts(files: list[Path], text_key: str, split_on_blank_lines: bool) -> Iterator[str]:
    for path in files:
        if kind(path) != ".txt":
            yield from _column(path, text_key)
            continue
        try:
            with open_binary(path) as stream, io.TextIOWrapper(stream, encoding="utf-8") as reader:
                text = reader.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read: {fault(path)}; convert it to UTF-8") from error
        except unpacking_errors(path) as error:
            raise ValueError(f"{path} cannot be read: {error}; mend the file") from error
        yield from re.split(r"\n(?:[ \t]*\n)+", text.strip()) if split_on_blank_lines else [text]


def _column(path: Path, text_key: str) -> Iterator[str]:
    for number, row in enumerate(stream_file(path)):
        if text_key not in row:
            raise ValueError(f"{path}, row {number}: no {text_key!r} among {', '.join(row)}; name it with --text-key")
        text = row[text_key]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: {text_key!r} is {type(text).__name__}, not text; mend the row")
        yield text or ""


def _encoded(encoder: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each text with its ids, encoded in batches of about a megabyte; a text without any id is left out."""
    texts = iter(texts)
    for first in texts:
        batch, characters = [first], len(first)
        for text in itertools.islice(texts, _BATCH_DOCUMENTS - 1):
            batch.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                break
        for text, encoding in zip(batch, encoder.encode_batch_fast(batch, add_special_tokens=False)):
            if encoding.ids:
                yield text, encoding.ids


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that equal texts fall on the same side of a split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ModuleNotFoundError(
            "the package tokenizers, which turns text into tokens, is not installed; pip install 'am-data[prepare]'"
        ) from error
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a folder with a tokenizer.json, or that file")
    content = file.read_text(encoding="utf-8")
    try:
        known = "model" in json.loads(content)
    except (json.JSONDecodeError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{file} is no tokenizer.json (JSON with a 'model'); save one with save_pretrained")
    encoder = Tokenizer.from_str(content)
    # A tokenizer.json may carry the cut and the padding of the run that saved it.
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _bos_token(path: Path) -> str:
    """The `bos_token`, else the `eos_token`, that the tokenizer's folder names."""
    file = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    token = config.get("bos_token") or config.get("eos_token")
    if not token:
        raise ValueError(f"{file} names no bos_token or eos_token; choose one with --bos TOKEN, or --no-bos")
    return token["content"] if isinstance(token, dict) else token


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that is told of tokens written: a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit=" tokens", unit_scale=True) as bar:
            yield bar.update
        return
    started = shown = time.monotonic()
    tokens = 0

    def advance(new: int) -> None:
        nonlocal shown, tokens
        tokens += new
        now = time.monotonic()
        if now - shown >= _SECONDS_BETWEEN_LINES:
            shown = now
            print(f"{tokens:,} tokens, {tokens / (now - started):,.0f} tokens/s", file=sys.stderr, flush=True)

    yield advance

"""Files of rows: which ones a path or pattern stands for, how they are compressed, and where one of them is broken."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

# What `datasets` reads each kind of file with.
BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}


def _open_zstandard(path: Path, mode: str) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path} is read with the package zstandard, which is not installed; pip install zstandard"
        ) from error
    stream: IO[bytes] = zstandard.open(path, mode)
    return stream


_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
COMPRESSIONS = tuple(_OPENERS)
_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


def kind(path: Path) -> str:
    """The suffix that says what is in a file, such as `.jsonl` of `rows.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def is_pattern(path: Path) -> bool:
    """Whether a path stands for the files that match it; not where a file has that very name."""
    return glob.has_magic(str(path)) and not path.exists()


def expand(path: Path) -> list[Path]:
    """The files that a pattern matches, in the order of their names; FileNotFoundError for none."""
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise FileNotFoundError(f"no file matches {str(path)!r}; check the pattern")
    return found


def open_binary(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    stream: IO[bytes] = opener(path, "rb")
    return stream


def unpacking_errors(path: Path) -> tuple[type[Exception], ...]:
    """What is raised where a compressed file, or one of a folder, is broken or none of its kind."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS and not path.is_dir():
        return ()
    of_zstandard = (importlib.import_module("zstandard").ZstdError,) if suffix == ".zst" else ()
    # That of bz2 is a plain OSError.
    return (EOFError, OSError, lzma.LZMAError, zlib.error, *of_zstandard)


def fault(path: Path) -> str | None:
    """Where a file cannot be read, as people count: the line and what is wrong there; None where nothing is found.

    What libraries say counts from somewhere inside the file, or names no place at all. Reads the file up to the fault.
    """
    if kind(path) not in _TEXT:
        return None
    errors: tuple[type[Exception], ...] = (OSError, *unpacking_errors(path))
    try:
        with open_binary(path) as stream:
            return _fault_in(stream, kind(path))
    except errors as error:
        return str(error)


def _fault_in(stream: IO[bytes], suffix: str) -> str | None:
    lines: list[str] = []
    document: bool | None = None
    for number, raw in enumerate(stream, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            return f"line {number:,} is not UTF-8 at its byte {error.start + 1} ({raw[error.start]:#x})"
        if suffix not in (".jsonl", ".ndjson", ".json"):
            continue
        if document is None and line.strip():
            # A .json file has a row on each line, or is one value over many.
            document = suffix == ".json" and (line.lstrip()[0] == "[" or _json_fault(line) is not None)
        if document:
            lines.append(line)
            continue
        fault = _json_fault(line)
        if fault is not None:
            return f"line {number:,} is not JSON: {_said(fault)} at character {fault.pos + 1}"
    fault = _json_fault("".join(lines))
    return None if fault is None else f"line {fault.lineno:,} is not JSON: {_said(fault)} at character {fault.colno}"


def _said(fault: json.JSONDecodeError) -> str:
    # Some messages end as if a place followed.
    return fault.msg.rstrip(": ").removesuffix(" at")


def _json_fault(text: str) -> json.JSONDecodeError | None:
    try:
        if text.strip():
            json.loads(text)
    except json.JSONDecodeError as error:
        return error
    return None


def paths_of(rows: object) -> list[Path] | None:
    """The paths that `rows` names, `~` expanded; None where it holds rows itself."""
    named = [rows] if isinstance(rows, str | Path) else rows
    if not isinstance(named, Sequence) or not named or not all(isinstance(each, str | Path) for each in named):
        return None
    return [Path(each).expanduser() for each in named]

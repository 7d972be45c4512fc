"""Where rows come from: local files or a folder, a hub dataset, a `datasets.Dataset` or plain dicts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from am_data._files import BUILDERS, COMPRESSIONS, expand, fault, is_pattern, kind, open_binary, paths_of
from am_data._hub import require_on_hub
from am_data._messages import Row

if TYPE_CHECKING:
    import datasets

Rows: TypeAlias = "str | Path | Sequence[str | Path] | Sequence[Row] | datasets.Dataset"
Source: TypeAlias = "Sequence[Row] | datasets.Dataset"


@dataclass(frozen=True)
class Part:
    """Rows of one file, from its row `first` on."""

    file: Path
    rows: Source
    first: int = 0


class FileRows(Sequence[Row]):
    """The rows of files one after the other; each file has columns of its own. Of `several`, a row's place names it."""

    def __init__(self, parts: Sequence[Part], *, several: bool) -> None:
        self.parts = parts
        self._several = several
        self._starts = list(itertools.accumulate((len(part.rows) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            with _naming(part.file):
                yield from part.rows

    # Any: a sequence answers slices too, which nobody asks for here.
    def __getitem__(self, index: Any) -> Any:
        part, place = self._locate(index)
        with _naming(part.file):
            return part.rows[place]

    def place(self, index: int) -> str:
        """What people call row `index`: its number in its file, with the file's name where there are several."""
        part, place = self._locate(index)
        return f"{part.file.name}:{part.first + place}" if self._several else str(part.first + place)

    def each(self, change: Callable[[Source], Source]) -> FileRows:
        """The same files with `change` made to the rows of each."""
        parts = [Part(part.file, change(part.rows), part.first) for part in self.parts]
        return FileRows(parts, several=self._several)

    def spans(self, ranges: Sequence[tuple[int, int]]) -> FileRows:
        """The rows of each range `(begin, end)`."""
        parts = []
        for begin, end in ranges:
            for part, start in zip(self.parts, self._starts):
                first, last = max(begin - start, 0), min(end - start, len(part.rows))
                if first < last:
                    assert not isinstance(part.rows, Sequence)  # as `datasets` has read it
                    parts.append(Part(part.file, part.rows.select(range(first, last)), part.first + first))
        return FileRows(parts, several=self._several)

    def _locate(self, index: int) -> tuple[Part, int]:
        for part, start in zip(self.parts, self._starts):
            if start <= index < start + len(part.rows):
                return part, index - start
        raise IndexError(f"index {index} is out of range for {len(self)} rows")


def read_rows(rows: Rows, *, split: str = "train", name: str | None = None) -> Source:
    """Rows that can be counted and iterated, read through `datasets`; `split` may be sliced ("train[:100]").

    Files may be several, compressed, or named by patterns: they are one split, "train", in the order given. A folder is
    read as `datasets` reads one: files named for their split, or the output of `save_to_disk`. Raises
    FileNotFoundError for a path that does not exist, ValueError for an unknown kind of file, one that cannot be read
    (with its name and line), no rows, or a split of rows in memory.
    """
    paths = paths_of(rows)
    if paths is None:
        if split != "train":
            raise ValueError(f"split={split!r} was asked of rows in memory, which have none; select them before")
        assert not isinstance(rows, str | Path)
        # A list of paths was told apart above.
        return rows
    if len(paths) == 1 and not paths[0].is_file() and not is_pattern(paths[0]):
        return _read_folder(paths[0], split, name) if paths[0].is_dir() else _read_hub(rows, paths[0], split, name)
    parts = [Part(file, _load_file(file)) for file in row_files(paths)]
    return _sliced(FileRows(parts, several=len(parts) > 1), split)


def row_files(paths: Sequence[Path]) -> list[Path]:
    """The files that paths and patterns name; FileNotFoundError and ValueError for what is none of rows."""
    files = [file for path in paths for file in (expand(path) if is_pattern(path) else [path])]
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder among several paths; name its files by a pattern, '{file}/*.jsonl'")
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give files, or patterns such as 'rows/*.jsonl'")
        if kind(file) not in BUILDERS:
            raise ValueError(
                f"{file} has suffix {kind(file)!r}; choose one of {', '.join(BUILDERS)}, as it is or compressed "
                f"({', '.join(COMPRESSIONS)})"
            )
    return files


def columns_of(source: Source) -> list[str]:
    """The columns of all rows, in the order they are met in; of rows that a transform makes, those of the first."""
    if isinstance(source, FileRows):
        return list(dict.fromkeys(column for part in source.parts for column in columns_of(part.rows)))
    if isinstance(source, Sequence):
        return list(dict.fromkeys(column for row in source for column in row))
    return list(source[0]) if source.format["type"] == "custom" else list(source.column_names)


def _read_folder(path: Path, split: str, name: str | None) -> Source:
    import datasets

    if (path / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f"{path} has no split {split!r}; choose one of {', '.join(splits)}")
        return splits[split]
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return read_rows(datasets.load_from_disk(str(path)), split=split)
    return _load(str(path), name=name, split=split, source=path)


def _read_hub(rows: object, path: Path, split: str, name: str | None) -> datasets.Dataset:
    named = rows if isinstance(rows, str | Path) else path
    if isinstance(named, Path) or kind(path) in BUILDERS or named.startswith((".", "~", "/")) or len(path.parts) > 2:
        raise FileNotFoundError(f"{path} does not exist; give a file, a folder or a hub dataset id")
    require_on_hub(named)
    return _load(named, name=name, split=split, source=named)


def _load_file(file: Path) -> datasets.Dataset:
    options = {"sep": "\t"} if kind(file) == ".tsv" else {}
    # One file is one split, which `datasets` calls "train", whatever the file's name.
    return _load(BUILDERS[kind(file)], data_files=_literal(file), split="train", source=file, **options)


def _literal(file: Path) -> str:
    # `datasets` takes the name for a pattern.
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in str(file))


def _sliced(rows: FileRows, split: str) -> FileRows:
    """`rows` cut as a split such as "train[:100]" says."""
    import datasets

    if split == "train":
        return rows
    source = ", ".join(str(part.file) for part in rows.parts)
    with _naming_split(source, split):
        spans = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    # `to_absolute` leaves an end out where it is the end of the rows.
    ranges = [(span.from_ or 0, len(rows) if span.to is None else span.to) for span in spans]
    sliced = rows.spans(ranges)
    if not sliced.parts:
        raise ValueError(f"{source!r} (split={split!r}) gives no data; choose another split")
    return sliced


def stream_file(file: Path) -> Iterator[Row]:
    """The rows of a file, without holding them; ValueError where it cannot be read, with its name and line."""
    import datasets

    rows: Iterator[Row] | None = None
    while True:
        try:
            # Not while the row is used: it is of the whole process.
            with _quiet():
                rows = rows or iter(
                    datasets.load_dataset(
                        BUILDERS[kind(file)], data_files=_literal(file), split="train", streaming=True
                    )
                )
                row = next(rows)
        except StopIteration:
            return
        except (ValueError, EOFError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{file} cannot be read: {_reason(file, error)}; mend the file") from error
        yield row


def _load(builder: str, *, split: str, source: str | Path, **options: Any) -> datasets.Dataset:
    """`datasets.load_dataset`, whose complaints do not say which rows were asked for, nor where they are wrong."""
    import datasets

    if isinstance(source, Path) and source.suffix.lower() in COMPRESSIONS:
        # Says what is missing to read it.
        open_binary(source).close()
    try:
        with _quiet(), _naming_split(source, split):
            return datasets.load_dataset(builder, split=split, **options)
    except StopIteration as error:
        raise ValueError(f"{source} is empty; give a file with at least one row") from error


@contextlib.contextmanager
def _naming_split(source: str | Path, split: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (ValueError, EOFError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"{str(source)!r} (split={split!r}) cannot be read: {_reason(source, error)}; mend the file or choose "
            "another split"
        ) from error


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Text of another encoding is found when a row is read, where nobody knows the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {_reason(file, error)}; convert it to UTF-8") from error


def _reason(source: str | Path, error: Exception) -> str:
    found = fault(source) if isinstance(source, Path) and source.is_file() else None
    return found or str(error.__cause__ or error).strip().splitlines()[0].rstrip(".!")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what `datasets` logs of a file that it cannot read: it counts lines from somewhere inside the file."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)

"""Where rows come from: a local file or folder, a hub dataset, a `datasets.Dataset` or plain dicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from am_data._messages import Row

if TYPE_CHECKING:
    import datasets

Rows: TypeAlias = "str | Path | Sequence[Row] | datasets.Dataset"

_BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}


def read_rows(rows: Rows, *, split: str = "train", name: str | None = None) -> Sequence[Row] | datasets.Dataset:
    """Rows that can be counted and iterated, read through `datasets`; `split` may be sliced ("train[:100]").

    A folder is read as `datasets` reads one: files named for their split, or the output of `save_to_disk`. Raises
    FileNotFoundError for a path that does not exist, ValueError for an unknown kind of file, one that cannot be read,
    no rows, or a split of rows in memory.
    """
    if not isinstance(rows, str | Path):
        if split != "train":
            raise ValueError(f"split={split!r} was asked of rows in memory, which have none; select them before")
        return rows
    import datasets

    path = Path(rows).expanduser()
    if path.is_file():
        builder = _BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(f"{path} has suffix {path.suffix!r}; choose one of {', '.join(_BUILDERS)}")
        options = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        # One file is one split, which `datasets` calls "train", whatever the file's name.
        return _load(builder, data_files=str(path), split=split, source=path, **options)
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = datasets.load_from_disk(str(path))
            if split not in splits:
                raise ValueError(f"{path} has no split {split!r}; choose one of {', '.join(splits)}")
            return splits[split]
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            return read_rows(datasets.load_from_disk(str(path)), split=split)
        return _load(str(path), name=name, split=split, source=path)
    if (
        isinstance(rows, Path)
        or path.suffix.lower() in _BUILDERS
        or rows.startswith((".", "~", "/"))
        or len(path.parts) > 2
    ):
        raise FileNotFoundError(f"{path} does not exist; give a file, a folder or a hub dataset id")
    return _load(rows, name=name, split=split, source=rows)


def _load(builder: str, *, split: str, source: str | Path, **options: Any) -> datasets.Dataset:
    """`datasets.load_dataset`, whose complaints do not say which rows were asked for."""
    import datasets

    try:
        return datasets.load_dataset(builder, split=split, **options)
    except StopIteration as error:
        raise ValueError(f"{source} is empty; give a file with at least one row") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".!")
        raise ValueError(
            f"{str(source)!r} (split={split!r}) cannot be read: {reason}; mend the file or choose another split"
        ) from error

"""Is a checkpoint what it should be: before it is resumed from, copied away or deployed. Without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

from am_ckpt._boxes import describe
from am_ckpt._config import config_problems, read_config
from am_ckpt._errors import IncompleteError
from am_ckpt._format import ITEM_BYTES, Header, read_header
from am_ckpt._inventory import Inventory, cover_problem, inspect, require_recorded_size
from am_ckpt._io import BLOCK_BYTES, block_digests, digest, file_digest
from am_ckpt._layout import read_manifest
from am_ckpt._names import ADAPTER_CONFIG, INDEX
from am_ckpt._sources import Source
from am_ckpt._tensors import TensorReader

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass
class VerifyReport:
    """``problems`` make a checkpoint unfit, ``warnings`` may be meant. ``exit_code``: 0, 2 damaged or 3 incomplete."""

    path: str
    kind: str
    full: bool
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)

    def add(self, problem: Exception) -> None:
        """Take up a problem; damage weighs more than what is missing."""
        self.problems.append(str(problem))
        code = 3 if isinstance(problem, IncompleteError | FileNotFoundError) else 2
        self.exit_code = min(self.exit_code or code, code)


def verify(path: str | os.PathLike[str], *, full: bool = False, section: str | None = None) -> VerifyReport:
    """Check the checkpoint folder ``path``; it is only read.

    Always: every header and size, and that every element is in exactly one file; of our steps the manifest's digest
    and those of headers; of Hugging Face folders what config.json says against the tensors that are there, files that
    the index does not name, and whether tokenizer and chat template are there. ``full`` reads all data: of our steps
    against the digests in the manifest, so that any changed bit is found, and of every kind each floating-point tensor
    for NaN, infinities and nothing but zeros.

    Returns what was found. Raises as :func:`inspect` where the folder cannot be read at all.
    """
    own = _manifest_folder(Path(path).absolute())
    if own is not None:
        report = VerifyReport(str(own), "am-ckpt", full)
        check_manifest(own, full, report)
        if report.problems:
            return report
    inventory = inspect(path, section=section)
    if own is None:
        report = VerifyReport(str(inventory.path), inventory.kind, full)
    for problem in inventory.problems:
        report.add(problem)
    for name in [name for name in inventory.sections if name != inventory.section]:
        for tensor, source in inventory.sections[name].items():
            problem_there = cover_problem(tensor, source)
            if problem_there is not None:
                report.add(problem_there)
    report.warnings += inventory.notes
    _check_files(inventory, report)
    if full and not report.problems:
        _check_values(inventory, report)
    return report


def _manifest_folder(folder: Path) -> Path | None:
    for place in (folder, folder.parent) if folder.name == "model" else (folder,):
        if (place / "manifest.json").is_file():
            return place
    return None


def check_manifest(folder: Path, full: bool, report: VerifyReport) -> None:
    """Hold the files of a step against its manifest, all of their content if ``full``."""
    for record in read_manifest(folder)["files"]:
        path = folder / record["path"]
        try:
            require_recorded_size(path, record)
            if "header_xxh3_128" in record:
                header = read_header(path)
                if digest(header.text) != record["header_xxh3_128"]:
                    raise ValueError(f"{path} is damaged: its header is not the one that was written; copy it again")
                if full:
                    _check_blocks(path, header, record, report)
            elif (full or record["path"].startswith("state/")) and file_digest(path) != record["xxh3_128"]:
                raise ValueError(f"{path} is damaged: its content is not what was written; copy it again")
        except (ValueError, FileNotFoundError) as error:
            report.add(error)


def _check_blocks(path: Path, header: Header, record: Mapping[str, Any], report: VerifyReport) -> None:
    """Compare the data of a safetensors file with its digests, and say which tensors a changed block belongs to."""
    blocks = record["blocks_xxh3_128"]
    starts = range(header.data_start, record["bytes"], BLOCK_BYTES)
    if len(blocks) != len(starts):
        report.add(ValueError(f"{path}: the manifest has {len(blocks)} digests for {len(starts)} blocks"))
        return
    for start, expected, found in zip(starts, blocks, block_digests(path, header.data_start), strict=True):
        end = min(start + BLOCK_BYTES, record["bytes"])
        if found != expected:
            inside = [name for name, entry in header.entries.items() if entry.begin < end and start < entry.end]
            named = ", ".join(repr(name) for name in inside[:5]) + (" and more" if len(inside) > 5 else "")
            report.add(
                ValueError(
                    f"{path} is damaged: bytes {start} to {end} have digest {found} instead of {expected}; they hold "
                    f"{named}: copy the file again or take another step"
                )
            )


def _check_files(inventory: Inventory, report: VerifyReport) -> None:
    """What a program that opens the folder looks for besides weights."""
    files = inventory.files
    if inventory.kind == "huggingface":
        there = {path.name for path in inventory.path.glob("*.safetensors")}
        used = {chunk.path.name for source in inventory.tensors.values() for chunk in source.chunks}
        extra = sorted(there - used)
        if extra:
            what = INDEX if (inventory.path / INDEX).is_file() else "any reader"
            report.warnings.append(f"{len(extra)} weight files that {what} does not use: {', '.join(extra[:5])}")
    if inventory.adapter:
        if ADAPTER_CONFIG not in files:
            report.add(IncompleteError(f"{inventory.path} has no {ADAPTER_CONFIG}; peft cannot open it"))
        return
    if "config.json" not in files:
        if inventory.kind == "huggingface":
            report.add(IncompleteError(f"{inventory.path} has no config.json; transformers cannot open it"))
        return
    if inventory.mapping is None:
        for problem in config_problems(read_config(files["config.json"]), inventory.tensors):
            report.add(IncompleteError(f"{inventory.path}: config.json says {problem}"))
    if not any(name in files for name in _TOKENIZERS):
        report.warnings.append(f"no tokenizer ({', '.join(_TOKENIZERS[:3])}, ...) was found")
    elif "chat_template.jinja" not in files and not _has_template(files):
        report.warnings.append("no chat template was found")


def _has_template(files: Mapping[str, Path]) -> bool:
    return "tokenizer_config.json" in files and "chat_template" in read_config(files["tokenizer_config.json"])


def _check_values(inventory: Inventory, report: VerifyReport) -> None:
    with TensorReader(follow_symlinks=inventory.follow_symlinks) as reader:
        for name, source in inventory.tensors.items():
            if source.dtype not in ITEM_BYTES:
                continue
            zeros = True
            try:
                for box, bits in reader.blocks(name, source):
                    zeros = zeros and not bits.any()
                    bad = _not_finite(bits, source.dtype)
                    if bad is not None:
                        where = [
                            int(i) + o for i, o in zip(numpy.unravel_index(bad, box.size), box.offset, strict=True)
                        ]
                        report.add(
                            ValueError(
                                f"{name!r} {source.dtype} {list(source.shape)} is NaN or infinite at {where} "
                                f"({_files(source)}, part {describe(box)}): the training run diverged, or the file is "
                                "damaged; take an earlier step"
                            )
                        )
                        break
            except (ValueError, OSError) as error:
                report.add(error)
                continue
            if zeros and source.dtype in _EXPONENTS and source.chunks:
                report.warnings.append(f"{name!r} holds nothing but zeros ({_files(source)})")


def _files(source: Source) -> str:
    names = sorted({chunk.path.name for chunk in source.chunks})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# The exponent's bits of floating-point types that have infinities or NaN there: all ones means not finite.
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000, "F8_E5M2": 0x7C}


def _not_finite(bits: numpy.ndarray, dtype: str) -> int | None:
    """The flat index of the first value that is NaN or infinite, from its bits."""
    mask = _EXPONENTS.get(dtype)
    if mask is None:
        return None
    exponent = bits.dtype.type(mask)
    bad = (bits & exponent) == exponent
    return int(bad.argmax()) if bad.any() else None

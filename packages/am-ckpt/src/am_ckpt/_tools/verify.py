"""Is a checkpoint what it should be: before it is resumed from, copied away or deployed. Without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

from am_ckpt._boxes import describe
from am_ckpt._copy.values import TensorReader
from am_ckpt._dtypes import DTYPES, ITEM_BYTES
from am_ckpt._files.archive import changed_ranges
from am_ckpt._files.block_digests import changed_blocks
from am_ckpt._files.box_digests import changed_boxes, require_digested
from am_ckpt._files.cover import cover_problem
from am_ckpt._files.hf_folder import ADAPTER_CONFIG, INDEX, exported_files
from am_ckpt._files.model_config import (
    HEAD,
    config_doubts,
    config_problems,
    head_problem,
    read_config,
    tied_embedding,
    uneven_layers,
)
from am_ckpt._files.safetensors import read_header
from am_ckpt._files.step import MANIFEST, read_manifest
from am_ckpt._io import digest, file_digest, linked_file
from am_ckpt._sources import Source
from am_ckpt._tools.inspect import inspect, require_recorded_size, step_folder
from am_ckpt._tools.inventory import Inventory
from am_ckpt._tools.unchanged import export_problems
from am_ckpt.errors import IncompleteError, exit_code

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass
class VerifyReport:
    """`problems` make a checkpoint unfit, `warnings` may be meant. `exit_code`: 0, or that of the gravest: 4
    unsafe, 2 damaged, 3 incomplete, 5 could not be read, 8 of a newer release.

    `num_not_read`: entries of a `.distcp` folder that are pickles.
    """

    path: str
    kind: str
    full: bool
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    exit_code: int = 0
    num_not_read: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)

    def add(self, problem: Exception) -> None:
        """Take up a problem; what is unsafe weighs most, then damage, then what is missing."""
        self.problems.append(str(problem))
        codes = {self.exit_code, exit_code(problem)} - {0}
        self.exit_code = 4 if 4 in codes else min(codes)


def verify(
    path: str | os.PathLike[str], *, full: bool = False, section: str | None = None, assume_complete: bool = False
) -> VerifyReport:
    """Check the checkpoint folder `path`; it is only read.

    Always: every header and size, and that every element is in exactly one file; of our steps the manifest's digest
    and those of headers; of Hugging Face folders what config.json says against the tensors that are there (layers,
    vocabulary, experts, ties, dtypes), what one layer lacks and all others have, files and tensors that the index does
    not name, and whether tokenizer and chat template are there.

    `full` reads all tensors: of our steps against the digests in the manifest, of `merge(digest=True)` against its
    own, of files of `torch.save` (`.distcp` too) against their CRC-32, so that any changed bit is found; and of
    every kind each floating-point tensor for NaN, infinities and nothing but zeros, and a tied head against its
    embedding. What is no tensor in a `.distcp` folder is a pickle and is not read.

    `assume_complete`: see `merge`; without it, shards whose last ranks may be missing are a problem.

    Returns what was found. Raises as `inspect` where the folder cannot be read at all.
    """
    own = step_folder(Path(path).absolute())
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
    report.num_not_read = len(inventory.others) if own is None else 0
    for changed in export_problems(inventory, full):
        report.add(changed)
    with TensorReader(follow_symlinks=inventory.follow_symlinks) as reader:
        _check_files(inventory, report)
        config = inventory.files.get("config.json")
        if config is not None and not inventory.adapter:
            _check_config(inventory, read_config(config), reader, report)
        if full and inventory.kind in ("torch", "torch_checkpointing"):
            _check_pickled(inventory, report)
        for section_name in inventory.sections if not report.problems else ():
            _check_values(inventory, section_name, reader, report)
    try:
        inventory.require_shapes(config, assume_complete)
    except IncompleteError as error:
        report.add(error)
    return report


def check_manifest(folder: Path, full: bool, report: VerifyReport) -> None:
    """Hold the files of a step against its manifest; all of their content if `full`, otherwise that of its state."""
    manifest = read_manifest(folder)
    paths = {record["path"] for record in manifest["files"]}
    for entry in manifest["state"]:
        if f"state/{entry}.json" not in paths:
            report.add(
                IncompleteError(f"{folder / MANIFEST} lists the state {entry!r}, but no file state/{entry}.json")
            )
    for record in manifest["files"]:
        path = folder / record["path"]
        try:
            require_recorded_size(path, record)
            if "header_xxh3_128" in record:
                header = read_header(path)
                if digest(header.text) != record["header_xxh3_128"]:
                    raise ValueError(f"{path} is damaged: its header is not the one that was written; copy it again")
                if "boxes_xxh3_128" in record:
                    require_digested(path, header, record["boxes_xxh3_128"])
                    for problem in changed_boxes(path, header, record["boxes_xxh3_128"]) if full else ():
                        report.add(ValueError(problem))
                elif full or record["path"].startswith("state/"):
                    blocks = record["blocks_xxh3_128"]
                    for problem in changed_blocks(path, header, blocks, range(len(blocks))):
                        report.add(ValueError(problem))
            elif (full or record["path"].startswith("state/")) and file_digest(path) != record["xxh3_128"]:
                raise ValueError(f"{path} is damaged: its content is not what was written; copy it again")
        except (ValueError, FileNotFoundError) as error:
            report.add(error)


def _check_files(inventory: Inventory, report: VerifyReport) -> None:
    """What a program that opens the folder looks for besides weights."""
    files = inventory.files
    if inventory.kind == "huggingface":
        _check_index(inventory, report)
    exported = exported_files(inventory.path) if inventory.kind in ("huggingface", "adapter") else set()
    for name in sorted(name for name in exported if not os.path.lexists(inventory.path / name)):
        report.add(IncompleteError(f"{inventory.path} lacks {name}, which was exported with the rest; copy it again"))
    config, program = (ADAPTER_CONFIG, "peft") if inventory.adapter else ("config.json", "transformers")
    if config not in files:
        problem = f"{inventory.path} has no {config}; {program} cannot open it"
        if exported and config not in exported:
            # As of a module of one's own, which is loaded with load_hf.
            report.warnings.append(f"{problem}: it was exported without one")
        elif config not in exported and (inventory.adapter or inventory.kind == "huggingface"):
            report.add(IncompleteError(problem))
        return
    if inventory.adapter:
        return
    if not any(name in files for name in _TOKENIZERS):
        report.warnings.append(f"no tokenizer ({', '.join(_TOKENIZERS[:3])}, ...) was found")
    elif "chat_template.jinja" not in files and not _has_template(files):
        report.warnings.append("no chat template was found")


def _check_index(inventory: Inventory, report: VerifyReport) -> None:
    """Weight files, and tensors in weight files, that the index does not name."""
    indexed = (inventory.path / INDEX).is_file()
    there = {path.name for path in inventory.path.glob("*.safetensors")}
    used = {chunk.path for source in inventory.tensors.values() for chunk in source.chunks}
    extra = sorted(there - {path.name for path in used})
    if extra:
        what = INDEX if indexed else "any reader"
        report.warnings.append(f"{len(extra)} weight files that {what} does not use: {', '.join(extra[:5])}")
    for path in sorted(used) if indexed else ():
        others = [
            name
            for name in read_header(path, follow_symlinks=True).entries
            if name not in inventory.tensors or inventory.tensors[name].chunks[0].path != path
        ]
        if others:
            report.warnings.append(
                f"{len(others)} tensors of {path.name} that {INDEX} does not place there, such as {others[0]!r}: some "
                "programs load them, others do not"
            )


def _check_config(inventory: Inventory, config: Mapping[str, Any], reader: TensorReader, report: VerifyReport) -> None:
    """Hold the tensors against config.json; with a mapping, their names are not those that it speaks of."""
    if inventory.mapping is not None:
        return
    tensors = inventory.tensors
    for problem in config_problems(config, tensors):
        report.add(IncompleteError(f"{inventory.path}: config.json says {problem}"))
    head = head_problem(config, tensors) if inventory.kind == "huggingface" else None
    if head is not None:
        report.add(type(head)(f"{inventory.path}: config.json says {head}"))
    embedding = tied_embedding(config, tensors)
    if report.full and embedding is not None and not reader.equal(HEAD, tensors[HEAD], embedding, tensors[embedding]):
        report.add(
            ValueError(
                f"{inventory.path}: config.json says tie_word_embeddings=true, but {HEAD} and {embedding} have other "
                f"values: some programs ignore {HEAD}; say false there, or take the weights of one training"
            )
        )
    if inventory.kind == "huggingface":
        for what, sure in uneven_layers(config, tensors):
            if sure:
                report.add(IncompleteError(f"{inventory.path}: {what}"))
            else:
                report.warnings.append(what)
        report.warnings += config_doubts(config, tensors)


def _has_template(files: Mapping[str, Path]) -> bool:
    return "tokenizer_config.json" in files and "chat_template" in read_config(files["tokenizer_config.json"])


def _prefix(inventory: Inventory, section: str) -> str:
    """What names of tensors outside the model begin with in messages."""
    if section in ("", inventory.section):
        return ""
    return section + ("/" if inventory.kind == "am-ckpt" else ".")


def _check_pickled(inventory: Inventory, report: VerifyReport) -> None:
    """All bytes of files of `torch.save` against the CRC-32 that they carry."""
    inside: dict[Path, list[tuple[int, str]]] = {}
    for section, tensors in inventory.sections.items():
        for name, source in tensors.items():
            for place in (chunk for chunk in source.chunks if chunk.path.suffix != ".safetensors"):
                inside.setdefault(place.path, []).append((place.begin, _prefix(inventory, section) + name))
    for path, places in inside.items():
        for begin, end in changed_ranges(linked_file(path), 0, path.stat().st_size, str(path)):
            names = [repr(name) for start, name in places if begin <= start < end]
            report.add(_not_as_noted(path, begin, end, ", ".join(names[:5]) or "what describes the tensors"))


def _not_as_noted(path: Path, begin: int, end: int, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: bytes {begin} to {end} do not have the CRC-32 that torch noted; they hold {what}: copy "
        "the file again or take another step"
    )


def _check_values(inventory: Inventory, section: str, reader: TensorReader, report: VerifyReport) -> None:
    """Archives of `.distcp` files; with `full` every value: what is not finite, tensors of zeros.

    Outside the model both may be meant: moments start as zeros, and the best loss as infinity.
    """
    model = section == inventory.section
    prefix = _prefix(inventory, section)
    zeros = []
    for tensor, source in inventory.sections[section].items():
        name = prefix + tensor
        try:
            if not report.full:
                reader.located(name, source)
            elif source.dtype not in ITEM_BYTES:
                report.warnings.append(f"{name!r} is {source.dtype}: its values were not read")
            else:
                for chunk in source.chunks:
                    if chunk.archive_bytes is not None:
                        for begin, end in changed_ranges(chunk.path, chunk.begin, chunk.archive_bytes, str(chunk.path)):
                            report.add(_not_as_noted(chunk.path, begin, end, f"{name!r} {describe(chunk.box)}"))
                bad, only_zeros = _look(name, source, reader)
                if bad is not None and model:
                    report.add(
                        ValueError(f"{bad}: the training run diverged, or the file is damaged; take an earlier step")
                    )
                elif bad is not None:
                    report.warnings.append(bad)
                # Biases start as zeros, and some stay.
                if only_zeros and model and not name.endswith("bias"):
                    zeros.append(f"{name!r} ({_files(source)})")
        except (ValueError, OSError) as error:
            report.add(error)
    if zeros:
        more = f" and {len(zeros) - 5} more" if len(zeros) > 5 else ""
        report.warnings.append(f"nothing but zeros: {', '.join(zeros[:5])}{more}")


def _look(name: str, source: Source, reader: TensorReader) -> tuple[str | None, bool]:
    """The first value of a tensor that is NaN or infinite, as a sentence, and whether there are only zeros."""
    mask, pattern = DTYPES[source.dtype].not_finite or (0, 1)
    only_zeros = bool(mask) and source.dtype != "F8_E8M0" and bool(source.chunks)
    for box, bits in reader.blocks(name, source):
        # A complex number is two of 32 bits.
        values = bits.reshape(-1).view(numpy.uint32) if source.dtype == "C64" else bits.reshape(-1)
        bad = (values & values.dtype.type(mask)) == values.dtype.type(pattern)
        if bad.any():
            index = numpy.unravel_index(int(bad.argmax()) * bits.size // values.size, box.size)
            where = [int(i) + offset for i, offset in zip(index, box.offset, strict=True)]
            what = f"{name!r} {source.dtype} {list(source.shape)} is NaN or infinite at {where}"
            return f"{what} ({_files(source)}, part {describe(box)})", False
        # Without the sign.
        only_zeros = only_zeros and not (values << 1).any()
    return None, only_zeros


def _files(source: Source) -> str:
    names = sorted({chunk.path.name for chunk in source.chunks})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

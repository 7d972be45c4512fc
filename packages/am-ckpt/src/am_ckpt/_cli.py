"""The command `am-ckpt`: what is in a checkpoint, and a plain Hugging Face folder out of it.

Exit codes: 0 ok, 1 wrong usage, 2 damaged, 3 incomplete, 4 unsafe input refused, 5 input or output error, 6 conflict
with what is there, 7 different, 8 of a newer am-ckpt, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from am_ckpt import __version__
from am_ckpt.errors import ArgumentError, MissingTorchError, exit_code

_EPILOG = (
    "exit codes: 0 ok, 1 usage, 2 damaged, 3 incomplete, 4 unsafe input refused, 5 I/O error, 6 conflict with what is "
    "there, 7 different, 8 of a newer am-ckpt, 130 interrupted"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's) and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        for folder in options.folders:
            path = vars(options)[folder]
            if not os.path.isdir(path):
                raise ArgumentError(f"{path} is not a folder; give the folder of a checkpoint")
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on" if options.resumable and not options.no_fsync else ""
        print(f"am-ckpt: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads has seen enough (`| head`). What is left must not be written again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, MissingTorchError) as error:
        code = exit_code(error)
        if options.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": code}))
        print(f"am-ckpt: {error}", file=sys.stderr)
        return code


def _parser() -> _Parser:
    parser = _Parser("am-ckpt", description="Look into, check and merge training checkpoints.", epilog=_EPILOG)
    parser.set_defaults(folders=("path",), resumable=False)
    parser.add_argument("--version", action="version", version=f"am-ckpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    show = commands.add_parser("inspect", help="what a checkpoint folder holds, from headers alone", epilog=_EPILOG)
    show.add_argument("path", metavar="PATH")
    show.add_argument("--tensors", metavar="GLOB", default=None, help="list the tensors whose names match")
    show.add_argument("--chunks", action="store_true", help="with --tensors or --json: which bytes of which files")
    show.set_defaults(run=_inspect)
    merge = commands.add_parser("merge", help="shards to a Hugging Face folder, without a model", epilog=_EPILOG)
    merge.add_argument("path", metavar="SOURCE")
    merge.add_argument("destination", metavar="DESTINATION")
    merge.add_argument("--like", metavar="FOLDER", help="take config, tokenizer, template and code from here")
    merge.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of a weight file (default 5GB)")
    merge.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    merge.add_argument("--resume", action="store_true", help="go on with an interrupted merge")
    merge.add_argument("--overwrite", action="store_true", help="replace an export that is at DESTINATION")
    merge.add_argument("--digest", action="store_true", help="add am_ckpt_digests.json, which verify --full checks")
    merge.set_defaults(run=_merge, resumable=True)
    cut = commands.add_parser("reshard", help="the same values in the files of another layout", epilog=_EPILOG)
    cut.add_argument("path", metavar="SOURCE")
    cut.add_argument("destination", metavar="DESTINATION")
    cut.add_argument("--mesh", required=True, metavar="dp=4,tp=2", help="ranks of each axis")
    cut.add_argument("--placements", metavar="FILE", help="JSON of name pattern -> dim that tp cuts")
    cut.add_argument("--model-only", action="store_true", help="of a step: shards of its model, not a step")
    cut.add_argument("--resume", action="store_true", help="go on with an interrupted reshard")
    cut.set_defaults(run=_reshard, resumable=True)
    other = commands.add_parser("convert", help="the model in another kind of folder", epilog=_EPILOG)
    other.add_argument("path", metavar="SOURCE")
    other.add_argument("destination", metavar="DESTINATION")
    other.add_argument(
        "--to", required=True, choices=("hf", "sharded", "dcp"), help="Hugging Face, its shards, .distcp"
    )
    other.set_defaults(run=_convert)
    check = commands.add_parser("verify", help="is a checkpoint whole and unchanged", epilog=_EPILOG)
    check.add_argument("path", metavar="PATH")
    check.add_argument("--full", action="store_true", help="read all data: digests, NaN, tensors of zeros")
    check.set_defaults(run=_verify)
    compare = commands.add_parser("diff", help="two checkpoints of any kinds, tensor by tensor", epilog=_EPILOG)
    compare.add_argument("path", metavar="A")
    compare.add_argument("other", metavar="B")
    compare.add_argument("--tensors", metavar="GLOB", default="*", help="compare the tensors whose names match")
    compare.add_argument("--atol", type=float, default=0.0, metavar="X", help="allow |a - b| <= X + Y |b| (default 0)")
    compare.add_argument("--rtol", type=float, default=0.0, metavar="Y")
    compare.set_defaults(run=_diff, folders=("path", "other"))
    for command in (merge, cut, other):
        command.add_argument("--threads", type=int, metavar="N", help="default: cores, at most 8")
        command.add_argument("--no-fsync", action="store_true", help="do not wait for the disk")
        command.add_argument("--no-verify", action="store_true", help="do not check SOURCE by its stored digests")
    for command in (merge, cut, other, check):
        command.add_argument(
            "--assume-complete",
            action="store_true",
            help="of shards that do not say how large tensors are (torch's Hugging Face writer): no rank is missing",
        )
    for command in (show, merge, cut, other, check, compare):
        command.add_argument("--section", metavar="NAME", help="the part of a .distcp folder that is the model")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from am_ckpt._boxes import describe
    from am_ckpt._tools.inspect import inspect

    inventory = inspect(options.path, section=options.section)
    chosen = options.tensors or ("*" if options.json else None)
    names = [name for name in inventory.tensors if chosen is not None and fnmatchcase(name, chosen)]
    if options.json:
        plain = inventory.to_json(chunks=options.chunks)
        plain["tensors"] = {name: plain["tensors"][name] for name in names}
        print(json.dumps(plain, indent=1))
    else:
        step = f", step {inventory.step}" if inventory.step is not None else ""
        what = "adapter" if inventory.adapter else "model"
        ephemeral = ", ephemeral: a save of a newer step deletes it" if inventory.ephemeral else ""
        print(f"{inventory.path}: {inventory.kind}{step}{ephemeral}")
        print(f"{what}: {len(inventory.tensors)} tensors, {_size(inventory.num_bytes)}, {_dtypes(inventory)}")
        for section, tensors in inventory.sections.items():
            if section != inventory.section:
                print(f"{section or 'top level'}: {len(tensors)} tensors")
        if inventory.others:
            print(f"not tensors: {len(inventory.others)} entries")
        if inventory.files:
            print(f"files: {', '.join(sorted(inventory.files))}")
        for name in names:
            source = inventory.tensors[name]
            print(f"{name}  {source.dtype} {list(source.shape)}  in {len(source.chunks)} parts")
            for chunk in source.chunks if options.chunks else ():
                print(f"    {describe(chunk.box)}  {chunk.path.name} from byte {chunk.begin}")
        for note in inventory.notes:
            print(f"note: {note}")
        for problem in inventory.problems:
            print(f"problem: {problem}")
    return min(map(exit_code, inventory.problems), default=0)


def _dtypes(inventory: Any) -> str:
    counts: dict[str, int] = {}
    for source in inventory.tensors.values():
        counts[source.dtype] = counts.get(source.dtype, 0) + 1
    return ", ".join(f"{dtype} ({count})" for dtype, count in sorted(counts.items()))


def _merge(options: argparse.Namespace) -> int:
    from am_ckpt._tools.merge import merge

    report = merge(
        options.path,
        options.destination,
        like=options.like,
        max_shard_size=options.max_shard_size,
        dtype=options.dtype,
        section=options.section,
        threads=options.threads,
        resume=options.resume,
        overwrite=options.overwrite,
        fsync=not options.no_fsync,
        digest=options.digest,
        assume_complete=options.assume_complete,
        verify=not options.no_verify,
        progress=_progress_line() if sys.stderr.isatty() else None,
    )
    _show_copied(report, options)
    return 0


def _show_copied(report: Any, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        rate = report.num_bytes / max(report.seconds, 1e-9) / 1e9
        resumed = f", {_size(report.resumed_bytes)} of them from before" if report.resumed_bytes else ""
        print(
            f"{report.destination}: {report.num_tensors} tensors, {_size(report.num_bytes)}{resumed}, "
            f"from {report.kind}, {report.seconds:.1f} s ({rate:.1f} GB/s)"
        )
        for note in report.notes:
            print(f"note: {note}")


def _reshard(options: argparse.Namespace) -> int:
    from am_ckpt._tools.reshard import reshard

    report = reshard(
        options.path,
        options.destination,
        mesh=_mesh(options.mesh),
        placements=_placements(options.placements) if options.placements else None,
        model_only=options.model_only,
        section=options.section,
        threads=options.threads,
        resume=options.resume,
        fsync=not options.no_fsync,
        assume_complete=options.assume_complete,
        verify=not options.no_verify,
        progress=_progress_line() if sys.stderr.isatty() else None,
    )
    _show_copied(report, options)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from am_ckpt._tools.convert import convert

    report = convert(
        options.path,
        options.destination,
        to=options.to,
        section=options.section,
        threads=options.threads,
        fsync=not options.no_fsync,
        assume_complete=options.assume_complete,
        verify=not options.no_verify,
        progress=_progress_line() if sys.stderr.isatty() else None,
    )
    _show_copied(report, options)
    return 0


def _mesh(text: str) -> dict[str, int]:
    mesh: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.isdecimal():
            raise ArgumentError(f"--mesh {text}: {part!r} is not an axis and its size; write it as dp=4,tp=2")
        if axis in mesh:
            raise ArgumentError(f"--mesh {text} has {axis} twice")
        mesh[axis] = int(size)
    return mesh


def _placements(file: str) -> dict[str, int]:
    from am_ckpt._files.safetensors import parse_json

    try:
        placements = parse_json(Path(file).read_bytes(), file)
    except (ValueError, OSError) as error:
        raise ArgumentError(f"--placements: {error}") from error
    if not isinstance(placements, dict) or not all(type(dim) is int for dim in placements.values()):
        raise ArgumentError(f'{file} must map patterns of names to dims, as in {{"*.q_proj.weight": 0}}')
    return placements


def _verify(options: argparse.Namespace) -> int:
    from am_ckpt._tools.verify import verify

    report = verify(options.path, full=options.full, section=options.section, assume_complete=options.assume_complete)
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        for problem in report.problems:
            print(f"problem: {problem}")
        for warning in report.warnings:
            print(f"warning: {warning}")
        state = f"{len(report.problems)} problems" if report.problems else "ok"
        more = " and state" if report.kind == "am-ckpt" else ""
        depth = f"headers, sizes{more} read; --full reads all tensors"
        if options.full:
            left = f"; {report.num_not_read} entries that are no tensors were not" if report.num_not_read else ""
            depth = f"all {'data' if report.kind == 'am-ckpt' else 'tensors'} read{left}"
        print(f"{report.path}: {report.kind}, {state} ({depth})")
    return report.exit_code


def _diff(options: argparse.Namespace) -> int:
    from am_ckpt._tools.diff import diff, show

    report = diff(
        options.path,
        options.other,
        tensors=options.tensors,
        section=options.section,
        atol=options.atol,
        rtol=options.rtol,
    )
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        for line in show(report):
            print(line)
    return report.exit_code


def _size(num_bytes: int) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= power:
            return f"{num_bytes / power:.1f} {unit}"
    return f"{num_bytes} bytes"


def _progress_line() -> Callable[[int, int], None]:
    """A line on stderr, at most ten times a second."""
    started = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < 0.1 and done < total:
            return
        shown = now
        rate = done / max(now - started, 1e-9)
        left = (total - done) / max(rate, 1)
        share = done * 100 // max(total, 1)
        text = f"\r{share:3d} %  {_size(done)} of {_size(total)}  {rate / 1e9:.1f} GB/s  {left:.0f} s left "
        print(text, end="\n" if done >= total else "", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())

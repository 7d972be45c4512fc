"""am-ckpt against its peers, on checkpoints of 1 GB: merging, planning, saving, loading, saving in the background.

Run from the repository root: `python tools/bench/ckpt.py [--nemo-python PYTHON]`; see ckpt_merge.py and ckpt_save.py
for what is measured. Writes `tools/bench/results/ckpt.json`; with `--only PART` anew what that part measures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ckpt_merge
import ckpt_save

PARTS = ("merge", "consolidation", "planning", "memory", "save", "verified", "direct")
RESULT = Path(__file__).resolve().parent / "results/ckpt.json"


def table(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are promised."""
    fsdp, tp, save = result["merge"]["fsdp"], result["merge"]["tp_dim_1"], result["save"]
    others, memory = result["consolidation"], result["memory"]
    hundred = save["hundred_saves"]
    return {
        "merge FSDP / cp, wall, 1 thread": fsdp["wall: am-ckpt-1 / cp"],
        "merge FSDP / cp, CPU, 1 thread": fsdp["cpu: am-ckpt-1 / cp"],
        "merge FSDP / cp, wall, 2 threads": fsdp["wall: am-ckpt-2 / cp"],
        "merge FSDP with digests / cp, wall": fsdp["wall: am-ckpt-1-digest / cp"],
        "merge FSDP with digests / cp, CPU": fsdp["cpu: am-ckpt-1-digest / cp"],
        "merge TP dim 1 / cp, wall, 1 thread": tp["wall: am-ckpt-1 / cp"],
        "merge TP dim 1 / cp, wall, 2 threads": tp["wall: am-ckpt-2 / cp"],
        "torch's consolidation / merge, TP dim 1, wall": others["tp_dim_1"]["wall: torch-2 / am-ckpt-2"],
        "torch's consolidation / merge, TP dim 1, CPU": others["tp_dim_1"]["cpu: torch-2 / am-ckpt-2"],
        "torch's consolidation / merge, FSDP, wall": others["fsdp"]["wall: torch-2 / am-ckpt-2"],
        "torch's consolidation / merge, FSDP, CPU": others["fsdp"]["cpu: torch-2 / am-ckpt-2"],
        "peak memory of a merge, 20 GB / 1 GB": round(memory["20 GB"]["peak_bytes"] / memory["1 GB"]["peak_bytes"], 3),
        "growth of memory in a merge of 20 GB, MiB": round(memory["20 GB"]["peak_growth_bytes"] / 2**20, 1),
        "save / FileSystemWriter, CPU": save["ratios"]["save cpu: am-ckpt / dcp"],
        "save / HuggingFaceStorageWriter, CPU": save["ratios"]["save cpu: am-ckpt / dcp-hf"],
        "direct save / sharded save and merge, wall": result["direct"]["direct / sharded and merged"],
        "load that verifies / one that does not, wall, warm": result["verified"]["warm wall: verified / not"],
        "load that verifies / one that does not, wall, cold": result["verified"]["cold wall: verified / not"],
        "threads that only pread / load, wall (0.9 or more)": save["ratios"]["load wall: raw / am-ckpt"],
        ".distcp / load, wall": save["ratios"]["load wall: dcp / am-ckpt"],
        "asynchronous save / async_save, time blocked": save["ratios"]["blocked: am-ckpt / dcp"],
        "memory after 100 saves / after 5": round(hundred["bytes after 100"] / hundred["bytes after 5"], 3),
        **{
            f"planning, microseconds a chunk: {what}": row["cpu_microseconds_per_chunk"]
            for what, row in result["planning"].items()
            if what != "measured"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckpt_bench"))
    parser.add_argument("--nemo-python", help="the Python of an environment with nemo-automodel")
    parser.add_argument("--only", choices=PARTS, help="measure one part anew, keep the others")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    parts = {
        "merge": lambda: ckpt_merge.merges(options.folder, options.rounds),
        "consolidation": lambda: ckpt_merge.consolidations(options.folder, options.rounds, options.nemo_python),
        "planning": lambda: ckpt_merge.plans(options.folder),
        "memory": lambda: ckpt_merge.memory(options.folder),
        "save": lambda: ckpt_save.run(options.folder, options.rounds),
        "verified": lambda: ckpt_save.verified(options.folder, options.rounds),
        "direct": lambda: ckpt_save.direct(options.folder, options.rounds),
    }
    result: dict[str, Any] = json.loads(RESULT.read_text()) if options.only is not None else {}
    try:
        for name, part in parts.items():
            if options.only in (None, name):
                result[name] = part() | {"measured": conditions(options.rounds)}
                print(name, json.dumps(result[name], indent=1), flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    result = {"table": table(result)} | {name: result[name] for name in parts}
    print(json.dumps(result["table"], indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def conditions(rounds: int) -> dict[str, Any]:
    """When and where a part was measured."""
    return {
        "rounds": rounds,
        "load_average": os.getloadavg(),
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "safetensors", "am-ckpt")},
        "kernel": platform.release(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()

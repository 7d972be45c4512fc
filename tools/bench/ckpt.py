"""am-ckpt against its peers, on checkpoints of 1 GB: merging, planning, saving, loading, saving in the background.

Run from the repository root: `python tools/bench/ckpt.py [--nemo-python PYTHON]`; see ckpt_merge.py and ckpt_save.py
for what is measured. Writes `tools/bench/results/ckpt.json`.
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

RESULT = Path(__file__).resolve().parent / "results/ckpt.json"


def table(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that are promised."""
    fsdp, tp, save = result["merge"]["fsdp"], result["merge"]["tp_dim_1"], result["save"]
    memory = result["merge"]["memory"]
    hundred = save["hundred_saves"]
    return {
        "merge FSDP / cp, wall, 1 thread": fsdp["wall: am-ckpt-1 / cp"],
        "merge FSDP / cp, CPU, 1 thread": fsdp["cpu: am-ckpt-1 / cp"],
        "merge FSDP / cp, wall, 2 threads": fsdp["wall: am-ckpt-2 / cp"],
        "merge FSDP with digests / cp, wall": fsdp["wall: am-ckpt-1-digest / cp"],
        "merge FSDP with digests / cp, CPU": fsdp["cpu: am-ckpt-1-digest / cp"],
        "merge TP dim 1 / cp, wall, 1 thread": tp["wall: am-ckpt-1 / cp"],
        "merge TP dim 1 / cp, wall, 2 threads": tp["wall: am-ckpt-2 / cp"],
        "torch's consolidation / merge, TP dim 1": tp["wall: torch-2 / am-ckpt-2"],
        "torch's consolidation / merge, FSDP": fsdp["wall: torch-2 / am-ckpt-2"],
        "NeMo's consolidation / merge, FSDP": fsdp.get("wall: nemo-2 / am-ckpt-2"),
        "peak memory of a merge, 20 GB / 1 GB": round(memory["20 GB"]["peak_bytes"] / memory["1 GB"]["peak_bytes"], 3),
        "growth of memory in a merge of 20 GB, MiB": round(memory["20 GB"]["peak_growth_bytes"] / 2**20, 1),
        "save / FileSystemWriter, CPU": save["ratios"]["save cpu: am-ckpt / dcp"],
        "save / HuggingFaceStorageWriter, CPU": save["ratios"]["save cpu: am-ckpt / dcp-hf"],
        "direct save / sharded save and merge, wall": result["direct"]["direct / sharded and merged"],
        "safetensors and copy / load, wall": save["ratios"]["load wall: safetensors / am-ckpt"],
        "load that verifies / one that does not, wall, warm": result["verified"]["warm wall: verified / not"],
        "load that verifies / one that does not, wall, cold": result["verified"]["cold wall: verified / not"],
        "threads that only pread / load, wall": save["ratios"]["load wall: raw / am-ckpt"],
        ".distcp / load, wall": save["ratios"]["load wall: dcp / am-ckpt"],
        "asynchronous save / async_save, time blocked": save["ratios"]["blocked: am-ckpt / dcp"],
        "memory after 100 saves / after 5": round(hundred["bytes after 100"] / hundred["bytes after 5"], 3),
        **{
            f"planning, microseconds a chunk: {what}": row["cpu_microseconds_per_chunk"]
            for what, row in result["merge"]["planning"].items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ckpt_bench"))
    parser.add_argument("--nemo-python", help="the Python of an environment with nemo-automodel")
    parser.add_argument(
        "--only", choices=("merge", "save", "verified", "direct"), help="print one part and write nothing"
    )
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    parts = {
        "merge": lambda: ckpt_merge.run(options.folder, options.rounds, options.nemo_python),
        "save": lambda: ckpt_save.run(options.folder, options.rounds),
        "verified": lambda: ckpt_save.verified(options.folder, options.rounds),
        "direct": lambda: ckpt_save.direct(options.folder, options.rounds),
    }
    result: dict[str, Any] = {}
    try:
        for name, part in parts.items():
            if options.only in (None, name):
                result[name] = part()
                print(name, json.dumps(result[name], indent=1), flush=True)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    if options.only is not None:
        return
    result = {"table": table(result), "rounds": options.rounds} | result
    result["load_average"] = os.getloadavg()
    result["versions"] = {
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "safetensors", "am-ckpt")},
        "kernel": platform.release(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result["table"], indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

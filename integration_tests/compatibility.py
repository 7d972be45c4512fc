"""Which features have been proven together, out of the cells of the table of equivalence and what is refused.

    python -m integration_tests.compatibility

writes `docs/compatibility.md`, to read, and `recipes/src/am_recipes/compatibility.json`, which the check of a config
reads; a test fails where they are not what this module gives.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from pathlib import Path
from typing import Any

from integration_tests.cells import EIGHT_RANKS, FEW_RANKS, PAIRS

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "recipes/src/am_recipes/compatibility.json", ROOT / "docs/compatibility.md"
# Each feature, and the config that has it: dotted path to a value, `>N`, `null` or `not null`.
FEATURES: dict[str, dict[str, Any]] = {
    "fsdp2": {"distributed.strategy": "fsdp2", "distributed.dp_replicate_size": 1},
    "hsdp": {"distributed.strategy": "fsdp2", "distributed.dp_replicate_size": ">1"},
    "ddp": {"distributed.strategy": "ddp"},
    "tp": {"distributed.tp_size": ">1"},
    "sp": {"distributed.sequence_parallel": True},
    "cp": {"distributed.cp_size": ">1"},
    "recompute_selective": {"distributed.activation_checkpointing": "selective"},
    "recompute_full": {"distributed.activation_checkpointing": "full"},
    "cpu_offload": {"distributed.cpu_offload": True},
    "packed": {"packed_sequence.packed_sequence_size": ">0"},
    "padded": {"packed_sequence.packed_sequence_size": 0},
    "full": {"peft": "null"},
    "lora": {"peft": "not null"},
    "tied": {"facts.tied": True},
    "untied": {"facts.tied": False},
    "dense": {"facts.experts": False},
    "moe": {"facts.experts": True},
    "accumulation": {"facts.micro_batches": ">1"},
    "sft": {"recipe": "sft"},
    "kd": {"recipe": "kd"},
    "pretrain": {"recipe": "pretrain"},
    "vlm": {"recipe": "vlm"},
}
# Of each group a config has one.
EXCLUSIVE = (
    {"fsdp2", "hsdp", "ddp"},
    {"recompute_selective", "recompute_full"},
    {"packed", "padded"},
    {"full", "lora"},
    {"tied", "untied"},
    {"dense", "moe"},
    {"sft", "kd", "pretrain", "vlm"},
    # These two have no section packed_sequence.
    *({recipe, rows} for recipe in ("pretrain", "vlm") for rows in ("packed", "padded")),
)
# Why two features do not go together, and the nearest legal choice.
REFUSED = {
    ("cp", "vlm"): (
        "images stand at places of the whole sequence, which no rank would have",
        "cp_size=1 with more of dp_size or tp_size",
    ),
    ("ddp", "cpu_offload"): ("ddp keeps weights whole on every rank", "strategy=fsdp2"),
}
# Combinations that whole runs of a recipe show, each named by the test that does.
_PRETRAIN = tuple(
    {"pretrain", "full", *model, *layout}
    for model in ({"tied", "dense"}, {"untied", "moe"})
    for layout in (
        {"fsdp2", "cpu_offload"},
        {"fsdp2", "accumulation", "recompute_full"},
        {"ddp", "accumulation"},
        {"fsdp2", "tp", "sp", "accumulation", "recompute_selective"},
        {"fsdp2", "cp"},
    )
)
_VLM = tuple(
    {"vlm", "full", "untied", "dense", *layout}
    for layout in (
        {"fsdp2", "cpu_offload"},
        {"fsdp2", "accumulation", "recompute_full"},
        {"ddp", "accumulation"},
        {"fsdp2", "tp", "sp", "recompute_selective"},
    )
)
RUNS: dict[str, tuple[set[str], ...]] = {
    "test_pretrain.py::test_layouts_agree": _PRETRAIN,
    "test_vlm.py::test_layouts_agree": _VLM,
}
_NAMES = {"supported": "yes", "refused": "no", "untested": "?"}


def proven() -> set[frozenset[str]]:
    """Every pair of features that is in a cell, or in a run."""
    together = [case.features() | layout.features() for case, layout in (*FEW_RANKS, *PAIRS, *EIGHT_RANKS)]
    together += [features for runs in RUNS.values() for features in runs]
    return {frozenset(pair) for features in together for pair in itertools.combinations(sorted(features), 2)}


def pairs() -> list[dict[str, str | None]]:
    found, refused = proven(), {frozenset(pair): why for pair, why in REFUSED.items()}
    result: list[dict[str, str | None]] = []
    for a, b in itertools.combinations(FEATURES, 2):
        pair = frozenset((a, b))
        if any(pair <= group for group in EXCLUSIVE):
            continue
        reason, nearest = refused.get(pair, (None, None))
        status = "refused" if reason else "supported" if pair in found else "untested"
        assert not (reason and pair in found), f"{a} x {b} is refused, and a cell has it"
        result.append({"a": a, "b": b, "status": status, "reason": reason, "nearest": nearest})
    return result


def data() -> str:
    """The file that the check of a config reads."""
    lines = [json.dumps(pair) for pair in pairs()]
    return f'{{"features": {json.dumps(FEATURES, indent=1)},\n"pairs": [\n' + ",\n".join(lines) + "\n]}\n"


def page() -> str:
    """The same to read."""
    status = {frozenset((str(pair["a"]), str(pair["b"]))): pair for pair in pairs()}
    counts = {name: sum(pair["status"] == name for pair in status.values()) for name in _NAMES}
    often = [layout for _, layout in (*PAIRS, *FEW_RANKS)]
    four = sum(layout.world_size == 4 for layout in often)
    layouts = list(FEATURES)[:9]
    meaning = (
        "Two steps of training in a layout are held against one process: the loss, every gradient by name, the norm "
        "and every weight, each within 1e-5 of its largest value in float32. Every pair marked *yes* is in at least "
        "one such cell, or, of pretrain and vlm, in a whole run of the recipe, of which the logged numbers and the "
        "exported weights are compared, and no gradients by name; *no* is refused when a config is checked, before "
        "anything is loaded; *?* has not been held against one process, and a run says so. Written by "
        "`python -m integration_tests.compatibility`."
    )
    numbers = (
        f"Pairs: {counts['supported']} proven, {counts['refused']} refused, {counts['untested']} untested. Cells: "
        f"{four} on 4 ranks and {len(often) - four} on 1 or 2 in every run of the tests, {len(EIGHT_RANKS)} of "
        "three axes on 8 ranks in `nox -s slow`. sp is sequence parallelism beside tp."
    )
    lines = [
        "# What has been proven together",
        "",
        textwrap.fill(meaning, 120),
        "",
        textwrap.fill(numbers, 120),
        "",
        "| | " + " | ".join(layouts) + " |",
        "|---|" + "---|" * len(layouts),
    ]
    for name in FEATURES:
        row = []
        for other in layouts:
            pair = status.get(frozenset((name, other)))
            row.append("" if pair is None else _NAMES[str(pair["status"])])
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "## Refused", "", "| | reason | choose |", "|---|---|---|"]
    lines += [f"| {a} x {b} | {reason} | {nearest} |" for (a, b), (reason, nearest) in REFUSED.items()]
    lines += [
        "| strategy megatron_fsdp | needs a GPU, and none has proven it yet against one process | strategy fsdp2 |",
        "| pp_size, ep_size above 1 | not there yet | 1 |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    DATA.write_text(data())
    PAGE.write_text(page())

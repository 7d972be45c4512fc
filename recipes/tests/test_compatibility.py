"""What a config asks together is looked up in the table of equivalence before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from am_recipes import compatibility
from am_recipes.configs import ConfigError, parse
from am_recipes.settings import plain

FEATURES = {
    "tp": {"distributed.tp_size": ">1"},
    "sp": {"distributed.sequence_parallel": True},
    "lora": {"peft": "not null"},
    "full": {"peft": "null"},
    "tied": {"facts.tied": True},
    "hsdp": {"distributed.strategy": "fsdp2", "distributed.dp_replicate_size": ">1"},
}
PAIRS = [
    {"a": "tp", "b": "sp", "status": "supported", "reason": None, "nearest": None},
    {"a": "tp", "b": "lora", "status": "refused", "reason": "halves differ", "nearest": "tp_size=1"},
    {"a": "full", "b": "tp", "status": "untested", "reason": None, "nearest": None},
]


def table(*pairs):
    return compatibility.read(json.dumps({"features": FEATURES, "pairs": [*PAIRS, *pairs], "reading": ""}))


def config(tp=1, peft=None, sp=False, replicas=1, **facts):
    layout = {"tp_size": tp, "sequence_parallel": sp, "strategy": "fsdp2", "dp_replicate_size": replicas}
    return {"distributed": layout, "peft": peft, **({"facts": facts} if facts else {})}


def test_features_are_what_holds_of_a_config():
    assert table().active(config()) == ["full"]
    assert table().active(config(tp=2, sp=True, peft={"r": 2}, tied=True)) == ["tp", "sp", "lora", "tied"]
    assert table().active(config(replicas=2, tied=False)) == ["full", "hsdp"]
    # Nothing of a section that is null, and nothing of one that the recipe does not have.
    assert table().active({"distributed": None}) == []


def test_a_refused_pair_says_why_and_what_to_choose():
    key, message = table().refused(config(tp=2, peft={"r": 2}))
    assert key == "distributed.tp_size"
    assert message == (
        "tp (distributed.tp_size=2) and lora (peft={'r': 2}) do not go together: halves differ; choose tp_size=1"
    )
    assert table().refused(config(tp=2)) is None


def test_a_pair_of_a_layout_that_nobody_tried_is_a_line():
    assert table().untested(config(tp=2, sp=True)) == (
        "not held against one process in the table of equivalence: full x tp, sp x full"
    )
    assert table().untested(config(tied=True)) is None


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"a": "tp", "b": "ep", "status": "supported"}, "pair tp x ep: no feature ep; describe it"),
        (
            {"a": "tp", "b": "hsdp", "status": "refused", "reason": "no"},
            "is refused without a reason or a nearest legal choice",
        ),
    ],
)
def test_a_table_with_holes_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        table(pair)


def test_every_feature_of_the_table_names_keys_that_a_recipe_has():
    """A misspelt path would never be active."""
    tiny = Path(__file__).parents[1] / "configs/tiny.yaml"
    kd, vlm = (tiny.with_name(name) / "tiny.yaml" for name in ("kd", "vlm"))
    known = {f"facts.{name}" for name in ("tied", "experts", "micro_batches")}
    for file in (tiny, kd, vlm):
        values = plain(parse(file))
        known |= {*values, *(f"distributed.{name}" for name in values["distributed"])}
    known |= {"packed_sequence.packed_sequence_size"}
    for conditions in compatibility.table().features.values():
        assert set(conditions) <= known


def test_a_config_is_held_against_the_table_without_torch():
    script = """
    import sys
    from am_recipes.configs import ConfigError, parse
    try:
        parse(sys.argv[1], [("distributed.cp_size", "2")])
    except ConfigError as error:
        print(error)
    print("torch" in sys.modules)
    """
    path = Path(__file__).parents[1] / "configs/vlm/tiny.yaml"
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(line[4:] for line in script.splitlines()), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    refusal, has_torch = result.stdout.splitlines()
    assert "distributed.cp_size: cp (distributed.cp_size=2) and vlm (recipe=vlm) do not go together: " in refusal
    assert "; choose " in refusal
    assert has_torch == "False"


@pytest.mark.parametrize("layout", ["{tp_size: 2}", "{cp_size: 2}", "{cp_layout: contiguous, cp_size: 1, tp_size: 2}"])
def test_a_teacher_is_asked_about_the_tokens_of_its_student(layout):
    path = Path(__file__).parents[1] / "configs/kd/tiny.yaml"
    with pytest.raises(ConfigError, match=r"teacher_distributed: tp_size=\d, cp_size=\d.* the student's tp_size=1"):
        parse(path, [("teacher_distributed", layout)])
    same = [("teacher_distributed", "{strategy: ddp, tp_size: 2}"), ("distributed.tp_size", "2")]
    assert parse(path, same).teacher_distributed.tp_size == 2
    assert parse(path, [("teacher_distributed", layout), ("kd_ratio", "0")]).kd_ratio == 0

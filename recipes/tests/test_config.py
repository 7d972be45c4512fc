"""What `parse` and `check_targets` accept, what they refuse and in which words, and what is saved."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from am_recipes import sections
from am_recipes.configs import ConfigError, SftConfig, Target, check_targets, identity_difference, parse

MINIMAL = """\
recipe: sft
model:
  name_or_path: some/folder
dataset:
  path: rows.jsonl
optimizer:
  lr: 1e-4
step_scheduler:
  max_steps: 10
"""

TARGETS = """\
class Rows:
    def __init__(self, tokenizer, path, *, limit=None, transform=None):
        self.tokenizer, self.path, self.limit, self.transform = tokenizer, path, limit, transform

    @classmethod
    def from_pretrained(cls, path, **options):
        rows = cls(options.pop("tokenizer"), path)
        rows.options = options
        return rows

def scale(factor, offset=0):
    return ("scale", factor, offset)

def without_tokenizer(path):
    return path

VERSION = 3
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config and, beside it, a module of targets; return the config's path. The test runs in that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_targets", raising=False)
    (tmp_path / "my_targets.py").write_text(TARGETS)

    def write(text=MINIMAL, name="config.yaml"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return Path(name)

    return write


def refused(path, overrides=(), *, targets=False):
    """The message of the refusal, which must also leave the folder as it was."""
    before = sorted(Path().rglob("*"))
    if targets:
        config = parse(path, overrides)
        with pytest.raises(ConfigError) as caught:
            check_targets(config)
    else:
        with pytest.raises(ConfigError) as caught:
            parse(path, overrides)
    assert [name for name in sorted(Path().rglob("*")) if "__pycache__" not in str(name)] == before
    return str(caught.value)


def test_defaults(write):
    config = parse(write())
    assert isinstance(config, SftConfig)
    assert config.seed == 42
    assert config.run_dir == Path("runs/config")
    assert config.source == Path("config.yaml")
    assert config.dataset == Target("am_data.ChatDataset", {"path": "rows.jsonl"})
    assert config.loss_fn == Target("am_loss.linear_cross_entropy")
    assert config.peft is None
    assert config.validation_datasets == {}
    assert config.clip_grad_norm.max_norm == 1.0
    assert config.optimizer.hyperparameters() == {"lr": 1e-4}
    assert config.distributed.sizes() == {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "pp": 1, "ep": 1}
    assert config.goal() == {"max_steps": 10, "num_epochs": None, "max_tokens": None}


def test_nothing_heavy_is_imported_and_nothing_is_written(write):
    """In a fresh interpreter, for a good and for a bad config."""
    write()
    write(MINIMAL + "checkpont: {}\n", "bad.yaml")
    script = """
    import sys
    from am_recipes.configs import ConfigError, parse
    print(parse("config.yaml", [("optimizer.weight_decay", "0.1")]).to_yaml()[:11])
    try:
        parse("bad.yaml")
    except ConfigError as error:
        print(error)
    heavy = {"torch", "transformers", "datasets", "peft", "numpy", "am_data", "am_models", "my_targets"}
    print(sorted(heavy & sys.modules.keys()))
    """
    before = sorted(Path().iterdir())
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "recipe: sft",
        "bad.yaml:10: checkpont: unknown key; did you mean 'checkpoint'?",
        "[]",
    ]
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("sede: 1", "config.yaml:10: sede: unknown key; did you mean 'seed'?"),
        ("seed: 1\nseed: 2", "config.yaml:11: seed: duplicate key; it is already set on line 10"),
        ("seed: 1.5", "config.yaml:10: seed: expected an integer, got 1.5"),
        ("seed: true", "config.yaml:10: seed: expected an integer, got True"),
        ("seed: -1", "config.yaml:10: seed: must be at least 0, got -1"),
        ("run_dir: 2024", "config.yaml:10: run_dir: expected a path, got 2024"),
        ("dataloader: {shuffle: 1}", "config.yaml:10: dataloader.shuffle: expected true or false, got 1"),
        (
            "dataloader: true",
            "config.yaml:10: dataloader: expected a mapping with shuffle, prefetch, drop_last, collate, got True",
        ),
        (
            "distributed:\n  strategy: fspd2",
            "config.yaml:11: distributed.strategy: must be one of 'fsdp2', 'ddp', 'megatron_fsdp', got 'fspd2'; "
            "did you mean 'fsdp2'?",
        ),
        (
            "distributed: {pp_size: 2}",
            "config.yaml:10: distributed.pp_size: must be 1: no recipe splits this yet, got 2",
        ),
        ("distributed: {tp_size: 0}", "config.yaml:10: distributed.tp_size: must be at least 1, got 0"),
        (
            "distributed: {sequence_parallel: true}",
            "config.yaml:10: distributed.sequence_parallel: sequence_parallel=True says how matrices are split, and "
            "tp_size=1 splits none; raise it or remove this",
        ),
        (
            "distributed: {tp_plan: {'*.q_proj': colwise}}",
            "config.yaml:10: distributed.tp_plan: tp_plan={'*.q_proj': 'colwise'} says how matrices are split, and "
            "tp_size=1 splits none; raise it or remove this",
        ),
        (
            "distributed: {tp_size: 2, tp_plan: {}}",
            "config.yaml:10: distributed.tp_plan: tp_plan={} splits nothing; null takes the model's own plan",
        ),
        (
            "distributed: {tp_size: 2, tp_plan: {a: 1}}",
            "config.yaml:10: distributed.tp_plan.a: expected text, got 1",
        ),
        (
            "distributed: {cp_size: 2, cp_layout: zig-zag}",
            "config.yaml:10: distributed.cp_layout: must be one of 'zigzag', 'contiguous', got 'zig-zag'; "
            "did you mean 'zigzag'?",
        ),
        (
            "distributed: {strategy: megatron_fsdp}",
            "config.yaml:10: distributed.strategy: strategy=megatron_fsdp needs a GPU, and none has proven it yet "
            "against one process; choose fsdp2, which shards the same",
        ),
        (
            "distributed: {strategy: ddp, cpu_offload: true}",
            "config.yaml:10: distributed.cpu_offload: cpu_offload=True is of fsdp2, and strategy=ddp shards nothing; "
            "remove one",
        ),
        (
            "distributed: {reshard_after_forward: 1}",
            "config.yaml:10: distributed.reshard_after_forward: must be true, false or at least 2, got 1",
        ),
        ("distributed: {prefetch: 0}", "config.yaml:10: distributed.prefetch: must be at least 1, got 0"),
        (
            "distributed: {dp_size: 3, dp_replicate_size: 2}",
            "config.yaml:10: distributed: dp_size=3 is not a multiple of dp_replicate_size=2; "
            "dp_size counts all data-parallel ranks, replicas included",
        ),
        ("clip_grad_norm: {max_norm: 0}", "config.yaml:10: clip_grad_norm.max_norm: must be greater than 0, got 0"),
        (
            "clip_grad_norm: {max_norm: .nan}",
            "config.yaml:10: clip_grad_norm.max_norm: must be greater than 0, got nan",
        ),
        ("generate:\n  prompts:\n  - a\n  - 3", "config.yaml:13: generate.prompts.1: expected text, got 3"),
        ("generate: {prompts: hello}", "config.yaml:10: generate.prompts: expected a list, got 'hello'"),
        ("kernels: of", "config.yaml:10: kernels: must be one of 'auto', 'off', got 'of'; did you mean 'off'?"),
        ("checkpoint: {keep_last: 0}", "config.yaml:10: checkpoint.keep_last: must be at least 1, got 0"),
        (
            "  max_time: 2 hours",
            "config.yaml:10: step_scheduler.max_time: must be a time longer than 0 as SLURM writes",
        ),
        (
            "  max_time: 0:00",
            "config.yaml:10: step_scheduler.max_time: must be a time longer than 0 as SLURM writes it: 90 (",
        ),
        ("  max_time: 1.5", "config.yaml:10: step_scheduler.max_time: expected text, got 1.5"),
        (
            "lr_scheduler: {warmup_steps: 11}",
            "config.yaml:10: lr_scheduler: warmup_steps=11 is longer than the run of step_scheduler.max_steps=10",
        ),
        (
            "lr_scheduler: {style: linear, min_lr: 1.0}",
            "config.yaml:10: lr_scheduler: min_lr=1.0 is above the learning rate 0.0001",
        ),
        (
            "lr_scheduler: {style: wsd, warmup_steps: 4, decay_steps: 7}",
            "config.yaml:10: lr_scheduler: decay_steps=7 must be between 1 and 6, the steps of "
            "step_scheduler.max_steps=10 that follow step 4, the first at the full rate; change it",
        ),
        (
            "lr_scheduler: {style: wsd, decay_steps: 10}",
            "config.yaml:10: lr_scheduler: decay_steps=10 must be between 1 and 9, the steps of "
            "step_scheduler.max_steps=10 that follow step 1",
        ),
        (
            "lr_scheduler: {decay_steps: 3}",
            "config.yaml:10: lr_scheduler: decay_steps=3 is for style='wsd'; style='constant' has no such phase",
        ),
        ("validation_dataset_a: 3", "config.yaml:10: validation_dataset_a: expected a mapping with _target_"),
        ("validation_dataset: {_target_: nodots}", "config.yaml:10: validation_dataset._target_: 'nodots' is not the"),
        ("loss_fn: {_target_: [a]}", "config.yaml:10: loss_fn._target_: expected text, got a list of 1"),
        (
            "seed: !!python/name:os.system",
            "config.yaml:10: seed: the tag tag:yaml.org,2002:python/name:os.system is not",
        ),
        ("seed: !!int x", "config.yaml:10: seed: 'x' does not fit its tag"),
        ("seed: [1", "config.yaml:11: not YAML: "),
        ("seed: &a [*a]", "config.yaml:10: seed.0: an alias that contains itself"),
        ("<<: {seed: 1}", "config.yaml:10: <<: keys must be plain text; write merged keys out"),
    ],
)
def test_refused_with_file_line_path_and_constraint(write, extra, message):
    assert refused(write(MINIMAL + extra + "\n")).startswith(message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("recipe: sft\n", "", "config.yaml:1: the key 'recipe' is required: one of sft"),
        ("recipe: sft", "recipe: stf", "config.yaml:1: recipe: must be one of sft, pretrain, kd, vlm, got 'stf'"),
        ("  lr: 1e-4", "  lrr: 1e-4", "config.yaml:7: optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("  lr: 1e-4", "  eps: 1e-4", "config.yaml:6: optimizer: the key 'lr' is required"),
        ("  lr: 1e-4", "  lr: -1e-4", "config.yaml:7: optimizer.lr: must be at least 0, got -0.0001"),
        ("  lr: 1e-4", "  lr: fast", "config.yaml:7: optimizer.lr: expected a number, got 'fast'"),
        (
            "  lr: 1e-4",
            "  lr: 1\n  amsgard: true",
            "config.yaml:8: optimizer.amsgard: unknown key; did you mean 'amsgrad'?",
        ),
        (
            "  lr: 1e-4",
            "  lr: 1\n  betas: [0.9]",
            "config.yaml:8: optimizer.betas: expected a list of 2, got a list of 1",
        ),
        ("  lr: 1e-4", "  lr: 1\n  betas: [0.9, 1]", "config.yaml:8: optimizer.betas.1: must be in [0, 1), got 1"),
        (
            "  lr: 1e-4",
            "  lr: 1\n  param_group_overrides:\n  - {pattern: '('}",
            "config.yaml:9: optimizer.param_group_overrides.0.pattern: must be a regular expression, got '('",
        ),
        (
            "  lr: 1e-4",
            "  lr: 1\n  param_group_overrides:\n  - {pattern: a, lr_mul: 2}",
            "config.yaml:9: optimizer.param_group_overrides.0.lr_mul: unknown key; did you mean 'lr_mult'?",
        ),
        (
            "  lr: 1e-4",
            "  lr: 1\n  adamw: {lr: 1}",
            "config.yaml:1: optimizer.adamw is for torch.optim.Muon, which leaves a part to AdamW, and the optimizer "
            "is torch.optim.AdamW; remove it",
        ),
        ("max_steps: 10", "max_steps: 0", "config.yaml:9: step_scheduler.max_steps: must be at least 1, got 0"),
        ("max_steps: 10", "max_steps: 8.0", "config.yaml:9: step_scheduler.max_steps: expected an integer, got 8.0"),
        (
            "max_steps: 10",
            "max_steps: null",
            "config.yaml:8: step_scheduler: set one of max_steps, num_epochs, max_tokens or more",
        ),
        (
            "max_steps: 10",
            "max_steps: 10\n  global_batch_size: 10\n  local_batch_size: 4",
            "config.yaml:8: step_scheduler: global_batch_size=10 is not a multiple of local_batch_size=4; change one",
        ),
        (
            "max_steps: 10",
            "max_steps: 1\n  global_batch_size: 0",
            "config.yaml:10: step_scheduler.global_batch_size: must",
        ),
        ("name_or_path: some/folder", "dtype: auto", "config.yaml:2: model: give exactly one of name_or_path"),
        ("some/folder", "x\n  config: {model_type: llama}", "config.yaml:2: model: give exactly one of name_or_path"),
        ("name_or_path: some/folder", "config: {hidden_size: 3}", "config.yaml:2: model: config needs a model_type"),
        (
            "name_or_path: some/folder",
            "config: {model_type: llama}",
            "config.yaml:1: tokenizer.name_or_path is required with model.config",
        ),
        (MINIMAL, "", "config.yaml:1: expected a mapping of sections, got null"),
        (MINIMAL, "- a", "config.yaml:1: expected a mapping of sections, got a list of 1"),
    ],
)
def test_refused_values_of_required_sections(write, old, new, message):
    assert refused(write(MINIMAL.replace(old, new))).startswith(message)


def test_a_validation_dataset_of_null_is_none(write):
    text = MINIMAL + "validation_dataset: null\nvalidation_dataset_math: {path: math.jsonl}\n"
    assert list(parse(write(text)).validation_datasets) == ["val_loss_math"]
    assert parse(write(text), [("validation_dataset_math", "null")]).validation_datasets == {}


def test_what_fits_the_run_exactly_is_accepted(write):
    text = MINIMAL.replace("lr: 1e-4", "lr: 1\n  _target_: torch.optim.Muon\n  adamw: {lr: 0.5}")
    config = parse(write(text + "lr_scheduler: {style: wsd, warmup_steps: 4, decay_steps: 6}\n"))
    assert config.optimizer.options()["adamw"] == {"lr": 0.5}
    assert config.lr_scheduler.decay_steps == 6


# What each recipe makes of the capabilities it shares with the others: it takes the section, or says why it does not.
FOR_ALL = [
    "peft: {r: 2}",
    "freeze: [{freeze: a}]",
    "moe: {balance_loss: 0.01, z_loss: 0.001}",
    "export: {merge_adapter: true}",
    "sinks: [{_target_: my_targets.scale, factor: 2}]",
    "dataloader: {shuffle: false, prefetch: 0, drop_last: true, collate: {_target_: my_targets.scale}}",
    "model: {name_or_path: a, family: {_target_: my_targets.scale, factor: 2}}",
    "step_scheduler: {max_tokens: 100}",
]
RECIPES = ("sft", "pretrain", "kd", "vlm")
ONLY_FOR = {
    "packed_sequence: {packed_sequence_size: 64}": ("sft", "kd"),
    "tokenizer: {name_or_path: t}": ("sft", "pretrain", "kd"),
    "processor: {name_or_path: p}": ("vlm",),
    "model: {name_or_path: a, vision_family: {_target_: my_targets.scale, factor: 2}}": ("vlm",),
    "generate: {prompts: [a]}": ("sft", "pretrain", "kd"),
    "kd_ratio: 0.5": ("kd",),
    "temperature: 0.5": ("kd",),
    "teacher_model: {name_or_path: a}": ("kd",),
    "teacher_distributed: {strategy: ddp}": ("kd",),
    "kd_loss_fn: {_target_: my_targets.scale}": ("kd",),
}


def of_recipe(recipe, extra):
    """A config of `recipe` whose keys `extra` replaces."""
    text = MINIMAL.replace("sft", recipe) + ("teacher_model: {name_or_path: a}\n" if recipe == "kd" else "")
    return re.sub(rf"^{extra.partition(':')[0]}:.*\n(  .*\n)*", "", text, flags=re.MULTILINE) + extra + "\n"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("extra", [*FOR_ALL, *ONLY_FOR])
def test_a_capability_is_in_a_recipe_or_refused_there_by_name(write, recipe, extra):
    path = write(of_recipe(recipe, extra))
    if recipe in ONLY_FOR.get(extra, RECIPES):
        config = parse(path)
        Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert parse("saved.yaml") == config
    else:
        message = refused(path)
        assert f"not in recipe {recipe}: " in message
        assert extra.partition(":")[0] in message


VLM = """\
recipe: vlm
model:
  name_or_path: some/folder
dataset:
  path: rows.parquet
optimizer:
  lr: 1e-4
step_scheduler:
  max_steps: 10
"""


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{freeze: 5}]", "config.yaml:10: freeze.0.freeze: expected text, got 5"),
        ("[{freeze: ''}]", "config.yaml:10: freeze.0.freeze: must not be empty, got ''"),
        ("[{freez: a}]", "config.yaml:10: freeze.0.freez: unknown key; did you mean 'freeze'?"),
        ("[{freeze: a}, {}]", "config.yaml:10: freeze.1: give exactly one of freeze, unfreeze"),
        ("[{freeze: a, unfreeze: b}]", "config.yaml:10: freeze.0: give exactly one of freeze, unfreeze"),
        ("{freeze: a}", "config.yaml:10: freeze: expected a list, got"),
    ],
)
def test_freeze_rules_are_refused_where_they_stand(write, rules, message):
    assert refused(write(VLM + f"freeze: {rules}\n")).startswith(message)


def test_freeze_rules_are_those_of_am_peft(write):
    config = parse(write(VLM + "freeze: [{freeze: 'model.*'}, {unfreeze: model.connector}]\n"))
    assert config.freeze_rules() == [{"freeze": "model.*"}, {"unfreeze": "model.connector"}]
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse("saved.yaml") == config
    assert parse(write(VLM)).freeze_rules() is None


@pytest.mark.parametrize(
    "model",
    [
        "{dtype: auto}",
        "{name_or_path: a, config: {model_type: idefics3}}",
    ],
)
def test_a_vision_model_has_one_source(write, model):
    message = refused(write(VLM.replace("\n  name_or_path: some/folder", f" {model}")))
    assert message.startswith("config.yaml:2: model: give exactly one of name_or_path, config:")


def test_a_missing_file_is_a_config_error(write):
    write()
    assert refused(Path("confg.yaml")) == "confg.yaml: cannot read the config: No such file or directory"


def test_yaml_scalars_are_those_of_yaml_1_2(write):
    """PyYAML alone reads `off` as False, `1e-4` as text and a date as a date."""
    text = MINIMAL + "kernels: off\ndistributed: {activation_checkpointing: none, dp_size: none}\nrun_dir: 2024-01-01\n"
    config = parse(write(text))
    assert config.kernels == "off"
    assert config.distributed.activation_checkpointing == "none"
    assert config.distributed.dp_size is None
    assert config.run_dir == Path("2024-01-01")
    assert config.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("path", "text", "read"),
    [
        ("optimizer.lr", "1e-5", lambda config: config.optimizer.lr == 1e-5),
        ("optimizer.lr", "1", lambda config: type(config.optimizer.lr) is float),
        ("optimizer.betas", "[0.5, 0.6]", lambda config: config.optimizer.betas == (0.5, 0.6)),
        ("optimizer.amsgrad", "true", lambda config: config.optimizer.hyperparameters()["amsgrad"] is True),
        ("clip_grad_norm.max_norm", "none", lambda config: config.clip_grad_norm.max_norm is None),
        ("clip_grad_norm.max_norm", "null", lambda config: config.clip_grad_norm.max_norm is None),
        ("clip_grad_norm", "null", lambda config: config.clip_grad_norm.max_norm is None),
        ("clip_grad_norm", "none", lambda config: config.clip_grad_norm.max_norm is None),
        ("distributed.activation_checkpointing", "none", lambda c: c.distributed.activation_checkpointing == "none"),
        ("run_dir", "2024", lambda config: config.run_dir == Path("2024")),
        ("model.name_or_path", "1e3", lambda config: config.model.name_or_path == "1e3"),
        ("generate.prompts", "['a: b', c]", lambda config: config.generate.prompts == ("a: b", "c")),
        ("generate.prompts.1", "[unclosed", lambda config: config.generate.prompts == ("first", "[unclosed")),
        ("generate.prompts.0", "Who: me # you", lambda config: config.generate.prompts[0] == "Who: me # you"),
        ("dataset.limit", "3", lambda config: config.dataset.arguments["limit"] == 3),
        ("dataset.path", "other", lambda config: config.dataset.arguments["path"] == "other"),
        ("peft.r", "8", lambda config: config.peft.lora.arguments == {"r": 8}),
        ("peft.bias", '"none"', lambda config: config.peft.lora.arguments == {"bias": "none"}),
        ("validation_dataset_b.path", "v", lambda config: list(config.validation_datasets) == ["val_loss_b"]),
        ("dataset.columns.prompt", "q", lambda config: config.dataset.arguments["columns"] == {"prompt": "q"}),
    ],
)
def test_overrides(write, path, text, read):
    source = (
        MINIMAL.replace("rows.jsonl", "rows.jsonl\n  columns: {prompt: p}") + "generate: {prompts: [first, second]}\n"
    )
    assert read(parse(write(source), [(path, text)]))


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        ([("generate.prompts.0", "a"), ("generate.prompts.1", "b")], lambda c: c.generate.prompts == ("a", "b")),
        ([("freeze.0.freeze", "x.*"), ("freeze.1.unfreeze", "x.y")], lambda c: len(c.freeze_rules()) == 2),
        ([("optimizer.betas.0", "0.5"), ("optimizer.betas.1", "0.6")], lambda c: c.optimizer.betas == (0.5, 0.6)),
        ([("optimizer.param_group_overrides.0.pattern", "b")], lambda c: len(c.optimizer.overrides()) == 1),
        ([("dataset.paths.0", "a"), ("dataset.paths.1", "b")], lambda c: c.dataset.arguments["paths"] == ["a", "b"]),
        ([("generate.prompts", "[]"), ("generate.prompts.0", "a")], lambda c: c.generate.prompts == ("a",)),
    ],
)
def test_numbers_make_and_lengthen_lists(write, overrides, read):
    assert read(parse(write(), overrides))


def test_an_item_is_added_to_a_list_of_the_file(write):
    source = write(MINIMAL + "generate: {prompts: [first, second]}\n")
    assert parse(source, [("generate.prompts.2", "third")]).generate.prompts == ("first", "second", "third")


def test_a_gap_in_a_list_is_refused_with_the_number_that_fits(write):
    assert refused(write(), [("generate.prompts.1", "a")]).endswith(
        "generate.prompts.1: no such item; generate.prompts has 0, numbered from 0; --generate.prompts.0 adds one"
    )


@pytest.mark.parametrize(
    ("path", "default"),
    [
        ("packed_sequence", "{packed_sequence_size: 0}"),
        ("generate", "{prompts: [], max_new_tokens: 64}"),
        ("generate.prompts", "[]"),
        ("lr_scheduler.min_lr", "0.0"),
        ("dataloader.shuffle", "true"),
        ("export", "{enabled: true, merge_adapter: false, which: last}"),
        ("loss_fn", "{_target_: am_loss.linear_cross_entropy}"),
    ],
)
@pytest.mark.parametrize("text", ["null", "none"])
def test_null_where_it_is_no_value_is_refused_with_the_default(write, path, default, text):
    assert refused(write(), [(path, text)]).endswith(f", got null; its default is {default}")


def test_no_bias_of_an_adapter_is_a_text(write):
    said = """peft.bias: is a text, and null is none of it; write --peft.bias '"none"', in a file bias: none"""
    assert refused(write(), [("peft.bias", "none")]) == f"config.yaml:1 (--peft.bias): {said}"
    assert refused(write(MINIMAL + "peft: {r: 4, bias: null}\n")) == f"config.yaml:10: {said}"
    assert parse(write(MINIMAL + "peft: {r: 4, bias: none}\n")).peft.lora.arguments == {"r": 4, "bias": "none"}


def test_a_section_of_null_turns_clipping_off(write, monkeypatch):
    source = write(MINIMAL + "clip_grad_norm: null\n")
    assert parse(source).clip_grad_norm.max_norm is None
    assert parse(source, [("clip_grad_norm.max_norm", "0.5")]).clip_grad_norm.max_norm == 0.5
    # A reference is kept, where the value then stands.
    monkeypatch.setenv("CLIP", "null")
    config = parse(write(MINIMAL + "clip_grad_norm: ${CLIP}\n"))
    assert config.clip_grad_norm.max_norm is None
    assert parse(write(config.to_yaml())) == config
    assert "max_norm: ${CLIP}" in config.to_yaml()


def test_the_last_override_wins(write):
    assert parse(write(), [("seed", "1"), ("seed", "2")]).seed == 2


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("optimzer.lr", "1", "config.yaml:1 (--optimzer.lr): optimzer: unknown key; did you mean 'optimizer'?"),
        ("optimizer.lrr", "1", "config.yaml:6 (--optimizer.lrr): optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("sede", "1", "config.yaml:1 (--sede): sede: unknown key; did you mean 'seed'?"),
        (
            "checkpoint.keep_lst",
            "1",
            "config.yaml:1 (--checkpoint.keep_lst): checkpoint.keep_lst: unknown key; did you mean 'keep_last'?",
        ),
        ("optimizer.lr", "fast", "config.yaml:6 (--optimizer.lr): optimizer.lr: expected a number, got 'fast'"),
        (
            "optimizer.lr.x",
            "1",
            "config.yaml:7 (--optimizer.lr.x): optimizer.lr.x: optimizer.lr is 0.0001, which has no 'x'",
        ),
        (
            "generate.prompts.7",
            "a",
            "config.yaml:10 (--generate.prompts.7): generate.prompts.7: no such item; generate.prom",
        ),
        ("generate.prompts.x", "a", "config.yaml:10 (--generate.prompts.x): generate.prompts.x: no such item"),
        (
            "dataset.columns.promt",
            "q",
            "config.yaml:5 (--dataset.columns.promt): dataset.columns.promt: unknown key: "
            "an override cannot add it; did you mean 'prompt'?",
        ),
        (
            "dataset.options.a",
            "q",
            "config.yaml:4 (--dataset.options.a): dataset.options.a: unknown key: an override cannot",
        ),
        ("optimizer..lr", "1", "config.yaml:1: --optimizer..lr: not a dotted path"),
        (
            "step_scheduler",
            "3",
            "config.yaml:1 (--step_scheduler): step_scheduler: expected a mapping with global_batch_s",
        ),
    ],
)
def test_overrides_create_nothing(write, path, text, message):
    source = MINIMAL.replace("  path: rows.jsonl", "  columns: {prompt: p}") + "generate: {prompts: [first, second]}\n"
    assert refused(write(source), [(path, text)]).startswith(message)


CUSTOM = MINIMAL.replace("path: rows.jsonl", "_target_: my_targets.Rows\n  path: rows.jsonl")


def test_targets_build_recursively_and_runtime_arguments_win(write):
    text = CUSTOM.replace("rows.jsonl", "rows.jsonl\n  transform: {_target_: my_targets.scale, factor: 2}\n  limit: 5")
    config = parse(write(text))
    check_targets_of_dataset(config)
    rows = config.dataset.build(tokenizer="tok", limit=9)
    assert (rows.tokenizer, rows.path, rows.transform, rows.limit) == ("tok", "rows.jsonl", ("scale", 2, 0), 9)


def check_targets_of_dataset(config):
    config.dataset.bind(("tokenizer",))


def test_a_class_method_and_an_argument_under_any_name(write):
    config = parse(write(CUSTOM.replace("my_targets.Rows", "my_targets.Rows.from_pretrained\n  anything: 1")))
    check_targets_of_dataset(config)
    assert config.dataset.build(tokenizer="tok").options == {"anything": 1}


def test_callable_applies_the_configured_arguments(write):
    config = parse(write(MINIMAL + "loss_fn: {_target_: my_targets.scale, offset: 4}\n"))
    config.loss_fn.bind(partial=True)
    assert config.loss_fn.callable()(2) == ("scale", 2, 4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "my_targets.Rows",
            "my_target.Rows",
            "config.yaml:5: dataset._target_: 'my_target.Rows': no module named 'my_target'",
        ),
        (
            "my_targets.Rows",
            "my_targets.Rosw",
            "config.yaml:5: dataset._target_: 'my_targets.Rosw': my_targets has no 'Rosw'; did you mean 'Rows'?",
        ),
        (
            "my_targets.Rows",
            "my_targets.Rows.from_pretraned",
            "config.yaml:5: dataset._target_: 'my_targets.Rows.from_pretraned': my_targets.Rows has no "
            "'from_pretraned'; did you mean 'from_pretrained'?",
        ),
        (
            "my_targets.Rows",
            "my_targets.VERSION",
            "config.yaml:5: dataset._target_: 'my_targets.VERSION' is a int, not a",
        ),
        (
            "path: rows.jsonl",
            "path: a\n  limt: 3",
            "config.yaml:7: dataset.limt: my_targets.Rows takes no such argument; did you mean 'limit'?",
        ),
        ("  path: rows.jsonl\n", "", "config.yaml:4: dataset: my_targets.Rows needs 'path'"),
        (
            "path: rows.jsonl",
            "path: a\n  tokenizer: b",
            "config.yaml:7: dataset.tokenizer: the recipe passes this argument",
        ),
        (
            "my_targets.Rows",
            "my_targets.without_tokenizer",
            "config.yaml:4: dataset.tokenizer: my_targets.without_tokenizer takes no",
        ),
        (
            "path: rows.jsonl",
            "path: a\n  transform:\n    _target_: my_targets.scale\n    facter: 2",
            "config.yaml:9: dataset.transform.facter: my_targets.scale takes no such argument; did you mean 'factor'?",
        ),
        (
            "path: rows.jsonl",
            "path: [{_target_: my_targets.scale}]",
            "config.yaml:6: dataset.path.0: my_targets.scale needs 'factor'",
        ),
    ],
)
def test_targets_are_held_against_their_signature(write, old, new, message):
    assert refused(write(CUSTOM.replace(old, new)), targets=True).startswith(message)


def test_an_override_of_a_target_argument_is_held_against_the_signature(write):
    message = refused(write(CUSTOM), [("dataset.limti", "3")], targets=True)
    assert message.startswith(
        "config.yaml:4 (--dataset.limti): dataset.limti: my_targets.Rows takes no such argument; did"
    )


def test_a_target_whose_module_fails_to_import_says_why(write):
    path = write(CUSTOM.replace("my_targets.Rows", "broken.Rows"))
    Path("broken.py").write_text("import not_there_at_all\n")
    message = refused(path, targets=True)
    assert message == "config.yaml:5: dataset._target_: importing broken failed: No module named 'not_there_at_all'"


def test_torch_and_peft_targets(write):
    text = CUSTOM + "peft: {r: 4, target_modules: all-linear}\nloss_fn: {_target_: my_targets.scale}\n"
    config = parse(write(text), [("optimizer.amsgrad", "true"), ("optimizer.betas", "[0.9, 0.95]")])
    check_targets(config)
    lora = config.peft.lora_config("CAUSAL_LM")
    assert (lora.r, lora.task_type) == (4, "CAUSAL_LM")
    assert config.optimizer.factory().__name__ == "AdamW"
    assert config.optimizer.hyperparameters() == {"lr": 1e-4, "betas": (0.9, 0.95), "amsgrad": True}
    message = refused(write(text), [("peft.lora_alfa", "3")], targets=True)
    assert message.startswith(
        "config.yaml:11 (--peft.lora_alfa): peft.lora_alfa: peft.LoraConfig takes no such argument; did"
    )
    message = refused(write(text), [("optimizer._target_", "torch.optim.SGD"), ("optimizer.eps", "1")], targets=True)
    assert message == "config.yaml:7: optimizer.eps: torch.optim.SGD takes no 'eps', which the recipe passes to it"
    message = refused(write(text), [("optimizer._target_", "torch.optim.AdmW")], targets=True)
    assert message.endswith("'torch.optim.AdmW': torch.optim has no 'AdmW'; did you mean 'AdamW'?")


def test_an_inline_model_config_is_held_against_its_class(write):
    text = CUSTOM.replace("name_or_path: some/folder", "config:\n    model_type: llama\n    hidden_size: 64")
    text += "tokenizer: {name_or_path: t}\nloss_fn: {_target_: my_targets.scale}\n"
    config = parse(write(text), [("model.config.num_hidden_layers", "1"), ("model.dtype", "bfloat16")])
    check_targets(config)
    assert (config.model.hf_config(None).hidden_size, config.model.hf_config(None).num_hidden_layers) == (64, 1)
    assert str(config.model.hf_config(None).dtype) == "torch.bfloat16"
    message = refused(write(text), [("model.config.hiden_size", "1")], targets=True)
    assert message.startswith(
        "config.yaml:3 (--model.config.hiden_size): model.config.hiden_size: LlamaConfig has no such"
    )
    assert message.endswith("did you mean 'hidden_size'?")
    message = refused(write(text.replace(": llama", ": lama")), targets=True)
    assert message == "config.yaml:4: model.config.model_type: unknown 'lama'; did you mean 'llama'?"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # Not declared by the class, but its attention asks for it.
        ("{model_type: qwen3_moe, head_dim: 128}", None),
        ("{model_type: granite, head_dim: 16}", None),
        # The class makes another field of it.
        ("{model_type: llama, rope_theta: 10000.0}", None),
        ("{model_type: qwen2, rope_scaling: {rope_type: linear, factor: 2.0}}", None),
        ("{model_type: llama, torch_dtype: float32}", None),
        # Nothing reads it, or nothing but the rotary embedding, whose width would no longer fit the heads.
        ("{model_type: llama, sliding_window: 64}", "model.config.sliding_window: LlamaConfig has no such field"),
        ("{model_type: llama, rope_thetta: 1.0}", "model.config.rope_thetta: LlamaConfig has no such field"),
        ("{model_type: gpt_neox, head_dim: 16}", "model.config.head_dim: GPTNeoXConfig has no such field"),
        # It belongs to a part.
        ("{model_type: gemma3, head_dim: 16}", "model.config.head_dim: Gemma3Config has no such field"),
    ],
)
def test_the_keys_of_a_model_config_are_those_that_class_and_attention_take(write, given, message):
    text = write(MINIMAL.replace("name_or_path: some/folder", f"config: {given}") + "tokenizer: {name_or_path: t}\n")
    if message is None:
        check_targets(parse(text))
    else:
        assert message in refused(text, targets=True)


def test_the_teacher_of_a_kd_run_is_checked_too(write):
    text = MINIMAL.replace("recipe: sft", "recipe: kd")
    text += "teacher_model:\n  config:\n    model_type: llama\n    hidden_size: 64\n"
    check_targets(parse(write(text)))
    message = refused(write(text.replace("hidden_size", "hiden_size")), targets=True)
    assert message.startswith("config.yaml:13: teacher_model.config.hiden_size: LlamaConfig has no such field")
    assert message.endswith("did you mean 'hidden_size'?")
    message = refused(write(text.replace(": llama", ": lama")), targets=True)
    assert message == "config.yaml:12: teacher_model.config.model_type: unknown 'lama'; did you mean 'llama'?"


def inline_vision(config):
    return VLM.replace("name_or_path: some/folder", f"config: {config}") + "processor: {name_or_path: p}\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{model_type: idefics3, vision_config: {hiden_size: 7}}",
            "model.config.vision_config.hiden_size: Idefics3VisionConfig has no such field; did you mean 'hidden_size'",
        ),
        # Where the class of a part is open, its own model_type decides, or else the default of the whole.
        (
            "{model_type: idefics3, text_config: {hiden_size: 7}}",
            "model.config.text_config.hiden_size: LlamaConfig has no such field; did you mean 'hidden_size'?",
        ),
        (
            "{model_type: idefics3, text_config: {model_type: qwen3, hiden_size: 7}}",
            "model.config.text_config.hiden_size: Qwen3Config has no such field; did you mean 'hidden_size'?",
        ),
        (
            "{model_type: idefics3, text_config: {model_type: lama}}",
            "model.config.text_config.model_type: unknown 'lama'; did you mean 'llama'?",
        ),
        ("{model_type: idefics3, text_config: {model_type: [7]}}", "model.config.text_config.model_type: unknown [7]"),
        ("{model_type: dpt, backbone_config: {depths: 7}}", "model.config.backbone_config: needs a model_type"),
        # Two levels down.
        (
            "{model_type: qwen2_5_omni, thinker_config: {text_config: {hiden_size: 7}}}",
            "model.config.thinker_config.text_config.hiden_size: Qwen2_5OmniTextConfig has no such field; did you mean",
        ),
        (
            "{model_type: idefics3, text_config: {hidden_size: wide}}",
            "model.config.text_config: LlamaConfig: Field 'hidden_size' expected int, got str (value: 'wide')",
        ),
        (
            "{model_type: idefics3, vision_config: 7}",
            "model.config: Idefics3Config: Field 'vision_config' with value 7",
        ),
    ],
)
def test_the_parts_of_a_model_config_are_checked(write, given, message):
    assert refused(write(inline_vision(given)), targets=True).startswith(f"config.yaml:3: {message}")


def test_a_part_that_a_model_does_without_has_no_dtype(write):
    """Gemma 4 has a vision and an audio part only where they are asked for."""
    config = parse(write(inline_vision("{model_type: gemma4, vision_config: null}\n  dtype: bfloat16")))
    check_targets(config)
    hf_config = config.model.hf_config(None)
    assert hf_config.vision_config is None
    assert [str(part.dtype) for part in (hf_config, hf_config.text_config)] == ["torch.bfloat16"] * 2


COMPOSED = """\
name_or_path:
    _target_: am_recipes.quickstart.compose
    language_model: a
    processor: {_target_: my_targets.Rows, _partial_: true, path: x}
    config:
      model_type: idefics3
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "vision_config: {hiden_size: 7}",
            "9: model.name_or_path.config.vision_config.hiden_size: Idefics3VisionConfig has no such field; did you",
        ),
        ("text_config: {}", "9: model.name_or_path.config.text_config: it comes from language_model; remove it"),
        ("image_token_id: 3", "9: model.name_or_path.config.image_token_id: it comes from the processor; remove it"),
        ("tie_word_embeddings: true", "9: model.name_or_path.config.tie_word_embeddings: it comes from language_model"),
    ],
)
def test_the_config_of_a_composed_model_is_checked(write, given, message):
    text = VLM.replace("name_or_path: some/folder\n", COMPOSED)
    check_targets(parse(write(text)))
    assert refused(write(text.replace("idefics3", f"idefics3\n      {given}")), targets=True).startswith(
        f"config.yaml:{message}"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path: x", "pth: x", "6: model.name_or_path.processor.pth: my_targets.Rows takes no such argument"),
        (", path: x", "", "6: model.name_or_path.processor: my_targets.Rows needs 'path'"),
        (
            "my_targets.Rows",
            "my_targets.without_tokenizer",
            "6: model.name_or_path.processor.tokenizer: my_targets.wit",
        ),
        ("_partial_: true, ", "", "6: model.name_or_path.processor: my_targets.Rows needs 'tokenizer'"),
        ("_partial_: true, ", "tokenizer: t, ", "6: model.name_or_path.processor: needs a _target_ with _partial_: tr"),
        ("_partial_: true", "_partial_: 1", "6: model.name_or_path.processor._partial_: expected true or false, got 1"),
        ("model_type: idefics3", "scale_factor: 2", "7: model.name_or_path.config: needs a model_type"),
        ("language_model: a", "languagemodel: a", "5: model.name_or_path.languagemodel: am_recipes.quickstart.compose"),
    ],
)
def test_what_composes_a_model_is_checked(write, old, new, message):
    path = write(VLM.replace("name_or_path: some/folder\n", COMPOSED).replace(old, new))
    with pytest.raises(ConfigError) as caught:
        check_targets(parse(path))
    assert str(caught.value).startswith(f"config.yaml:{message}")


def test_a_partial_target_is_for_the_arguments_of_another(write):
    """It gives the callable itself, for the other to call; the recipe decides how it calls its own."""
    text = CUSTOM.replace(
        "rows.jsonl", "rows.jsonl\n  transform: {_target_: my_targets.scale, _partial_: true, offset: 1}"
    )
    config = parse(write(text))
    check_targets_of_dataset(config)
    assert config.dataset.build(tokenizer="tok").transform(5) == ("scale", 5, 1)
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse("saved.yaml") == config
    message = refused(write(CUSTOM.replace("path: rows", "_partial_: true\n  path: rows")))
    assert message.startswith("config.yaml:6: dataset._partial_: is for a target in the arguments of another")


def test_a_source_may_be_a_target(write):
    source = "{_target_: my_targets.scale, factor: 2}"
    text = MINIMAL.replace("some/folder", source) + f"tokenizer: {{name_or_path: {source}}}\n"
    config = parse(write(text))
    assert config.model.name_or_path == config.tokenizer.name_or_path == Target("my_targets.scale", {"factor": 2})
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse("saved.yaml") == config
    for key in ("model", "tokenizer"):
        message = refused(write(text), [(f"{key}.name_or_path.facter", "3")], targets=True)
        assert f"{key}.name_or_path.facter: my_targets.scale takes no such argument; did you mean 'factor'?" in message
    other = parse(write(text), [("model.name_or_path.factor", "3")])
    assert identity_difference(config.identity(), other.identity()) == ["model.name_or_path.factor"]


def test_every_target_is_bound(write):
    """The targets of a config are what it finds by looking for them; none is left to fail when it is built."""
    text = of_recipe("kd", "sinks: [{_target_: my_targets.scale, factor: 2}]") + textwrap.dedent("""\
    validation_dataset_math: {path: b}
    tokenizer: {name_or_path: {_target_: a.tokenizer}}
    dataloader: {collate: {_target_: a.collate}}
    peft: {r: 2}
    """)
    text = text.replace("teacher_model: {name_or_path: a}", "teacher_model: {name_or_path: {_target_: a.teacher}}")
    text = text.replace(
        "name_or_path: some/folder", "name_or_path: {_target_: a.model}\n  family: {_target_: a.family}"
    )
    calls = {call.key: call for call in parse(write(text)).targets()}
    assert calls.keys() == {
        *("dataset", "validation_dataset_math", "model.name_or_path", "model.family", "teacher_model.name_or_path"),
        *("optimizer", "loss_fn", "kd_loss_fn", "dataloader.collate", "peft", "sinks.0", "tokenizer.name_or_path"),
    }
    assert calls["dataset"].provided == ("tokenizer",)
    assert calls["kd_loss_fn"].partial


def test_environment(write, monkeypatch):
    monkeypatch.setenv("AM_DATA", "/data")
    monkeypatch.setenv("AM_LR", "3e-4")
    text = MINIMAL.replace("rows.jsonl", "${AM_DATA}/rows.jsonl\n  limit: ${AM_LIMIT,7}\n  literal: $${x}")
    config = parse(write(text.replace("1e-4", "${AM_LR}") + "run_dir: ${AM_RUN,runs/7}\n"))
    assert config.dataset.arguments == {"path": "/data/rows.jsonl", "limit": 7, "literal": "${x}"}
    assert config.optimizer.lr == 3e-4
    assert config.run_dir == Path("runs/7")
    saved = config.to_yaml()
    for reference in ("path: ${AM_DATA}/rows.jsonl", "limit: ${AM_LIMIT,7}", "literal: $${x}", "lr: ${AM_LR}"):
        assert reference in saved
    assert "/data" not in saved
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse("saved.yaml") == config


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("${AM_DTA}", "the environment variable AM_DTA is not set; did you mean 'AM_DATA'?"),
        ("a/${QQ_1}/b", "the environment variable QQ_1 is not set; set it, or write ${QQ_1,default}"),
        ("${oc.env:QQ_1}/b", "the environment variable QQ_1 is not set; set it, or write ${QQ_1,default}"),
        ("$QQ_1", "the environment variable QQ_1 is not set; set it, or write ${QQ_1,default}"),
        ("${a b}", "${a b} is not a reference; write ${NAME} or ${NAME,default}, and $${ for a plain ${"),
    ],
)
def test_a_missing_variable_names_the_line(write, monkeypatch, reference, message):
    monkeypatch.setenv("AM_DATA", "/data")
    path = write(MINIMAL.replace("rows.jsonl", reference))
    assert refused(path) == f"config.yaml:5: dataset.path: {message}"
    assert parse(path, [("dataset.path", "other")]).dataset.arguments == {"path": "other"}


def test_references_as_other_tools_write_them(write, monkeypatch):
    """OmegaConf's `${oc.env:}`, and a shell's `$NAME` where a text begins with it; what has dollars inside stays."""
    monkeypatch.setenv("AM_DATA", "/data")
    monkeypatch.setenv("AM_LR", "3e-4")
    arguments = {
        "path": "$AM_DATA/rows.jsonl",
        "limit": "${oc.env:AM_LIMIT,7}",
        "folder": "${oc.env:AM_DATA}/x",
        "formula": "$x^2$ costs $AM_DATA",
        "literal": "$$AM_DATA/x",
        "more": "$$$AM_DATA",
        "hf_token": "$AM_DATA",
    }
    lines = "".join(f"  {name}: '{text}'\n" for name, text in arguments.items())
    config = parse(write(MINIMAL.replace("  path: rows.jsonl\n", lines).replace("1e-4", "$AM_LR")))
    assert config.optimizer.lr == 3e-4
    expected = {
        "path": "/data/rows.jsonl",
        "limit": 7,
        "folder": "/data/x",
        "formula": "$x^2$ costs $AM_DATA",
        "literal": "$AM_DATA/x",
        "more": "$$AM_DATA",
        "hf_token": "/data",
    }
    assert config.dataset.arguments == expected
    saved = config.to_yaml()
    assert "/data" not in saved
    for reference in ("path: $AM_DATA/rows.jsonl", "limit: ${oc.env:AM_LIMIT,7}", "lr: $AM_LR", "hf_token: $AM_DATA"):
        assert reference in saved
    Path("saved.yaml").write_text(saved, encoding="utf-8")
    assert parse("saved.yaml") == config


@pytest.mark.parametrize("text", ["null", "None", "none", "~"])
def test_overrides_that_are_no_value(write, text):
    path = write(MINIMAL + "peft: {r: 8}\n")
    config = parse(path, [("dataset.path", text), ("peft", text), ("distributed.activation_checkpointing", "none")])
    assert config.dataset.arguments["path"] is None
    assert config.peft is None
    assert config.distributed.activation_checkpointing == "none"
    assert parse(path, [("dataset.path", f'"{text}"')]).dataset.arguments["path"] == text


def test_here_is_the_folder_of_the_config(write, tmp_path, monkeypatch):
    text = MINIMAL.replace("rows.jsonl", "${here}/../rows.jsonl\n  said: $${here}\n  in: a ${here}")
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "mine.yaml"
    path.write_text(text)
    expected = {"path": str(tmp_path / "rows.jsonl"), "said": "${here}", "in": f"a {tmp_path}/configs"}
    for folder, name in ((tmp_path, "configs/mine.yaml"), (tmp_path / "configs", "mine.yaml"), (Path("/"), path)):
        monkeypatch.chdir(folder)
        config = parse(name)
        assert config.dataset.arguments == expected
    # What is saved is read from another folder.
    (tmp_path / "saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert parse(tmp_path / "saved.yaml") == config


def test_a_value_from_the_environment_stays_out_of_messages(write, monkeypatch):
    monkeypatch.setenv("AM_LR", "hunter2")
    message = refused(write(MINIMAL.replace("1e-4", "${AM_LR}")))
    assert message == "config.yaml:7: optimizer.lr: expected a number, got ${AM_LR}"


def test_secrets_are_neither_shown_nor_saved(write, monkeypatch):
    monkeypatch.setenv("HF", "hunter1")
    text = MINIMAL.replace(
        "path: rows.jsonl", "path: x\n  hf_token: ${HF,hunter3}\n  api_key: hunter2\n  pad_token: <pad>\n  password: 1"
    )
    config = parse(write(text))
    assert config.dataset.arguments["hf_token"] == "hunter1"
    for shown in (str(config), repr(config), config.to_yaml(), repr(config.dataset), str(config.identity())):
        assert "hunter" not in shown
    saved = config.to_yaml()
    assert "hf_token: ${HF}" in saved
    assert "api_key: ${API_KEY}" in saved
    assert "pad_token: <pad>" in saved
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    message = refused(Path("saved.yaml"))
    assert re.search(r"saved.yaml:\d+: dataset.api_key: the environment variable API_KEY is not set", message)
    monkeypatch.setenv("API_KEY", "hunter2")
    monkeypatch.setenv("PASSWORD", "1")
    assert parse("saved.yaml").dataset.arguments["api_key"] == "hunter2"


NESTED = """\
path: x
  credentials: {user: hunter0, pass: hunter1}
  password: [hunter2, {deeper: hunter3}]
  webhook_url: hunter4
  connection_string: hunter5"""


def test_all_below_the_name_of_a_secret_is_one(write, monkeypatch):
    config = parse(write(MINIMAL.replace("path: rows.jsonl", NESTED)))
    for shown in (config.to_yaml(), str(config.identity())):
        assert "hunter" not in shown
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    variables = ("CREDENTIALS_USER", "CREDENTIALS_PASS", "PASSWORD_0", "PASSWORD_1_DEEPER", "WEBHOOK_URL")
    for number, name in enumerate((*variables, "CONNECTION_STRING")):
        monkeypatch.setenv(name, f"hunter{number}")
    assert parse("saved.yaml").dataset.arguments == config.dataset.arguments


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://me:hunter@host:1/x", "a password"),
        ("https://hunter@host", "a password"),
        ("postgresql://me:hunter@host/db", "a password"),
        ("http://h:1/?write_token=hunter", "a write_token"),
        ("${AM_URL,https://hunter@host}", "a password"),
        ("https://me:${AM_PW}@host", None),
        ("https://${oc.env:AM_PW}@host?token=${AM_PW}", None),
        ("${AM_PW}", None),
        ("postgresql://me@host/db", None),
        ("sqlite:///a@b.db", None),
        ("hf://datasets/a/b@main", None),
        ("http://host:80/x@y?page=2", None),
    ],
)
def test_a_secret_in_an_address_is_refused_unless_it_is_a_reference(write, monkeypatch, address, found):
    monkeypatch.setenv("AM_PW", "https://me:hunter@host")
    path = write(MINIMAL.replace("path: rows.jsonl", f"path: '{address}'"))
    if found is None:
        assert "hunter" not in parse(path).to_yaml()
    else:
        message = refused(path)
        assert message.startswith(f"config.yaml:5: dataset.path: has {found} in clear, which")
        assert "hunter" not in message


def test_the_saved_config_reads_back_equal(write):
    text = MINIMAL + textwrap.dedent("""\
    validation_dataset: {path: a}
    validation_dataset_math: {path: b}
    peft: {r: 8, adapter_dtype: float32, rank_pattern: {q_proj: 4}, bias: none}
    kernels: {attention: off, "1e-4": "1e-4", when: "2024-01-01", answer: "yes", empty: "", number: "0x1f", nothing: ~}
    generate: {prompts: ["multi\\nline: é", "null", "1e5"]}
    """)
    config = parse(
        write(text),
        [
            ("optimizer.param_group_overrides", "[{pattern: bias, wd_mult: 0}]"),
            ("optimizer._target_", "my_targets.scale"),
        ],
    )
    Path("saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = parse("saved.yaml")
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.identity() == config.identity()
    assert again.run_dir == Path("runs/config")
    assert again.kernels["1e-4"] == "1e-4"
    assert again.optimizer.overrides() == [{"pattern": "bias", "lr_mult": 1.0, "wd_mult": 0.0}]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("12:30:15", 45015),
        ("'1-12'", 36 * 3600),
        ("1-12:30", 36 * 3600 + 1800),
        ("2-00:00:01", 2 * 86400 + 1),
    ],
)
def test_a_time_has_the_forms_that_slurm_knows(write, typed, expected):
    """`sbatch --help` has them, and none is a number in YAML 1.2 but the first."""
    config = parse(write(MINIMAL + f"  max_time: {typed}\n"))
    assert config.step_scheduler.max_time == typed.strip("'")
    assert sections.seconds(config.step_scheduler.max_time) == expected
    overridden = parse(write(), [("step_scheduler.max_time", typed.strip("'"))])
    assert overridden.step_scheduler == config.step_scheduler
    assert parse(write(config.to_yaml())).step_scheduler == config.step_scheduler


@pytest.mark.parametrize("typed", ["", "1h", "-5", "1:2:3:4", "1-1:1:1:1", "1-", ":30", "0", "0-0:00", "²", "5 "])
def test_what_is_no_time(typed):
    assert sections.seconds(typed) is None


@pytest.mark.parametrize(
    ("path", "text", "different"),
    [
        ("model.dtype", "float32", ["model.dtype"]),
        ("tokenizer.name_or_path", "t", ["tokenizer.name_or_path"]),
        ("dataset.limit", "3", ["dataset.limit"]),
        ("packed_sequence.packed_sequence_size", "64", ["packed_sequence.packed_sequence_size"]),
        ("peft.r", "4", ["peft"]),
        ("optimizer.lr", "1e-5", ["optimizer.lr"]),
        ("optimizer.amsgrad", "true", ["optimizer.amsgrad"]),
        ("lr_scheduler.warmup_steps", "3", ["lr_scheduler.warmup_steps"]),
        ("clip_grad_norm.max_norm", "0.5", ["clip_grad_norm.max_norm"]),
        ("loss_fn.chunk_size", "64", ["loss_fn.chunk_size"]),
        ("seed", "1", ["seed"]),
        ("freeze", "[{freeze: a}]", ["freeze"]),
        ("moe.balance_loss", "0.01", ["moe.balance_loss"]),
        ("model.family", "{_target_: a.b}", ["model.family"]),
        ("dataloader.shuffle", "false", ["dataloader.shuffle"]),
        ("dataloader.drop_last", "true", ["dataloader.drop_last"]),
        ("dataloader.collate", "{_target_: a.b}", ["dataloader.collate"]),
        ("dataloader.prefetch", "0", []),
        ("sinks", "[{_target_: a.b}]", []),
        ("step_scheduler.global_batch_size", "8", ["step_scheduler.global_batch_size"]),
        ("step_scheduler.local_batch_size", "2", []),
        ("step_scheduler.max_steps", "100", []),
        ("step_scheduler.val_every_steps", "1", []),
        ("step_scheduler.max_time", "1:00:00", []),
        ("validation_dataset.path", "x", []),
        ("run_dir", "elsewhere", []),
        ("kernels", "off", []),
        ("distributed.strategy", "ddp", []),
        ("checkpoint.keep_last", "1", []),
        ("generate.max_new_tokens", "1", []),
        ("export.enabled", "false", []),
    ],
)
def test_identity(write, path, text, different):
    source = write()
    assert identity_difference(parse(source).identity(), parse(source, [(path, text)]).identity()) == different


def test_the_length_of_a_decaying_schedule_is_identity(write):
    source = write(MINIMAL + "lr_scheduler: {style: cosine}\n")
    longer = parse(source, [("step_scheduler.max_steps", "20")])
    assert identity_difference(parse(source).identity(), longer.identity()) == ["step_scheduler.max_steps"]


def test_identity_notices_another_value_of_a_variable_but_not_of_a_secret(write, monkeypatch):
    source = write(MINIMAL.replace("rows.jsonl", "${AM_DATA}\n  hf_token: ${HF}"))
    identities = []
    for data, token in (("a", "1"), ("b", "1"), ("b", "2")):
        monkeypatch.setenv("AM_DATA", data)
        monkeypatch.setenv("HF", token)
        identities.append(parse(source).identity())
    assert identity_difference(identities[0], identities[1]) == ["dataset.path"]
    assert identity_difference(identities[1], identities[2]) == []


def test_a_later_error_about_a_value_names_its_line(write):
    config = parse(write(), [("seed", "3")])
    assert str(config.error("optimizer.lr", "x")) == "config.yaml:7: optimizer.lr: x"
    assert str(config.error("seed", "x")) == "config.yaml:1 (--seed): seed: x"
    assert str(config.error("optimizer.eps", "x")) == "config.yaml:6: optimizer.eps: x"


FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(FOLDER)) for path in CONFIGS])
def test_the_shipped_configs_fit_what_they_name(path):
    config = parse(path)
    missing = [name for name in config.trackers() if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extras {', '.join(missing)}")
    check_targets(config)


def test_public_names():
    import am_recipes.configs

    assert am_recipes.configs.__all__ == [
        "DEFAULT_LOSS",
        "RECIPES",
        "ConfigError",
        "KdConfig",
        "PretrainConfig",
        "RunConfig",
        "SftConfig",
        "Target",
        "VlmConfig",
        "check_targets",
        "identity_difference",
        "parse",
    ]

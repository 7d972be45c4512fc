"""A recipe's config: one YAML file, command-line overrides and the environment, as one typed frozen dataclass.

`parse` checks the schema without importing torch or any target and writes nothing; `check_targets` imports every
``_target_`` and holds its arguments against its signature before anything is built. All complaints are `ConfigError`
with file, line, dotted path and the nearest valid name. `SftConfig.to_yaml` is the resolved config, which `parse` reads
back to an equal one: values from the environment are written as the references they were.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from am_recipes._saved import fingerprints, written
from am_recipes._schema import Check, DefaultTarget, Inline, Prefixed, Target, plain, read_section
from am_recipes._yaml import ConfigError, Node, Place, dump, load, nearest, override, resolve, walk

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PretrainedConfig

__all__ = ["ConfigError", "SftConfig", "Target", "check_targets", "identity_difference", "parse"]

PositiveInt = Annotated[int, Check(lambda number: number >= 1, "must be at least 1")]
NonNegativeInt = Annotated[int, Check(lambda number: number >= 0, "must be at least 0")]
PositiveFloat = Annotated[float, Check(lambda number: 0 < number < math.inf, "must be greater than 0")]
NonNegativeFloat = Annotated[float, Check(lambda number: 0 <= number < math.inf, "must be at least 0")]
Fraction = Annotated[float, Check(lambda number: 0 <= number < 1, "must be in [0, 1)")]
OneRank = Annotated[
    int, Check(lambda size: size == 1, "must be 1: this recipe divides work over data-parallel ranks only")
]
Text = Annotated[str, Check(bool, "must not be empty")]
Pattern = Annotated[str, Check(lambda text: _compiles(text), "must be a regular expression")]
Dtype = Literal["float32", "bfloat16"]
_ADAMW = DefaultTarget("torch.optim.AdamW", ("amsgrad", "capturable", "differentiable", "foreach", "fused", "maximize"))
_CHAT = "am_data.ChatDataset"
DEFAULT_LOSS = "am_loss.linear_cross_entropy"
Dataset = Annotated[Target, DefaultTarget(_CHAT)]


@dataclass(frozen=True)
class Model:
    """Weights by ``name_or_path`` (a folder, a hub id or ``package:<asset>``), or a random model by ``config``."""

    name_or_path: Text | None = None
    config: Mapping[str, Any] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give exactly one of name_or_path (pretrained weights) and config (a random model)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs a model_type, such as llama")

    def hf_config(self, folder: Path | None) -> PretrainedConfig:
        """The transformers config, from ``folder`` or the inline ``config``, with ``dtype`` set unless it is auto."""
        import torch
        from transformers import AutoConfig

        if folder is None:
            config = AutoConfig.for_model(**(self.config or {}))
        else:
            # Code that comes with weights is never run; left to itself, transformers would ask on the terminal.
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if self.dtype != "auto":
            config.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        return config


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer, where it is not the model's; ``chat_template`` is a Jinja text that replaces its own."""

    name_or_path: Text | None = None
    chat_template: Text | None = None


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one padding-free pack; 0 pads each example instead."""

    packed_sequence_size: NonNegativeInt = 0


@dataclass(frozen=True)
class DataLoader:
    shuffle: bool = True


@dataclass(frozen=True)
class Peft:
    """The fields of `peft.LoraConfig`, and the dtype the adapter's weights are kept in (None: the model's)."""

    lora: Annotated[Target, Inline(), DefaultTarget("peft.LoraConfig")]
    adapter_dtype: Dtype | None = None

    def lora_config(self) -> LoraConfig:
        return self.lora.build()

    def dtype(self) -> torch.dtype | None:
        return _dtype(self.adapter_dtype)


@dataclass(frozen=True)
class Distributed:
    """How the ranks share the work. ``dp_size`` None: all of them; ``dp_replicate_size`` above 1 is HSDP."""

    strategy: Literal["fsdp2", "ddp"] = "fsdp2"
    dp_size: PositiveInt | None = None
    dp_replicate_size: PositiveInt = 1
    tp_size: OneRank = 1
    cp_size: OneRank = 1
    pp_size: OneRank = 1
    ep_size: OneRank = 1
    activation_checkpointing: Literal["none", "full"] = "none"
    param_dtype: Dtype | None = None
    reduce_dtype: Dtype = "float32"
    timeout_minutes: PositiveInt = 30

    def __post_init__(self) -> None:
        if self.dp_size is not None and self.dp_size % self.dp_replicate_size:
            raise ValueError(
                f"dp_size={self.dp_size} is not a multiple of dp_replicate_size={self.dp_replicate_size}; "
                "dp_size counts all data-parallel ranks, replicas included"
            )

    def sizes(self) -> dict[str, int]:
        """The arguments of `am_mesh.ParallelDims`; a ``dp_shard`` of -1 takes the ranks that are left."""
        shard = -1 if self.dp_size is None else self.dp_size // self.dp_replicate_size
        others = {"cp": self.cp_size, "tp": self.tp_size, "pp": self.pp_size, "ep": self.ep_size}
        return {"dp_replicate": self.dp_replicate_size, "dp_shard": shard} | others

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_mesh.parallelize`."""
        return {
            "strategy": self.strategy,
            "recompute": self.activation_checkpointing,
            "param_dtype": _dtype(self.param_dtype),
            "reduce_dtype": _dtype(self.reduce_dtype),
        }


@dataclass(frozen=True)
class StepScheduler:
    """Batch sizes in samples, lengths in optimizer steps. The run ends at whichever of steps and epochs comes first."""

    global_batch_size: PositiveInt = 32
    local_batch_size: PositiveInt = 1
    max_steps: PositiveInt | None = None
    num_epochs: PositiveInt | None = None
    ckpt_every_steps: PositiveInt | None = 100
    val_every_steps: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"local_batch_size={self.local_batch_size}; change one of them"
            )
        if self.max_steps is None and self.num_epochs is None:
            raise ValueError("set max_steps, num_epochs or both: the run needs an end")


@dataclass(frozen=True)
class ParamGroupOverride:
    """Multipliers for the parameters whose name the regular expression ``pattern`` matches; the first match counts."""

    pattern: Pattern
    lr_mult: NonNegativeFloat = 1.0
    wd_mult: NonNegativeFloat = 1.0


@dataclass(frozen=True)
class Optimizer:
    """An optimizer class and what it is given; None leaves a value to the class."""

    lr: NonNegativeFloat
    target: Annotated[Target, Inline(), _ADAMW]
    betas: tuple[Fraction, Fraction] | None = None
    eps: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    param_group_overrides: tuple[ParamGroupOverride, ...] = ()

    def factory(self) -> Callable[..., torch.optim.Optimizer]:
        """The optimizer class (or function) itself."""
        return Target(self.target.path, place=self.target.place, places=self.target.places).callable()

    def named(self) -> dict[str, Any]:
        """The values every optimizer knows by the same name, without those left to the class."""
        values = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return {name: value for name, value in values.items() if value is not None}

    def hyperparameters(self) -> dict[str, Any]:
        """The keyword arguments of `factory`, ``params`` aside."""
        return self.named() | self.target.built_arguments()

    def overrides(self) -> list[dict[str, Any]]:
        """``param_group_overrides`` as `am_recipes.optim.build_optimizer` takes them."""
        return [asdict(override) for override in self.param_group_overrides]


@dataclass(frozen=True)
class LrScheduler:
    """Linear warm-up over ``warmup_steps``, then ``style`` from ``optimizer.lr`` to ``min_lr``, an absolute rate."""

    style: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_recipes.optim.schedule`, ``total_steps`` aside."""
        return asdict(self)


@dataclass(frozen=True)
class ClipGradNorm:
    """The largest global gradient norm; null, here or for the whole section, does not clip."""

    max_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """``resume`` from the latest checkpoint: where there is one (auto), or fail without (must), or never."""

    enabled: bool = True
    resume: Literal["auto", "must", "never"] = "auto"
    keep_last: PositiveInt | None = None
    keep_best: PositiveInt | None = None


@dataclass(frozen=True)
class Generate:
    """Sample answers at the end of the run, decoded greedily."""

    prompts: tuple[Text, ...] = ()
    max_new_tokens: PositiveInt = 64


@dataclass(frozen=True)
class Export:
    """The Hugging Face folder written at the end; ``merge_adapter`` folds a LoRA adapter into the weights first."""

    enabled: bool = True
    merge_adapter: bool = False


@dataclass(frozen=True, repr=False)
class SftConfig:
    """Everything `am_recipes.sft` needs; section and key names are those of the YAML file.

    ``validation_datasets`` maps the name of the logged metric to its dataset: ``validation_dataset`` is ``val_loss``,
    ``validation_dataset_math`` is ``val_loss_math``. ``source`` is the file that was read, ``places`` says where each
    dotted path was set, ``environment`` maps dotted paths to the ``${VAR}`` text their value came from.
    """

    recipe: Literal["sft"]
    run_dir: Path
    model: Model
    dataset: Dataset
    optimizer: Optimizer
    step_scheduler: StepScheduler
    seed: NonNegativeInt = 42
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    validation_datasets: Annotated[Mapping[str, Dataset], Prefixed("validation_dataset", "val_loss")] = field(
        default_factory=dict
    )
    packed_sequence: PackedSequence = field(default_factory=PackedSequence)
    dataloader: DataLoader = field(default_factory=DataLoader)
    peft: Peft | None = None
    distributed: Distributed = field(default_factory=Distributed)
    lr_scheduler: LrScheduler = field(default_factory=LrScheduler)
    loss_fn: Annotated[Target, DefaultTarget(DEFAULT_LOSS)] = field(default_factory=lambda: Target(DEFAULT_LOSS))
    clip_grad_norm: ClipGradNorm = field(default_factory=ClipGradNorm)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    kernels: Literal["auto", "off"] | Mapping[str, Any] = "auto"
    generate: Generate = field(default_factory=Generate)
    export: Export = field(default_factory=Export)
    source: Path = field(default=Path(), compare=False)
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)
    environment: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.model.name_or_path is None and self.tokenizer.name_or_path is None:
            raise ValueError("tokenizer.name_or_path is required with model.config: a random model brings no tokenizer")
        if self.model.name_or_path is None and self.peft and self.export.enabled and not self.export.merge_adapter:
            raise ValueError(
                "export.merge_adapter is false with model.config: nothing could load an adapter without the random "
                "weights it belongs to; set export.merge_adapter or give model.name_or_path"
            )
        if self.checkpoint.keep_best is not None and not self.validation_datasets:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation_dataset, whose loss says what is "
                "best; add one, or use checkpoint.keep_last"
            )
        schedule, steps = self.lr_scheduler, self.step_scheduler
        if schedule.style != "constant" and schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"lr_scheduler.min_lr={schedule.min_lr} is above optimizer.lr={self.optimizer.lr}; lower it"
            )
        if steps.max_steps is not None and schedule.warmup_steps > steps.max_steps:
            raise ValueError(
                f"lr_scheduler.warmup_steps={schedule.warmup_steps} is longer than the run of "
                f"step_scheduler.max_steps={steps.max_steps}; lower it"
            )

    def error(self, path: str, message: str) -> ConfigError:
        """An error about the value at a dotted path, with the line that set it or the section it would be in."""
        parent = path
        while parent not in self.places and parent:
            parent = parent.rpartition(".")[0]
        where = self.places[parent].where if parent in self.places else str(self.source)
        return Place(where, path).error(message)

    def __str__(self) -> str:
        return self.to_yaml()

    __repr__ = __str__

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run, as JSON values that hold no secret and nothing from the environment.

        Where the schedule decays, the length of the run is part of it: it decides the rate of every step.
        """
        values = fingerprints(plain(self), self.environment)
        data = ("dataset", "packed_sequence", "dataloader")
        update = ("optimizer", "lr_scheduler", "clip_grad_norm", "loss_fn", "seed")
        result = {key: values[key] for key in ("model", "tokenizer", *data, "peft", *update)}
        result["step_scheduler"] = {"global_batch_size": self.step_scheduler.global_batch_size}
        if self.lr_scheduler.style != "constant":
            result["step_scheduler"] |= self.goal()
        return result

    def goal(self) -> dict[str, int | None]:
        """How long to train: what decides whether a run is finished, and may grow between two calls of one command."""
        return {"max_steps": self.step_scheduler.max_steps, "num_epochs": self.step_scheduler.num_epochs}

    def to_yaml(self) -> str:
        """The resolved config: defaults written out, environment references as they were, secrets as references."""
        return dump(written(plain(self), self.environment))

    def save(self, path: Path) -> None:
        """Write `to_yaml` to ``path``; one rank calls this."""
        path.write_text(self.to_yaml(), encoding="utf-8")


RECIPES: Mapping[str, type[SftConfig]] = {"sft": SftConfig}


def parse(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> SftConfig:
    """Read and check a config file; ``overrides`` are (dotted path, text) pairs, later ones win.

    Imports nothing that the config names and writes nothing. Raises `ConfigError`.
    """
    source = Path(path)
    tree = load(source)
    for dotted_path, text in overrides:
        override(tree, dotted_path, text)
    root = resolve(tree)
    recipe = root.value.get("recipe")
    if recipe is None:
        raise root.error(f"the key 'recipe' is required: one of {', '.join(RECIPES)}")
    if recipe.value not in list(RECIPES):
        raise recipe.error(f"must be one of {', '.join(RECIPES)}, got {recipe.shown()}")
    for key, child in root.value.items():
        if key == "dataset" or key.startswith("validation_dataset"):
            _name_rows(child)
    if "clip_grad_norm" in root.value:
        root.value["clip_grad_norm"] = _spell_out_no_clipping(root.value["clip_grad_norm"])
    default = {"run_dir": Node(root.place.child("run_dir"), f"runs/{source.stem}")}
    complete = Node(root.place, default | root.value)
    nodes = dict(walk(root))
    return read_section(
        complete,
        RECIPES[recipe.value],
        source=source,
        places={dotted_path: node.place for dotted_path, node in nodes.items()},
        environment={path: node.reference for path, node in nodes.items() if node.reference is not None},
    )


def _name_rows(node: Node) -> None:
    """In the short form of a dataset, ``path`` is what `am_data.ChatDataset` calls ``rows``."""
    if not isinstance(node.value, dict) or "path" not in node.value:
        return
    if "_target_" in node.value and node.value["_target_"].value != _CHAT:
        return
    if "rows" in node.value and not node.value["path"].created:
        raise node.value["path"].error("means the same as rows, which is given too; keep one of them")
    # In place of the key it renames, so that the order of what is saved stays that of the file.
    renamed = {"rows" if key == "path" else key: child for key, child in node.value.items() if key != "rows"}
    node.value.clear()
    node.value.update(renamed)


def _spell_out_no_clipping(node: Node) -> Node:
    """``clip_grad_norm: null`` is short for ``clip_grad_norm: {max_norm: null}``."""
    if node.value not in (None, "none", "None"):
        return node
    max_norm = replace(node, place=node.place.child("max_norm"))
    return Node(node.place, {"max_norm": max_norm})


def check_targets(config: SftConfig) -> None:
    """Import every target of the config and check its arguments against its signature. Raises `ConfigError`."""
    config.dataset.bind(("tokenizer",))
    for dataset in config.validation_datasets.values():
        dataset.bind(("tokenizer",))
    config.optimizer.target.bind(("params", *config.optimizer.named()))
    config.loss_fn.bind(partial=True)
    if config.peft is not None:
        config.peft.lora.bind()
    if config.model.config is not None:
        _check_model_config(config)


def _check_model_config(config: SftConfig) -> None:
    """Transformers keeps unknown keywords as attributes that nothing reads; a misspelt size would go unnoticed."""
    import inspect

    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    inline = config.model.config or {}
    model_type = inline["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise config.error("model.config.model_type", f"unknown {model_type!r}{nearest(model_type, CONFIG_MAPPING)}")
    kind = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(kind).parameters, *kind().to_dict(), *kind.attribute_map, "model_type"}
    for key in inline:
        if key not in known:
            raise config.error(f"model.config.{key}", f"{kind.__name__} has no such field{nearest(key, known)}")
    try:
        kind(**{key: value for key, value in inline.items() if key != "model_type"})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise config.error("model.config", f"{kind.__name__}: {error.__cause__ or error}") from error


def identity_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys on which two results of `SftConfig.identity` differ."""
    result: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            result += [f"{key}.{inner}" for inner in identity_difference(before, after)]
        elif before != after:
            result.append(key)
    return result


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]

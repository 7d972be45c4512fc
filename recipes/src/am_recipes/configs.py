"""A recipe's config: one YAML file, command-line overrides and the environment, as one typed frozen dataclass.

All facts of a recipe stand on its class. `parse` checks the schema without importing torch or any target and writes
nothing; `check_targets` imports every `_target_` and holds its arguments against its signature before anything is
built. All complaints are `ConfigError` with file, line, dotted path and the nearest valid name. `RunConfig.to_yaml` is
the resolved config, which `parse` reads back to an equal one: values from the environment are written as the references
they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from am_recipes import schedules, sections
from am_recipes.settings import (
    ArgumentError,
    Call,
    ConfigError,
    DefaultTarget,
    Node,
    Place,
    Prefixed,
    Target,
    dump,
    fingerprints,
    load,
    override,
    plain,
    read_section,
    resolve,
    walk,
    written,
)

__all__ = [
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

DEFAULT_LOSS = "am_loss.linear_cross_entropy"
DEFAULT_KD_LOSS = "am_loss.linear_distillation"
# Of a config that names none; `{config}` is the stem of its file.
DEFAULT_RUN_DIR = "runs/{config}"
MUON = "torch.optim.Muon"
_HELD_OUT = Prefixed("validation_dataset", "val_loss")
_OF_KD = {
    "teacher_model": "this recipe has no teacher; recipe kd learns from one",
    "teacher_distributed": "this recipe has no teacher; recipe kd learns from one",
    "kd_ratio": "it weighs the loss of a teacher, and this recipe has none; recipe kd learns from one",
    "temperature": "it softens the distributions of a teacher, and this recipe has none; recipe kd learns from one",
    "kd_loss_fn": "it compares with a teacher, and this recipe has none; recipe kd learns from one",
}
_OF_VLM = {
    "processor": "this recipe reads text alone, with a tokenizer; recipe vlm reads images",
    "model.vision_family": "this recipe trains language models; recipe vlm trains models with a vision tower",
    "generate.num_rows": "this recipe answers generate.prompts; recipe vlm answers held-out rows",
}


@dataclass(frozen=True, repr=False, kw_only=True)
class RunConfig:
    """What every recipe needs; section and key names are those of the YAML file.

    `validation_datasets` maps the name of the logged metric to its dataset: `validation_dataset` is `val_loss`,
    `validation_dataset_math` is `val_loss_math`. `source` is the file that was read, `places` says where each dotted
    path was set, `environment` maps dotted paths to the `${VAR}` text their value came from.
    """

    # What the recipe is called in a config and on the command line, and what it does in a line.
    NAME: ClassVar[str]
    COMMAND: ClassVar[tuple[str, str]]
    HELP: ClassVar[str]
    # The class of a dataset that names none, and what the recipe passes to the class of any.
    DATASET: ClassVar[DefaultTarget]
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    # The sections, or keys of them, that make two runs the same run.
    IDENTITY: ClassVar[tuple[str, ...]] = (
        *("model", "dataset", "dataloader.shuffle", "dataloader.drop_last", "dataloader.collate", "peft", "freeze"),
        *("moe", "optimizer", "lr_scheduler", "clip_grad_norm", "loss_fn", "seed"),
    )
    # Keys of other recipes, and why this one has no use for them.
    REFUSED: ClassVar[Mapping[str, str]] = _OF_KD | _OF_VLM

    recipe: str
    """Which recipe runs."""
    run_dir: Path
    """Where the run is kept."""
    model: sections.Model
    dataset: Target
    """The rows to train on: its class (_target_) and what that takes, such as path."""
    optimizer: sections.Optimizer
    step_scheduler: sections.StepScheduler
    seed: sections.NonNegativeInt = 42
    """Decides every random number, however the work is split."""
    validation_datasets: Mapping[str, Target] = field(default_factory=dict)
    """Held-out rows, as dataset; their losses are val_loss and val_loss_NAME."""
    dataloader: sections.DataLoader = field(default_factory=sections.DataLoader)
    distributed: sections.Distributed = field(default_factory=sections.Distributed)
    lr_scheduler: sections.LrScheduler = field(default_factory=sections.LrScheduler)
    loss_fn: Annotated[Target, DefaultTarget(DEFAULT_LOSS)] = field(default_factory=lambda: Target(DEFAULT_LOSS))
    """A function of hidden states, output weight and shifted labels that returns a sum over targets."""
    clip_grad_norm: sections.ClipGradNorm = field(default_factory=sections.ClipGradNorm)
    peft: sections.Peft | None = None
    freeze: tuple[sections.FreezeRule, ...] | None = None
    moe: sections.Router = field(default_factory=sections.Router)
    checkpoint: sections.Checkpoint = field(default_factory=sections.Checkpoint)
    kernels: Literal["auto", "off"] | Mapping[str, Any] = "auto"
    """Our faster parts: all that fit, none, or a mapping of part to choice (am_models.optimize)."""
    export: sections.AdapterExport = field(default_factory=sections.AdapterExport)
    sinks: tuple[Target, ...] = ()
    """What else is told of every step (am_recipes.sinks.Sink)."""
    source: Path = field(default=Path(), compare=False)
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)
    environment: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.checkpoint.keep_best is not None and not self.validation_datasets:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation_dataset, whose loss says what is "
                "best; add one, or use checkpoint.keep_last"
            )
        try:
            schedules.require_fit(
                **self.lr_scheduler.options(),
                lr=self.optimizer.lr,
                total_steps=self.step_scheduler.max_steps,
                length="step_scheduler.max_steps",
            )
        except ValueError as error:
            raise self.error("lr_scheduler", str(error)) from error
        if self.optimizer.adamw is not None and self.optimizer.target.path != MUON:
            raise ValueError(
                f"optimizer.adamw is for {MUON}, which leaves a part to AdamW, and the optimizer is "
                f"{self.optimizer.target.path}; remove it"
            )
        if self.model.config is not None and self.peft and self.export.enabled and not self.export.merge_adapter:
            raise ValueError(
                "export.merge_adapter is false with model.config: nothing could load an adapter without the random "
                "weights it belongs to; set export.merge_adapter or give model.name_or_path"
            )

    def models(self) -> Mapping[str, sections.Model]:
        """The sections that describe a model, by their key."""
        return {"model": self.model}

    def targets(self) -> Iterator[Call]:
        """Every target of the config, with what the recipe passes to it."""
        yield Call("dataset", self.dataset, self.DATASET_ARGUMENTS)
        for metric, dataset in self.validation_datasets.items():
            key = _HELD_OUT.key + metric.removeprefix(_HELD_OUT.stored)
            yield Call(key, dataset, self.DATASET_ARGUMENTS)
        for key, model in self.models().items():
            yield from model.calls(key)
        yield Call("optimizer", self.optimizer.target, ("params", *self.optimizer.named()))
        yield Call("loss_fn", self.loss_fn, partial=True)
        if self.dataloader.collate is not None:
            yield Call("dataloader.collate", self.dataloader.collate, partial=True)
        if self.peft is not None:
            yield Call("peft", self.peft.lora)
        for number, sink in enumerate(self.sinks):
            yield Call(f"sinks.{number}", sink)

    def freeze_rules(self) -> list[dict[str, str]] | None:
        """`freeze` as `am_peft.freeze` takes it; None where the config leaves it to the recipe."""
        return None if self.freeze is None else [rule.rule() for rule in self.freeze]

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

        Where the schedule needs the length of the run, that is part of it: it decides the rate of every step.
        """
        values = fingerprints(plain(self), self.environment)
        result: dict[str, Any] = {}
        for key in self.IDENTITY:
            section, _, name = key.partition(".")
            if name:
                result.setdefault(section, {})[name] = values[section][name]
            else:
                result[section] = values[section]
        result["step_scheduler"] = {"global_batch_size": self.step_scheduler.global_batch_size}
        if self.lr_scheduler.style in schedules.NEEDS_TOTAL_STEPS:
            result["step_scheduler"] |= self.goal()
        return result

    def goal(self) -> dict[str, int | None]:
        """How long to train: what decides whether a run is finished, and may grow between two calls of one command."""
        return self.step_scheduler.goal()

    def to_yaml(self) -> str:
        """The resolved config: defaults written out, environment references as they were, secrets as references."""
        return dump(written(plain(self), self.environment))

    def save(self, path: Path) -> None:
        """Write `to_yaml` to `path`; one rank calls this."""
        path.write_text(self.to_yaml(), encoding="utf-8")


@dataclass(frozen=True, repr=False, kw_only=True)
class SftConfig(RunConfig):
    """Everything `am_recipes.sft` needs."""

    NAME: ClassVar[str] = "sft"
    COMMAND: ClassVar[tuple[str, str]] = ("finetune", "llm")
    HELP: ClassVar[str] = "fine-tune a language model on conversations"
    DATASET: ClassVar[DefaultTarget] = DefaultTarget("am_data.ChatDataset")
    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "tokenizer", "packed_sequence")

    dataset: Annotated[Target, DATASET]
    validation_datasets: Annotated[Mapping[str, Annotated[Target, DATASET]], _HELD_OUT] = field(default_factory=dict)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    packed_sequence: sections.PackedSequence = field(default_factory=sections.PackedSequence)
    generate: sections.Generate = field(default_factory=sections.Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reader(self.model, self.tokenizer, "tokenizer")

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield from self.tokenizer.calls("tokenizer")


@dataclass(frozen=True, repr=False, kw_only=True)
class KdConfig(SftConfig):
    """Everything `am_recipes.kd` needs: a teacher beside what fine-tuning has.

    The loss is `(1 - kd_ratio) * cross-entropy + kd_ratio * temperature^2 * divergence`.
    """

    NAME: ClassVar[str] = "kd"
    COMMAND: ClassVar[tuple[str, str]] = ("kd", "llm")
    HELP: ClassVar[str] = "distil a language model from a larger one"
    IDENTITY: ClassVar[tuple[str, ...]] = (
        *SftConfig.IDENTITY,
        *("teacher_model", "kd_ratio", "temperature", "kd_loss_fn"),
    )
    REFUSED: ClassVar[Mapping[str, str]] = _OF_VLM | {"teacher_model.vision_family": _OF_VLM["model.vision_family"]}

    teacher_model: sections.Model
    """The frozen teacher, as model; it has the same tokens."""
    kd_ratio: sections.Ratio = 0.5
    """Share of the divergence in the loss; the rest is cross-entropy."""
    temperature: sections.PositiveFloat = 1.0
    """Softens the distributions of both models."""
    kd_loss_fn: Annotated[Target, DefaultTarget(DEFAULT_KD_LOSS)] = field(
        default_factory=lambda: Target(DEFAULT_KD_LOSS)
    )
    """The whole loss of a step, from the hidden states of both models."""
    teacher_distributed: sections.Distributed | None = None
    """The teacher's own layout over the same ranks; null: the student's."""

    def models(self) -> Mapping[str, sections.Model]:
        return {"model": self.model, "teacher_model": self.teacher_model}

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield Call("kd_loss_fn", self.kd_loss_fn, ("kd_ratio", "temperature", "num_tokens"), partial=True)


@dataclass(frozen=True, repr=False, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything `am_recipes.pretrain` needs."""

    NAME: ClassVar[str] = "pretrain"
    COMMAND: ClassVar[tuple[str, str]] = ("pretrain", "llm")
    HELP: ClassVar[str] = "train a language model on tokens, from random weights or on"
    DATASET: ClassVar[DefaultTarget] = DefaultTarget("am_data.TokenShards")
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("tokenizer", "vocab_size")
    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "tokenizer")
    REFUSED: ClassVar[Mapping[str, str]] = RunConfig.REFUSED | {
        "packed_sequence": "rows are windows of equal length, packed already; dataset.split_documents says whether "
        "documents see each other",
    }

    dataset: Annotated[Target, DATASET]
    step_scheduler: sections.BoundedScheduler
    validation_datasets: Annotated[Mapping[str, Annotated[Target, DATASET]], _HELD_OUT] = field(default_factory=dict)
    tokenizer: sections.Tokenizer = field(default_factory=sections.Tokenizer)
    generate: sections.Generate = field(default_factory=sections.Generate)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reader(self.model, self.tokenizer, "tokenizer")

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield from self.tokenizer.calls("tokenizer")


@dataclass(frozen=True, repr=False, kw_only=True)
class VlmConfig(RunConfig):
    """Everything `am_recipes.vlm` needs.

    `freeze` None freezes the vision tower and trains the rest; with `peft` it changes nothing.
    """

    NAME: ClassVar[str] = "vlm"
    COMMAND: ClassVar[tuple[str, str]] = ("finetune", "vlm")
    HELP: ClassVar[str] = "fine-tune a vision-language model on conversations with images"
    DATASET: ClassVar[DefaultTarget] = DefaultTarget("am_data.VisionChatDataset")
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("processor",)
    IDENTITY: ClassVar[tuple[str, ...]] = (*RunConfig.IDENTITY, "processor")
    REFUSED: ClassVar[Mapping[str, str]] = _OF_KD | {
        "tokenizer": "it is the processor's; set processor.name_or_path or processor.chat_template",
        "packed_sequence": "rows with images are padded, each a row of its own; set step_scheduler.local_batch_size",
        "generate.prompts": "this recipe answers held-out rows: generate.num_rows",
    }

    model: sections.VisionModel
    dataset: Annotated[Target, DATASET]
    validation_datasets: Annotated[Mapping[str, Annotated[Target, DATASET]], _HELD_OUT] = field(default_factory=dict)
    processor: sections.Processor = field(default_factory=sections.Processor)
    generate: sections.GenerateFromRows = field(default_factory=sections.GenerateFromRows)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_reader(self.model, self.processor, "processor")
        if self.generate.num_rows and not self.validation_datasets:
            raise ValueError(
                f"generate.num_rows={self.generate.num_rows} needs a validation_dataset, whose rows are asked; add one"
            )

    def targets(self) -> Iterator[Call]:
        yield from super().targets()
        yield from self.processor.calls("processor")


RECIPES: Mapping[str, type[RunConfig]] = {kind.NAME: kind for kind in (SftConfig, PretrainConfig, KdConfig, VlmConfig)}


def _require_reader(model: sections.Model, reader: sections.Reader, key: str) -> None:
    if model.name_or_path is None and reader.name_or_path is None:
        raise ValueError(f"{key}.name_or_path is required with model.config: a random model brings no {key}")


def parse(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Read and check a config file; `overrides` are (dotted path, text) pairs, later ones win.

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
    kind = RECIPES[recipe.value]
    _refuse(root, kind)
    if "clip_grad_norm" in root.value:
        root.value["clip_grad_norm"] = _spell_out_no_clipping(root.value["clip_grad_norm"])
    default = {"run_dir": Node(root.place.child("run_dir"), DEFAULT_RUN_DIR.format(config=source.stem))}
    nodes = dict(walk(root))
    return read_section(
        Node(root.place, default | root.value),
        kind,
        source=source,
        places={dotted_path: node.place for dotted_path, node in nodes.items()},
        environment={path: node.reference for path, node in nodes.items() if node.reference is not None},
    )


def _refuse(root: Node, kind: type[RunConfig]) -> None:
    """Refuse what the recipe has no use for and says so, which is more than that it does not know the key."""
    nodes = dict(walk(root))
    for key, reason in kind.REFUSED.items():
        if key in nodes:
            raise nodes[key].error(f"not in recipe {kind.NAME}: {reason}")


def _spell_out_no_clipping(node: Node) -> Node:
    """`clip_grad_norm: null` is short for `clip_grad_norm: {max_norm: null}`."""
    if node.value not in (None, "none", "None"):
        return node
    max_norm = replace(node, place=node.place.child("max_norm"))
    return Node(node.place, {"max_norm": max_norm})


def check_targets(config: RunConfig) -> None:
    """Import every target of the config and hold its arguments against its signature, and inline model configs against
    their classes. Raises `ConfigError`.
    """
    for call in config.targets():
        call.bind()
    # Knows transformers, which the schema does without.
    from am_recipes import model_config

    for key, model in config.models().items():
        if model.config is not None:
            try:
                model_config.check(model.config)
            except ArgumentError as error:
                raise config.error(f"{key}.config.{error.path}".rstrip("."), str(error)) from error


def identity_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys on which two results of `RunConfig.identity` differ."""
    result: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            result += [f"{key}.{inner}" for inner in identity_difference(before, after)]
        elif before != after:
            result.append(key)
    return result

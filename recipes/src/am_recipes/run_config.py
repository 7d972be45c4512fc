"""What the configs of all recipes have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from am_recipes import compatibility, schedules, sections
from am_recipes.launch.job import Launcher
from am_recipes.settings import (
    ArgumentError,
    Call,
    ConfigError,
    DefaultTarget,
    Place,
    Prefixed,
    Target,
    dump,
    fingerprints,
    first_name,
    in_clear,
    leaves,
    plain,
    unusable,
    written,
)

DEFAULT_LOSS = "am_loss.linear_cross_entropy"
MUON = "torch.optim.Muon"
HELD_OUT = Prefixed("validation_dataset", "val_loss")


@dataclass(frozen=True, repr=False, kw_only=True)
class RunConfig:
    """What every recipe needs; section and key names are those of the YAML file.

    `validation_datasets` maps the name of the logged metric to its dataset: `validation_dataset` is `val_loss`,
    `validation_dataset_math` is `val_loss_math`. `source` is the file that was read, `places` says where each dotted
    path was set, `environment` maps dotted paths to the `${VAR}` text their value came from. `dry_run` is no key: such
    a run ends where it would read weights and begin (`am_recipes.dry_run`).
    """

    # What the recipe is called in a config and on the command line, and what it does in a line.
    NAME: ClassVar[str]
    COMMAND: ClassVar[tuple[str, str]]
    HELP: ClassVar[str]
    # The class of a dataset that names none, and what the recipe passes to the class of any.
    DATASET: ClassVar[DefaultTarget]
    DATASET_ARGUMENTS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    # Of an adapter whose config names none: with it peft's Auto classes find the base model by themselves.
    PEFT_TASK_TYPE: ClassVar[str | None] = "CAUSAL_LM"
    # The sections, or keys of them, that make two runs the same run.
    IDENTITY: ClassVar[tuple[str, ...]] = (
        *("model", "dataset", "dataloader.shuffle", "dataloader.drop_last", "dataloader.collate", "peft", "freeze"),
        *("moe", "optimizer", "lr_scheduler", "clip_grad_norm", "loss_fn", "seed"),
    )
    # Keys of other recipes, and why this one has no use for them.
    REFUSED: ClassVar[Mapping[str, str]]

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
    deterministic: bool = False
    """The same run again gives the same numbers to the bit, with slower operations where that takes them."""
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
    early_stopping: sections.EarlyStopping | None = None
    export: sections.AdapterExport = field(default_factory=sections.AdapterExport)
    sinks: tuple[Target, ...] = ()
    """What else is told of every step (am_recipes.sinks.Sink)."""
    mlflow: sections.Mlflow | None = None
    wandb: sections.Wandb | None = None
    tensorboard: sections.TensorBoard | None = None
    trackio: sections.Trackio | None = None
    slurm: sections.Slurm | None = None
    kubernetes: sections.Kubernetes | None = None
    skypilot: sections.SkyPilot | None = None
    source: Path = field(default=Path(), compare=False)
    places: Mapping[str, Place] = field(default_factory=dict, compare=False)
    environment: Mapping[str, str] = field(default_factory=dict, compare=False)
    dry_run: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        self._require_validations()
        self._require_one_launcher()
        self._require_no_secret_in_an_address()
        self._require_compatible()
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

    def launchers(self) -> Mapping[str, Launcher]:
        """The sections that hand the run to a scheduler, by their key: none, or one."""
        launchers: Mapping[str, Launcher | None] = {
            "slurm": self.slurm,
            "kubernetes": self.kubernetes,
            "skypilot": self.skypilot,
        }
        return {key: launcher for key, launcher in launchers.items() if launcher is not None}

    def _require_one_launcher(self) -> None:
        first, *others = [*self.launchers(), ""]
        if len(others) > 1:
            raise self.error(others[0], f"{first} hands the run to a scheduler too; choose one: --{first} null")

    def _require_no_secret_in_an_address(self) -> None:
        """Refuse an address with a secret in it, which config.yaml and every copy of it would repeat."""
        for path, value in leaves(plain(self)):
            text = self.environment.get(path, value)
            if isinstance(text, str) and not text.count(" ") and (found := in_clear(text)):
                raise self.error(
                    path,
                    f"has {found} in clear, which config.yaml would repeat; give the whole address as a variable of "
                    "the environment, ${NAME}, or leave it out where its client reads one of its own",
                )

    def _require_compatible(self) -> None:
        """Refuse what the table of equivalence refuses; what it says of the model's own facts, `build` asks."""
        refused = compatibility.table().refused(plain(self))
        if refused is not None:
            raise self.error(*refused)
        kernels = self.kernels
        attention = kernels if isinstance(kernels, str) else kernels.get("attention", "auto")
        for key, layout in self.layouts().items():
            if layout.cp_size > 1 and attention not in ("auto", True):
                raise self.error(
                    "kernels" if isinstance(kernels, str) else "kernels.attention",
                    f"{attention}: with {key}.cp_size={layout.cp_size} a rank holds a part of each sequence, and only "
                    "the attention that auto chooses sees the whole; take this out, or choose cp_size=1",
                )

    def _require_validations(self) -> None:
        """Refuse to choose by validation losses that will not be there."""
        chosen_by = {
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "export.which": "best" if self.wants_best_export else None,
            "early_stopping": self.early_stopping and f"{{patience: {self.early_stopping.patience}}}",
        }
        for key, value in chosen_by.items():
            if value is None:
                continue
            if not self.validation_datasets:
                fix = "add one, or use checkpoint.keep_last" if key == "checkpoint.keep_best" else "add one"
                raise ValueError(f"{key}={value} needs a validation_dataset, whose loss says what is best; {fix}")
            if self.step_scheduler.val_every_steps is None:
                raise ValueError(
                    f"{key}={value} chooses among validations, and with val_every_steps=None there is one, at the end; "
                    "set step_scheduler.val_every_steps"
                )
            if key != "early_stopping" and not self.checkpoint.enabled:
                raise ValueError(
                    f"{key}={value} needs the checkpoints that checkpoint.enabled=False does not write; set it to true"
                )

    @property
    def wants_best_export(self) -> bool:
        """Whether the export is to be the best validation's."""
        return self.export.enabled and self.export.which == "best"

    def models(self) -> Mapping[str, sections.Model]:
        """The sections that describe a model, by their key."""
        return {"model": self.model}

    def trackers(self) -> dict[str, sections.Tracking]:
        """The trackers that are on, by the key of their section."""
        every: dict[str, sections.Tracking | None] = {
            "mlflow": self.mlflow,
            "wandb": self.wandb if self.wandb is not None and self.wandb.is_on else None,
            "tensorboard": self.tensorboard,
            "trackio": self.trackio,
        }
        return {name: section for name, section in every.items() if section is not None}

    def targets(self) -> Iterator[Call]:
        """Every target of the config, with what the recipe passes to it."""
        yield Call("dataset", self.dataset, self.DATASET_ARGUMENTS)
        for metric, dataset in self.validation_datasets.items():
            key = HELD_OUT.key + metric.removeprefix(HELD_OUT.stored)
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
        if self.wandb is not None and self.wandb.is_on:
            yield from self.wandb.calls("wandb")
        if self.trackio is not None:
            yield from self.trackio.calls("trackio")

    def spelt_out(self) -> Self:
        """The same config with the defaults of the datasets' classes, which the classes alone know, written out."""
        given = self.DATASET_ARGUMENTS
        held_out = {name: target.spelt_out(given) for name, target in self.validation_datasets.items()}
        return replace(self, dataset=self.dataset.spelt_out(given), validation_datasets=held_out)

    def layouts(self) -> Mapping[str, sections.Distributed]:
        """How the ranks share each model, by the key of the section."""
        return {"distributed": self.distributed}

    def freeze_rules(self) -> list[dict[str, str]] | None:
        """`freeze` as `am_peft.freeze` takes it; None where the config leaves it to the recipe."""
        return None if self.freeze is None else [rule.rule() for rule in self.freeze]

    def error(self, path: str, message: str) -> ConfigError:
        """An error about the value at a dotted path, with the line that set it or the section it would be in."""
        return self._place(path).error(message)

    def at(self, path: str = "") -> AbstractContextManager[None]:
        """Give what is refused within its place in the config: ValueError and OSError become `UnusableError`.

        It is `path`, or the value of it that the message begins with (`name=`), where the config sets that; of an
        `ArgumentError`, which checks raise, its own. Without `path` that is all.
        """

        def place(error: Exception) -> Place:
            if isinstance(error, ArgumentError):
                return self._place(error.path)
            return self.places.get(f"{path}.{first_name(error)}") or self._place(path)

        return unusable(place, (ValueError, OSError) if path else (ArgumentError,))

    def _place(self, path: str) -> Place:
        parent = path
        while parent not in self.places and parent:
            parent = parent.rpartition(".")[0]
        where = self.places[parent].where if parent in self.places else str(self.source)
        return Place(where, path)

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

    def ending(self) -> dict[str, Any]:
        """What else decides how a run ends: a finished run that is asked for another ending goes on, to that one."""
        values = plain(self)
        return {"early_stopping": values["early_stopping"], "export": values["export"]}

    def to_yaml(self) -> str:
        """The resolved config: defaults written out, environment references as they were, secrets as references."""
        return dump(written(plain(self), self.environment))


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

"""Sections about training: length, optimizer, schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from am_recipes.schedules import DecayType, Style
from am_recipes.sections.kinds import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Pattern,
    PositiveFloat,
    PositiveInt,
    Time,
)
from am_recipes.settings import DefaultTarget, Inline, Target

if TYPE_CHECKING:
    import torch

_ADAMW = DefaultTarget("torch.optim.AdamW", ("amsgrad", "capturable", "differentiable", "foreach", "fused", "maximize"))


@dataclass(frozen=True)
class StepScheduler:
    """Batch sizes and the length of the run: the first of max_steps, num_epochs and max_tokens."""

    global_batch_size: PositiveInt = 32
    """Samples of one optimizer step, over all ranks: rows, or packs of rows with packed_sequence."""
    local_batch_size: PositiveInt = 1
    """Samples of one micro-batch on one rank."""
    max_steps: PositiveInt | None = None
    """Optimizer steps of the run at most."""
    num_epochs: PositiveInt | None = None
    """Times the data is read at most."""
    max_tokens: PositiveInt | None = None
    """Tokens of the run at most, over all ranks and without padding; the last step is a whole one."""
    ckpt_every_steps: PositiveInt | None = 100
    """Steps between checkpoints; null: not by steps. The end has one in any case."""
    ckpt_every_minutes: PositiveFloat | None = 10.0
    """Minutes after which a step without a checkpoint gets one, which the next one replaces; null: not by time."""
    ckpt_every_epoch: bool = False
    """Whether the last step of every epoch gets a checkpoint too."""
    max_time: Time | None = None
    """How long one launch may take from the start of its process: it then commits and exits with 75. Null: no limit."""
    val_every_steps: PositiveInt | None = None
    """Steps between validations; null: only before the first step and at the end."""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.local_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"local_batch_size={self.local_batch_size}; change one of them"
            )
        if not any(self.goal().values()):
            raise ValueError(f"set one of {', '.join(self.goal())} or more: the run needs an end")

    def goal(self) -> dict[str, int | None]:
        """How long to train: what decides whether a run is finished, and may grow between two calls of one command."""
        return {
            name: value for name, value in asdict(self).items() if name in ("max_steps", "num_epochs", "max_tokens")
        }


@dataclass(frozen=True)
class BoundedScheduler(StepScheduler):
    """Batch sizes and the length of the run: the first of max_steps and max_tokens, and within num_epochs."""

    num_epochs: PositiveInt = 1
    """Times the data may be read: a longer run is refused."""


@dataclass(frozen=True)
class ParamGroupOverride:
    """Other rates for the parameters whose name matches a regular expression."""

    pattern: Pattern
    """Matches somewhere in a parameter's name; the first override that matches counts."""
    lr_mult: NonNegativeFloat = 1.0
    """Multiplies the learning rate."""
    wd_mult: NonNegativeFloat = 1.0
    """Multiplies the weight decay."""


@dataclass(frozen=True)
class AdamW:
    """What AdamW gets beside Muon."""

    lr: NonNegativeFloat | None = None
    """Its rate; null needs adjust_lr_fn match_rms_adamw of Muon."""
    betas: tuple[Fraction, Fraction] | None = None
    """Null: the class's own."""
    eps: PositiveFloat | None = None
    """Null: the class's own."""
    weight_decay: NonNegativeFloat | None = None
    """Null: Muon's."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer class and what it is given."""

    lr: NonNegativeFloat
    """Learning rate, the full one of the schedule."""
    target: Annotated[Target, Inline(), _ADAMW]
    """Any class of optimizers, and what else it takes."""
    betas: tuple[Fraction, Fraction] | None = None
    """Null: the class's own."""
    eps: PositiveFloat | None = None
    """Null: the class's own."""
    weight_decay: NonNegativeFloat | None = None
    """Of matrices, embeddings too; not of norms and biases. Null: the class's own."""
    param_group_overrides: tuple[ParamGroupOverride, ...] = ()
    """Other rates for some parameters."""
    adamw: AdamW | None = None
    """With torch.optim.Muon, which trains hidden matrices alone: what AdamW gets for the rest."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_recipes.optim.build_optimizer`."""
        options = {"optimizer": self.factory(), "overrides": self.overrides()} | self.hyperparameters()
        if self.adamw is None:
            return options
        return options | {"adamw": {name: value for name, value in asdict(self.adamw).items() if value is not None}}

    def factory(self) -> Callable[..., torch.optim.Optimizer]:
        """The optimizer class (or function) itself."""
        return Target(self.target.path, place=self.target.place, places=self.target.places).callable()

    def named(self) -> dict[str, Any]:
        """The values every optimizer knows by the same name, without those left to the class."""
        values = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return {name: value for name, value in values.items() if value is not None}

    def hyperparameters(self) -> dict[str, Any]:
        """The keyword arguments of `factory`, `params` aside."""
        return self.named() | self.target.built_arguments()

    def overrides(self) -> list[dict[str, Any]]:
        """`param_group_overrides` as `am_recipes.optim.build_optimizer` takes them."""
        return [asdict(override) for override in self.param_group_overrides]


@dataclass(frozen=True)
class LrScheduler:
    """The learning rate over the run: linear warm-up to optimizer.lr, then a style."""

    style: Style = "constant"
    """What follows the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps until the full rate, which the last of them takes."""
    init_lr: NonNegativeFloat | None = None
    """Rate of the first step of the warm-up; null: optimizer.lr / warmup_steps."""
    min_lr: NonNegativeFloat = 0.0
    """An absolute rate, where the schedule ends."""
    decay_steps: PositiveInt | None = None
    """How many of the last steps of wsd decay; null: a tenth of the run."""
    decay_type: DecayType | None = None
    """How wsd decays; null: linear."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `am_recipes.optim.schedule`, `total_steps` aside."""
        return asdict(self)


@dataclass(frozen=True)
class ClipGradNorm:
    """Clipping of the gradient, all parameters together."""

    max_norm: PositiveFloat | None = 1.0
    """The largest global norm; null, here or for the whole section, does not clip."""


@dataclass(frozen=True)
class Checkpoint:
    """What is saved on the way, and how a run goes on from it."""

    enabled: bool = True
    """Whether to write any; a run that is stopped writes one all the same, to go on from."""
    asynchronous: bool = False
    """Go on training while a copy of the state is written; the copy takes as much host memory."""
    layout: Literal["sharded", "direct"] = "sharded"
    """direct makes model/ of every checkpoint a Hugging Face folder, for ranks of one machine."""
    resume: Literal["auto", "must", "never"] = "auto"
    """From the latest checkpoint: where there is one (auto), or fail without (must), or never."""
    verify: bool = True
    """Hold what is loaded against the digests it was saved with; a damaged step is left out with a warning."""
    keep_last: PositiveInt | None = None
    """How many of the newest to keep, those by time and of a stop not counted; null: all but these."""
    keep_best: PositiveInt | None = None
    """How many of the lowest validation loss to keep beside them; a validation among them gets a checkpoint."""


@dataclass(frozen=True)
class EarlyStopping:
    """Ends the run, as finished, when the loss of the first validation set does not fall any more."""

    patience: PositiveInt
    """How many validations in a row may bring nothing."""
    min_delta: NonNegativeFloat = 0.0
    """By how much a loss has to be lower than the last that counted, to count."""

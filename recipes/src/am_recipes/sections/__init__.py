"""The sections of a config file, one frozen dataclass each: what `am_recipes.configs` puts together per recipe.

The string below a field is what `automodel RECIPE --keys` says about it.
"""

from __future__ import annotations

from am_recipes.sections.data import DataLoader, Generate, GenerateFromRows, PackedSequence
from am_recipes.sections.distributed import Distributed
from am_recipes.sections.kinds import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Ratio, Source, Time, seconds
from am_recipes.sections.kubernetes import Kubernetes
from am_recipes.sections.model import (
    AdapterExport,
    FreezeRule,
    Model,
    Peft,
    Processor,
    Reader,
    Router,
    Tokenizer,
    VisionModel,
)
from am_recipes.sections.skypilot import SkyPilot
from am_recipes.sections.slurm import Mount, Slurm
from am_recipes.sections.tracking import Mlflow, TensorBoard, Tracking, Trackio, Wandb
from am_recipes.sections.training import (
    AdamW,
    BoundedScheduler,
    Checkpoint,
    ClipGradNorm,
    EarlyStopping,
    LrScheduler,
    Optimizer,
    ParamGroupOverride,
    StepScheduler,
)

__all__ = [
    "AdamW",
    "AdapterExport",
    "BoundedScheduler",
    "Checkpoint",
    "ClipGradNorm",
    "DataLoader",
    "Distributed",
    "EarlyStopping",
    "Fraction",
    "FreezeRule",
    "Generate",
    "GenerateFromRows",
    "Kubernetes",
    "LrScheduler",
    "Mlflow",
    "Model",
    "Mount",
    "NonNegativeInt",
    "Optimizer",
    "PackedSequence",
    "ParamGroupOverride",
    "Peft",
    "PositiveFloat",
    "PositiveInt",
    "Processor",
    "Ratio",
    "Reader",
    "Router",
    "SkyPilot",
    "Slurm",
    "Source",
    "StepScheduler",
    "TensorBoard",
    "Time",
    "Tokenizer",
    "Tracking",
    "Trackio",
    "VisionModel",
    "Wandb",
    "seconds",
]

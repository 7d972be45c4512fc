"""Hugging Face models made fast in place, with their own signature."""

from __future__ import annotations

from am_models._attention import CutDocuments
from am_models._auto import AutoModelForCausalLM, AutoModelForImageTextToText
from am_models._families import FAMILIES, VISION_FAMILIES, Family, VisionFamily
from am_models._images import VisionParts, multi_axis_positions, num_position_axes, vision_parts
from am_models._initial import initial_value
from am_models._leaks import Cut, require_no_leak
from am_models._loss import Loss, RouterLoss, forward_with_loss, further_targets, split_batch
from am_models._optimize import OptimizeReport, optimize
from am_models._parallel import ParallelFacts, parallel_facts
from am_models._weight_map import weight_map

__version__ = "0.1.0"

__all__ = [
    "FAMILIES",
    "VISION_FAMILIES",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "Cut",
    "CutDocuments",
    "Family",
    "Loss",
    "OptimizeReport",
    "ParallelFacts",
    "RouterLoss",
    "VisionFamily",
    "VisionParts",
    "forward_with_loss",
    "further_targets",
    "initial_value",
    "multi_axis_positions",
    "num_position_axes",
    "optimize",
    "parallel_facts",
    "require_no_leak",
    "split_batch",
    "vision_parts",
    "weight_map",
]

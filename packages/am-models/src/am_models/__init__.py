"""Hugging Face models made fast in place, with their own signature."""

from am_models._auto import AutoModelForCausalLM, AutoModelForImageTextToText
from am_models._leak import leak_test
from am_models._loss import forward_with_loss
from am_models._optimize import OptimizeReport, optimize
from am_models._pictures import VisionParts, multi_axis_positions, num_position_axes, vision_parts
from am_models._weight_map import weight_map

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "OptimizeReport",
    "VisionParts",
    "forward_with_loss",
    "leak_test",
    "multi_axis_positions",
    "num_position_axes",
    "optimize",
    "vision_parts",
    "weight_map",
]

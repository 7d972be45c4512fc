"""LoRA on any PyTorch model, with PEFT's configuration and PEFT's files."""

from __future__ import annotations

from am_peft._apply import apply_lora, cannot_merge, initialise_lora, merge_lora
from am_peft._files import Adapter, adapter_files, adapter_state_dict, load_adapter, save_adapter
from am_peft._freeze import freeze
from am_peft._layer import AppliedLora, LoraFactor, LoraLayer, LoraLinear, LoraOptions, Wrapper, tensor_placements
from am_peft._report import ReportRow, TrainableReport, trainable_report

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AppliedLora",
    "LoraFactor",
    "LoraLayer",
    "LoraLinear",
    "LoraOptions",
    "ReportRow",
    "TrainableReport",
    "Wrapper",
    "adapter_files",
    "adapter_state_dict",
    "apply_lora",
    "cannot_merge",
    "freeze",
    "initialise_lora",
    "load_adapter",
    "merge_lora",
    "save_adapter",
    "tensor_placements",
    "trainable_report",
]

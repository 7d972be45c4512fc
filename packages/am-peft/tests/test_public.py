from __future__ import annotations

import subprocess
import sys

import am_peft


def test_all_is_the_documented_names():
    assert am_peft.__all__ == [
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
    assert set(am_peft.__all__) <= set(vars(am_peft))


def test_import_leaves_peft_and_transformers_alone():
    code = "import sys, am_peft; print([name for name in ('peft', 'transformers') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"

"""The public names, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import am_models


def test_public_names():
    names = {"AutoModelForCausalLM", "AutoModelForImageTextToText", "Family", "Loss", "OptimizeReport", "VisionFamily"}
    names |= {
        "VisionParts",
        "RouterLoss",
        "forward_with_loss",
        "further_targets",
        "initial_value",
        "multi_axis_positions",
        "num_position_axes",
        "optimize",
        "split_batch",
    }
    names |= {"Cut", "CutDocuments", "ParallelFacts", "parallel_facts"}
    names |= {"require_no_leak", "vision_parts", "weight_map"}
    tables = {"FAMILIES", "VISION_FAMILIES"}
    assert set(am_models.__all__) == names | tables
    assert all(callable(vars(am_models)[name]) for name in names)
    assert all(isinstance(vars(am_models)[name], dict) for name in tables)


def test_import_is_light():
    code = "import sys, am_models; print(sorted({'transformers', 'triton', 'datasets', 'peft'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"

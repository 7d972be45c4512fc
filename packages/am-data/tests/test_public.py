"""The public names, and what importing the package does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import am_data


def test_public_names():
    assert sorted(am_data.__all__) == [
        "Batch",
        "ChatDataset",
        "Collate",
        "DataLoader",
        "Dataset",
        "DatasetReport",
        "Example",
        "PackedDataset",
        "Rendered",
        "Report",
        "Reported",
        "Sample",
        "Stream",
        "TokenDataset",
        "TokenShards",
        "TokenShardsReport",
        "VisionChatDataset",
        "VisionProcessor",
        "chat_template",
        "collate",
        "pack",
        "render_and_mask",
        "vision_processor",
        "write_token_shards",
    ]
    assert all(am_data.__getattr__(name) is not None for name in am_data.__all__)
    assert set(am_data.__all__) <= set(dir(am_data))


def test_importing_imports_no_heavy_package():
    code = "import sys, am_data; print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_error_that_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"has no attribute 'ChatDatset'; public are .*ChatDataset"):
        _ = am_data.ChatDatset

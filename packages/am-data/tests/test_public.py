"""The public names, and what importing the package does not import."""

import subprocess
import sys

import am_data


def test_public_names():
    assert sorted(am_data.__all__) == [
        "Batch",
        "ChatDataset",
        "DataLoader",
        "DatasetReport",
        "PackedDataset",
        "TokenDataset",
        "collate",
        "pack",
        "render_and_mask",
    ]
    assert all(name in vars(am_data) for name in am_data.__all__)


def test_importing_imports_neither_transformers_nor_datasets():
    code = "import sys, am_data; print([n for n in ('transformers', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

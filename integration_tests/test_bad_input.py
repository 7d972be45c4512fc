"""Mistakes and accidents, end to end: a message, an exit status, and nothing lost.

A mistake that can be found before training leaves no trace of a run directory. An accident later (a full disk, a
damaged checkpoint, a loss that is no number) leaves the earlier checkpoints, and the same command continues from them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from am_recipes import cli
from am_testing import run_distributed
from integration_tests import runs

ROOT = Path(__file__).resolve().parents[1]
TINY = runs.shipped("tiny.yaml")
TIMINGS = ("time", "tokens_per_second", "peak_memory_bytes")
ROW = {"messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes, with pleasure."}]}
MODEL_SHARD = "model/shard-00001-model-00001-of-00001.safetensors"


def written(path: Path, changes: Mapping[str, Any]) -> Path:
    """A config file: tiny.yaml, two steps with a checkpoint each, changed; None takes a section or key out."""
    config = json.loads(json.dumps(TINY))
    config["step_scheduler"] |= {"max_steps": 2, "ckpt_every_steps": 1}
    config["lr_scheduler"] = {"style": "constant"}
    path.write_text(yaml.safe_dump(runs.changed(config, changes)))
    return path


class Runner:
    """Runs configs in this process, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"

    def __call__(self, changes: Mapping[str, Any], *overrides: str) -> tuple[int, str]:
        """The exit status and what was written to stderr."""
        config = written(self.folder / "config.yaml", changes)
        return runs.command(str(config), "--run_dir", str(self.run_dir), *overrides)

    def refuses(self, changes: Mapping[str, Any], *expected: str, status: int = 1) -> None:
        """Run; the message has every part of `expected`, and nothing that existed has changed or been added."""
        before = contents(self.run_dir)
        runs.require_refusal(self(changes), status, *expected)
        assert contents(self.run_dir) == before


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    """Everything under a path, or of a file; None where there is nothing."""
    if path.is_file():
        return path.read_bytes()
    if not path.exists():
        return None
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def saved_steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def save_rows(path: Path, *rows: object) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


# Wrong configs. What `parse` itself finds is tested beside it; here, that the command passes it on.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimiser.lr", "1"], r"config.yaml:\d+ \(--optimiser.lr\): optimiser: .*did you mean 'optimizer'"),
        (["--optimizer.lrr", "1"], r"config.yaml:\d+ \(--optimizer.lrr\): optimizer.lrr: .*did you mean 'lr'"),
        (["--step_scheduler.global_batch_size", "four"], r"global_batch_size: expected an integer, got 'four'"),
        (["--dataset.path", "${NO_SUCH_VARIABLE}"], r"dataset.path: the environment variable NO_SUCH_VARIABLE is not"),
        (["--step_scheduler.local_batch_size", "3"], "global_batch_size=4 is not a multiple of local_batch_size=3"),
    ],
)
def test_schema_errors_import_nothing_and_write_nothing(tmp_path: Path, overrides: list[str], message: str) -> None:
    config = written(tmp_path / "config.yaml", {})
    program = (
        "import sys\nfrom am_recipes import cli\n"
        "status = cli.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'datasets', 'am_data'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", program, str(config), *overrides]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_fn._target_": "am_loss.linear_cros_entropy"},
            "loss_fn._target_: .*did you mean 'linear_cross_entropy'",
        ),
        ({"dataset._target_": "am_dta.ChatDataset"}, "dataset._target_: .*no module named 'am_dta'.*'am_data'"),
        ({"dataset.max_lenght": 10}, "dataset.max_lenght: .*did you mean 'max_length'"),
        ({"optimizer.amsgrads": True}, "optimizer.amsgrads: .*did you mean 'amsgrad'"),
        ({"model.config.hiden_size": 64}, "model.config.hiden_size: LlamaConfig has no such field.*'hidden_size'"),
        ({"model.config.hidden_size": 63}, r"model.config: LlamaConfig: .*63.* not a multiple of .*heads \(4\)"),
        (
            {"checkpoint.keep_best": 1, "validation_dataset": None},
            "checkpoint.keep_best=1 needs a validation_dataset.*; add one, or use checkpoint.keep_last",
        ),
    ],
)
def test_what_a_config_cannot_mean(run: Runner, changes: dict[str, Any], message: str) -> None:
    run.refuses(changes, r"^\S+config.yaml:\d+: ", message, status=2)


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes/configs/tini.yaml"]) == 2
    assert "recipes/configs/tini.yaml: cannot read the config: No such file" in capsys.readouterr().err
    assert cli.main(["recipes/configs/tiny.yaml", "--no-such-option"]) == 2
    assert "unknown option --no-such-option" in capsys.readouterr().err


# Ranks.


def test_world_size_that_no_axes_fit(run: Runner) -> None:
    run.refuses(
        {"distributed.dp_size": 3}, r"^error: .*dp_shard=3.* = 3 is not world_size=1; nearest legal: .*dp_shard=1"
    )


def run_on_ranks(config: str, run_dir: str) -> tuple[int, str]:
    os.chdir(ROOT)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = cli.main([config, "--run_dir", run_dir])
    return status, errors.getvalue()


def test_batch_that_does_not_divide_over_the_ranks(tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", {"step_scheduler.local_batch_size": 4})
    results = run_distributed(run_on_ranks, 2, str(config), str(tmp_path / "run"))
    for prefix, (status, text) in zip(("error: ", "[rank 1] error: "), results, strict=True):
        assert status == 1
        assert re.search(
            rf"^{re.escape(prefix)}\S+config.yaml:\d+: step_scheduler.global_batch_size: global_batch_size=4 is not a "
            r"multiple of local_batch_size=4 \* world_size=2 = 8; choose 8",
            text,
            re.MULTILINE,
        )
    assert not (tmp_path / "run").exists()


# Data.


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_data_files_that_hold_nothing(run: Runner, tmp_path: Path) -> None:
    run.refuses({"dataset": {"path": "nowhere.jsonl"}}, "nowhere.jsonl does not exist; give a file, a folder or a hub")
    (tmp_path / "empty.jsonl").touch()
    run.refuses({"dataset": {"path": str(tmp_path / "empty.jsonl")}}, "empty.jsonl is empty; give .* at least one row")
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROW)[:-5])
    run.refuses(
        {"dataset": {"path": str(tmp_path / "cut.jsonl")}}, "cut.jsonl.* cannot be read: line 1 is not JSON.*mend"
    )
    run.refuses({"dataset.split": "test"}, "train.jsonl.*split='test'.*Unknown split.*'train'")
    run.refuses({"validation_dataset.split": "train[:0]"}, r"validation.jsonl.*split='train\[:0\]'.*no data; .*another")


def test_all_rows_bad(run: Runner, tmp_path: Path) -> None:
    bad = [
        conversation(("alien", "Hello"), ("assistant", "Hello")),
        conversation(("user", "Nobody answers")),
    ]
    run.refuses(
        {"dataset": save_rows(tmp_path / "bad.jsonl", *bad)},
        "all 2 rows of .*bad.jsonl' were refused",
        r"dropped 1: unknown role \(rows 0\).*role='alien'; choose one of system, .*assistant",
        r"dropped 1: no assistant turn \(rows 1\).*the roles are \['user'\]",
    )
    run.refuses({"dataset.max_length": 8}, r"dropped 96: longer than max_length .*196 tokens, max_length=8")
    run.refuses(
        {"dataset.max_length": 8, "dataset.truncation": True},
        "dropped 96: nothing under loss after truncation .*the prompt fills max_length=8",
    )


def test_some_rows_bad(run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default they are left out and counted where everyone sees it; on request they end the run."""
    dataset = save_rows(tmp_path / "rows.jsonl", *[ROW] * 8, conversation(("alien", "Hello"), ("assistant", "Hi")))
    run.refuses({"dataset": dataset | {"on_bad_row": "raise"}}, "row 8: unknown role: .*'alien'.*mend it, or .*'drop'")
    assert run({"dataset": dataset}) == (0, "")
    dropped = "dropped 1: unknown role (rows 8)"
    assert dropped in capsys.readouterr().out
    assert dropped in (run.run_dir / "report.html").read_text()


def test_templates_that_lose_turns(run: Runner) -> None:
    last_only = "{% for m in messages[-1:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    run.refuses(
        {"tokenizer.chat_template": last_only}, "dropped 96: the template drops a user turn .*longest solo flight"
    )
    run.refuses({"tokenizer.chat_template": "{% for"}, "dropped 96: the template refuses .*end of template")


def test_packs_smaller_than_a_row(run: Runner) -> None:
    run.refuses(
        {"packed_sequence.packed_sequence_size": 8},
        r"96 of 96 examples are longer than capacity=8 \(the longest has 501 tokens\); raise .*max_length",
    )


def test_tokenizers_that_do_not_fit(run: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(TINY["tokenizer"]["name_or_path"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run.refuses(
        {"tokenizer.name_or_path": str(folder)},
        r"config.yaml:\d+: dataset.chat_template: chat_template=None, and the tokenizer "
        f"'{folder}' has no chat template; give one: a name .chatml, ",
    )
    (folder / "tokenizer.json").unlink()
    run.refuses(
        {"tokenizer.name_or_path": str(folder)}, f"'{folder}' has no tokenizer .*; set tokenizer.name_or_path to"
    )
    run.refuses(
        {"model.config.vocab_size": 300},
        r"the data has token id \d+ \(.*\), but the model embeds ids 0..299 \(vocab_size=300\); use the model's own",
    )


# Models.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two steps with a checkpoint each; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    here = Path.cwd()
    os.chdir(ROOT)
    assert Runner(folder)({})[0] == 0
    os.chdir(here)
    return folder / "run"


UP = "model.layers.1.mlp.up_proj.weight"


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file, {"format": "pt"})

    return damage


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 900_000)


def lose_shard(folder: Path) -> None:
    names = list(safetensors.torch.load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (name == UP)}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "copy has no config.json, so it is not a Hugging Face model folder; check the path"),
        (remove("tokenizer.json"), "copy' has no tokenizer that can be loaded .*; set tokenizer.name_or_path"),
        (remove("model.safetensors"), "copy has neither model.safetensors nor model.safetensors.index.json"),
        (lose_shard, "copy lacks 1 of the 2 files its index names: model-00002-of-00002.safetensors; .*again"),
        (truncate, r"model.safetensors: truncated: the header describes \d+ bytes, the file has 900000"),
        (change_weights(lambda tensors: tensors.pop(UP)), f"1 missing in the files: {re.escape(UP)} "),
        (change_weights(lambda tensors: tensors.update({UP: torch.zeros(3, 3)})), r"model \[192, 64\], file \[3, 3\]"),
        (change_weights(lambda tensors: tensors.update(odd=torch.zeros(3))), "1 in the files only: odd"),
        (
            change_weights(lambda tensors: tensors[UP].fill_(torch.nan)),
            "llama: .* logits .* are NaN or infinite; the weights are broken",
        ),
    ],
)
def test_damaged_model_folders(
    run: Runner, trained: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained / "export", folder)
    damage(folder)
    run.refuses({"model": {"name_or_path": str(folder)}, "tokenizer": None}, message)


def test_lora_that_matches_nothing(run: Runner) -> None:
    run.refuses(
        {"peft": {"r": 2, "target_modules": ["q_prj"]}, "export.merge_adapter": True},
        "target_modules entry 'q_prj' matches no module; nearest: q_proj",
    )


# Resuming.


@pytest.fixture
def resumed(run: Runner, trained: Path) -> Runner:
    shutil.copytree(trained, run.run_dir, symlinks=True)
    return run


ONE_MORE = {"step_scheduler.max_steps": 3}


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 0xFF
    file.write_bytes(damaged)


DAMAGES = {
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "has no manifest.json"),
    "truncated shard": (lambda step: os.truncate(step / MODEL_SHARD, 1000), "has 1000 bytes instead of"),
    "flipped state": (lambda step: flip(step / "state/data.json"), "data.json is damaged: its digest"),
    "flipped manifest": (lambda step: flip(step / "manifest.json"), "manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.filterwarnings("ignore:set a damaged checkpoint aside:UserWarning")
def test_one_damaged_checkpoint_goes_back_to_the_one_before(resumed: Runner, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(resumed.run_dir / "checkpoints/step_000002")
    first = contents(resumed.run_dir / "checkpoints/step_000001")
    assert resumed(ONE_MORE)[0] == 0
    record = json.loads((resumed.run_dir / "run.json").read_text())
    skipped = f"WARNING SKIPPED a damaged checkpoint, going back to step_000001: .*{message}"
    assert re.match(skipped, record["notes"][0], re.DOTALL)
    assert [launch["resume_step"] for launch in record["launches"]] == [None, 1]
    assert contents(resumed.run_dir / "checkpoints/step_000001") == first
    assert saved_steps(resumed.run_dir) == ["step_000001", "step_000002", "step_000003"]
    assert [row["step"] for row in metrics(resumed.run_dir)] == [0, 1, 2, 3, 3]


def test_only_damaged_checkpoints(resumed: Runner) -> None:
    for step in saved_steps(resumed.run_dir):
        flip(resumed.run_dir / "checkpoints" / step / "state/data.json")
    resumed.refuses(
        ONE_MORE, "none of the 2 checkpoints is whole: .*data.json is damaged.*move them away or use another"
    )


def test_resume_must_and_never(resumed: Runner) -> None:
    resumed.refuses(
        ONE_MORE | {"checkpoint.resume": "never"},
        "checkpoint.resume is never, but .* holds step_000001, step_000002; remove them, choose another run_dir",
    )
    shutil.rmtree(resumed.run_dir)
    resumed.refuses({"checkpoint.resume": "must"}, "checkpoint.resume is must, but .* no checkpoint; check run_dir")


def test_another_runs_directory(resumed: Runner) -> None:
    resumed.refuses(ONE_MORE | {"seed": 7}, "run holds a different run:", "seed: 1234 there, 7 now", "its own run_dir")
    (resumed.run_dir / "run.json").write_text("{")
    resumed.refuses(ONE_MORE, "run.json is not the record of a run .*; restore the file, or give this run its own")


def test_other_rows_in_the_same_file(run: Runner, tmp_path: Path) -> None:
    other = conversation(("user", "Say no."), ("assistant", "No, never."))
    dataset = save_rows(tmp_path / "rows.jsonl", *[ROW] * 8)
    assert run({"dataset": dataset})[0] == 0
    save_rows(tmp_path / "rows.jsonl", *[ROW] * 7, other)
    run.refuses(
        ONE_MORE | {"dataset": dataset}, "fingerprint=.*the samples or their order differ; resume with the data"
    )


# The place to write, and accidents on the way.


def test_files_in_the_way(run: Runner) -> None:
    run.run_dir.write_text("not a folder")
    run.refuses({}, r"run_dir=\S+run needs the folder .*, but \S+run is a file; remove it or choose another run_dir")
    run.run_dir.unlink()
    run.run_dir.mkdir()
    (run.run_dir / "checkpoints").write_text("not a folder")
    run.refuses({}, r"but \S+run/checkpoints is a file; remove it")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write into any directory")
def test_read_only_place(run: Runner) -> None:
    run.run_dir.mkdir(mode=0o555)
    run.refuses({}, "cannot be written by this user or is read-only; choose another run_dir")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB: room for two checkpoints of 3 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root alone")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def test_full_disk(run: Runner, small_disk: Path, tmp_path: Path) -> None:
    reference = Runner(tmp_path)
    four = {"step_scheduler.max_steps": 4}
    assert reference(four)[0] == 0

    # One that the next would replace, beside two that somebody has pinned.
    run.run_dir = small_disk / "by_time"
    (run.run_dir / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        (run.run_dir / "checkpoints" / f"step_{step:06d}.pin").touch()
    status, text = run(four | {"step_scheduler.ckpt_every_steps": None, "step_scheduler.ckpt_every_minutes": 1e-9})
    assert status == 1
    assert re.search(r"error: \[Errno 28\] step 3 was not saved in \S+, nothing was published: .*free some", text)
    pins = ["step_000001.pin", "step_000002.pin"]
    assert saved_steps(run.run_dir) == sorted(["step_000001", "step_000002", *pins])
    shutil.rmtree(run.run_dir)
    run.run_dir = small_disk / "run"

    status, text = run(four)
    assert status == 1
    assert re.search(
        r"error: \[Errno 28\] step 3 was not saved in \S+, .*needed \d+ bytes .*free are \d+ .*free some", text
    )
    assert "Traceback" not in text
    saved = contents(run.run_dir / "checkpoints")
    assert saved_steps(run.run_dir) == ["step_000001", "step_000002"]

    fill(small_disk / "filler")
    status, text = run(four)
    assert status == 1
    assert re.search(
        r"error: \[Errno 28\] \S+ was not written: No space left on device, 0 bytes are free; the same", text
    )
    assert contents(run.run_dir / "checkpoints") == saved
    assert list(run.run_dir.glob(".*")) == []
    # It is found out before anything is read.
    new = Runner(tmp_path)
    new.run_dir = small_disk / "new"
    new.refuses({"dataset.path": "none.jsonl"}, r"\S+ was not written: No space left on device, 0 bytes are free")

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run(four) == (0, "")
    assert metrics(run.run_dir) == metrics(reference.run_dir)

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run.run_dir = small_disk / "new"
    status, text = run({})
    assert status == 1
    assert re.search(r"run_dir=\S+new needs the folder .* read-only; choose another run_dir", text)


def test_a_disk_without_room_for_the_log(run: Runner, small_disk: Path, tmp_path: Path) -> None:
    def steps(number: int) -> dict[str, Any]:
        return {"step_scheduler.max_steps": number, "step_scheduler.ckpt_every_steps": 100} | quick

    # Rows of two hundred bytes: the blocks of a file that has room within them are full after twenty.
    quick = {"step_scheduler.global_batch_size": 1, "packed_sequence.packed_sequence_size": 256}
    quick |= {"dataset.max_length": 256, "validation_dataset": None, "step_scheduler.val_every_steps": None}
    reference = Runner(tmp_path)
    assert reference(steps(30)) == (0, "")
    run.run_dir = small_disk / "run"
    assert run(steps(2)) == (0, "")
    saved = contents(run.run_dir / "checkpoints")

    filler = {"_target_": "integration_tests.user_code.Filler", "file": str(small_disk / "filler"), "after": 3}
    status, text = run(steps(30) | {"sinks": [filler]})
    assert status == 1
    assert re.search(
        r"metrics.jsonl was not written: No space left on device, 0 bytes are free; the same command", text
    )
    assert "Traceback" not in text
    assert contents(run.run_dir / "checkpoints") == saved

    (small_disk / "filler").unlink()
    assert run(steps(30)) == (0, "")
    assert metrics(run.run_dir) == metrics(reference.run_dir)


def test_a_file_system_that_is_read_only(run: Runner, small_disk: Path) -> None:
    run.run_dir = small_disk / "run"
    one = {"step_scheduler.max_steps": 1}
    assert run(one) == (0, "")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    read_only = (
        r"run_dir=\S+ needs the folder \S+, and \S+ cannot be written by this user or is read-only; choose another"
    )
    run.refuses({"step_scheduler.max_steps": 2}, read_only)
    run.run_dir = small_disk / "new" / "run"
    run.refuses(one, read_only)


LOSSES = """\
import os, signal
import am_loss

calls = 0

def stopping(hidden, weight, labels, **options):
    # In a step, not where the recipe asks about the loss before the first.
    if hidden.requires_grad and hidden.shape[-1] == 64:
        os.kill(os.getpid(), signal.SIGTERM)
    return am_loss.linear_cross_entropy(hidden, weight, labels, **options)

def breaking(hidden, weight, labels, *, after, value, **options):
    global calls
    # Of this model's hidden states, not of the made-up ones that a loss is asked about before.
    calls += hidden.requires_grad and hidden.shape[-1] == 64
    loss = am_loss.linear_cross_entropy(hidden, weight, labels, **options)
    return loss * value if calls > after else loss
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with loss functions, named like ours."""
    name = f"am_losses_{random.randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_loss_that_is_no_number(run: Runner, losses: str, value: str) -> None:
    """Ten micro-batches are two steps and a half: the third step breaks, and never reaches the weights."""
    broken = {"_target_": f"{losses}.breaking", "after": 10, "value": float(value)}
    status, text = run({"loss_fn": broken, "step_scheduler.max_steps": 5})
    assert status == 1
    assert re.search(
        rf"error: step 3: loss is {value}, grad_norm is (nan|inf); .*Nothing was saved.*Lower optimizer.lr", text
    )
    assert "Traceback" not in text
    assert saved_steps(run.run_dir) == ["step_000001", "step_000002"]
    weights = safetensors.torch.load_file(run.run_dir / "checkpoints/latest" / MODEL_SHARD)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert [row["step"] for row in metrics(run.run_dir)] == [0, 1, 2]
    assert f"step 3: loss is {value}" in (run.run_dir / "report.html").read_text()


def test_learning_rate_that_destroys_the_model(run: Runner) -> None:
    """The gradients are numbers, the weights after the step are not: validation finds out before they are saved."""
    status, text = run({"optimizer.lr": 1e39, "step_scheduler.val_every_steps": 1})
    assert status == 1
    assert re.search("error: step 1: val_loss is (nan|inf); .*Nothing was saved", text)
    assert not (run.run_dir / "checkpoints").exists()
    assert not (run.run_dir / "export").exists()


def test_sigterm_is_neither_success_nor_failure(run: Runner, losses: str) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert run({"loss_fn._target_": f"{losses}.stopping", "validation_dataset": None}) == (75, "")
    assert saved_steps(run.run_dir) == ["step_000001"]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("loss_fn", "given"),
    [
        ({"_target_": "am_loss.linear_cross_entropy", "z_loss": 0.5}, "am_loss.linear_cross_entropy, z_loss=0.5"),
        ({"_target_": "am_loss.linear_distillation"}, "am_loss.linear_distillation"),
    ],
)
def test_a_loss_function_that_a_family_cannot_use(run: Runner, loss_fn: dict[str, Any], given: str) -> None:
    model = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 2048}
    run.refuses(
        {"loss_fn": loss_fn, "model.config": model},
        rf"loss_fn \({given}\) would not be called: family gpt2 has its loss computed from logits: .*; leave it out",
    )


def test_tracebacks_are_for_bugs(run: Runner, losses: str) -> None:
    status, text = run({"dataset": {"path": "nowhere.jsonl"}}, "--debug")
    assert status == 1
    assert "Traceback" in text
    # A fault in an operation, though in a module of our name: nobody wrote a message about that.
    wrong = {"_target_": f"{losses}.breaking", "after": "ten", "value": 1.0}
    status, text = run({"loss_fn": wrong, "validation_dataset": None})
    assert status == 1
    assert "Traceback" in text
    assert "error: TypeError: '>' not supported between instances of 'int' and 'str'" in text

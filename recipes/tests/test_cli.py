"""The `automodel` command line: grammar, exit statuses, messages, and what it does not import."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from am_recipes import cli, command_line, errors, launch
from am_recipes.configs import RECIPES, parse
from am_recipes.settings import keys

CONFIG = """\
recipe: sft
model: {name_or_path: nowhere}
dataset: {_target_: rows_for_cli.rows, path: x}
optimizer: {lr: 1e-4}
step_scheduler: {max_steps: 2}
loss_fn: {_target_: rows_for_cli.loss}
"""
TARGETS = "def rows(tokenizer, path): ...\ndef loss(hidden, weight, labels): ...\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "rows_for_cli.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rows_for_cli", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "AUTOMODEL_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_both_grammars_mean_the_same(folder):
    overrides = ["--optimizer.lr", "-1", "--a.b=c=d", "--seed", "3"]
    expected = (Path("c.yaml"), (("optimizer.lr", "-1"), ("a.b", "c=d"), ("seed", "3")), 4)
    for argv in (
        ["c.yaml", "--nproc-per-node", "4", *overrides],
        ["finetune", "llm", "-c", "c.yaml", *overrides, "--nproc_per_node=4"],
        ["finetune", "llm", *overrides, "--config=c.yaml", "--nproc-per-node=4"],
        ["-c", "c.yaml", "--nproc-per-node", "4", *overrides],
    ):
        arguments = command_line.parse_arguments(argv)
        assert (arguments.path, arguments.overrides, arguments.processes) == expected
        assert arguments.recipe == ("sft" if "llm" in argv else None)
        assert not arguments.dry_run


def test_workers_get_the_same_config_and_overrides(folder):
    arguments = command_line.parse_arguments(
        ["c.yaml", "--a.b", "-1", "--c.d", "x y", "--nproc-per-node", "2", "--debug"]
    )
    again = command_line.parse_arguments(arguments.worker_arguments())
    assert (again.path, again.overrides, again.debug, again.processes) == (
        Path("c.yaml"),
        arguments.overrides,
        True,
        None,
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["pretrain", "vlm", "-c", "c.yaml"],
            "'pretrain vlm' is neither a config file nor a command; there is: "
            "finetune llm, pretrain llm, kd llm, finetune vlm",
        ),
        (
            ["finetune", "lm", "-c", "c.yaml"],
            "'finetune lm' is neither a config file nor a command; there is: "
            "finetune llm, pretrain llm, kd llm, finetune vlm",
        ),
        (
            ["finetun", "llm", "-c", "c.yaml"],
            "'finetun llm' is neither a config file nor a command; did you mean 'finetune'?",
        ),
        (["finetune", "llm"], "which config? Write automodel CONFIG or -c CONFIG"),
        (["c.yaml", "d.yaml"], "unexpected argument 'd.yaml'; overrides are written --section.key value"),
        (["c.yaml", "-c", "d.yaml"], "two configs: c.yaml and d.yaml"),
        (["c.yaml", "--nproc-per-node"], "--nproc-per-node needs a value"),
        (["-c", "--optimizer.lr", "1"], "-c needs a value"),
        (["c.yaml", "--dryrun"], "--dryrun needs a value; did you mean '--dry-run'?"),
        (["c.yaml", "--nproc-per-nod", "2"], "unknown option --nproc-per-nod; did you mean '--nproc-per-node'?"),
        (["c.yaml", "--nproc-per-node", "two"], "--nproc-per-node must be a whole number of at least 1, got 'two'"),
        (["c.yaml", "--nproc-per-node=0"], "--nproc-per-node must be a whole number of at least 1, got '0'"),
        (["c.yaml", "--nnodes", "2"], "--nnodes without --node-rank and --rdzv-endpoint: several machines need"),
        (["c.yaml", "--nnodes=2", "--rdzv-endpoint", "a:1"], "--nnodes and --rdzv-endpoint without --node-rank"),
        (["c.yaml", "--node-rank", "0"], "--node-rank without --nnodes and --rdzv-endpoint"),
        (["c.yaml", "--nnodes", "0"], "--nnodes must be a whole number of at least 1, got '0'"),
        (["c.yaml", "--nnodes=1:4"], "--nnodes must be a whole number of at least 1, got '1:4'"),
        (["c.yaml", "--nnodes", "٣"], "--nnodes must be a whole number of at least 1, got '٣'"),
        (["c.yaml", "--nnodes=1", "--rdzv-endpoint=junk"], "--rdzv-endpoint must be HOST:PORT with a port from 1"),
        (["c.yaml", "--nnodes=1", "--node-rank=1"], "--node-rank 1 must be less than --nnodes 1"),
        (["c.yaml", "--nnodes"], "--nnodes needs a value"),
        (["c.yaml", "--node-rnk", "1"], "unknown option --node-rnk; did you mean '--node-rank'?"),
        (
            ["c.yaml", "--nnodes=2", "--node-rank=2", "--rdzv-endpoint=a:1"],
            "--node-rank 2 must be less than --nnodes 2; number the machines from 0 to 1",
        ),
        (
            ["c.yaml", "--nnodes=2", "--node-rank=-1", "--rdzv-endpoint=a:1"],
            "--node-rank must be a whole number of at least 0, got '-1'",
        ),
        *(
            (
                ["c.yaml", "--nnodes=2", "--node-rank=1", f"--rdzv-endpoint={endpoint}"],
                f"--rdzv-endpoint must be HOST:PORT with a port from 1 to 65535, got {endpoint!r}; HOST is",
            )
            for endpoint in ("node0", "node0:", ":29400", "node0:0", "node0:65536", "node0:x", "a b:1", "::1:29400", "")
        ),
        (["c.yaml", "--dry-run=1"], "--dry-run takes no value, got '1'"),
        (["-x", "c.yaml"], "unknown option -x"),
        (["--keys"], "--keys is about a recipe: automodel RECIPE --keys, with one of sft, pretrain, kd, vlm"),
        (["c.yaml", "--keys"], "--keys is about a recipe: automodel RECIPE --keys"),
        (["stf", "--keys"], "'stf' is neither a config file nor a command; did you mean 'sft'?"),
        (["report"], "automodel report takes a run directory, such as runs/quickstart, and nothing else"),
        (["report", "--debug"], "automodel report takes a run directory"),
    ],
)
def test_usage_errors(folder, capsys, argv, message):
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["c.yaml", "--optimzer.lr", "1"],
            "c.yaml:1 (--optimzer.lr): optimzer: unknown key; did you mean 'optimizer'?\n",
        ),
        (["other.yaml"], "other.yaml: cannot read the config: No such file or directory\n"),
        (
            ["finetune", "llm", "-c", "c.yaml", "--recipe", "sftt"],
            "c.yaml:1 (--recipe): recipe: must be one of sft, pretrain, kd, vlm, got 'sftt'\n",
        ),
        (
            ["c.yaml", "--dry-run", "--dataset.pth", "1"],
            "c.yaml:3 (--dataset.pth): dataset.pth: rows_for_cli.rows takes no",
        ),
    ],
)
def test_config_errors_are_the_message_alone(folder, capsys, argv, message):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_shows_the_traceback_of_a_config_error(folder, capsys, monkeypatch):
    assert cli.main(["c.yaml", "--sede", "1", "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    monkeypatch.setenv("AUTOMODEL_TRACEBACK", "1")
    assert cli.main(["c.yaml", "--sede", "1"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_mistake_found_by_the_recipe_is_one_line_and_status_1(folder, capsys):
    assert cli.main(["c.yaml", "--nproc-per-node", "1"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "nowhere" in message
    assert "Traceback" not in message


LOSSES = """\
import torch, am_loss

NOTHING = None

def none(hidden, weight, labels, **options):
    return NOTHING[0]

def divide(hidden, weight, labels, **options):
    return 1 / 0

def multiply(hidden, weight, labels, **options):
    return torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))

def later(hidden, weight, labels, *, error, **options):
    loss = am_loss.linear_cross_entropy(hidden, weight, labels, **options)
    # More than the recipe asks about before it begins.
    if hidden.requires_grad and hidden.shape[1] > 100:
        if error is None:
            return loss * float("nan")
        raise {"ValueError": ValueError, "OSError": OSError, "KeyError": KeyError}[error]("of the user")
    return loss
"""


@pytest.fixture
def trains(folder, monkeypatch):
    """Run one step of the tiny config with a loss function of the user; return the status and where the run was."""
    root = Path(__file__).parents[2]
    (folder / "losses_for_cli.py").write_text(LOSSES)
    monkeypatch.chdir(root)
    monkeypatch.delitem(sys.modules, "losses_for_cli", raising=False)
    run_dir = folder / "run"

    def trains(loss_fn, *options):
        few = ["--step_scheduler.max_steps", "1", "--lr_scheduler", "{}", "--dataset.split", "train[:8]"]
        argv = ["recipes/configs/tiny.yaml", "--run_dir", str(run_dir), "--nproc-per-node", "1", *few]
        return cli.main([*argv, "--validation_dataset.split", "train[:2]", "--loss_fn", loss_fn, *options]), run_dir

    return trains


@pytest.mark.parametrize(
    ("function", "line", "message"),
    [
        ("none", "return NOTHING[0]", "TypeError: 'NoneType' object is not subscriptable"),
        ("divide", "return 1 / 0", "ZeroDivisionError: division by zero"),
        (
            "multiply",
            "return torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))",
            "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
        ),
    ],
)
def test_what_is_no_message_shows_where_on_the_terminal_and_in_the_run_directory(
    trains, capsys, function, line, message
):
    status, run_dir = trains(f"{{_target_: losses_for_cli.{function}}}")
    assert status == 1
    written = (run_dir / "error.txt").read_text()
    # Rows are read anew, with bars of their own, where nobody has read them before.
    told = re.sub(r"^\s*Generating.*?(?=Traceback)", "", capsys.readouterr().err, flags=re.DOTALL)
    for text in (written, told):
        assert text.startswith("Traceback")
        assert line in text
        assert message in text
    assert told.endswith(f" (traceback: {run_dir / 'error.txt'})\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ValueError", "error: of the user"),
        ("OSError", "error: of the user"),
        ("null", "error: step 1: loss is nan, grad_norm is nan; finite numbers are needed"),
    ],
)
def test_what_ends_a_run_with_a_message_leaves_its_traceback(trains, capsys, error, message):
    status, run_dir = trains(f"{{_target_: losses_for_cli.later, error: {error}}}")
    assert status == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert told.endswith(f" (traceback: {run_dir / 'error.txt'})\n")
    assert (run_dir / "error.txt").read_text().startswith("Traceback")


def test_errors_of_other_ranks_have_files_of_their_own_and_success_removes_them(tmp_path, capsys, monkeypatch):
    def fail():
        raise KeyError("of the user")

    monkeypatch.setenv("RANK", "3")
    assert errors.reported(fail, debug=False, run_dir=tmp_path) == 1
    assert "[rank 3] error: KeyError: 'of the user' (traceback: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["error.rank3.txt"]
    assert errors.reported(lambda: 75, debug=False, run_dir=tmp_path) == 75
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_cannot_be_written_does_not_hide_the_error(tmp_path, capsys):
    (tmp_path / "file").touch()

    def fail():
        raise KeyError("of the user")

    assert errors.reported(fail, debug=False, run_dir=tmp_path / "file" / "run") == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback")
    assert told.endswith("error: KeyError: 'of the user'\n")


def test_a_refusal_before_the_run_begins_leaves_no_trace(folder, capsys):
    assert cli.main(["c.yaml", "--nproc-per-node", "1"]) == 1
    assert capsys.readouterr().err.endswith("(--debug shows where)\n")
    assert not (folder / "runs").exists()


def test_the_first_rank_reports_a_config_error_before_the_others(folder, capsys, monkeypatch):
    """torchrun stops every rank as soon as one of them has ended."""
    waited = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        began = time.monotonic()
        assert cli.run_recipe("sft", "sft.py", ["-c", "c.yaml", "--sede", "1"]) == 2
        waited[rank] = time.monotonic() - began
        assert capsys.readouterr().err.count("\n") == 1
    assert waited["0"] < 10 < waited["1"]


def test_dry_run_prints_the_resolved_config_and_writes_nothing(folder, capsys):
    """From another directory than the repository's: a shipped config finds what lies beside it."""
    before = {path.name for path in folder.iterdir()}
    tiny = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    assert cli.main(["finetune", "llm", "-c", str(tiny), "--dry-run", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("recipe: sft\nrun_dir: runs/tiny\n")
    assert "\nseed: 7\n" in printed
    # What only the class of the dataset knows.
    assert "  max_length: null\n  truncation: false\n  train_on: assistant\n" in printed
    assert f"  path: {tiny.parents[1]}/data/chat/train.jsonl\n" in printed
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before
    (folder / "c.yaml").write_text(printed)
    assert cli.main(["c.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_a_dry_run_refuses_a_run_dir_that_cannot_be_written(folder, capsys):
    """/proc takes no folder, though root is told that it may write there."""
    tiny = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    refusals = []
    for options in ([], ["--dry-run"]):
        assert cli.main([str(tiny), "--run_dir", "/proc/x", *options]) == 1
        refusals.append(capsys.readouterr().err)
    assert "run_dir=/proc/x needs the folder /proc/x/checkpoints, and /proc cannot be written" in refusals[0]
    assert refusals[0] == refusals[1]


def test_a_dry_run_looks_for_the_model(folder, capsys):
    assert cli.main(["c.yaml", "--dry-run"]) == 1
    assert capsys.readouterr().err.startswith("error: c.yaml:2: model.name_or_path: 'nowhere' is neither an existing")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1"], "lr: unknown key; did you mean 'optimizer.lr' or 'optimizer.adamw.lr'?"),
        (["--max_steps=5"], "max_steps: unknown key; did you mean 'step_scheduler.max_steps'?"),
        (
            ["--batch_size", "5"],
            "batch_size: unknown key; did you mean 'step_scheduler.global_batch_size' or "
            "'step_scheduler.local_batch_size'?",
        ),
        (["--sede", "5"], "sede: unknown key; did you mean 'seed'?"),
        (["--seed"], "seed: expected an integer, got True"),
    ],
)
def test_a_key_without_its_section_is_told_in_full(folder, capsys, argv, message):
    assert cli.main(["c.yaml", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_key_without_a_value_is_true(folder):
    argv = ["c.yaml", "--dataset.truncation", "--export.merge_adapter", "--seed", "3", "--checkpoint.asynchronous"]
    expected = (
        ("dataset.truncation", "true"),
        ("export.merge_adapter", "true"),
        ("seed", "3"),
        ("checkpoint.asynchronous", "true"),
    )
    assert command_line.parse_arguments(argv).overrides == expected


def test_a_worker_is_told_the_number_of_processes_that_it_is_one_of(folder, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert cli.main(["c.yaml", "--nproc-per-node", "2"]) == 2
    assert "--nproc-per-node 2 inside a torchrun worker that has 4 processes" in capsys.readouterr().err


def test_several_machines_are_torchruns_where_torchrun_has_started_the_process(folder, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert cli.main(["c.yaml", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "a:1"]) == 2
    assert "--nnodes 2 inside a torchrun worker: torchrun has started this process" in capsys.readouterr().err


@pytest.mark.parametrize(("endpoint", "host"), [("node-0.lan:29400", "node-0.lan"), ("[fe80::1]:29400", "[fe80::1]")])
def test_one_of_several_machines(folder, endpoint, host):
    argv = ["c.yaml", "--nnodes=3", "--node-rank", "2", "--rdzv_endpoint", endpoint, "--seed", "3"]
    arguments = command_line.parse_arguments(argv)
    assert arguments.nodes == launch.Nodes(3, 2, host, 29400)
    assert arguments.worker_arguments() == ["-c", "c.yaml", "--seed=3"]


def test_one_machine_is_a_local_run(folder):
    for options in (["--nnodes", "1"], ["--nnodes=1", "--node_rank=0", "--rdzv-endpoint=a:1"], []):
        assert command_line.parse_arguments(["c.yaml", *options]).nodes is None


def test_help_names_every_recipe(folder, capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, kind in RECIPES.items():
        assert re.search(rf"^  {' '.join(kind.COMMAND)} +{name} +{kind.HELP}$", printed, re.MULTILINE)


def test_a_command_line_without_anything_is_wrong_usage(folder, capsys):
    for command in (cli.main, functools.partial(cli.run_recipe, "sft", "mysft.py")):
        assert command([]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("usage: automodel CONFIG")


def test_what_the_help_shows_of_overrides_is_true(folder):
    section = command_line.HELP.partition("overrides, for any key of the config:\n")[2].partition("\n\n")[0]
    shown = shlex.split(re.sub(r"   +(a|an) .*", "", section, flags=re.MULTILINE))
    overrides = command_line.parse_arguments(["c.yaml", *shown]).overrides
    assert ("generate.prompts.0", "Hello") in overrides
    assert ("freeze.0.freeze", "*") in overrides
    parse("c.yaml", overrides)


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_names_every_key(folder, capsys, recipe):
    """What a dumped config has, the table explains: no key without a meaning, nothing wider than a terminal."""
    assert cli.main([recipe, "--keys"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.startswith(f"Recipe {recipe}: {RECIPES[recipe].HELP}.\n")
    found = {}
    for path, meaning, section in keys.sections(RECIPES[recipe]):
        assert meaning
        for key in section:
            assert key.meaning, key
            assert key.name.split("(")[0].split(",")[0] in printed
            found[f"{path}.{key.name}".lstrip(".")] = (key.type, key.default)
    assert found["step_scheduler.max_steps"] == ("integer", "null")
    assert found["step_scheduler.num_epochs"] == ("integer", "1" if recipe == "pretrain" else "null")
    assert found["optimizer.lr"] == ("number", None)
    assert found["optimizer.betas"] == ("list of 2 number", "null")
    assert found["lr_scheduler.warmup_steps"] == ("integer", "0")
    assert found["dataloader.shuffle"] == ("true | false", "true")
    assert found["distributed.strategy"] == ("fsdp2 | ddp | megatron_fsdp", "fsdp2")
    assert found["distributed.tp_size"] == ("integer", "1")
    assert found["distributed.tp_plan"] == ("mapping", "null")
    assert found["distributed.reshard_after_forward"] == ("true | false | integer", "null")
    assert found["peft._target_, its arguments"] == ("target", "peft.LoraConfig")
    assert found["freeze.N.unfreeze"] == ("text", "null")
    assert ("teacher_model.name_or_path" in found) == (recipe == "kd")
    assert ("tokenizer.name_or_path" in found) == (recipe != "vlm")
    assert ("processor.name_or_path" in found) == (recipe == "vlm")


def test_a_recipe_and_its_command_are_one(folder):
    for name, kind in RECIPES.items():
        assert command_line.parse_arguments([name, "c.yaml"]) == command_line.parse_arguments([*kind.COMMAND, "c.yaml"])
        assert command_line.parse_arguments([name, "c.yaml"]).recipe == name


def test_the_report_of_a_run_directory(trains, folder, capsys):
    status, run_dir = trains("{}")
    assert status == 0
    page = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    capsys.readouterr()
    assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    assert (run_dir / "report.html").read_bytes() == page
    assert cli.main(["report", str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {folder} is not the directory of a run")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["finetune", "--help"], ["sft", "--keys"]])
def test_help_is_quick_and_imports_nothing_heavy(folder, argv):
    script = (
        "import sys, json; sys.argv[1:] = json.loads(sys.argv[1]); from am_recipes import cli; status = cli.main();"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'numpy'} & sys.modules.keys()), status)"
    )
    before = os.times().children_user
    command = [sys.executable, "-c", script, json.dumps(argv)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(("usage: automodel CONFIG", "Recipe sft: "))
    assert result.stdout.endswith("[] 0\n")
    # Processor time of the child: a busy machine stretches the wall clock, not this.
    assert os.times().children_user - before < 0.5


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--help"], 0, "usage: automodel CONFIG"),
        (["-c", "c.yaml", "--no-such-option"], 2, "error: unknown option --no-such-option"),
        (["-c", "c.yaml", "--sede", "1"], 2, "c.yaml:1 (--sede): sede: unknown key; did you mean 'seed'?"),
    ],
)
@pytest.mark.parametrize("worker", [False, True], ids=["alone", "under torchrun"])
def test_the_recipe_module_answers_before_it_imports_torch(folder, argv, status, message, worker):
    command = [sys.executable, "-X", "importtime", "-m", "am_recipes.sft", *argv]
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} if worker else {}
    before = os.times().children_user
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | ranks)
    assert result.returncode == status, result.stderr
    imports = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    assert message in result.stdout + result.stderr
    assert any(line.endswith("am_recipes.configs") for line in imports)
    assert [line for line in imports if line.endswith((" torch", " transformers", " numpy"))] == []
    # Processor time, as above; importing torch alone takes four times as much.
    assert os.times().children_user - before < 1


def test_a_signal_while_torch_is_imported_is_a_stop(folder):
    """The first process of a container would not even get it without a handler."""
    (folder / "rows_for_cli.py").write_text("import time\nopen('importing', 'w').close()\ntime.sleep(60)\n" + TARGETS)
    command = [sys.executable, "-m", "am_recipes.cli", "c.yaml", "--nproc-per-node", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "importing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[1] == "\nSIGUSR1 before the first step: ending, nothing is lost\n"
    assert process.returncode == 75


def test_the_installed_command_and_several_processes(folder):
    """Two ranks started by the command agree that the config is bad, and one of them says so."""
    command = [str(Path(sys.executable).parent / "automodel"), "c.yaml", "--nproc-per-node", "2", "--dataset.pth", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("dataset.pth: rows_for_cli.rows takes no such argument; did you mean 'path'?") == 1

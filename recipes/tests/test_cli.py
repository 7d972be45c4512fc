"""The `automodel` command line: grammar, exit statuses, messages, and what it does not import."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from am_recipes import cli

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
        arguments = cli.parse_arguments(argv)
        assert (arguments.path, arguments.overrides, arguments.processes) == expected
        assert arguments.recipe == ("sft" if "llm" in argv else None)
        assert not arguments.dry_run


def test_workers_get_the_same_config_and_overrides(folder):
    arguments = cli.parse_arguments(["c.yaml", "--a.b", "-1", "--c.d", "x y", "--nproc-per-node", "2", "--debug"])
    again = cli.parse_arguments(arguments.worker_arguments())
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
            "finetune llm, finetune vlm, pretrain llm, kd llm",
        ),
        (
            ["finetune", "lm", "-c", "c.yaml"],
            "'finetune lm' is neither a config file nor a command; there is: "
            "finetune llm, finetune vlm, pretrain llm, kd llm",
        ),
        (
            ["finetun", "llm", "-c", "c.yaml"],
            "'finetun llm' is neither a config file nor a command; did you mean 'finetune'?",
        ),
        (["finetune", "llm"], "which config? Write automodel CONFIG or -c CONFIG"),
        (["c.yaml", "d.yaml"], "unexpected argument 'd.yaml'; overrides are written --section.key value"),
        (["c.yaml", "-c", "d.yaml"], "two configs: c.yaml and d.yaml"),
        (["c.yaml", "--seed"], "--seed needs a value"),
        (["c.yaml", "--seed", "--optimizer.lr", "1"], "--seed needs a value"),
        (["c.yaml", "--dryrun"], "--dryrun needs a value; did you mean '--dry-run'?"),
        (["c.yaml", "--nproc-per-nod", "2"], "unknown option --nproc-per-nod; did you mean '--nproc-per-node'?"),
        (["c.yaml", "--nproc-per-node", "two"], "--nproc-per-node must be a whole number of at least 1, got 'two'"),
        (["c.yaml", "--nproc-per-node=0"], "--nproc-per-node must be a whole number of at least 1, got '0'"),
        (["c.yaml", "--dry-run=1"], "--dry-run takes no value, got '1'"),
        (["-x", "c.yaml"], "unknown option -x"),
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


def test_an_error_from_a_library_or_from_the_users_code_shows_its_traceback(folder, capsys):
    """Another package of a name like ours is none of ours."""
    (folder / "am_recipes_of_mine.py").write_text("def rows(tokenizer): raise ValueError('rows are out')")
    dataset = ["--dataset", "{_target_: am_recipes_of_mine.rows}", "--model", "{config: {model_type: llama}}"]
    tokenizer = Path(__file__).parents[1] / "data/tiny/tokenizer"
    argv = ["c.yaml", *dataset, "--tokenizer.name_or_path", str(tokenizer), "--nproc-per-node", "1"]
    assert cli.main(argv) == 1
    message = capsys.readouterr().err
    assert message.startswith("Traceback")
    assert message.endswith("error: rows are out\n")


def test_the_first_rank_reports_a_config_error_before_the_others(folder, capsys, monkeypatch):
    """torchrun stops every rank as soon as one of them has ended."""
    waited = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        began = time.monotonic()
        assert cli.main_recipe("sft", ["-c", "c.yaml", "--sede", "1"]) == 2
        waited[rank] = time.monotonic() - began
        assert capsys.readouterr().err.count("\n") == 1
    assert waited["0"] < 10 < waited["1"]


def test_dry_run_prints_the_resolved_config_and_writes_nothing(folder, capsys):
    before = {path.name for path in folder.iterdir()}
    assert cli.main(["finetune", "llm", "-c", "c.yaml", "--dry-run", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("recipe: sft\nrun_dir: runs/c\n")
    assert "\nseed: 7\n" in printed
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before
    (folder / "c.yaml").write_text(printed)
    assert cli.main_recipe("sft", ["-c", "c.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_several_processes_are_asked_of_the_right_command(folder, capsys, monkeypatch):
    assert cli.main_recipe("sft", ["-c", "c.yaml", "--nproc-per-node", "2"]) == 2
    assert "python -m am_recipes.sft is one process; use automodel --nproc-per-node 2" in capsys.readouterr().err
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert cli.main(["c.yaml", "--nproc-per-node", "2"]) == 2
    assert "--nproc-per-node 2 inside a torchrun worker that has 4 processes" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["finetune", "--help"]])
def test_help_is_quick_and_imports_nothing_heavy(folder, argv):
    script = (
        "import sys, json; sys.argv[1:] = json.loads(sys.argv[1]); from am_recipes import cli; status = cli.main();"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'numpy'} & sys.modules.keys()), status)"
    )
    before = os.times().children_user
    command = [sys.executable, "-c", script, json.dumps(argv)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: automodel CONFIG")
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


def test_the_installed_command_and_several_processes(folder):
    """Two ranks started by the command agree that the config is bad, and one of them says so."""
    command = [str(Path(sys.executable).parent / "automodel"), "c.yaml", "--nproc-per-node", "2", "--dataset.pth", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("dataset.pth: rows_for_cli.rows takes no such argument; did you mean 'path'?") == 1

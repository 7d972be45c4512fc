"""The section `slurm`: what is rendered of it, what is refused, and what is told of a submission."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from am_recipes import cli, submission
from am_recipes.configs import ConfigError, parse
from am_recipes.settings import UnusableError

CONFIG = """\
recipe: sft
model:
  name_or_path: ${here}/model
dataset:
  path: "${here}/rows.jsonl"  # ${here} in a comment
  split: train[:${ROWS,5}]
optimizer:
  lr: 1e-4
step_scheduler:
  max_steps: 10
slurm:
"""
VARIANTS = {
    "bare": "{}",
    "one_node": """
  {ntasks_per_node: 1, account: me, partition: null, exclusive: false, requeue: false, signal_seconds: null}""",
    "all": """
  {job_name: my-job, nodes: 4, ntasks_per_node: 2, time: "1-12", account: me, partition: gpu, qos: high,
   gpus_per_node: 2, cpus_per_task: 3, dependency: "afterok:17",
   directives: {constraint: "a100&ib", mail_type: FAIL, mem: 0, overcommit: null},
   env_vars: {NCCL_DEBUG: INFO, NUMBER: 3, QUOTED: "it's $x; `y`", SCRATCH: "${TMPDIR_OF_JOB}/x y",
              D: "${NOBODY,de'f }"},
   hf_token: "${MY_TOKEN}", wandb_key: $WANDB_API_KEY, hf_home: /tmp/hf home, python: /opt/python 3/bin/python}""",
    "array": "{array: '1-4%1'}",
    "command": "{command: 'echo \"${MY_TOKEN} $SLURM_NODEID $${SLURM_RESTART_COUNT:-0}\" \n\n    exit 3'}",
    "checkout": "{repo_root: /srv/check out}",
    "pyxis": """
  {container_image: "nvcr.io#nvidia/pytorch:25.01", nodes: 2, nemo_mount: {source: /tmp, dest: /opt/Automodel},
   extra_mounts: ["/tmp:/data:ro", "/usr:/my usr"]}""",
    "apptainer": """
  {container_image: "docker://nvcr.io/nvidia/pytorch:25.01", container_runtime: apptainer, nodes: 2,
   extra_mounts: {/tmp: /data}, gpus_per_node: 8}""",
    "no_gpu": "{container_image: /bin/sh, container_runtime: apptainer, gpus_per_node: 0}",
}
SECRET = "hf_SECRETSECRETSECRET"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, where the commands are typed."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MY_TOKEN": SECRET, "WANDB_API_KEY": SECRET, "TMPDIR_OF_JOB": "/here"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(folder, section, config=CONFIG):
    path = folder / "my config.yaml"
    path.write_text(config.replace("slurm:\n", "") + f"slurm: {section}\n" if section else config)
    return path


def render(folder, section, *overrides, program="am_recipes.sft", processes=None):
    path = write(folder, section)
    asked = submission.Asked(path, overrides, (), program, processes)
    return submission.rendered(parse(path, overrides), asked)


def text_of(rendered):
    return rendered.files[rendered.shown]


def directives(text):
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def words_of(text, *variables):
    """What bash makes of the `export`s of a script, `variables` of them."""
    exports = "\n".join(line for line in text.splitlines() if line.startswith(("export", ": ")))
    asked = "; ".join(f'printf "%s\\n" "${name}"' for name in variables)
    script = f"folder=x job=y start=z first=f MASTER_ADDR=m\n{exports}\n{asked}"
    result = subprocess.run(["bash", "-uc", script], check=True, capture_output=True, text=True)
    return result.stdout.splitlines()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_script_is_clean_and_has_no_secret(folder, variant):
    rendered = render(folder, VARIANTS[variant])
    text = text_of(rendered)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert SECRET not in "".join(rendered.files.values())
    assert not list(folder.glob("slurm_jobs*"))
    header, _, body = text.partition("\n\n")
    assert header.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=")
    assert "#SBATCH" not in body
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


def test_a_section_that_says_nothing_asks_for_what_the_keys_say_by_default(folder):
    rendered = render(folder, "{}", ("optimizer.lr", "2e-4"))
    home = rendered.folder
    assert home.parent == folder / "slurm_jobs"
    assert home.name.isdecimal()
    assert sorted(rendered.files) == ["llm_finetune.sbatch", "my config.yaml"]
    assert rendered.command == ("sbatch", "--parsable", f"{home}/llm_finetune.sbatch")
    assert directives(text_of(rendered)) == [
        "job-name=llm_finetune",
        "nodes=1",
        "ntasks-per-node=8",
        "time=00:05:00",
        "partition=batch",
        "signal=USR1@120",
        f"chdir={folder}",
        f"output={home}/llm_finetune_%j.log",
        "open-mode=append",
        "requeue",
        "exclusive",
    ]
    command = re.search(r"  \S*python.*?(?=\n  status)", text_of(rendered), re.DOTALL)[0]
    assert command.split() == [
        *(sys.executable, "-m", "am_recipes.sft", "-c", f"'{home}/my", "config.yaml'", "\\"),
        *("--optimizer.lr=2e-4", "--slurm=null", "\\", "--nproc-per-node", "8"),
    ]
    srun = text_of(rendered).partition("\nsrun \\\n")[2]
    assert srun.startswith("  --nodes=1 --ntasks=1 --ntasks-per-node=1 --mpi=none --export=ALL \\\n")


def test_several_nodes_start_as_they_do_by_hand(folder):
    text = text_of(render(folder, VARIANTS["all"], processes=5, program=f"{folder}/mysft.py"))
    assert "--cpus-per-task=15 " in text
    assert '--nnodes 4 --node-rank "$SLURM_NODEID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"' in text
    assert f"'/opt/python 3/bin/python' {folder}/mysft.py -c " in text
    assert "--nproc-per-node 5 " in text
    assert "\nsrun \\\n  --nodes=4 --ntasks=4 --ntasks-per-node=1 " in text
    expected = {"ntasks-per-node=5", "cpus-per-task=3", "time=1-12", "constraint=a100&ib", "mail-type=FAIL", "mem=0"}
    expected |= {"overcommit", "qos=high", "dependency=afterok:17", "gpus-per-node=2", "job-name=my-job"}
    assert expected <= set(directives(text))


def test_variables_are_read_where_the_job_runs(folder):
    text = text_of(render(folder, VARIANTS["all"]))
    names = ("HF_TOKEN", "WANDB_API_KEY", "QUOTED", "SCRATCH", "D", "NUMBER", "HF_HOME", "MASTER_PORT")
    assert words_of(text, *names) == [
        *(SECRET, SECRET, "it's $x; `y`", "/here/x y", "de'f", "3", "/tmp/hf home", "13742")
    ]
    environment = {name: value for name, value in os.environ.items() if name != "MY_TOKEN"}
    script = text[text.index("# The environment") : text.index("# Where the nodes")]
    gone = subprocess.run(["bash", "-uc", script], env=environment, capture_output=True, text=True, check=False)
    assert gone.returncode == 127
    assert "MY_TOKEN: is not set here: submit the job where it is" in gone.stderr


def test_containers(folder):
    rendered = render(folder, VARIANTS["pyxis"])
    pyxis, job = text_of(rendered), rendered.folder
    mounts = re.search(r"--container-mounts='(.*)'", pyxis)[1].split(",")
    assert mounts == [
        f"{job}:{job}",
        f"{folder}:{folder}",
        f"{folder}/slurm_jobs/.hf_home:{folder}/slurm_jobs/.hf_home",
        "/tmp:/opt/Automodel",
        "/tmp:/data:ro",
        "/usr:/my usr",
    ]
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01" in pyxis.replace("'", "")
    assert "  python -m am_recipes.sft -c " in pyxis
    assert "in /opt/Automodel/packages/*/src /opt/Automodel/recipes/src; do" in pyxis
    apptainer = text_of(render(folder, VARIANTS["apptainer"]))
    assert "  apptainer exec --nv \\\n  --bind " in apptainer
    assert (
        '  docker://nvcr.io/nvidia/pytorch:25.01 \\\n  bash -c "$(declare -f on_each_node); on_each_node" &'
        in apptainer
    )
    assert "--nv" not in text_of(render(folder, VARIANTS["no_gpu"]))


@pytest.mark.parametrize(
    ("section", "place", "message"),
    [
        ("{time: soon}", "slurm.time", "must be a time longer than 0 as SLURM writes it"),
        ("{time: 0}", "slurm.time", "must be a time longer than 0 as SLURM writes it"),
        ("{hf_token: hf_abc}", "slurm.hf_token", "a secret in clear; name an environment variable that holds it"),
        ("{wandb_key: 12345}", "slurm.wandb_key", "a secret in clear"),
        ('{hf_token: "${MY_TOKEN,hf_abc}"}', "slurm.hf_token", "a secret in clear"),
        ('{hf_token: "x${MY_TOKEN}"}', "slurm.hf_token", "a secret in clear"),
        ("{env_vars: {MY_API_KEY: abc}}", "slurm.env_vars.MY_API_KEY", "a secret in clear"),
        ("{env_vars: {A: true}}", "slurm.env_vars.A", "expected text, got True"),
        ("{env_vars: {a-b: x}}", "slurm", "env_vars='a-b' is no name of a variable"),
        ('{hf_token: "${NOT_THERE}"}', "slurm.hf_token", "the environment variable NOT_THERE is not set"),
        ("{job_name: a b}", "slurm.job_name", "must be letters, digits"),
        ("{nodes: 0}", "slurm.nodes", "must be at least 1"),
        ("{master_port: 70000}", "slurm.master_port", "must be in 1..65535"),
        ("{container_runtime: docker}", "slurm.container_runtime", "must be one of 'pyxis', 'apptainer'"),
        ("{hf_home: cache}", "slurm.hf_home", "must be an absolute path"),
        ("{container_image: a, extra_mounts: [data:/data]}", "slurm.extra_mounts.0", "must be two absolute paths"),
        ("{nemo_mount: {source: /tmp, dest: /opt}}", "slurm", "nemo_mount is for a container, and container_image"),
        ("{nsys_enabled: true}", "slurm.nsys_enabled", "the recipes mark no part of a run for nsys to capture"),
        ("{signal_seconds: 300}", "slurm", "signal_seconds=300 is not less than time=00:05:00"),
        ("{nodse: 2}", "slurm.nodse", "unknown key; did you mean 'nodes'?"),
    ],
)
def test_a_wrong_section_is_named(folder, section, place, message):
    path = write(folder, section)
    with pytest.raises(ConfigError, match=re.escape(f"my config.yaml:11: {place}: ") + ".*" + re.escape(message)):
        parse(path)


@pytest.mark.parametrize(
    ("section", "place", "message"),
    [
        ("{container_image: /nowhere/a.sqsh}", "slurm.container_image", "container_image=/nowhere/a.sqsh is no file"),
        ("{container_image: a.sif, container_runtime: apptainer}", "slurm.container_image", "=a.sif is no file here"),
        ("{container_image: a, extra_mounts: [/nowhere:/x]}", "slurm.extra_mounts", "=/nowhere is not there"),
        ("{container_image: a, extra_mounts: {data: /x}}", "slurm.extra_mounts", "both absolute"),
        (
            "{container_image: a, nemo_mount: {source: /nowhere, dest: /x}}",
            "slurm.nemo_mount",
            "=/nowhere is not there",
        ),
        ("{directives: {nodes: 3}}", "slurm.directives", "is the key slurm.nodes of its own"),
        ("{directives: {C: gpu}}", "slurm.directives", "no long name of an option"),
        ("{directives: {comment: [a]}}", "slurm.directives", "must be one text or number"),
        ("{array: 0-3}", "slurm.array", "would train the same run many times at once, in one run_dir"),
    ],
)
def test_what_cannot_be_rendered_is_named(folder, section, place, message):
    with pytest.raises(UnusableError, match=re.escape(f"my config.yaml:11: {place}: ") + ".*" + re.escape(message)):
        render(folder, section)


def test_an_array_of_different_runs(folder):
    rendered = render(folder, "{array: 0-3}", ("run_dir", "runs/${SLURM_ARRAY_TASK_ID,0}"))
    text = text_of(rendered)
    assert f"output={rendered.folder}/llm_finetune_%A_%a.log" in directives(text)
    assert "'--run_dir=runs/${SLURM_ARRAY_TASK_ID,0}'" in text
    assert "MASTER_PORT=$((13742 + ${SLURM_ARRAY_TASK_ID:-0} % 1000))" in text


def test_the_copy_of_the_config_means_the_same_and_keeps_its_lines(folder):
    rendered = render(folder, "{}")
    text = rendered.files["my config.yaml"]
    assert len(text.splitlines()) == len((folder / "my config.yaml").read_text().splitlines())
    assert "${here}" not in text
    assert "${ROWS,5}" in text
    assert f"{folder}/rows.jsonl" in text


def test_the_section_is_saved_with_references_and_read_back(folder):
    config = parse(write(folder, VARIANTS["all"]))
    saved = config.to_yaml()
    assert SECRET not in saved
    assert "hf_token: ${MY_TOKEN}" in saved
    (folder / "saved.yaml").write_text(saved)
    assert parse(folder / "saved.yaml") == config


SBATCH = """\
#!/usr/bin/env bash
echo "$@" >> asked
[ -z "$REFUSAL" ] || { echo "sbatch: error: $REFUSAL" >&2; exit 3; }
echo "42;east"
"""


@pytest.fixture
def sbatch(folder, monkeypatch):
    """An `sbatch` on PATH that notes what it is given, and refuses where it is told to."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("REFUSAL", "")
    return folder


# Its targets are not looked at here: they would cost seconds of imports.
ELSEWHERE = "{python: python3, nodes: 2}"


def test_what_is_told_of_a_submission(sbatch, capsys):
    path = write(sbatch, ELSEWHERE)
    assert cli.main([str(path)]) == 0
    (job,) = (sbatch / "slurm_jobs").iterdir()
    assert capsys.readouterr().out.splitlines() == [
        "submitted job 42 to partition batch: 2 nodes, at most 00:05:00 at a time",
        f"  follow  tail -F {job}/llm_finetune_42.log",
        "  state   squeue -M east -j 42",
        "  cancel  scancel -M east 42",
        f"  files   {job}",
        "  run     runs/my config (config.yaml, metrics.jsonl, checkpoints)",
    ]
    assert (sbatch / "asked").read_text() == f"--parsable {job}/llm_finetune.sbatch\n"
    assert sorted(file.name for file in job.iterdir()) == ["llm_finetune.sbatch", "my config.yaml"]
    # A second one has its own folder, also in the same second.
    assert cli.main([str(path), "--slurm.time=30"]) == 0
    assert len(list((sbatch / "slurm_jobs").iterdir())) == 2


@pytest.mark.parametrize(
    ("refusal", "place", "fix"),
    [
        ("invalid partition specified: batch", "slurm.partition", "sinfo --summarize lists the partitions"),
        ("Invalid account or account/partition combination specified", "slurm.account", "sacctmgr show associations"),
        ("Job dependency problem", "slurm.dependency", "such as afterok:JOB"),
        ("something else", "slurm", "man sbatch explains"),
    ],
)
def test_a_refusal_of_sbatch_is_passed_on_with_its_status(sbatch, monkeypatch, capsys, refusal, place, fix):
    monkeypatch.setenv("REFUSAL", refusal)
    assert cli.main([str(write(sbatch, ELSEWHERE))]) == 3
    errors = capsys.readouterr().err
    assert f"sbatch: error: {refusal}\n" in errors
    assert re.search(re.escape(f"my config.yaml:11: {place}: sbatch refused the job (3): {fix}"), errors)


def test_without_sbatch_nothing_is_written(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder / "empty"))
    assert cli.main([str(write(folder, ELSEWHERE))]) == 1
    assert "my config.yaml:11: slurm: sbatch is not on PATH" in capsys.readouterr().err
    assert not (folder / "slurm_jobs").exists()


def test_several_machines_by_hand_and_a_scheduler_exclude_each_other(folder, capsys):
    argv = [str(write(folder, ELSEWHERE)), "--nnodes=2", "--node-rank=0", "--rdzv-endpoint=a:1"]
    assert cli.main(argv) == 2
    assert "--nnodes 2 with a section slurm" in capsys.readouterr().err


def test_a_dry_run_of_what_runs_elsewhere_shows_the_config_and_the_script(folder, capsys):
    assert cli.main([str(write(folder, ELSEWHERE)), "--dry-run"]) == 0
    config, _, script = capsys.readouterr().out.partition("---\n")
    assert "not looked at here" in config
    assert "recipe: sft" in config
    assert script.startswith("# sbatch --parsable ")
    assert "#SBATCH --nodes=2" in script
    assert not (folder / "slurm_jobs").exists()

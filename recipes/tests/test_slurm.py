"""The section `slurm`: what is rendered of it, what is refused, and what is told of a submission."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading

import pytest

from am_recipes import cli, submission
from am_recipes.configs import ConfigError, parse
from am_recipes.launch import job
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


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck not installed")
@pytest.mark.parametrize("variant", VARIANTS)
def test_shellcheck_has_nothing_to_say_of_any_script(folder, variant):
    text = text_of(render(folder, VARIANTS[variant]))
    checked = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def on_a_node(text):
    """What bash prints that gets the function of a node as srun's tasks do; `printf` instead of Python."""
    function = text[text.index("on_each_node() {") : text.index("# Bash itself")].replace(
        sys.executable, "printf %s\\\\n"
    )
    call = 'bash -c "$(declare -f on_each_node); on_each_node"'
    call = f"FAILED=/dev/null folder=/f MASTER_ADDR=a MASTER_PORT=1\n{function}\n{call}"
    return subprocess.run(["bash", "-c", call], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("value", ["a\nb", "a\n\n  b\n", "a\x0bb\u2028c\x0c", "it's\n'", "a\nEOF\n"])
def test_an_override_of_many_lines_arrives_as_it_was_typed(folder, value):
    printed = on_a_node(text_of(render(folder, "{}", ("model.name_or_path", value))))
    assert f"\n--model.name_or_path={value}\n--slurm=null\n" in printed


def test_a_command_may_have_a_document_in_it(folder):
    text = text_of(render(folder, '{command: "cat <<EOF\\nhello\\n  $((1 + 1))\\nEOF"}'))
    assert on_a_node(text) == "hello\n  2\n"


SCONTROL = """\
#!/usr/bin/env bash
n=$(cat count 2>/dev/null || echo 0)
echo $((n + 1)) >count
echo "$@" >>calls
case $(sed -n "$((n + 1))p" answers) in
  away) echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1 ;;
  yes) ;;
  *) echo "JobId=7 JobState=$(sed -n "$((n + 1))p" answers) Reason=None" ;;
esac
"""


@pytest.fixture
def controller(folder, monkeypatch):
    """A `scontrol` that gives the `answers` it finds, one a call, and a `sleep` that does not."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"scontrol": SCONTROL, "sleep": "#!/bin/sh\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return folder


def after_a_start(folder, text, *answers, status=75, latest=None):
    """Exit status and words of the script's end, for a start that ended with `status` and committed `latest`."""
    (folder / "answers").write_text("\n".join(answers))
    (folder / "count").unlink(missing_ok=True)
    checkpoints = folder / "runs" / "my config" / "checkpoints"
    begin = text[text.index("start=$((") : text.index("export FAILED")]
    where = "\n".join(line for line in text.splitlines() if line.startswith(("run_dir=", "case $run_dir")))
    commit = f"mkdir -p {shlex.quote(str(checkpoints))}; ln -sfn {latest} {shlex.quote(str(checkpoints))}/latest"
    before = text[text.index("# What the run has committed") : text.index("\nsrun ")] if "committed()" in text else ""
    end = text[text.index("# A start that") if "idle=" in text else text.index("# 75:") :]
    begin = f"job=7\n{begin}\nfolder={shlex.quote(str(folder))}\n{where}\n{before}\n"
    script = f"{begin}{commit if latest else ''}\nstatus={status}\n{end}"
    result = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=False, cwd=folder)
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["RUNNING", "yes"], "was stopped and is requeued"),
        (["away", "away", "RUNNING", "yes"], "was stopped and is requeued"),
        (["RUNNING", "away", "away", "RUNNING", "yes"], "was stopped and is requeued"),
        (["RUNNING", "away", "PENDING"], "SLURM was asked to requeue it, but has not answered; it is PENDING"),
        (["CANCELLED"], "was cancelled or is at its end (CANCELLED) and is not requeued"),
        (["away", "CANCELLED"], "was cancelled or is at its end (CANCELLED) and is not requeued"),
        (["RUNNING", "away"] * 12, "could not be requeued; submitted again, it continues"),
    ],
)
def test_a_controller_that_is_away_is_asked_again(controller, answers, said):
    status, output = after_a_start(controller, text_of(render(controller, "{}")), *answers)
    assert status == 75
    assert said in output
    assert (controller / "count").read_text() == f"{len(answers)}\n"


def test_starts_that_commit_nothing_are_not_repeated_for_ever(controller):
    text = text_of(render(controller, "{}"))
    answers = ("RUNNING", "yes")
    for latest, status in ((None, 75), ("step_000002", 75), (None, 75), ("step_000004", 75), (None, 75), (None, 1)):
        ended, output = after_a_start(controller, text, *answers, latest=latest)
        assert ended == status, output
        assert ("requeued" in output) == (status == 75)
    assert f"committed anything in {controller}/runs/my config. The job ends" in output
    # What a command commits nobody knows, and a run that failed has said so.
    assert after_a_start(controller, text, "RUNNING", status=3) == (3, "")
    assert "idle=" not in text_of(render(controller, "{command: hostname}"))
    assert "idle=" not in text_of(render(controller, "{requeue: false}"))


def test_the_end_of_the_job_is_kept_where_nobody_says_another(controller):
    text = text_of(render(controller, "{}"))
    text = text[text.index("start=$((") : text.index("# The environment of")]
    run = "".join(line + "\n" for line in text.splitlines() if not line.startswith("echo"))
    asked = f"job=7\nSLURM_JOB_END_TIME=5\n{run}\necho end ${{SLURM_JOB_END_TIME-none}}"
    for answer, end in (("X EndTime=1970-01-01T00:00:09Z", "9"), ("X EndTime=Unknown", "none")):
        (controller / "answers").write_text(f"away\n{answer}\n")
        (controller / "count").unlink(missing_ok=True)
        result = subprocess.run(["bash", "-uc", asked], capture_output=True, text=True, check=True, cwd=controller)
        assert result.stdout == f"end {end}\n"
    # Ten minutes without an answer, in no time.
    silent = asked.replace("+ 600", "+ 0")
    (controller / "answers").write_text("away\n" * 9)
    (controller / "count").unlink()
    result = subprocess.run(["bash", "-uc", silent], capture_output=True, text=True, check=True, cwd=controller)
    assert result.stdout == "end 5\n"


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
    assert """/usr:/my usr',"$run_dir:$run_dir" """ in pyxis
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


def test_a_run_elsewhere_is_mounted_in_a_container(folder):
    sections = VARIANTS["no_gpu"], "{container_image: a}"
    for section, mount in zip(sections, ('--bind "$run_dir:$run_dir" ', ',"$run_dir:$run_dir" '), strict=True):
        text = text_of(render(folder, section, ("run_dir", f"{folder}/scratch/${{SLURM_ARRAY_TASK_ID,0}}")))
        assert mount in text
        where = text[text.index("run_dir=") : text.index("# Where the nodes")]
        subprocess.run(["bash", "-uc", where], env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "3"}, check=True)
        assert (folder / "scratch" / "3").is_dir()
        shutil.rmtree(folder / "scratch")
    # There it has another name here: whether it commits is not seen.
    other = text_of(render(folder, "{container_image: a, extra_mounts: {/tmp: /data}}", ("run_dir", "/data/run")))
    assert '"$run_dir:$run_dir"' not in other
    assert "idle=" not in other
    assert 'mkdir -p "$run_dir"' not in other


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
        ("{env_vars: {a-b: x}}", "slurm.env_vars.a-b", "'a-b' cannot be the name of an environment variable"),
        ("{env_vars: {a\u00c4: x}}", "slurm.env_vars.a\u00c4", "cannot be the name of an environment variable"),
        (
            '{hf_token: "${MY_TOKEN}", env_vars: {HF_TOKEN: "${MY_TOKEN}"}}',
            "slurm.env_vars.HF_TOKEN",
            "the variable HF_TOKEN is given twice",
        ),
        ('{account: "x\\n#SBATCH --foo"}', "slurm.account", "must be text on one line, without"),
        ("{partition: 'a\"b'}", "slurm.partition", "must be text on one line, without"),
        ("{qos: 'a\\b'}", "slurm.qos", "must be text on one line, without"),
        ('{array: "1\\n%1"}', "slurm.array", "must be text on one line, without"),
        ("{dependency: ''}", "slurm.dependency", "must be text on one line, without"),
        ('{hf_token: "${NOT_THERE}"}', "slurm.hf_token", "the environment variable NOT_THERE is not set"),
        ("{job_name: a b}", "slurm.job_name", "must be letters, digits"),
        ("{nodes: 0}", "slurm.nodes", "must be at least 1"),
        ("{master_port: 70000}", "slurm.master_port", "must be in 1..65535"),
        ("{container_runtime: docker}", "slurm.container_runtime", "must be one of 'pyxis', 'apptainer'"),
        ("{hf_home: cache}", "slurm.hf_home", "must be an absolute path"),
        ("{container_image: a, extra_mounts: [data:/data]}", "slurm.extra_mounts.0", "must be two absolute paths"),
        (
            "{nemo_mount: {source: /tmp, dest: /opt}}",
            "slurm.nemo_mount",
            "nemo_mount is for a container, and container_image",
        ),
        ("{nsys_enabled: true}", "slurm.nsys_enabled", "the recipes mark no part of a run for nsys to capture"),
        ("{signal_seconds: 300}", "slurm.signal_seconds", "signal_seconds=300 is not less than time=00:05:00"),
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
        ("{directives: {comment: 'a\\b'}}", "slurm.directives", "must be one text or number"),
        ("{array: 0-3}", "slurm.array", "would train the same run many times at once, in one run_dir"),
        ("{array: 0-31%16}", "slurm.array", "would train the same run many times at once, in one run_dir"),
        ("{array: 0-3%10}", "slurm.array", "would train the same run many times at once, in one run_dir"),
        (
            "{array: 0-3, env_vars: {A: '${SLURM_ARRAY_TASK_ID,0}'}} # ${SLURM_ARRAY_TASK_ID,0}",
            "slurm.array",
            "would train the same run many times at once, in one run_dir",
        ),
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
    where = text[text.index("run_dir=") : text.index("# Where the nodes")]
    environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "3"}
    said = subprocess.run(["bash", "-uc", where], env=environment, check=True, capture_output=True, text=True).stdout
    assert said == f"  run     {folder}/runs/3\n"


def test_a_config_with_a_number_that_is_none_is_the_same_in_its_copy(folder):
    assert ".nan" in render(folder, "{directives: {comment: .nan}}").files["my config.yaml"]


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


def test_submissions_at_once_have_folders_of_their_own(sbatch):
    barrier = threading.Barrier(8)

    def submit(number):
        # The folder is chosen by all of them before any of them makes it.
        waits = [barrier.wait]

        def render_once(now):
            rendered = job.Rendered(sbatch / "jobs" / str(now), {"a": str(number)}, "a", ("sbatch", str(number)))
            while waits:
                waits.pop()()
            return rendered

        return job.submit(render_once, sbatch)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(submit, range(8)))
    assert len({rendered.folder for rendered, _ in results}) == 8
    for number, (rendered, result) in enumerate(results):
        assert result.returncode == 0
        assert (rendered.folder / "a").read_text() == str(number)


def test_the_run_of_an_array_is_told_as_it_was_written(sbatch, capsys):
    path = write(sbatch, "{python: python3, array: 0-3}")
    assert cli.main([str(path), "--run_dir=runs/${SLURM_ARRAY_TASK_ID,0}"]) == 0
    assert "  run     runs/${SLURM_ARRAY_TASK_ID,0} (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("refusal", "place", "fix"),
    [
        ("invalid partition specified: batch", "slurm.partition", "sinfo --summarize lists the partitions"),
        ("Invalid account or account/partition combination specified", "slurm.account", "sacctmgr show associations"),
        ("Job dependency problem", "slurm.dependency", "such as afterok:JOB"),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "slurm",
            "sacctmgr show associations user=$USER and sacctmgr show qos",
        ),
        ("Unable to contact slurm controller (connect failure)", "slurm", "scontrol ping says whether it is up"),
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

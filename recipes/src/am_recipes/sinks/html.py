"""report.html: one file, no script and no network, readable in light and dark. A function of the run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median

from am_recipes.sinks import curves, files, record
from am_recipes.sinks.charts import Series, chart
from am_recipes.sinks.curves import Curve, Metrics
from am_recipes.sinks.record import ImageAnswers, Launch, Record
from am_recipes.sinks.sink import Row
from am_recipes.sinks.text import duration

NAME = "report.html"
# The versions that a page names; run.json has all.
SHOWN = ("python", *record.OURS, "torch", "transformers", "peft", "datasets", "safetensors")
# The columns that every step has, with a chart each: heading, unit, color, factor, whether the axis begins at zero.
CHARTS = {
    "lr": ("Learning rate", "lr", 3, 1.0, True),
    "grad_norm": ("Gradient norm, before clipping", "norm", 4, 1.0, False),
    "tokens_per_second": ("Tokens per second, all processes", "tokens/s", 5, 1.0, True),
    "peak_memory_bytes": ("Peak memory of the first process, GiB", "GiB", 1, 2.0**-30, True),
}


class HtmlPage:
    """Draws report.html at the first step of a launch, every few minutes after that, and at the end.

    Training waits for it: the first page of a launch reads all of metrics.jsonl, a later one only what was added.
    """

    def __init__(self, run_dir: Path, *, minutes: float = 5) -> None:
        self._run_dir = run_dir
        self._metrics = Metrics()
        self._seconds = 60 * minutes
        self._due = time.monotonic()

    def note(self, fact: str) -> None:
        """Nothing: facts are read from the run directory."""

    def step(self, row: Row) -> None:
        if time.monotonic() >= self._due:
            _write(self._run_dir, self._metrics)
            self._due = time.monotonic() + self._seconds

    def validation(self, row: Row) -> None:
        """Nothing: losses are read from the run directory."""

    def close(self, status: str) -> None:
        _write(self._run_dir, self._metrics)


def write_page(run_dir: Path) -> Path:
    """Draw the page of the run in `run_dir`, going on or not, and return where it is.

    Reads config.yaml, run.json and metrics.jsonl, the last as a stream. The same files give the same page.

    Raises:
        ValueError: `run_dir` is not the directory of a run.
        OSError: the page was not written.
    """
    missing = [name for name in ("config.yaml", record.NAME, "metrics.jsonl") if not (run_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"{run_dir} is not the directory of a run: {', '.join(missing)} not found there; give the run_dir of a run"
        )
    _write(run_dir, Metrics())
    return run_dir / NAME


def _write(run_dir: Path, metrics: Metrics) -> None:
    """Draw the page from the run directory; `metrics` is what of metrics.jsonl is known already, and is updated."""
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    curves.read(run_dir / "metrics.jsonl", metrics)
    text = render(record.load(run_dir), config, metrics, run_dir.resolve().name)
    files.replace(run_dir / NAME, [text.encode()])


def render(run: Record, config: str, metrics: Metrics, name: str) -> str:
    """Return the page as a complete HTML document; `name` is the heading of a run without a title."""
    title = escape(run.title or name)
    warnings = [text for _, text in run.warnings]
    if metrics.is_broken:
        warnings.append(
            f"line {metrics.num_lines + 1} of metrics.jsonl is no JSON; the page ends before it, and so will the file "
            "when the run continues"
        )
    sections = [
        _header(title, run, metrics),
        _list_section("Warnings", warnings, "warning"),
        _charts(metrics),
        _answers(run.answers),
        _images(run.image_answers),
        _samples(run.samples),
        _next_steps(run.next_steps),
        _list_section("Set up", run.notes, "note"),
        _details("Configuration", f"<pre>{escape(config)}</pre>{_origins(run.launches[-1])}"),
        _details("Launches and versions", "\n".join(_launch(launch) for launch in run.launches)),
    ]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _charts(metrics: Metrics) -> str:
    if not metrics.train:
        return ""
    loss = metrics.train["loss"]
    smoothed = loss.smoothed()
    losses = [Series("train", loss, 1, faint=smoothed is not loss)]
    losses += [Series("train, smoothed", smoothed, 1)] if smoothed is not loss else []
    losses += [
        Series(name.removeprefix("val_loss_").replace("val_loss", "validation"), curve, color, True)
        for color, (name, curve) in enumerate(sorted(metrics.validation.items()), start=2)
    ]
    small = [
        chart(heading, [Series(unit, metrics.train[name].scaled(factor), color)], 520, 220, from_zero)
        for name, (heading, unit, color, factor, from_zero) in CHARTS.items()
    ]
    small += [
        chart(name.replace("_", " ").capitalize(), [Series(name, curve, 2)], 520, 220)
        for name, curve in metrics.train.items()
        if name != "loss" and name not in CHARTS
    ]
    foot = f'<p class="foot">Lines are means of {loss.size} steps, bands reach from the smallest to the largest.</p>'
    parts = [
        # A drawing is scaled as a whole, its letters too: a narrow screen, which has no pointer, has one of its own.
        f'<div class="wide">{chart("Loss per target token", losses, 1040, 300)}</div>',
        f'<div class="narrow">{chart("Loss per target token", losses, 520, 300, pointer=False)}</div>',
        f'<div class="row">{"".join(small)}</div>',
        foot if loss.size > 1 else "",
    ]
    return f'<section class="card">{"".join(parts)}</section>'


def _header(title: str, run: Record, metrics: Metrics) -> str:
    facts = [("Steps", f"{metrics.last_step:,} of {run.total_steps:,}")]
    if metrics.train:
        throughput = [bucket.mean for bucket in metrics.train["tokens_per_second"].buckets]
        facts += [
            ("Train loss", _from_to(metrics.train["loss"].smoothed())),
            *((_label(name), _from_to(curve)) for name, curve in sorted(metrics.validation.items())),
            ("Tokens", f"{metrics.tokens:,}"),
            ("Supervised", f"{metrics.target_tokens / max(metrics.tokens, 1):.0%} of tokens"),
            ("Time in steps", duration(metrics.seconds)),
            ("Tokens per second", f"{median(throughput):,.0f}" if throughput else "-"),
            ("Peak memory", f"{metrics.train['peak_memory_bytes'].high / 2**30:.2f} GiB"),
        ]
    facts.append(("Processes", str(run.launches[-1]["world_size"])))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    kind = run.status.split(maxsplit=1)[0].rstrip(":")
    color = {"finished": "good", "running": "busy", "failed": "bad"}.get(kind, "busy")
    text = run.status
    if kind == "running" and metrics.last_time is not None:
        # A run that was killed had no time to say so.
        text = f"running, or killed: the last step ended at {datetime.fromtimestamp(metrics.last_time, UTC):%F %T} UTC"
    reason = f'<p class="reason {color}">{escape(text)}</p>' if text != kind else ""
    return f'<header><h1>{title} <span class="pill {color}">{escape(kind)}</span></h1>{reason}<dl>{cells}</dl></header>'


def _label(name: str) -> str:
    return "Validation loss" if name == "val_loss" else f"Validation: {name.removeprefix('val_loss_')}"


def _from_to(curve: Curve) -> str:
    if curve.first is None or curve.last is None:
        return "-"
    return f"{curve.first[1]:.3f}" if curve.first == curve.last else f"{curve.first[1]:.3f} → {curve.last[1]:.3f}"


def _answers(answers: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    if not answers:
        return ""
    prompts = list(dict.fromkeys(prompt for pairs in answers.values() for prompt, _ in pairs))
    blocks = []
    for prompt in prompts:
        cells = "".join(
            f'<div class="answer"><h4>{escape(moment)}</h4><p>{escape(answer.strip()) or "<i>nothing</i>"}</p></div>'
            for moment, pairs in answers.items()
            for asked, answer in pairs
            if asked == prompt
        )
        blocks.append(f'<article><p class="prompt">{escape(prompt)}</p><div class="answers">{cells}</div></article>')
    return f'<section class="card"><h2>Answers</h2>{"".join(blocks)}</section>'


def _images(answers: ImageAnswers | None) -> str:
    if answers is None:
        return ""
    *earlier, latest = answers["answers"]
    blocks = []
    for number, (images, prompt, expected) in enumerate(answers["rows"]):
        answer = answers["answers"][latest][number]
        shown = "".join(f'<img alt="" src="data:image/png;base64,{escape(image)}"/>' for image in images)
        mark = "good" if answer.strip() == expected.strip() else "bad"
        others = [] if mark == "good" else [("expected", expected)]
        others += [(moment, answers["answers"][moment][number]) for moment in earlier]
        small = "".join(f"<div><small>{name}: {escape(text.strip())}</small></div>" for name, text in others)
        blocks.append(
            f'<figure title="{escape(prompt)}">{shown}<figcaption class="{mark}">{escape(answer.strip())}{small}'
            "</figcaption></figure>"
        )
    hint = "".join(f'<p class="hint">{moment}: {escape(text)}</p>' for moment, text in answers["summary"].items())
    grid = f'<div class="images">{"".join(blocks)}</div>'
    return f'<section class="card"><h2>Answers about images</h2>{hint}{grid}</section>'


def _samples(samples: Sequence[Sequence[tuple[str, bool]]]) -> str:
    if not samples:
        return ""
    blocks = [
        "<pre class='sample'>"
        + "".join(f"<mark>{escape(text)}</mark>" if counts else escape(text) for text, counts in sample)
        + "</pre>"
        for sample in samples
    ]
    legend = '<p class="hint">What the model reads; it learns to write what is <mark>marked</mark> alone.</p>'
    return f'<section class="card"><h2>Training samples</h2>{legend}{"".join(blocks)}</section>'


def _next_steps(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "\n".join(f"<i>{escape(line)}</i>" if line.startswith("#") else escape(line) for line in commands)
    return f'<section class="card"><h2>Next steps</h2><pre>{lines}</pre></section>'


def _list_section(title: str, texts: Sequence[str], kind: str) -> str:
    if not texts:
        return ""
    items = "".join(f'<pre class="{kind}">{escape(text)}</pre>' for text in texts)
    return f'<section class="card"><h2>{title}</h2>{items}</section>'


def _details(title: str, content: str) -> str:
    return f'<details class="card"><summary>{title}</summary>{content}</details>' if content else ""


def _launch(launch: Launch) -> str:
    versions = "  ".join(f"{name} {launch['versions'][name]}" for name in SHOWN if name in launch["versions"])
    start = "from the start" if launch["resume_step"] is None else f"from step {launch['resume_step']}"
    machine = launch.get("environment", {})
    where = f" of {', '.join(machine['hosts'])}" if "hosts" in machine else ""
    jobs = [f"{name}={value}" for name, value in machine.get("job", {}).items()]
    facts = [
        f"{launch['time']}  {start}, {launch['world_size']} processes on {launch['device']}{where}",
        *([" ".join(jobs)] if jobs else []),
        "$ " + launch["command"],
        f"commit {launch['git'] or 'unknown'}",
        versions,
        *(f"{name}: {digest}" for name, digest in launch.get("data", {}).items()),
    ]
    return f"<pre>{escape(chr(10).join(facts))}</pre>"


def _origins(launch: Launch) -> str:
    """Where the values that are no defaults were set."""
    lines = [f"{path}: {origin}" for path, origin in launch.get("origins", {}).items() if origin != "default"]
    return f"<h3>Where values were set</h3><pre>{escape(chr(10).join(lines))}</pre>" if lines else ""

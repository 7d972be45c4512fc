"""report.html: one file, no script and no network, readable in light and dark. A function of what `Page` holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from statistics import median
from typing import Any

Row = Mapping[str, Any]
Points = list[tuple[float, float]]

# More points than this are averaged in buckets of consecutive steps: the page stays small however long the run.
MAX_POINTS = 240


@dataclass
class Page:
    """Everything the page shows. ``rows`` are those of metrics.jsonl, with None where a number was not finite."""

    title: str
    config: str
    total_steps: int
    status: str = "running"
    rows: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    answers: dict[str, list[list[str]]] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)
    next_steps: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """Return the page as a complete HTML document."""
    train = [row for row in page.rows if "tokens_per_second" in row]
    validation_names = sorted({name for row in page.rows for name in row if name.startswith("val_loss")})
    losses = [Series("train", _points(train, "loss"), 1)]
    losses += [
        Series(name.removeprefix("val_loss_").replace("val_loss", "validation"), _points(page.rows, name), color, True)
        for color, name in enumerate(validation_names, start=2)
    ]
    charts = [
        _chart("Loss per target token", losses, 1040, 300, _short),
        '<div class="row">',
        _chart("Learning rate", [Series("lr", _points(train, "lr"), 3)], 520, 220, _short, from_zero=True),
        _chart("Gradient norm, before clipping", [Series("norm", _points(train, "grad_norm"), 4)], 520, 220, _short),
        _chart(
            "Tokens per second, all processes",
            [Series("tokens/s", _points(train, "tokens_per_second"), 5)],
            520,
            220,
            _short,
            from_zero=True,
        ),
        _chart(
            "Peak memory of the first process, GiB",
            [Series("GiB", [(x, y / 2**30) for x, y in _points(train, "peak_memory_bytes")], 1)],
            520,
            220,
            _short,
            from_zero=True,
        ),
        *(
            _chart(name.replace("_", " ").capitalize(), [Series(name, _points(train, name), 2)], 520, 220, _short)
            for name in page.others
        ),
        "</div>",
    ]
    if len(train) > MAX_POINTS:
        size = _bucket_size(len(train))
        charts.append(
            f'<p class="foot">Lines are means of {size} steps, bands reach from the smallest to the largest.</p>'
        )
    sections = [
        _header(page, train, validation_names),
        _list_section("Warnings", page.warnings, "warning"),
        '<section class="card">' + "\n".join(charts) + "</section>" if train else "",
        _answers(page.answers),
        _pictures(page.pictures),
        _samples(page.samples),
        _next_steps(page.next_steps),
        _list_section("Set up", page.notes, "note"),
        _details("Configuration", f"<pre>{escape(page.config)}</pre>"),
        _details("Launches and versions", "\n".join(_launch(launch) for launch in page.launches)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(page: Page, train: Sequence[Row], validation_names: Sequence[str]) -> str:
    last = train[-1] if train else None
    facts = [("Steps", f"{last['step'] if last else 0:,} of {page.total_steps:,}")]
    if last:
        seconds = sum(row["tokens"] / row["tokens_per_second"] for row in train if row["tokens_per_second"])
        throughput = [row["tokens_per_second"] for row in train if row["tokens_per_second"]]
        targets, tokens = sum(row["target_tokens"] for row in train), sum(row["tokens"] for row in train)
        facts += [
            ("Train loss", _from_to(_points(train, "loss"))),
            *((_label(name), _from_to(_points(page.rows, name))) for name in validation_names),
            ("Tokens", f"{tokens:,}"),
            ("Supervised", f"{targets / max(tokens, 1):.0%} of tokens"),
            ("Time in steps", _duration(seconds)),
            ("Tokens per second", f"{median(throughput):,.0f}" if throughput else "-"),
            ("Peak memory", f"{max(row['peak_memory_bytes'] for row in train) / 2**30:.2f} GiB"),
        ]
    if page.launches:
        facts.append(("Processes", str(page.launches[-1]["world_size"])))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    kind = page.status.split(maxsplit=1)[0].rstrip(":")
    color = {"finished": "good", "running": "busy", "failed": "bad"}.get(kind, "busy")
    reason = f'<p class="reason {color}">{escape(page.status)}</p>' if page.status != kind else ""
    return (
        f'<header><h1>{escape(page.title)} <span class="pill {color}">{escape(kind)}</span></h1>{reason}'
        f"<dl>{cells}</dl></header>"
    )


def _label(name: str) -> str:
    return "Validation loss" if name == "val_loss" else f"Validation: {name.removeprefix('val_loss_')}"


def _from_to(points: Points) -> str:
    if not points:
        return "-"
    return f"{points[0][1]:.3f}" if len(points) == 1 else f"{points[0][1]:.3f} → {points[-1][1]:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _answers(answers: Mapping[str, Sequence[Sequence[str]]]) -> str:
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


def _pictures(answers: Mapping[str, Any]) -> str:
    if not answers:
        return ""
    blocks = []
    for pictures, prompt, answer, expected in answers["rows"]:
        images = "".join(f'<img alt="" src="data:image/png;base64,{escape(picture)}"/>' for picture in pictures)
        mark = "good" if answer.strip() == expected.strip() else "bad"
        wanted = "" if mark == "good" else f"<div><small>expected: {escape(expected.strip())}</small></div>"
        blocks.append(
            f'<figure title="{escape(prompt)}">{images}<figcaption class="{mark}">{escape(answer.strip())}{wanted}'
            "</figcaption></figure>"
        )
    hint = f'<p class="hint">{escape(answers["summary"])}</p>'
    grid = f'<div class="pictures">{"".join(blocks)}</div>'
    return f'<section class="card"><h2>Answers about pictures</h2>{hint}{grid}</section>'


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


def _launch(launch: Mapping[str, Any]) -> str:
    versions = "  ".join(f"{name} {version}" for name, version in launch["versions"].items())
    start = "from the start" if launch["resume_step"] is None else f"from step {launch['resume_step']}"
    facts = f"{launch['time']}  {start}, {launch['world_size']} processes on {launch['device']}"
    commit = f"commit {launch['git'] or 'unknown'}"
    return f"<pre>{escape(chr(10).join([facts, '$ ' + launch['command'], commit, versions]))}</pre>"


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``color`` counts the palette from 1. ``dots`` marks every point."""

    name: str
    points: Points
    color: int
    dots: bool = False


def _points(rows: Sequence[Row], name: str) -> Points:
    return [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]


def _chart(
    title: str,
    series: Sequence[Series],
    width: int,
    height: int,
    write: Callable[[float], str],
    from_zero: bool = False,
) -> str:
    """Draw lines over steps as SVG, with ticks, and a rule with the values under the pointer."""
    everything = [point for line in series for point in line.points]
    if not everything:
        return ""
    left, right, top, bottom = 56, width - 14, 38, height - 30
    x_ticks = _ticks(min(x for x, _ in everything), max(x for x, _ in everything), width // 110, whole=True)
    low = 0.0 if from_zero else min(y for _, y in everything)
    y_ticks = _ticks(low, max(y for _, y in everything), height // 50)
    x_low, x_high = min(x for x, _ in everything), max(x for x, _ in everything)
    y_low, y_high = min(low, y_ticks[0]), max(y_ticks[-1], max(y for _, y in everything))

    def across(x: float) -> float:
        return (left + right) / 2 if x_high == x_low else left + (x - x_low) / (x_high - x_low) * (right - left)

    def up(y: float) -> float:
        return bottom - (y - y_low) / ((y_high - y_low) or 1) * (bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="4" y="16">{escape(title)}</text>')
    parts += [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
        f'<text class="tick" x="{left - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{write(y)}</text>'
        for y in y_ticks
    ]
    parts += [
        f'<text class="tick" x="{across(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:,.0f}</text>'
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    shown = [Series(line.name, _thin(line.points), line.color, line.dots) for line in series]
    for line, full in zip(shown, series, strict=True):
        if len(full.points) > len(line.points):
            parts.append(_envelope(full, across, up))
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="c{line.color}" points="{path}"/>')
        if line.dots or len(line.points) <= 20:
            parts += [
                f'<circle class="c{line.color}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2"/>' for x, y in line.points
            ]
    parts.append(_legend(series, right) if len(series) > 1 else "")
    parts.append(_pointer(shown, across, up, (left, right, top, bottom), write))
    return "".join(parts) + "</svg>"


def _legend(series: Sequence[Series], right: float) -> str:
    parts, x = [], right
    for line in reversed(series):
        x -= 7 * len(line.name) + 30
        parts.append(
            f'<circle class="c{line.color}" cx="{x:.0f}" cy="12" r="4"/>'
            f'<text class="tick" x="{x + 9:.0f}" y="16">{escape(line.name)}</text>'
        )
    return "".join(parts)


def _pointer(
    series: Sequence[Series],
    across: Callable[[float], float],
    up: Callable[[float], float],
    box: tuple[float, float, float, float],
    write: Callable[[float], str],
) -> str:
    """One transparent column for each x; the one under the pointer shows its rule, dots and values."""
    left, right, top, bottom = box
    columns: dict[float, list[tuple[Series, float]]] = {}
    for line in series:
        for x, y in line.points:
            columns.setdefault(x, []).append((line, y))
    places = sorted(columns)
    edges = [left, *((across(a) + across(b)) / 2 for a, b in pairwise(places)), right]
    parts = []
    for x, (start, end) in zip(places, pairwise(edges), strict=True):
        text = f"step {x:,.0f}   " + "   ".join(f"{line.name} {write(y)}" for line, y in columns[x])
        anchor = "start" if across(x) < (left + right) / 2 else "end"
        dots = "".join(
            f'<circle class="c{line.color}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4.5"/>' for line, y in columns[x]
        )
        parts.append(
            f'<g class="at"><rect x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{bottom - top}"/>'
            f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{top}" y2="{bottom}"/>{dots}'
            f'<text x="{across(x):.1f}" y="{top - 5}" text-anchor="{anchor}">{escape(text)}</text></g>'
        )
    return "".join(parts)


def _envelope(line: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """The band between the smallest and largest value of each bucket that `_thin` averages."""
    buckets = _buckets(line.points)
    high = [(across(_mean(x for x, _ in bucket)), up(max(y for _, y in bucket))) for bucket in buckets]
    low = [(across(_mean(x for x, _ in bucket)), up(min(y for _, y in bucket))) for bucket in buckets]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*high, *reversed(low)])
    return f'<polygon class="c{line.color}" points="{path}"/>'


def _thin(points: Points) -> Points:
    """Average buckets of consecutive points, so that at most MAX_POINTS remain."""
    if len(points) <= MAX_POINTS:
        return points
    return [(_mean(x for x, _ in bucket), _mean(y for _, y in bucket)) for bucket in _buckets(points)]


def _buckets(points: Points) -> list[Points]:
    size = _bucket_size(len(points))
    return [points[start : start + size] for start in range(0, len(points), size)]


def _bucket_size(num_points: int) -> int:
    return math.ceil(num_points / MAX_POINTS)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _ticks(low: float, high: float, wanted: int, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2, 2.5 or 5 times a power of ten apart, from at or below ``low`` to at or past ``high``."""
    if high == low:
        low, high = (low - 0.5, high + 0.5) if whole else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        distance = max(1.0, float(round(distance)))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, last + 1)]


def _short(value: float) -> str:
    """A number in few characters: 0, 3e-05, 0.0125, 2.31, 12.5, 4,200, 1.2M."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2230; --soft: #667085; --rule: #e4e7ec;
  --mark: #d8f3e1; --mark-ink: #0b5a2b; --c1: #3563e9; --c2: #e5683b; --c3: #7a4fd0; --c4: #b7791f; --c5: #12908e;
  --c6: #c13584; --good: #12805c; --bad: #c8322b; --busy: #3563e9; }
@media (prefers-color-scheme: dark) { :root { --page: #11141b; --card: #191e28; --ink: #e6e9f0; --soft: #98a2b3;
  --rule: #2b3240; --mark: #123f29; --mark-ink: #a6f0c4; --c1: #7b9cff; --c2: #ff9166; --c3: #b394ff; --c4: #e3b04b;
  --c5: #45c9c5; --c6: #f07ab8; --good: #3ccf97; --bad: #ff7b72; --busy: #7b9cff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; }
h4 { font-size: 11px; letter-spacing: .06em; text-transform: uppercase; color: var(--soft); margin: 0 0 4px; }
.pill { font-size: 13px; font-weight: 600; letter-spacing: 0; vertical-align: 5px; margin-left: 8px; padding: 3px 10px;
  border-radius: 99px; border: 1px solid currentColor; }
.good { color: var(--good); } .bad { color: var(--bad); } .busy { color: var(--busy); }
.reason { margin: -8px 0 18px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(178px, 1fr)); gap: 1px; margin: 0 0 20px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px; overflow: hidden; }
dl div { background: var(--card); padding: 12px 16px; box-shadow: 0 0 0 1px var(--rule); }
dt { font-size: 12px; color: var(--soft); } dd { margin: 2px 0 0; font-size: 17px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 20px 22px;
  margin: 0 0 20px; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px 26px;
  margin-top: 18px; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; }
svg .title { font-weight: 600; font-size: 14px; fill: var(--ink); }
svg .tick { fill: var(--soft); font-variant-numeric: tabular-nums; } svg .grid { stroke: var(--rule); }
polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
circle { fill: var(--c); } polygon { fill: var(--c); opacity: .16; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.c6 { --c: var(--c6); }
.at rect { fill: transparent; } .at line { stroke: var(--soft); stroke-dasharray: 3 3; }
.at text { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 5px;
  white-space: pre; }
.at line, .at text, .at circle { visibility: hidden; pointer-events: none; }
.at:hover line, .at:hover text, .at:hover circle { visibility: visible; }
pre { margin: 0 0 10px; padding: 12px 14px; border-radius: 8px; background: var(--page); border: 1px solid var(--rule);
  font: 12.5px/1.6 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre:last-child { margin-bottom: 0; } pre i { color: var(--soft); font-style: normal; }
.warning { border-color: var(--bad); } .hint { color: var(--soft); margin: -6px 0 12px; }
.foot { color: var(--soft); margin: 14px 0 0; font-size: 13px; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 3px; padding: 1px 0; }
article + article { border-top: 1px solid var(--rule); margin-top: 16px; padding-top: 16px; }
.prompt { font-weight: 600; margin: 0 0 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 14px; }
figure { margin: 0; text-align: center; }
figure img { max-width: 96px; max-height: 96px; background: #fff; border-radius: 6px; padding: 4px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; }
.answer { border-left: 3px solid var(--rule); padding: 0 0 0 14px; } .answer:last-child { border-color: var(--c1); }
.answer p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { font-size: 17px; font-weight: 600; cursor: pointer; } details[open] summary { margin-bottom: 12px; }
"""

"""Numbers, times and texts in few characters."""

from __future__ import annotations


def short(value: float) -> str:
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


def duration(seconds: float) -> str:
    """A time in two units: 1.23 s, 45 s, 12 min 05 s, 3 h 07 min, 12 d 03 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def excerpt(text: str, width: int = 80, num_lines: int = 6) -> str:
    """The first and last of the lines of `text`, each cut in the middle so that none is longer than `width`."""
    lines = text.strip("\n").splitlines()
    if len(lines) > num_lines:
        last = num_lines // 2
        lines = [*lines[: num_lines - last - 1], f"... {len(lines) - num_lines + 1} lines", *lines[-last:]]
    return "\n".join(f"  {cut(line, width - 2)}" for line in lines)


def cut(line: str, width: int) -> str:
    """The line without its middle where it is longer than `width`."""
    first = (width - 5) // 2
    return line if len(line) <= width else f"{line[:first]} ... {line[first + 5 - width :]}"

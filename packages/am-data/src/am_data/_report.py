"""What became of the rows: counts, reasons, and a look at what is under loss."""

from __future__ import annotations

from dataclasses import dataclass, field

Segment = tuple[str, bool]


@dataclass
class Dropped:
    """Rows refused for one reason: how many, the ids of the first five, and what was wrong with the first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    detail: str = ""


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset did with its rows: `str(report)` in a few lines, `report.full()` with the samples.

    `dropped` is keyed by reason. `num_tokens` and `num_supervised_tokens` count the kept rows. `samples` are up to
    three rows, each a list of `(text, supervised)` segments whose texts join to the decoded row; there a run of image
    tokens is `<image x 64>`. `num_images` and `num_image_tokens` are those of the kept rows. `ignored_columns` are
    those of the rows that nothing reads.
    """

    rows_read: int
    rows_kept: int
    rows_truncated: int
    dropped: dict[str, Dropped]
    num_tokens: int
    num_supervised_tokens: int
    samples: list[list[Segment]]
    num_images: int = 0
    num_image_tokens: int = 0
    ignored_columns: tuple[str, ...] = ()

    @property
    def supervised_share(self) -> float:
        """Tokens under loss over all tokens, 0 to 1."""
        return self.num_supervised_tokens / self.num_tokens

    def __str__(self) -> str:
        truncated = f", {self.rows_truncated} of them truncated" if self.rows_truncated else ""
        lines = [
            f"{self.rows_read} rows read, {self.rows_kept} kept{truncated}; "
            f"{self.num_tokens} tokens, {self.num_supervised_tokens} under loss ({self.supervised_share:.1%})",
        ]
        if self.num_images:
            lines.append(f"{self.num_images} images, {self.num_image_tokens} image tokens")
        lines += describe_dropped(self.dropped)
        if self.ignored_columns:
            lines.append(f"columns that nothing reads: {', '.join(self.ignored_columns)}")
        return "\n".join(lines)

    def full(self) -> str:
        """The same with every sample, what is under loss between [[ and ]]."""
        lines = [str(self)]
        for number, sample in enumerate(self.samples, start=1):
            text = "".join(f"[[{text}]]" if supervised else text for text, supervised in sample)
            lines += [f"sample {number} ([[...]] is under loss):", text.rstrip("\n")]
        return "\n".join(lines)


def describe_dropped(dropped: dict[str, Dropped]) -> list[str]:
    """One line for each reason, the most frequent first."""
    lines = []
    for reason, entry in sorted(dropped.items(), key=lambda item: -item[1].count):
        more = ", ..." if entry.count > len(entry.examples) else ""
        first = f"; the first: {entry.detail}" if entry.detail else ""
        lines.append(f"dropped {entry.count}: {reason} (rows {', '.join(entry.examples)}{more}){first}")
    return lines

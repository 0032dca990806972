"""What became of the rows of a split: which were dropped, how many were cut, how long they are."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from rmipo.data.chat import DataError

SHOWN_ROWS = 5  # numbers named per reason


@contextlib.contextmanager
def of_split(split: str) -> Iterator[None]:
    """Name the split in what is wrong with its rows."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{split}: {error}") from error


@dataclass
class DataReport:
    """Attributes:
    dropped: reason -> row numbers.
    rows_cut: rows of which any side is cut; `cut` has the number per side.
    notes: what else there is to know about the rows.
    loss_on: the part of the rows that TRL's loss is on, where the recipe doesn't say it.
    tokens: total per side, after the cut. `lengths`: median, p95 and max tokens per side.
    """

    rows: int
    dropped: dict[str, list[int]]
    loss_on: str | None = None
    notes: list[str] = field(default_factory=list)
    rows_cut: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def measure(self, lengths: Mapping[str, np.ndarray], cut: Mapping[str, np.ndarray]) -> None:
        """Note the tokens of each kept row and whether it was cut, both per side."""
        self.cut = {side: int(values.sum()) for side, values in cut.items()}
        # A row counts once, however many of its sides are cut.
        self.rows_cut = int(np.any([*cut.values()], axis=0).sum())
        self.tokens = {side: int(values.sum()) for side, values in lengths.items()}
        self.lengths = {
            side: {"median": int(np.median(values)), "p95": int(np.percentile(values, 95)), "max": int(values.max())}
            for side, values in lengths.items()
        }

    def note_markers(self, rows: Sequence[int]) -> None:
        if rows:
            found = f"{len(rows)} have markers of turns inside of a text (Human:, <|im_start|>, [INST], ...)"
            self.notes.append(f"{found}, which are trained as text: {name_rows(rows)}")

    @property
    def dropped_rows(self) -> int:
        return sum(map(len, self.dropped.values()))

    @property
    def kept(self) -> int:
        return self.rows - self.dropped_rows

    def check_dropped(self, max_dropped_fraction: float) -> None:
        # A run on a tenth of its rows would look like any other.
        if self.kept == 0 or self.dropped_rows > max_dropped_fraction * self.rows:
            allowed = f"more than max_dropped_fraction: {max_dropped_fraction} allows. Repair or remove them"
            found = f"{self.dropped_rows} of {self.rows} rows can't be used, {allowed}"
            raise DataError("\n".join([found, *self.dropped_lines()]))

    def check_cut(self, max_truncated_fraction: float, limits: str) -> None:
        if self.rows_cut > max_truncated_fraction * self.kept:
            allowed = f"more than max_truncated_fraction: {max_truncated_fraction} allows. Raise {limits}"
            raise DataError("\n".join([f"{self.rows_cut} of {self.kept} rows are cut, {allowed}", *self.lines()]))

    def dropped_lines(self) -> list[str]:
        return [f"- {len(rows)} dropped, {reason}: {name_rows(rows)}" for reason, rows in self.dropped.items()]

    def lines(self) -> list[str]:
        """Short lines to print."""
        lines = [f"{self.kept} of {self.rows} rows used", *self.dropped_lines()]
        if self.loss_on:
            lines.append(f"- the loss is on {self.loss_on}")
        lines += [f"- {note}" for note in self.notes]
        if self.rows_cut and "messages" in self.cut:
            lines.append(f"- {self.rows_cut} dialogues cut to the window")
        elif self.rows_cut:
            lines.append(
                f"- {self.rows_cut} pairs cut: {self.cut['prompt']} prompts lost their start, {self.cut['chosen']} chosen "
                f"and {self.cut['rejected']} rejected responses lost their end and end token"
            )
        for side, values in self.lengths.items():
            numbers = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"{side} tokens: {self.tokens[side]:,} ({numbers})")
        return lines

    def as_dict(self) -> dict:
        return {**asdict(self), "kept": self.kept}  # a property is no field


def rows_by_reason(reasons: Iterable[str | None], rows: Iterable[int]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for reason, row in zip(reasons, rows, strict=True):
        if reason:
            grouped.setdefault(reason, []).append(row)
    return grouped


def name_rows(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:SHOWN_ROWS]))}{more}"

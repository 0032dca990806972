"""What became of the rows of a split: which were dropped, how many were cut, how long they are."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

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


class DataReport:
    """Attributes, which `vars` gives for a record:
    rows, kept: how many.
    dropped: reason -> row numbers.
    rows_cut: rows of which any side is cut; `cut` has the number per side.
    tokens: total per side, after the cut. `lengths`: median, p95 and max tokens per side.
    """

    def __init__(
        self,
        rows: Sequence[int],
        reasons: Sequence[str | None],
        lengths: Mapping[str, np.ndarray],
        cut: Mapping[str, np.ndarray],
    ):
        """Of the numbers of all rows, the reasons to drop them or None, and per side tokens and whether they are cut."""
        kept = np.array([reason is None for reason in reasons], dtype=bool)
        self.rows, self.kept = len(kept), int(kept.sum())
        self.dropped: dict[str, list[int]] = {}
        for reason, row in zip(reasons, rows, strict=True):
            if reason is not None:
                self.dropped.setdefault(reason, []).append(row)
        # A row counts once, however many of its sides are cut.
        self.rows_cut = int(np.any([*cut.values()], axis=0)[kept].sum())
        self.cut = {side: int(values[kept].sum()) for side, values in cut.items()}
        self.tokens = {side: int(values[kept].sum()) for side, values in lengths.items()}
        self.lengths: dict[str, dict[str, int]] = {}
        for side, values in lengths.items() if self.kept else ():
            median, p95, longest = np.percentile(values[kept], (50, 95, 100))
            self.lengths[side] = {"median": int(median), "p95": int(p95), "max": int(longest)}

    def check(self, max_dropped_fraction: float, max_truncated_fraction: float) -> None:
        """Raises DataError where more is dropped or cut: a run on a tenth of its rows would look like any other."""
        dropped, problem = self.rows - self.kept, None
        if self.kept == 0 or dropped > max_dropped_fraction * self.rows:
            allowed = f"more than max_dropped_fraction: {max_dropped_fraction} allows"
            problem = f"{dropped} of {self.rows} rows can't be used, {allowed}"
        elif self.rows_cut > max_truncated_fraction * self.kept:
            allowed = f"more than max_truncated_fraction: {max_truncated_fraction} allows"
            problem = f"{self.rows_cut} of {self.kept} rows are cut to max_length or max_prompt_length, {allowed}"
        if problem:
            raise DataError("\n".join([problem, *self.lines()]))

    def lines(self) -> list[str]:
        """Short lines to print."""
        lines = [f"{self.kept} of {self.rows} rows used"]
        for reason, rows in self.dropped.items():
            numbers = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
            lines.append(f"- {len(rows)} dropped, {reason}: row {numbers}")
        if self.rows_cut:
            sides = ", ".join(f"{count} {side}" for side, count in self.cut.items())
            lines.append(f"- {self.rows_cut} rows cut ({sides}): a prompt loses its start, other texts their end")
        for side, values in self.lengths.items():
            numbers = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"{side} tokens: {self.tokens[side]:,} ({numbers})")
        return lines

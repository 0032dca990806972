"""A table of the paper filled with our results: each number with its error and notes, or the commands that make it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from rmipo.evaluation import BENCHMARKS, metric_label
from rmipo.evaluation.statistics import Interval
from rmipo.reporting.paired import OURS, paired_difference, paired_note
from rmipo.reporting.provenance import conflicts, deviations, made_with, missing_verdicts, require_comparable
from rmipo.reporting.results import (
    Result,
    eval_command,
    find_runs,
    is_trained,
    load_results,
    model_label,
    paper_table,
    sft_command,
    train_command,
)
from rmipo.reporting.tables import Cell, Table


@dataclass(frozen=True)
class Entry:
    """A filled cell.

    Args:
        ours: None where `commands` (in this order) have yet to be run, or where nothing fills it (no commands).
        error: standard error of the evaluation; with several seeds, their standard deviation.
        results: what `ours` is the mean of, one for each seed.
        difference: ours minus the paper's, where both were made in the same way.
        behind: RMiPO's number minus this one, paired by prompts, where both results have values per prompt.
        deviations: why ours can't stand beside the paper's.
        notes: what else has to be said beside the number: (kind, text).
    """

    cell: Cell
    digits: int
    ours: float | None = None
    error: float | None = None
    results: tuple[Result, ...] = ()
    difference: float | None = None
    behind: Interval | None = None
    commands: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FilledTable:
    table: Table
    entries: list[Entry]
    remarks: list[str] = field(default_factory=list)  # of this filling, beside the table's own notes

    def column_groups(self) -> dict[str, int]:
        """Number of columns by group, in order."""
        columns = dict.fromkeys(entry.cell.column for entry in self.entries)
        return Counter(group for group, _ in columns)

    def only(self, groups: Iterable[str]) -> "FilledTable":
        """The columns of these groups."""
        return replace(self, entries=[entry for entry in self.entries if entry.cell.column[0] in groups])

    def blocks(self) -> list["FilledTable"]:
        """The table by models, where the first of several row labels is the model; otherwise all of it."""
        if len(self.table.headers) == 1:
            return [self]
        models = dict.fromkeys(entry.cell.row[0] for entry in self.entries)
        return [replace(self, entries=[e for e in self.entries if e.cell.row[0] == model]) for model in models]

    def made_with(self) -> list[str]:
        return made_with({result.path: result for entry in self.entries for result in entry.results}.values())

    def paired(self) -> list[str]:
        """RMiPO against each method prompt by prompt, a line for each model and metric; nothing without any."""
        lines = []
        for model, metric in dict.fromkeys((entry.cell.model, entry.cell.metric) for entry in self.entries):
            alike = [entry for entry in self.entries if (entry.cell.model, entry.cell.metric) == (model, metric)]
            what = f"{metric_label(metric)} of {model_label(model)}"
            lines += paired_note(what, [(e.cell.method, e.behind) for e in alike], alike[0].digits)
        return lines

    def notes(self) -> list[str]:
        """What else has to be said under the table, each once: its own notes last."""
        entries, notes = [entry for entry in self.entries if entry.ours is not None], self.made_with()
        if any(entry.error is not None and len(entry.results) == 1 for entry in entries):
            notes.append("±: standard error of the evaluation.")
        if counts := sorted({len(entry.results) for entry in entries if len(entry.results) > 1}):
            seeds = " or ".join(str(count) for count in counts)
            notes.append(f"Mean ± standard deviation over {seeds} seeds where (n) says so.")
        if marked := dict.fromkeys(text for entry in entries for text in entry.deviations):
            notes.append("†: not evaluated as in the paper, so no difference is printed unless asked for:")
            notes += [f"† {text}" for text in marked]
        notes += notes_text(note for entry in entries for note in entry.notes)
        if any(entry.ours is None and not entry.commands for entry in self.entries):
            notes.append("n/a: the length-controlled model knows AlpacaEval's own instructions alone.")
        return [*notes, *self.remarks, *self.table.notes]


def notes_text(notes: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each kind of note, its texts each once; of many, the first three."""
    texts: dict[str, dict[str, None]] = {}
    for kind, text in notes:
        texts.setdefault(kind, {})[text] = None
    return [
        f"{kind}: {'; '.join(list(each)[:3])}" + (f"; and {len(each) - 3} more, see the CSV." if len(each) > 3 else ".")
        for kind, each in texts.items()
    ]


def fill(
    table: Table, outputs: Path, allow_mixed: bool = False, all_differences: bool = False, name: str = ""
) -> FilledTable:
    """Read the result files behind every cell, of the evaluations with the EVAL_NAME `name`.

    Raises ReportError where result files can't be compared (see `provenance`), unless `allow_mixed`, which makes it a
    note. `all_differences`: also to numbers that the paper made in another way.
    """
    runs = {model: find_runs(outputs, model) for model in dict.fromkeys(cell.model for cell in table.cells)}
    keys = dict.fromkeys((cell.model, cell.method, cell.bench) for cell in table.cells)
    results = {key: load_results(outputs, *key, runs[key[0]], name) for key in keys}
    everything = [result for found in results.values() for result in found]
    if not allow_mixed:
        require_comparable(f"table {table.number} (--allow_mixed_versions prints them with a note)", everything)
    mixed = conflicts(everything)

    def entry(cell: Cell) -> Entry:
        benchmark, found = BENCHMARKS[cell.bench], results[cell.model, cell.method, cell.bench]
        metric = benchmark.metrics[cell.metric]
        if not found:
            return Entry(cell, metric.digits, commands=missing_commands(outputs, cell, name))
        having = [result for result in found if cell.metric in result.metrics]
        if not having:
            return Entry(cell, metric.digits, commands=commands_for_metric(found[0], cell, name))
        values = [result.metrics[cell.metric] for result in having]
        ours = mean(values)
        error = stdev(values) if len(values) > 1 else having[0].metrics.get(metric.standard_error)
        deviating = tuple(dict.fromkeys(text for result in having for text in deviations(result)))
        paths = {result.path for result in having}
        notes = [("MISSING verdicts", text) for result in having for text in missing_verdicts(result)]
        notes += [("MIXED VERSIONS", conflict.text) for conflict in mixed if paths & conflict.paths]
        known = cell.paper is not None and (all_differences or not deviating)
        difference = ours - cell.paper if known else None
        return Entry(
            cell, metric.digits, ours, error, tuple(having), difference, deviations=deviating, notes=tuple(notes)
        )

    entries = compare_paired([entry(cell) for cell in table.cells])
    return append_averages(table, entries) if table.ranked else FilledTable(table, entries)


def compare_paired(entries: list[Entry]) -> list[Entry]:
    """The entries with `behind`, which needs RMiPO's number of the same model and metric."""
    ours = {(entry.cell.model, entry.cell.metric): entry.results for entry in entries if entry.cell.method == OURS}

    def compared(entry: Entry) -> Entry:
        reference = ours.get((entry.cell.model, entry.cell.metric), ())
        if entry.cell.method == OURS or not (reference and entry.results):
            return entry
        if conflicts([*reference, *entry.results]):  # another judge's verdicts are no pairs to ours
            return entry
        return replace(entry, behind=paired_difference(reference, entry.results, entry.cell.metric))

    return [compared(entry) for entry in entries]


def commands_for_metric(result: Result, cell: Cell, name: str) -> tuple[str, ...]:
    """What adds a metric to a finished result: LC where it was switched off; nothing does for a stand-in's prompts."""
    evaluate = eval_command(cell.model, cell.method, result.bench, name)
    if cell.metric == "alpacaeval2_lc":
        if result.settings.get("reference") is not None:
            return ()
        evaluate += " ARGS='--set alpacaeval.length_controlled=true'"
    return f"rm {result.path}", evaluate


def missing_commands(outputs: Path, cell: Cell, name: str) -> tuple[str, ...]:
    """What to run for a result that isn't there: first the training, where that isn't finished either."""
    model, method = cell.model, cell.method
    if method == "initial":
        train, trained = sft_command(model), is_trained(outputs, model, "sft")
    else:
        train, trained = train_command(model, method), is_trained(outputs, model, method)
    return ((train,) if train and not trained else ()) + (eval_command(model, method, cell.bench, name),)


def average_ranks(scores: pd.DataFrame) -> pd.Series:
    """Mean over columns of each row's rank within its column: 1 is the largest, ties share the best rank ("1224")."""
    return scores.rank(ascending=False, method="min").mean(axis=1)


def append_averages(table: Table, entries: list[Entry]) -> FilledTable:
    """Table 2's average score and average rank after each row; ranks among fewer methods get no difference."""
    printed = paper_table("table2").set_index(["setting", "method"])
    rows: dict[str, dict[str, list[Entry]]] = {}  # model -> method -> entries
    for entry in entries:
        rows.setdefault(entry.cell.model, {}).setdefault(entry.cell.method, []).append(entry)
    appended, remarks = [], []
    for model, methods in rows.items():
        complete = {
            method: [entry.ours for entry in row]
            for method, row in methods.items()
            if all(entry.ours is not None for entry in row)
        }
        scores = pd.DataFrame.from_dict(complete, orient="index")
        ranks, means = average_ranks(scores), scores.mean(axis=1)
        partly = len(complete) < len(methods)
        if complete and partly:
            remarks.append(
                f"{model_label(model)}: ranks among {len(complete)} of {len(methods)} methods, so no difference is printed."
            )
        for method, row in methods.items():
            appended += row
            for name, label, ours in (("avg_score", "Avg. Score", means), ("avg_rank", "Avg. Rank", ranks)):
                paper = printed[name].get((model, method))
                cell = replace(row[0].cell, column=("", label), metric=name, paper=paper)
                compared = all(entry.difference is not None for entry in row) and not (partly and name == "avg_rank")
                appended.append(
                    replace(
                        row[0],
                        cell=cell,
                        ours=ours.get(method),
                        error=None,
                        behind=None,
                        difference=ours[method] - paper if method in ours and compared else None,
                        commands=tuple(dict.fromkeys(command for entry in row for command in entry.commands)),
                        notes=tuple(dict.fromkeys(note for entry in row for note in entry.notes)),
                    )
                )
    return FilledTable(table, appended, remarks)

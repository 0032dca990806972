"""The paper's tables filled from result files: our number in each cell, or the commands that would bring it."""

from dataclasses import dataclass
from pathlib import Path

from rmipo.evaluation import benchmark_of
from rmipo.reporting.provenance import conflicts, require_comparable, reservations
from rmipo.reporting.results import (
    Result,
    eval_command,
    is_trained,
    load_result,
    paper_rows,
    sft_command,
    train_command,
)
from rmipo.reporting.tables import Cell, Table, model_label, number


@dataclass(frozen=True)
class Entry:
    """A filled cell.

    `ours` is None where `commands` (in this order) have yet to be run; () where nothing fills it. `notes` are what has
    to be said beside the number: that it is of a trial, lacks verdicts, or was made otherwise than others.
    """

    paper: float | None
    ours: float | None
    digits: int
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass(frozen=True)
class FilledTable:
    """`notes`: of the table and of all its entries, each once."""

    table: Table
    columns: tuple[tuple[str, str], ...]
    entries: list[list[Entry]]
    notes: list[str]


def fill(table: Table, outputs: Path, allow_mixed_versions: bool = False) -> FilledTable:
    """Read the result files behind every cell.

    Raises ReportError where result files can't be compared (see `provenance`), unless `allow_mixed_versions`, which
    makes it a note.
    """
    keys = {(cell.model, cell.method, benchmark_of(cell.metric).name) for row in table.cells for cell in row}
    results = {key: result for key in sorted(keys) if (result := load_result(outputs, *key))}
    if not allow_mixed_versions:
        require_comparable(f"table {table.number} (--allow_mixed_versions prints them with a note)", results.values())
    mixed = conflicts(results.values())

    def entry(cell: Cell) -> Entry:
        bench = benchmark_of(cell.metric).name
        result = results.get((cell.model, cell.method, bench))
        if result is None:
            return Entry(cell.paper, None, cell.digits, missing_commands(outputs, cell.model, cell.method, bench))
        if cell.metric not in result.metrics:
            return Entry(cell.paper, None, cell.digits, commands_for_metric(result, cell))
        differing = [f"MIXED VERSIONS: {conflict.text}" for conflict in mixed if result.path in conflict.paths]
        notes = (*reservations(result), *differing)
        return Entry(cell.paper, result.metrics[cell.metric], cell.digits, notes=notes)

    entries = [[entry(cell) for cell in row] for row in table.cells]
    of_entries = dict.fromkeys(note for row in entries for entry in row for note in entry.notes)
    notes = [*table.notes, *of_entries]
    if any(entry.ours is None and not entry.commands for row in entries for entry in row):
        notes.append("n/a: the length-controlled model knows AlpacaEval's own instructions alone, not a stand-in's.")
    columns = table.columns
    if table.ranked:
        columns += (("", "Avg. Score"), ("", "Avg. Rank"))
        notes += append_averages(table, entries)
    return FilledTable(table, columns, entries, notes)


def commands_for_metric(result: Result, cell: Cell) -> tuple[str, ...]:
    """What adds a metric to a finished result: LC where it was switched off; nothing does for a stand-in's prompts."""
    evaluate = eval_command(cell.model, cell.method, result.bench)
    if cell.metric == "alpacaeval2_lc":
        if result.settings.get("reference") is not None:
            return ()
        evaluate += " ARGS='--set alpacaeval.length_controlled=true'"
    return f"rm {result.path}", evaluate


def missing_commands(outputs: Path, model: str, method: str, bench: str) -> tuple[str, ...]:
    """What to run for a result that isn't there: first the training, where that isn't finished either."""
    if method == "initial":
        train, trained = sft_command(model), is_trained(outputs, model, "sft")
    else:
        train, trained = train_command(model, method), is_trained(outputs, model, method)
    return ((train,) if train and not trained else ()) + (eval_command(model, method, bench),)


def competition_ranks(values: list[float]) -> list[int]:
    """Rank 1 is the largest; ties share the best rank and the next one is skipped ("1224")."""
    return [1 + sum(other > value for other in values) for value in values]


def average_ranks(rows: list[list[float]]) -> list[float]:
    """Mean over columns of each row's competition rank within its column."""
    ranks = [competition_ranks(list(column)) for column in zip(*rows, strict=True)]
    return [sum(row) / len(row) for row in zip(*ranks, strict=True)]


def append_averages(table: Table, entries: list[list[Entry]]) -> list[str]:
    """Append Table 2's average score and average rank to each row; returns notes on ranks among fewer methods."""
    notes = []
    printed = {(row["setting"], row["method"]): row for row in paper_rows("table2")}
    models = list(dict.fromkeys(row[0].model for row in table.cells))
    for model in models:
        block = [i for i, row in enumerate(table.cells) if row[0].model == model]
        complete = [i for i in block if all(entry.ours is not None for entry in entries[i])]
        scores = [[entry.ours for entry in entries[i]] for i in complete]
        ranks = dict(zip(complete, average_ranks(scores), strict=True))
        if complete and len(complete) < len(block):
            notes.append(f"{model_label(model)}: ranks among {len(complete)} of {len(block)} methods, no difference.")
        for i in block:
            paper = printed.get((model, table.cells[i][0].method), {})
            paper_score, paper_rank = number(paper.get("avg_score")), number(paper.get("avg_rank"))
            if i not in ranks:
                commands = tuple(dict.fromkeys(c for entry in entries[i] for c in entry.commands))
                entries[i] += [Entry(paper_score, None, 2, commands), Entry(paper_rank, None, 2, commands)]
                continue
            score = sum(entry.ours for entry in entries[i]) / len(entries[i])
            said = tuple(dict.fromkeys(note for entry in entries[i] for note in entry.notes))
            if len(complete) < len(block):
                paper_rank = None
            entries[i] += [Entry(paper_score, score, 2, notes=said), Entry(paper_rank, ranks[i], 2, notes=said)]
    return notes

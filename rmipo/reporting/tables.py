"""The paper's tables: the run and metric behind each cell, and our number beside the paper's or how to get it."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.evaluation.statistics import Interval
from rmipo.reporting.paired import OURS, paired_difference, paired_note
from rmipo.reporting.provenance import conflicts, deviations, made_with, missing_verdicts, require_comparable
from rmipo.reporting.results import (
    METHODS,
    PAPER_MODELS,
    ReportError,
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

LEADERBOARD = ("ifeval", "bbh", "math", "gpqa", "musr", "mmlu_pro")
INSTRUCT = ("mistral-7b-instruct", "llama3-8b-instruct")
ABLATION_MODEL = "llama3-8b-instruct"  # of Table 3
TABLE5_RUNS = {
    name: name if name == "dpo" else f"table5-{name}" for name in ("dpo", "simpo", "alpha-dpo", "simper", "rmipo")
}
# (GM, MI, ED) -> run. Row 3 is Table 7's linear schedule and the last row the whole method: one run serves both.
TABLE3_RUNS = {
    (1, 0, 0): "table3-row1",
    (0, 1, 0): "table3-row2",
    (1, 1, 0): "table7-linear",
    (1, 0, 1): "table3-row4",
    (0, 1, 1): "table3-row5",
    (1, 1, 1): "rmipo",
}
TABLE7_RUNS = {"exponential": "rmipo", "linear": "table7-linear", "cosine": "table7-cosine", "none": "table7-constant"}
TABLE7_LABELS = {"rmipo": "Exponential", "table7-linear": "Linear", "table7-cosine": "Cosine", "table7-constant": "w/o"}
TABLE8_RUNS = {"[0,2]": "table8-0-2", "[0.3,1.6]": "rmipo", "[0.5,1.4]": "table8-0.5-1.4", "[1.0,1.2]": "table8-1-1.2"}


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    `row` are the labels of its row; `column` is (group, name), the group "" where the paper has none. `paper` is what
    the paper prints, None where it prints nothing.
    """

    row: tuple[str, ...]
    column: tuple[str, str]
    model: str
    method: str
    metric: str
    paper: float | None = None

    @property
    def bench(self) -> str:
        return benchmark_of(self.metric).name


@dataclass(frozen=True)
class Table:
    """`ranked`: average score and rank within each model are appended (Table 2)."""

    number: int
    title: str
    headers: tuple[str, ...]  # of the row labels
    cells: list[Cell]
    ranked: bool = False
    notes: tuple[str, ...] = ()


def grid(rows: dict[tuple[str, ...], dict], columns: dict[tuple[str, str], dict], printed: pd.DataFrame) -> list[Cell]:
    """A cell for each row and column, row by row.

    `rows` and `columns` map labels to what they say of a cell: model, method, metric. `printed` is the paper's table
    with the columns setting, method, and one for each metric.
    """
    paper = printed.set_index(["setting", "method"]).to_dict("index")
    cells = []
    for row, of_row in rows.items():
        for column, of_column in columns.items():
            named = of_row | of_column
            number = paper.get((named["model"], named["method"]), {}).get(named["metric"])
            cells.append(Cell(row, column, **named, paper=number))
    return cells


def metrics_of_models(models: Iterable[str], metrics: Iterable[str]) -> dict[tuple[str, str], dict]:
    return {
        (model_label(model), metric_label(metric)): {"model": model, "metric": metric}
        for model in models
        for metric in metrics
    }


def leaderboard_columns() -> dict[tuple[str, str], dict]:
    return {("", metric_label(metric)): {"metric": metric} for metric in LEADERBOARD}


def table1(models: Iterable[str]) -> Table:
    rows = {(label,): {"method": method} for method, label in METHODS.items()}
    columns = metrics_of_models(models, ("alpacaeval2_lc", "alpacaeval2_wr", "alpacaeval2_length", "mt_bench"))
    notes = ("The paper's baselines are other papers' published numbers, not re-runs: see docs/REPRODUCE.md.",)
    return Table(1, "AlpacaEval 2 and MT-Bench", ("Method",), grid(rows, columns, paper_table("table1")), notes=notes)


def table2(models: Iterable[str]) -> Table:
    printed = paper_table("table2")
    rows = {
        (model_label(model), METHODS[method]): {"model": model, "method": method}
        for model in models
        for method in printed["method"].unique()
    }
    cells = grid(rows, leaderboard_columns(), printed)
    return Table(2, "Open LLM Leaderboard v2 (normalised scores)", ("Model", "Method"), cells, ranked=True)


def table3(models: Iterable[str]) -> Table:
    printed = paper_table("table3")
    switches = printed[["gm", "mi", "ed"]].itertuples(index=False, name=None)
    printed = printed.assign(setting=ABLATION_MODEL, method=[TABLE3_RUNS[row] for row in switches])
    rows = {
        (model_label(model), *("✓" if on else "" for on in switches)): {"model": model, "method": method}
        for model in models
        for switches, method in TABLE3_RUNS.items()
    }
    title = "Ablation of tuning gamma (GM), the mutual-information signal (MI) and exponential decay (ED)"
    notes = ("The paper doesn't define rows 1, 2, 4 and 5; the readings are in recipes/ablations/table3-row*.yaml.",)
    return Table(3, title, ("Model", "GM", "MI", "ED"), grid(rows, leaderboard_columns(), printed), notes=notes)


def table5(models: Iterable[str]) -> Table:
    rows = {(METHODS[method],): {"method": run} for method, run in TABLE5_RUNS.items()}
    columns = metrics_of_models(models, ("alpacaeval2_lc", "alpacaeval2_wr"))
    cells = grid(rows, columns, paper_table("table5").replace({"method": TABLE5_RUNS}))
    notes = ("DPO never divides by lengths: its row is the run of Table 1, though the paper prints other numbers.",)
    return Table(5, "AlpacaEval 2 without length normalisation", ("Method",), cells, notes=notes)


def by_variant(number: int, title: str, runs: dict[str, str], labels: dict[str, str], models: Iterable[str]) -> Table:
    """Tables 7 and 8: LC win rate of each model (row) by variant of gamma (column). `runs`: CSV column -> method."""
    printed = paper_table(f"table{number}").melt("setting", var_name="method", value_name="alpacaeval2_lc")
    rows = {(model_label(model),): {"model": model} for model in models}
    columns = {("", labels[run]): {"method": run, "metric": "alpacaeval2_lc"} for run in runs.values()}
    return Table(number, title, ("Model",), grid(rows, columns, printed.replace({"method": runs})))


def table7(models: Iterable[str]) -> Table:
    return by_variant(7, "AlpacaEval 2 LC (%) by schedule of gamma", TABLE7_RUNS, TABLE7_LABELS, models)


def table8(models: Iterable[str]) -> Table:
    labels = {run: bounds.replace(",", ", ") for bounds, run in TABLE8_RUNS.items()}
    return by_variant(8, "AlpacaEval 2 LC (%) by bounds of gamma", TABLE8_RUNS, labels, models)


TABLES: dict[int, tuple[Callable[[Iterable[str]], Table], tuple[str, ...]]] = {
    1: (table1, tuple(PAPER_MODELS)),
    2: (table2, INSTRUCT),
    3: (table3, (ABLATION_MODEL,)),
    5: (table5, INSTRUCT),
    7: (table7, INSTRUCT),
    8: (table8, INSTRUCT),
}


def build_table(number: int, models: Iterable[str] = ()) -> Table:
    """One of the paper's tables, for the paper's models or for `models`. Raises ReportError for another number."""
    if number not in TABLES:
        raise ReportError(f"there is no table {number} to rebuild; the ones there are: {sorted(TABLES)}")
    build, paper_models = TABLES[number]
    return build(tuple(models) or paper_models)


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


def fill(table: Table, outputs: Path, allow_mixed: bool = False, all_differences: bool = False) -> FilledTable:
    """Read the result files behind every cell.

    Raises ReportError where result files can't be compared (see `provenance`), unless `allow_mixed`, which makes it a
    note. `all_differences`: also to numbers that the paper made in another way.
    """
    runs = {model: find_runs(outputs, model) for model in dict.fromkeys(cell.model for cell in table.cells)}
    keys = dict.fromkeys((cell.model, cell.method, cell.bench) for cell in table.cells)
    results = {key: load_results(outputs, *key, runs[key[0]]) for key in keys}
    everything = [result for found in results.values() for result in found]
    if not allow_mixed:
        require_comparable(f"table {table.number} (--allow_mixed_versions prints them with a note)", everything)
    mixed = conflicts(everything)

    def entry(cell: Cell) -> Entry:
        benchmark, found = BENCHMARKS[cell.bench], results[cell.model, cell.method, cell.bench]
        metric = benchmark.metrics[cell.metric]
        if not found:
            return Entry(cell, metric.digits, commands=missing_commands(outputs, cell.model, cell.method, cell.bench))
        having = [result for result in found if cell.metric in result.metrics]
        if not having:
            return Entry(cell, metric.digits, commands=commands_for_metric(found[0], cell))
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
        return replace(entry, behind=paired_difference(reference, entry.results, entry.cell.metric))

    return [compared(entry) for entry in entries]


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
                f"{model_label(model)}: ranks among {len(complete)} of {len(methods)} methods, no difference."
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

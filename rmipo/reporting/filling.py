"""A table filled with our results: each number with its error and notes, or the commands that make it."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.evaluation.statistics import holm
from rmipo.reporting.paired import interval_text, paired_difference, paired_line
from rmipo.reporting.provenance import (
    TRIAL,
    deviations,
    made_with,
    missing_note,
    missing_verdicts,
    require_comparable,
)
from rmipo.reporting.results import (
    OURS,
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
from rmipo.reporting.tables import Table


@dataclass(frozen=True)
class FilledTable:
    """`cells` are the table's with these columns more:

    digits      to be printed
    ours        NaN where `commands` (in this order) have yet to be run, or where nothing fills it (no commands)
    error       standard error of the evaluation; with several seeds, their standard deviation
    results     what `ours` is the mean of, one for each seed
    difference  ours minus the paper's, where both were made in the same way
    behind      the number of the method `against` minus this one, paired by prompts, where both have values per prompt;
                `p` is its p-value, corrected by Holm for all of the table
    deviations  why ours can't stand beside the paper's
    missing     how many verdicts it leaves out, and where
    best        whether it is the best of its column
    """

    table: Table
    cells: pd.DataFrame
    against: str
    remarks: tuple[str, ...] = ()  # of this filling, beside the table's own notes

    def made_with(self) -> list[str]:
        return made_with({result.path: result for results in self.cells["results"] for result in results}.values())

    def paired(self) -> list[str]:
        """The method `against` and each other prompt by prompt, a line for each model and metric; nothing without any."""
        lines = []
        for (model, metric), alike in self.cells.dropna(subset="behind").groupby(["model", "metric"], sort=False):
            texts = [(cell.method, interval_text(cell.behind, cell.digits, cell.p)) for cell in alike.itertuples()]
            lines += paired_line(f"{metric_label(metric)} of {model_label(model)}", texts)
        return lines

    def marks(self) -> list[str]:
        """What the marks in the cells mean."""
        counts = self.cells["results"].map(len)
        notes = []
        if (self.cells["error"].notna() & (counts == 1)).any():
            notes.append("±: standard error of the evaluation.")
        if seeds := sorted({count for count in counts if count > 1}):
            notes.append(f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds where (n) says so.")
        if self.cells["behind"].notna().any():
            notes.append("*, **, ***: a difference with p below 0.05, 0.01, 0.001, by Holm for all of the table.")
        if self.cells["deviations"].map(len).any():
            unlike = "not evaluated as in the paper, so no difference is printed unless asked for"
            notes.append(f"†: {'a trial' if self.table.number is None else unlike}.")
        if (self.cells["ours"].isna() & (self.cells["commands"].map(len) == 0)).any():
            notes.append("n/a: no such number. The length-controlled model knows AlpacaEval's own instructions alone.")
        return notes

    def notes(self) -> list[str]:
        """What has to be said under the table, each once."""
        unlike = dict.fromkeys(text for texts in self.cells["deviations"] for text in texts)
        said = missing_note(text for texts in self.cells["missing"] for text in texts)
        return [
            *self.marks(),
            *(f"† {text}" for text in unlike),
            *said,
            *self.made_with(),
            *self.remarks,
            *self.table.notes,
        ]


def fill(
    table: Table, outputs: Path, all_differences: bool = False, name: str = "", against: str = OURS
) -> FilledTable:
    """Read the result files behind every cell, of the evaluations with the EVAL_NAME `name`.

    Raises ReportError where result files can't be compared (see `provenance`). `all_differences`: also to numbers that the
    paper made in another way.
    """
    cells = table.cells.assign(bench=[benchmark_of(metric).name for metric in table.cells["metric"]])
    runs = {model: find_runs(outputs, model) for model in cells["model"].unique()}
    # Each file is read once, whatever number of cells it fills.
    keys = cells[["model", "method", "bench"]].drop_duplicates().itertuples(index=False, name=None)
    results = {key: load_results(outputs, *key, runs[key[0]], name) for key in keys}
    require_comparable("this table", [result for found in results.values() for result in found])
    own = table.number is None

    def numbers(cell) -> dict:
        metric = BENCHMARKS[cell.bench].metrics[cell.metric]
        found = results[cell.model, cell.method, cell.bench]
        having = [result for result in found if cell.metric in result.metrics]
        filled = {"digits": metric.digits, "results": having, "commands": (), "deviations": (), "missing": ()}
        if not having:
            if not found:
                return filled | {"commands": missing_commands(outputs, cell, name)}
            return filled | {"commands": () if own else commands_for_metric(found[0], cell, name)}
        values = [result.metrics[cell.metric] for result in having]
        unlike = dict.fromkeys(text for result in having for text in deviations(result))
        # A table of our own has no paper to stand beside: there only a trial has to be told from the benchmark.
        filled["deviations"] = tuple(text for text in unlike if not own or text.startswith(TRIAL))
        filled["missing"] = tuple(text for result in having for text in missing_verdicts(result))
        filled["ours"] = mean(values)
        filled["error"] = stdev(values) if len(values) > 1 else having[0].metrics.get(f"{cell.metric}_standard_error")
        if all_differences or not filled["deviations"]:
            filled["difference"] = filled["ours"] - cell.paper  # NaN where the paper prints nothing
        return filled

    columns = ["digits", "ours", "error", "results", "difference", "commands", "deviations", "missing"]
    filled = pd.DataFrame([numbers(cell) for cell in cells.itertuples()], columns=columns)
    # A table without any number would have columns of objects, which can't be compared with NaN.
    filled = filled.astype({"ours": float, "error": float, "difference": float})
    cells = compare_paired(pd.concat([cells, filled], axis=1), against)
    remarks: tuple[str, ...] = ()
    if table.ranked:
        cells, remarks = append_averages(cells)
    # Averages are no metric of a benchmark, and of a length neither more nor less is better: no best there.
    better = [getattr(BENCHMARKS[c.bench].metrics.get(c.metric), "better", None) for c in cells.itertuples()]
    signed = cells["ours"] * pd.Series([{True: 1, False: -1}.get(kind) for kind in better], index=cells.index)
    cells["best"] = signed == signed.groupby([cells["group"], cells["column"]]).transform("max")
    return FilledTable(table, cells, against, remarks)


def compare_paired(cells: pd.DataFrame, against: str) -> pd.DataFrame:
    """The cells with `behind` and `p`."""
    ours = {(c.model, c.metric): c.results for c in cells.itertuples() if c.method == against}

    def behind(cell):
        reference = ours.get((cell.model, cell.metric), [])
        return None if cell.method == against else paired_difference(reference, cell.results, cell.metric)

    cells = cells.assign(behind=pd.Series([behind(cell) for cell in cells.itertuples()], dtype=object), p=1.0)
    known = cells["behind"].notna()
    # Whoever looks for the largest difference of a table has compared all of them.
    cells.loc[known, "p"] = holm([found.p for found in cells.loc[known, "behind"]])
    return cells


def commands_for_metric(result: Result, cell, name: str) -> tuple[str, ...]:
    """What adds a metric to a finished result: LC where it was switched off; nothing does for a stand-in's prompts."""
    evaluate = eval_command(cell.model, cell.method, result.bench, name)
    if cell.metric == "alpacaeval2_lc":
        if result.settings.get("reference") is not None:
            return ()
        evaluate += " ARGS='--set alpacaeval.length_controlled=true'"
    return f"rm {result.path}", evaluate


def missing_commands(outputs: Path, cell, name: str) -> tuple[str, ...]:
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


def append_averages(cells: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Table 2's average score and average rank of each row; ranks among fewer methods get no difference."""
    printed = paper_table("table2").set_index(["setting", "method"])
    appended, remarks = [], []
    for model, of_model in cells.groupby("model", sort=False):
        scores = of_model.pivot(index="method", columns="metric", values="ours")
        complete = scores.dropna()  # an average over fewer columns would be another number
        averages = {"avg_score": complete.mean(axis=1), "avg_rank": average_ranks(complete)}
        partly = 0 < len(complete) < len(scores)
        if partly:
            many = f"{len(complete)} of {len(scores)}"
            remarks.append(f"{model_label(model)}: ranks among {many} methods, so no difference is printed.")
        for method, row in of_model.groupby("method", sort=False):
            for metric, column in (("avg_score", "Avg. Score"), ("avg_rank", "Avg. Rank")):
                ours, paper = averages[metric].get(method), printed[metric].get((model, method))
                compared = row["difference"].notna().all() and not (partly and metric == "avg_rank")
                cell = row.iloc[0].to_dict() | {"column": column, "metric": metric, "ours": ours, "paper": paper}
                cell |= {"error": None, "behind": None, "p": 1.0, "difference": ours - paper if compared else None}
                for name in ("commands", "missing"):
                    cell[name] = tuple(dict.fromkeys(each for of_cell in row[name] for each in of_cell))
                appended.append(cell)
    numbers = dict.fromkeys(("ours", "error", "paper", "difference"), float)
    return pd.concat([cells, pd.DataFrame(appended).astype(numbers)], ignore_index=True), tuple(remarks)

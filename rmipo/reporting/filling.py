"""A table filled with our results: each number with its error, or the commands that make it."""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from rmipo.evaluation import BENCHMARKS, benchmark_of
from rmipo.evaluation.statistics import holm
from rmipo.reporting.paired import paired_difference
from rmipo.reporting.provenance import TRIAL, deviations, require_comparable
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

LC = "alpacaeval2_lc"


def fill(table: Table, outputs: Path, all_differences: bool = False, name: str = "", against: str = OURS) -> Table:
    """The table from the evaluations with the EVAL_NAME `name`; its cells then have these columns too:

    bench, digits  the benchmark of the metric, and how many digits are printed
    results        what `ours` is the mean of, one for each seed
    ours           NaN where `commands` (in this order) have yet to be run, or where nothing fills it (no commands)
    error          standard error of the evaluation; with several seeds, their standard deviation
    deviations     why ours can't stand beside the paper's
    difference     ours minus the paper's, where both were made in the same way, or of all with `all_differences`
    behind         the number of the method `against` minus this one, paired by prompts, where both have values per
                   prompt; `p` is its p-value, corrected by Holm for all of the table
    best           whether it is the best of its column

    Raises ReportError if the results can't be compared with each other (see `provenance`).
    """
    cells = table.cells.assign(bench=[benchmark_of(metric).name for metric in table.cells["metric"]])
    runs = {model: find_runs(outputs, model) for model in cells["model"].unique()}
    # Each file is read once, whatever number of cells it fills.
    keys = cells[["model", "method", "bench"]].drop_duplicates().itertuples(index=False, name=None)
    found = {key: load_results(outputs, *key, runs[key[0]], name) for key in keys}
    require_comparable("this table", [result for results in found.values() for result in results])

    def with_metric(cell) -> list[Result]:
        return [r for r in found[cell.model, cell.method, cell.bench] if cell.metric in r.metrics]

    def unlike(results: list[Result]) -> tuple[str, ...]:
        texts = dict.fromkeys(text for result in results for text in deviations(result))
        # A table of our own has no paper to stand beside: there only a trial has to be told from the benchmark.
        return tuple(text for text in texts if not table.own or text.startswith(TRIAL))

    def commands(cell) -> tuple[str, ...]:
        return () if cell.results else missing_commands(outputs, cell, found[cell.model, cell.method, cell.bench], name)

    cells["digits"] = [BENCHMARKS[c.bench].metrics[c.metric].digits for c in cells.itertuples()]
    # A benchmark that was evaluated in part has a result without some of its metrics.
    cells["results"] = [with_metric(c) for c in cells.itertuples()]
    cells["ours"] = [mean(r.metrics[c.metric] for r in c.results) if c.results else None for c in cells.itertuples()]
    cells["error"] = [error_of(c.results, c.metric) for c in cells.itertuples()]
    cells["deviations"] = [unlike(results) for results in cells["results"]]
    cells["commands"] = [commands(c) for c in cells.itertuples()]
    # Without any number these would be columns of objects, which can't be subtracted.
    cells = cells.astype({"ours": float, "error": float})
    compared = cells["deviations"].map(len).eq(0) | all_differences
    cells["difference"] = (cells["ours"] - cells["paper"]).where(compared)
    cells["behind"], cells["p"] = compare_paired(cells, against)
    notes = table.notes
    if table.ranked:
        cells, more = append_averages(cells)
        notes = (*more, *notes)
    # Neither more nor less of a length is better, and averages are no metric of a benchmark: no best there.
    better = [getattr(BENCHMARKS[c.bench].metrics.get(c.metric), "better", None) for c in cells.itertuples()]
    signed = cells["ours"] * pd.Series([{True: 1, False: -1}.get(kind) for kind in better], index=cells.index)
    cells["best"] = signed == signed.groupby([cells["group"], cells["column"]]).transform("max")
    return replace(table, cells=cells, notes=notes, against=against)


def error_of(results: list[Result], metric: str) -> float | None:
    if len(results) > 1:
        return stdev(result.metrics[metric] for result in results)
    return results[0].metrics.get(f"{metric}_standard_error") if results else None


def missing_commands(outputs: Path, cell, found: list[Result], name: str) -> tuple[str, ...]:
    """What fills a cell without a number; `found` are the results of its evaluation, which may lack this metric."""
    model, method = cell.model, cell.method
    evaluate = eval_command(model, method, cell.bench, name)
    if found and cell.metric == LC:  # it was switched off; of a stand-in's prompts there is none
        again = (f"rm {found[0].path}", f"{evaluate} ARGS='--set alpacaeval.length_controlled=true'")
        return () if found[0].settings.get("reference") else again
    if found:
        return (evaluate,) if BENCHMARKS[cell.bench].parts else ()  # only parts can be added to a result
    if method == "initial":
        train, trained = sft_command(model), is_trained(outputs, model, "sft")
    else:
        train, trained = train_command(model, method), is_trained(outputs, model, method)
    return (train, evaluate) if train and not trained else (evaluate,)


def compare_paired(cells: pd.DataFrame, against: str) -> tuple[pd.Series, pd.Series]:
    """The columns `behind` and `p`."""
    ours = {(c.model, c.metric): c.results for c in cells.itertuples() if c.method == against}
    found = [
        None if c.method == against else paired_difference(ours.get((c.model, c.metric), []), c.results, c.metric)
        for c in cells.itertuples()
    ]
    behind, p = pd.Series(found, index=cells.index, dtype=object), pd.Series(1.0, index=cells.index)
    known = behind.notna()
    # Whoever looks for the largest difference of a table has compared all of them.
    p[known] = holm([difference.p for difference in behind[known]])
    return behind, p


def average_ranks(scores: pd.DataFrame) -> pd.Series:
    """Mean over columns of each row's rank within its column: 1 is the largest, ties share the best rank ("1224")."""
    return scores.rank(ascending=False, method="min").mean(axis=1)


def append_averages(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Table 2's average score and average rank of each row, and notes; ranks among fewer methods get no difference."""
    printed = paper_table("table2").set_index(["setting", "method"])
    parts, notes = [cells], []
    for model, of_model in cells.groupby("model", sort=False):
        scores = of_model.pivot(index="method", columns="metric", values="ours")
        complete = scores.dropna()  # an average over fewer columns would be another number
        partly = 0 < len(complete) < len(scores)
        if partly:
            many = f"{len(complete)} of {len(scores)}"
            notes.append(f"{model_label(model)}: ranks among {many} methods, so no difference is printed.")
        by_method = of_model.groupby("method", sort=False)
        comparable = by_method["difference"].count() == scores.shape[1]
        averages = (
            ("avg_score", "Avg. Score", complete.mean(axis=1), comparable),
            ("avg_rank", "Avg. Rank", average_ranks(complete), comparable & (not partly)),
        )
        for metric, column, ours, compared in averages:
            rows = of_model.drop_duplicates("method").set_index("method")
            rows = rows.assign(metric=metric, column=column, ours=ours, error=float("nan"), behind=None, p=1.0)
            rows["paper"] = [printed[metric].get((model, method), float("nan")) for method in rows.index]
            rows["difference"] = (rows["ours"] - rows["paper"]).where(compared)
            rows["commands"] = by_method["commands"].agg(max)  # () is the least
            parts.append(rows.reset_index())
    return pd.concat(parts, ignore_index=True), notes

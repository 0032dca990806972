"""Tables: the run and metric behind each cell, the number that the paper prints there, and ours or the commands for it."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.evaluation.statistics import holm
from rmipo.reporting.paired import paired_difference
from rmipo.reporting.provenance import TRIAL, deviations, require_comparable
from rmipo.reporting.results import (
    METHODS,
    OURS,
    PAPER_MODELS,
    ReportError,
    Result,
    eval_command,
    evaluated_methods,
    find_runs,
    load_results,
    load_run,
    method_label,
    model_label,
    paper_table,
    sft_command,
    train_command,
)

LEADERBOARD = ("ifeval", "bbh", "math", "gpqa", "musr", "mmlu_pro")
LC = "alpacaeval2_lc"
INSTRUCT = ("mistral-7b-instruct", "llama3-8b-instruct")


@dataclass(frozen=True)
class Table:
    """`cells` has a line for each number, row by row: `row`, the labels of its row, as a tuple; `group` ("" for none) and
    `column`; `model`, `method`, `metric`; and `paper`, what the paper prints, NaN where it prints nothing.
    `fill` adds more columns.
    """

    number: int | None  # None: a table of our own, not one of the paper's
    title: str
    headers: tuple[str, ...]  # of the row labels
    cells: pd.DataFrame
    ranked: bool = False  # average score and rank within each model are appended (Table 2)
    notes: tuple[str, ...] = ()
    against: str = OURS  # the method that others are compared with, prompt by prompt

    @property
    def own(self) -> bool:
        return self.number is None


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables: every metric of every method of every model. `rows` and `columns` say how these lie."""

    title: str
    models: tuple[str, ...]
    methods: dict[str, tuple[str, ...]]  # run -> its labels
    metrics: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    headers: tuple[str, ...]
    notes: tuple[str, ...] = ()
    ranked: bool = False


def labels(*methods: str) -> dict[str, tuple[str, ...]]:
    return {method: (METHODS[method],) for method in methods}


TABLES = {
    1: PaperTable(
        "AlpacaEval 2 and MT-Bench", tuple(PAPER_MODELS), labels(*METHODS),
        # The paper prints no length; a win rate says little without it.
        ("alpacaeval2_lc", "alpacaeval2_wr", "alpacaeval2_length", "mt_bench"), ("method",), ("model", "metric"), ("Method",),
        ("The paper's baselines are other papers' published numbers, not re-runs: see docs/REPRODUCE.md.",),
    ),
    2: PaperTable(
        "Open LLM Leaderboard v2 (normalised scores)", INSTRUCT,
        labels("dpo", "simpo", "alpha-dpo", "beta-dpo", "epsilon-dpo", "simper", "rmipo"),
        LEADERBOARD, ("model", "method"), ("metric",), ("Model", "Method"), ranked=True,
    ),
    3: PaperTable(
        "Ablation of tuning gamma (GM), the mutual-information signal (MI) and exponential decay (ED)",
        ("llama3-8b-instruct",),
        {
            "table3-row1": ("✓", "", ""),
            "table3-row2": ("", "✓", ""),
            "table7-linear": ("✓", "✓", ""),  # one run serves both tables
            "table3-row4": ("✓", "", "✓"),
            "table3-row5": ("", "✓", "✓"),
            "rmipo": ("✓", "✓", "✓"),
        },
        LEADERBOARD, ("model", "method"), ("metric",), ("Model", "GM", "MI", "ED"),
        ("The paper doesn't define rows 1, 2, 4 and 5; the readings are in recipes/ablations/table3-row*.yaml.",),
    ),
    5: PaperTable(
        "AlpacaEval 2 without length normalisation", INSTRUCT,
        labels("dpo") | {f"table5-{method}": (METHODS[method],) for method in ("simpo", "alpha-dpo", "simper", "rmipo")},
        ("alpacaeval2_lc", "alpacaeval2_wr"), ("method",), ("model", "metric"), ("Method",),
        ("DPO never divides by lengths: its row is the run of Table 1, though the paper prints other numbers.",),
    ),
    7: PaperTable(
        "AlpacaEval 2 LC (%) by schedule of gamma", INSTRUCT,
        {"rmipo": ("Exponential",), "table7-linear": ("Linear",), "table7-cosine": ("Cosine",), "table7-constant": ("w/o",)},
        ("alpacaeval2_lc",), ("model",), ("method",), ("Model",),
    ),
    8: PaperTable(
        "AlpacaEval 2 LC (%) by bounds of gamma", INSTRUCT,
        {
            "table8-0-2": ("[0, 2]",),
            "rmipo": ("[0.3, 1.6]",),
            "table8-0.5-1.4": ("[0.5, 1.4]",),
            "table8-1-1.2": ("[1.0, 1.2]",),
        },
        ("alpacaeval2_lc",), ("model",), ("method",), ("Model",),
    ),
}  # fmt: skip


def build_table(number: int, models: Iterable[str] = ()) -> Table:
    """One of the paper's tables, for the paper's models or for `models`. Raises ReportError for another number."""
    if number not in TABLES:
        raise ReportError(f"there is no table {number} to rebuild; the ones there are: {sorted(TABLES)}")
    spec = TABLES[number]
    models = tuple(models) or spec.models
    printed = paper_table(f"table{number}").set_index(["setting", "method"]).to_dict("index")
    values = {"model": models, "method": spec.methods, "metric": spec.metrics}
    order = (*spec.rows, *spec.columns)
    cells = []
    for chosen in itertools.product(*(values[name] for name in order)):
        cell = {"metric": spec.metrics[0], **dict(zip(order, chosen, strict=True))}
        labels = {
            "model": (model_label(cell["model"]),),
            "method": spec.methods[cell["method"]],
            "metric": (metric_label(cell["metric"]),),
        }
        cell["row"], column = (sum((labels[name] for name in names), ()) for names in (spec.rows, spec.columns))
        cell["group"], cell["column"] = ("", *column)[-2:]
        cell["paper"] = printed.get((cell["model"], cell["method"]), {}).get(cell["metric"], float("nan"))
        cells.append(cell)
    return Table(number, spec.title, spec.headers, pd.DataFrame(cells), spec.ranked, spec.notes)


def benchmark_table(outputs: Path, model: str, benches: list[str], name: str = "") -> Table:
    """Every evaluated method of a model by the metrics of these benchmarks. Of one alone also the parts of its metrics."""
    methods = evaluated_methods(outputs, model, benches, name)
    if not methods:  # an empty table would look like a benchmark without methods
        raise ReportError(f"{model} has no results of {', '.join(benches)}: run `make eval MODEL={model} ...`")
    metrics = [
        {"group": BENCHMARKS[bench].title, "column": metric.label, "metric": key}
        for bench in benches
        for key, metric in BENCHMARKS[bench].metrics.items()
        if len(benches) == 1 or not metric.detail
    ]
    rows = [
        {"row": (method_label(method),), "model": model, "method": method, "paper": float("nan")} for method in methods
    ]
    cells = pd.DataFrame([row | metric for row in rows for metric in metrics])
    return Table(None, f"{', '.join(benches)} of {model_label(model)}", ("Method",), cells)


def fill(table: Table, outputs: Path, all_differences: bool = False, name: str = "", against: str = OURS) -> Table:
    """The table from the evaluations with the EVAL_NAME `name`; its cells then have these columns too:

    bench, digits  the benchmark of the metric, and how many digits are printed
    found          the results of its evaluation, one for each seed
    results        those of them that have the metric: `ours` is their mean
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

    def unlike(results: list[Result]) -> tuple[str, ...]:
        texts = dict.fromkeys(text for result in results for text in deviations(result))
        # A table of our own has no paper to stand beside: there only a trial has to be told from the benchmark.
        return tuple(text for text in texts if not table.own or text.startswith(TRIAL))

    cells["found"] = [found[c.model, c.method, c.bench] for c in cells.itertuples()]
    cells["digits"] = [BENCHMARKS[c.bench].metrics[c.metric].digits for c in cells.itertuples()]
    # A benchmark that was evaluated in part has a result without some of its metrics.
    cells["results"] = [[r for r in c.found if c.metric in r.metrics] for c in cells.itertuples()]
    cells["ours"] = [mean(r.metrics[c.metric] for r in c.results) if c.results else None for c in cells.itertuples()]
    cells["error"] = [error_of(c.results, c.metric) for c in cells.itertuples()]
    cells["deviations"] = [unlike(results) for results in cells["results"]]
    cells["commands"] = [() if c.results else missing_commands(outputs, c, name) for c in cells.itertuples()]
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


def missing_commands(outputs: Path, cell, name: str) -> tuple[str, ...]:
    """What fills a cell without a number; its evaluation may have results (`cell.found`) that lack this metric."""
    model, method, found = cell.model, cell.method, cell.found
    evaluate = eval_command(model, method, cell.bench, name)
    if found and cell.metric == LC:  # it was switched off; of a stand-in's prompts there is none
        again = (f"rm {found[0].path}", f"{evaluate} ARGS='--set alpacaeval.length_controlled=true'")
        return () if found[0].settings.get("reference") else again
    if found:
        return (evaluate,) if BENCHMARKS[cell.bench].parts else ()  # only parts can be added to a result
    # The model before preference training is the SFT stage's, or is not trained here.
    stage, train = ("sft", sft_command(model)) if method == "initial" else (method, train_command(model, method))
    run = load_run(outputs, model, stage)
    return (evaluate,) if train is None or (run and run.finished) else (train, evaluate)


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
        ranks = complete.rank(ascending=False, method="min")  # 1 is the largest, ties share the best rank ("1224")
        by_method = of_model.groupby("method", sort=False)
        comparable = by_method["difference"].count() == scores.shape[1]
        averages = (
            ("avg_score", "Avg. Score", complete.mean(axis=1), comparable),
            ("avg_rank", "Avg. Rank", ranks.mean(axis=1), comparable & (not partly)),
        )
        for metric, column, ours, compared in averages:
            rows = of_model.drop_duplicates("method").set_index("method")
            rows = rows.assign(metric=metric, column=column, ours=ours, error=float("nan"), behind=None, p=1.0)
            rows["paper"] = [printed[metric].get((model, method), float("nan")) for method in rows.index]
            rows["difference"] = (rows["ours"] - rows["paper"]).where(compared)
            rows["commands"] = by_method["commands"].agg(max)  # () is the least
            parts.append(rows.reset_index())
    return pd.concat(parts, ignore_index=True), notes

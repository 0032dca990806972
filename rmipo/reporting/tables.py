"""The rows and columns of tables: the run and metric behind each cell, and the number that the paper prints there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from rmipo.evaluation import BENCHMARKS, metric_label
from rmipo.reporting.results import (
    METHODS,
    PAPER_MODELS,
    ReportError,
    evaluated_methods,
    method_label,
    model_label,
    paper_table,
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
class Table:
    """`cells` has a line for each number, row by row: `row`, the labels of its row, as a tuple; `group` ("" for none) and
    `column`; `model`, `method`, `metric`; and `paper`, what the paper prints, NaN where it prints nothing.
    """

    number: int | None  # None: not one of the paper's
    title: str
    headers: tuple[str, ...]  # of the row labels
    cells: pd.DataFrame
    ranked: bool = False  # average score and rank within each model are appended (Table 2)
    notes: tuple[str, ...] = ()


def grid(
    rows: dict[tuple[str, ...], dict], columns: dict[tuple[str, str], dict], printed: pd.DataFrame
) -> pd.DataFrame:
    """A cell for each row and column. Both map labels to what they say of a cell: model, method, metric.

    `printed` is the paper's table with the columns setting, method, and one for each metric.
    """
    paper = printed.set_index(["setting", "method"]).to_dict("index")
    cells = []
    for row, of_row in rows.items():
        for (group, column), of_column in columns.items():
            named = of_row | of_column
            number = paper.get((named["model"], named["method"]), {}).get(named["metric"], float("nan"))
            cells.append({"row": row, "group": group, "column": column, **named, "paper": number})
    return pd.DataFrame(cells)


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


def benchmark_table(outputs: Path, model: str, benches: list[str], name: str = "") -> Table:
    """Every evaluated method of a model by the metrics of these benchmarks. Of one alone also the parts of its metrics."""
    methods = evaluated_methods(outputs, model, benches, name)
    if not methods:
        raise ReportError(f"{model} has no results of {', '.join(benches)}: run `make eval MODEL={model} ...`")
    rows = {(method_label(method),): {"model": model, "method": method} for method in methods}
    columns = {
        (BENCHMARKS[bench].title, metric.label): {"metric": key}
        for bench in benches
        for key, metric in BENCHMARKS[bench].metrics.items()
        if len(benches) == 1 or not metric.detail
    }
    printed = pd.DataFrame(columns=["setting", "method"])  # nothing: the paper has no such table
    return Table(None, f"{', '.join(benches)} of {model_label(model)}", ("Method",), grid(rows, columns, printed))

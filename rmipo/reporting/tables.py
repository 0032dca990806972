"""The rows and columns of tables: the run and metric behind each cell, and the number that the paper prints there."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from rmipo.evaluation import BENCHMARKS, metric_label
from rmipo.reporting.results import (
    METHODS,
    OURS,
    PAPER_MODELS,
    ReportError,
    evaluated_methods,
    method_label,
    model_label,
    paper_table,
)

LEADERBOARD = ("ifeval", "bbh", "math", "gpqa", "musr", "mmlu_pro")
INSTRUCT = ("mistral-7b-instruct", "llama3-8b-instruct")


@dataclass(frozen=True)
class Table:
    """`cells` has a line for each number, row by row: `row`, the labels of its row, as a tuple; `group` ("" for none) and
    `column`; `model`, `method`, `metric`; and `paper`, what the paper prints, NaN where it prints nothing.
    `rmipo.reporting.filling.fill` adds more columns.
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

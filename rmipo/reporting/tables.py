"""What the paper's tables hold: which run and which metric stands behind each cell, and the paper's number for it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.reporting.results import METHODS, PAPER_MODELS, ReportError, paper_rows

LEADERBOARD = tuple(BENCHMARKS["leaderboard"].metrics)
TABLE5_RUNS = {
    "dpo": "dpo",
    "simpo": "table5-simpo",
    "alpha-dpo": "table5-alpha-dpo",
    "simper": "table5-simper",
    "rmipo": "table5-rmipo",
}
ABLATION_MODEL = "llama3-8b-instruct"  # of Table 3


@dataclass(frozen=True)
class Cell:
    """One number of a table: the run and metric it is read from, and what the paper prints (None: not in the paper)."""

    model: str
    method: str
    metric: str
    paper: float | None

    @property
    def digits(self) -> int:
        return benchmark_of(self.metric).metrics[self.metric].digits


@dataclass(frozen=True)
class Table:
    number: int
    title: str
    row_headers: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]  # (group, name); the group is "" where the paper has none
    rows: tuple[tuple[str, ...], ...]  # labels, one tuple per row
    cells: tuple[tuple[Cell, ...], ...]
    ranked: bool = False  # Table 2: average score and rank within each model are appended
    notes: tuple[str, ...] = ()


def model_label(model: str) -> str:
    return PAPER_MODELS.get(model, model)


def number(text: str | None) -> float | None:
    return None if text is None else float(text)


def table1(models: Iterable[str]) -> Table:
    paper = {(row["setting"], row["method"]): row for row in paper_rows("table1")}
    metrics = ("alpacaeval2_lc", "alpacaeval2_wr", "mt_bench")
    return Table(
        1,
        "AlpacaEval 2 and MT-Bench",
        ("Method",),
        tuple((model_label(model), metric_label(metric)) for model in models for metric in metrics),
        tuple((label,) for label in METHODS.values()),
        tuple(
            tuple(
                Cell(model, method, metric, number(paper.get((model, method), {}).get(metric)))
                for model in models
                for metric in metrics
            )
            for method in METHODS
        ),
        notes=("The paper's baselines are other papers' published numbers, not re-runs: see docs/REPRODUCE.md.",),
    )


def table2(models: Iterable[str]) -> Table:
    paper = {(row["setting"], row["method"]): row for row in paper_rows("table2")}
    keys = [(model, method) for model in models for method in dict.fromkeys(row["method"] for row in paper.values())]
    return Table(
        2,
        "Open LLM Leaderboard v2 (normalised scores)",
        ("Model", "Method"),
        tuple(("", metric_label(metric)) for metric in LEADERBOARD),
        tuple((model_label(model), METHODS[method]) for model, method in keys),
        tuple(
            tuple(Cell(*key, metric, number(paper.get(key, {}).get(metric))) for metric in LEADERBOARD) for key in keys
        ),
        ranked=True,
    )


def table3(models: Iterable[str]) -> Table:
    paper = paper_rows("table3")
    # Row 3 is Table 7's linear schedule and row 6 the whole method: one run serves both.
    methods = ["table3-row1", "table3-row2", "table7-linear", "table3-row4", "table3-row5", "rmipo"]
    rows = [(model, method, row) for model in models for method, row in zip(methods, paper, strict=True)]
    return Table(
        3,
        "Ablation of tuning gamma (GM), the mutual-information signal (MI) and exponential decay (ED)",
        ("Model", "GM", "MI", "ED"),
        tuple(("", metric_label(metric)) for metric in LEADERBOARD),
        tuple((model_label(m), *("✓" if row[key] == "1" else "" for key in ("gm", "mi", "ed"))) for m, _, row in rows),
        tuple(
            tuple(
                Cell(model, method, metric, float(row[metric]) if model == ABLATION_MODEL else None)
                for metric in LEADERBOARD
            )
            for model, method, row in rows
        ),
        notes=("The paper doesn't define rows 1, 2, 4 and 5; the readings are in recipes/ablations/table3-row*.yaml.",),
    )


def table5(models: Iterable[str]) -> Table:
    paper = {(row["setting"], row["method"]): row for row in paper_rows("table5")}
    metrics = ("alpacaeval2_lc", "alpacaeval2_wr")
    return Table(
        5,
        "AlpacaEval 2 without length normalisation",
        ("Method",),
        tuple((model_label(model), metric_label(metric)) for model in models for metric in metrics),
        tuple((METHODS[method],) for method in TABLE5_RUNS),
        tuple(
            tuple(
                Cell(model, TABLE5_RUNS[method], metric, number(paper.get((model, method), {}).get(metric)))
                for model in models
                for metric in metrics
            )
            for method in TABLE5_RUNS
        ),
        notes=("DPO never divides by lengths: its row is the run of Table 1, though the paper prints other numbers.",),
    )


def lc_by_variant(number_: int, title: str, variants: dict[str, tuple[str, str]], models: Iterable[str]) -> Table:
    """Tables 7 and 8: LC win rate; `variants` maps the CSV's column to (label, method)."""
    paper = {row["setting"]: row for row in paper_rows(f"table{number_}")}
    return Table(
        number_,
        title,
        ("Model",),
        tuple(("", label) for label, _ in variants.values()),
        tuple((model_label(model),) for model in models),
        tuple(
            tuple(
                Cell(model, method, "alpacaeval2_lc", number(paper.get(model, {}).get(column)))
                for column, (_, method) in variants.items()
            )
            for model in models
        ),
    )


def table7(models: Iterable[str]) -> Table:
    variants = {
        "exponential": ("Exponential", "rmipo"),
        "linear": ("Linear", "table7-linear"),
        "cosine": ("Cosine", "table7-cosine"),
        "none": ("w/o", "table7-constant"),
    }
    return lc_by_variant(7, "AlpacaEval 2 LC (%) by schedule of gamma", variants, models)


def table8(models: Iterable[str]) -> Table:
    variants = {
        "[0,2]": ("[0, 2]", "table8-0-2"),
        "[0.3,1.6]": ("[0.3, 1.6]", "rmipo"),
        "[0.5,1.4]": ("[0.5, 1.4]", "table8-0.5-1.4"),
        "[1.0,1.2]": ("[1.0, 1.2]", "table8-1-1.2"),
    }
    return lc_by_variant(8, "AlpacaEval 2 LC (%) by bounds of gamma", variants, models)


INSTRUCT = ("mistral-7b-instruct", "llama3-8b-instruct")
TABLES: dict[int, tuple[Callable[[Iterable[str]], Table], tuple[str, ...]]] = {
    1: (table1, tuple(PAPER_MODELS)),
    2: (table2, INSTRUCT),
    3: (table3, (ABLATION_MODEL,)),
    5: (table5, INSTRUCT),
    7: (table7, INSTRUCT),
    8: (table8, INSTRUCT),
}


def build_table(number_: int, models: Iterable[str] = ()) -> Table:
    """One of the paper's tables, for the paper's models or for `models`. Raises ReportError for another number."""
    if number_ not in TABLES:
        raise ReportError(f"there is no table {number_} to rebuild; the ones there are: {sorted(TABLES)}")
    build, paper_models = TABLES[number_]
    return build(tuple(models) or paper_models)

"""Tables: the run and metric behind each cell, what the paper prints there, and ours or the commands for it. Win rates.

Two methods that answered the same prompts are compared prompt by prompt, which removes the prompts' difficulty.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from rmipo.evaluation.statistics import Interval, bootstrap, holm, interval, wins
from rmipo.reporting import results as saved
from rmipo.reporting.results import OURS, RECIPES, TRIAL, ReportError, Result, method_label, model_label

NAN = float("nan")


@dataclass(frozen=True)
class Table:
    """`cells` has a line for each number, row by row: row labels `Model` and `Method`; column headings `group` ("" for none)
    and `column`; `model`, `method`, `metric`; and `paper`, what the paper prints, NaN where it prints nothing. `fill` adds
    more columns.
    """

    number: int | None  # None: a table of our own, not one of the paper's
    title: str
    headers: tuple[str, ...]  # those of `Model` and `Method` that name a row
    cells: pd.DataFrame
    note: str = ""
    against: str = OURS  # the method that others are compared with, prompt by prompt


# The paper's tables: title, what names a row, what has to be said. Methods and metrics are those of paper/table<N>.csv.
TABLES = {
    1: ("AlpacaEval 2 and MT-Bench", ("Method",),
        "The paper's baselines are other papers' published numbers, not re-runs: see docs/REPRODUCE.md."),
    2: ("Open LLM Leaderboard v2 (normalised scores)", ("Model", "Method"), ""),
    3: ("Ablation of tuning gamma (GM), the mutual-information signal (MI) and exponential decay (ED)", ("Model", "Method"),
        "The paper doesn't define rows 1, 2, 4 and 5; the readings are in recipes/ablations/table3-row*.yaml."),
    5: ("AlpacaEval 2 without length normalisation", ("Method",),
        "DPO never divides by lengths: its row is the run of Table 1, though the paper prints other numbers."),
    7: ("AlpacaEval 2 LC (%) by schedule of gamma", ("Model",), ""),
    8: ("AlpacaEval 2 LC (%) by bounds of gamma", ("Model",), ""),
}  # fmt: skip


def build_table(number: int, models: Iterable[str] = ()) -> Table:
    """One of the paper's tables, for the paper's models or for `models`. Raises ReportError for another number."""
    if number not in TABLES:
        raise ReportError(f"there is no table {number} to rebuild; the ones there are: {sorted(TABLES)}")
    title, headers, note = TABLES[number]
    printed = saved.paper_table(f"table{number}")
    labels = dict(zip(printed["method"], printed.get("label", printed["method"]), strict=True))
    rows, by_model = itertools.product(tuple(models) or printed["setting"].unique(), labels), "Model" in headers
    rows = list(rows) if by_model else sorted(rows, key=lambda row: list(labels).index(row[1]))
    metrics = list(filter(benchmark_of, printed.columns))
    values = printed.set_index(["setting", "method"])[metrics].reindex(rows)
    cells = values.rename_axis(index=["model", "method"], columns="metric").stack(future_stack=True)
    cells = cells.rename("paper").reset_index()
    cells["Model"], cells["Metric"] = cells["model"].map(model_label), cells["metric"].map(metric_label)
    cells["Method"] = cells["method"].map(labels).map(method_label)
    cells["group"] = "" if by_model else cells["Model"]
    cells["column"] = cells["Metric" if "Method" in headers else "Method"]
    return Table(number, title, headers, cells, note)


def benchmark_table(outputs: Path, model: str, benches: list[str], name: str = "") -> Table:
    """Every evaluated method of a model by the metrics of these benchmarks. Of one alone also the parts of its metrics."""
    methods = saved.evaluated_methods(outputs, model, benches, name)
    if not methods:  # an empty table would look like a benchmark without methods
        raise ReportError(f"{model} has no results of {', '.join(benches)}: run `make eval MODEL={model} ...`")
    metrics = [
        {"group": BENCHMARKS[bench].title, "column": metric.label, "metric": key}
        for bench in benches
        for key, metric in BENCHMARKS[bench].metrics.items()
        if len(benches) == 1 or not metric.detail
    ]
    shown = {"model": model, "Model": model_label(model), "paper": NAN}
    rows = [shown | {"method": method, "Method": method_label(method)} for method in methods]
    cells = pd.DataFrame([row | metric for row in rows for metric in metrics])
    return Table(None, f"{', '.join(benches)} of {model_label(model)}", ("Method",), cells)


def fill(table: Table, outputs: Path, all_differences: bool = False, name: str = "", against: str = OURS) -> Table:
    """The table from the evaluations with the EVAL_NAME `name`; its cells then have these columns too:

    bench, digits  the benchmark of the metric, and how many digits are printed
    results        those that have the metric, one for each seed: `ours` is their mean
    ours           NaN where `commands` (in this order) have yet to be run, or where nothing fills it (no commands)
    error          standard error of the evaluation; with several seeds, their standard deviation
    deviations     why ours can't stand beside the paper's
    difference     ours minus the paper's, where both were made in the same way, or of all with `all_differences`
    behind         the number of the method `against` minus this one, paired by prompts, where both have values per
                   prompt; `p` is its p-value, corrected by Holm for all of the table
    best           whether it is the best of its column

    Raises ReportError if the results can't be compared with each other (see `results.conflicts`).
    """
    found, rows = {}, []
    for cell in table.cells.to_dict("records"):
        model, method, metric = cell["model"], cell["method"], cell["metric"]
        benchmark = benchmark_of(metric)
        if (model, benchmark.name) not in found:  # each file is read once, whatever number of cells it fills
            asked = {*table.cells.query("model == @model")["method"]}
            found[model, benchmark.name] = saved.load_results(outputs, model, benchmark.name, name, asked)
        evaluated = found[model, benchmark.name].get(method, [])
        # A benchmark that was evaluated in part has a result without some of its metrics.
        results = [result for result in evaluated if metric in result.metrics]
        unlike = dict.fromkeys(text for result in results for text in saved.deviations(result))
        commands = () if results else missing_commands(outputs, model, method, benchmark.name, name)
        if evaluated:  # nothing but parts can be added to a finished result
            commands = commands[-1:] if benchmark.parts else ()
        rows.append(cell | {
            "bench": benchmark.name,
            "digits": benchmark.metrics[metric].digits,
            "sign": {True: 1, False: -1}.get(benchmark.metrics[metric].better),
            "results": results,
            "ours": mean(result.metrics[metric] for result in results) if results else NAN,
            "error": error_of(results, metric),
            # A table of our own has no paper to stand beside: there only a trial has to be told from the benchmark.
            "deviations": tuple(text for text in unlike if table.number or text.startswith(TRIAL)),
            "commands": commands,
        })  # fmt: skip
    cells = pd.DataFrame(rows)
    shown = {result.path: result for results in cells["results"] for result in results}
    saved.require_comparable("this table", shown.values())
    cells["behind"], cells["p"] = compare_paired(cells, against)
    if table.number == 2:
        cells = append_averages(cells)
    compared = cells["deviations"].map(len).eq(0) | all_differences
    cells["difference"] = (cells["ours"] - cells["paper"]).where(compared)
    signed = cells["ours"] * cells["sign"]  # of a length neither more nor less is better: NaN, and no best
    cells["best"] = signed == signed.groupby([cells["group"], cells["column"]]).transform("max")
    return replace(table, cells=cells, against=against)


def error_of(results: list[Result], metric: str) -> float:
    if len(results) > 1:
        return stdev(result.metrics[metric] for result in results)
    return results[0].metrics.get(f"{metric}_standard_error", NAN) if results else NAN


def missing_commands(outputs: Path, model: str, method: str, bench: str, name: str) -> tuple[str, ...]:
    """What fills a cell without a number."""
    stage, train = method, saved.train_command(model, method)
    if method == "initial":  # the SFT stage's model, or one that is not trained here
        stage, train = "sft", f"make train MODEL={model} STAGE=sft" * (RECIPES / model / "sft.yaml").is_file()
    run = saved.load_run(outputs, model, stage)
    return (*[train] * bool(train and not (run and run.finished)), saved.eval_command(model, method, bench, name))


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


def append_averages(cells: pd.DataFrame) -> pd.DataFrame:
    """Table 2's average score of each row, and average rank: only where every method has all its scores."""
    printed = saved.paper_table("table2").set_index(["setting", "method"])
    parts = [cells]
    for model, of_model in cells.groupby("model", sort=False):
        scores = of_model.pivot(index="method", columns="metric", values="ours")
        complete = scores if scores.notna().all(axis=None) else NAN * scores
        ranks = complete.rank(ascending=False, method="min")  # 1 is the largest, ties share the best rank ("1224")
        averages = {"Avg. Score": scores.mean(axis=1, skipna=False), "Avg. Rank": ranks.mean(axis=1)}
        for (column, ours), metric in zip(averages.items(), ("avg_score", "avg_rank"), strict=True):
            rows = of_model.drop_duplicates("method").set_index("method")
            rows = rows.assign(metric=metric, column=column, ours=ours, error=NAN, behind=None, p=1.0)
            rows["paper"] = [printed[metric].get((model, method), NAN) for method in rows.index]
            rows["commands"] = of_model.groupby("method")["commands"].agg(max)  # () is the least
            parts.append(rows.reset_index())
    return pd.concat(parts, ignore_index=True)


def paired_difference(ours: Sequence[Result], theirs: Sequence[Result], metric: str) -> Interval | None:
    """Ours minus theirs over the prompts that both have a value for, each method's the mean of its seeds.

    Of a metric that is no mean over prompts, the difference for each draw of prompts. None where a result has no values
    per prompt and no draws, or other prompts.
    """
    if not (ours and theirs):
        return None
    # Every evaluation drew the same prompts, so draw 17 of one method is about the prompts of draw 17 of the other.
    if all(metric in result.draws for result in (*ours, *theirs)):
        values = [np.mean([result.metrics[metric] for result in results]) for results in (ours, theirs)]
        draws = [np.mean([result.draws[metric] for result in results], axis=0) for results in (ours, theirs)]
        return interval(values[0] - values[1], draws[0] - draws[1])
    columns = [[result.per_prompt.get(metric, []) for result in results] for results in (ours, theirs)]
    lengths = {len(values) for results in columns for values in results}
    if len(lengths) != 1 or 0 in lengths:  # prompts are compared by their place
        return None
    ours_each, theirs_each = (np.array(results, dtype=np.float64).mean(axis=0) for results in columns)  # None is NaN
    differences = ours_each - theirs_each
    differences = differences[~np.isnan(differences)]  # a prompt without a verdict of one method is no pair
    return bootstrap(differences) if len(differences) else None


def win_rates(outputs: Path, model: str, bench: str, name: str = "") -> tuple[pd.DataFrame, list[str]]:
    """How often one method's answer is better than another's, by the verdicts of one judge on each. And notes.

    A line for each two methods: row, column, rate (percent of prompts that the row's method wins, a tie is half), its 95%
    interval over prompts, n, and p of its being 50, corrected by Holm. Raises ReportError for fewer than two methods.
    """
    found = saved.load_results(outputs, model, bench, name)
    held = {method: found[method][0] for method in saved.evaluated_methods(outputs, model, [bench], name)}
    held = {method: result for method, result in held.items() if result.per_prompt}
    if len(held) < 2:
        raise ReportError(f"WINS=1 needs two methods of {model} with {bench} results that hold values per prompt")
    saved.require_comparable("WINS=1", held.values())
    # A benchmark's first metric is its main one.
    metric = next(key for key in BENCHMARKS[bench].metrics if all(key in result.per_prompt for result in held.values()))
    rows = []
    for row, column in itertools.combinations(held, 2):
        won = wins(*(np.array(held[method].per_prompt[metric], dtype=float) for method in (row, column)))  # None is NaN
        won = won[~np.isnan(won)]
        found = bootstrap(100 * won - 50)  # so that p is that of no difference
        shares = {"rate": 50 + found.mean, "low": 50 + found.low, "high": 50 + found.high}
        rows.append({"row": row, "column": column, **shares, "n": len(won), "p_holm": found.p})
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p_holm"])
    mirrored = frame.assign(row=frame["column"], column=frame["row"], rate=100 - frame["rate"])
    mirrored = mirrored.assign(low=100 - frame["high"], high=100 - frame["low"])
    notes = [
        f"Percent of {model_label(model)}'s prompts that the row's method wins by {metric_label(metric)}; a tie is half.",
        "In brackets the 95% interval over prompts. *, **, ***: other than 50 with p below 0.05, 0.01, 0.001, by Holm.",
        *saved.made_with(held.values()),
    ]
    return pd.concat([frame, mirrored], ignore_index=True), notes

"""One method against the others, prompt by prompt: both answered the same prompts, which removes their difficulty."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rmipo.evaluation import BENCHMARKS, metric_label
from rmipo.evaluation.statistics import Interval, bootstrap, holm, interval, wins
from rmipo.reporting.provenance import made_with, require_comparable
from rmipo.reporting.results import ReportError, Result, evaluated_methods, load_results, model_label


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


def stars(p: float) -> str:
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def interval_text(found: Interval, digits: int, p: float = 1.0) -> str:
    """E.g. `+1.2 [+0.3, +2.1]*`; `p`, the corrected p-value, makes the stars."""
    return f"{found.mean:+z.{digits}f} [{found.low:+z.{digits}f}, {found.high:+z.{digits}f}]{stars(p)}"


def win_rates(outputs: Path, model: str, bench: str, name: str = "") -> tuple[pd.DataFrame, list[str]]:
    """How often one method's answer is better than another's, by the verdicts of one judge on each. And notes.

    A line for each two methods: row, column, rate (percent of prompts that the row's method wins, a tie is half), its 95%
    interval over prompts, n, and p of its being 50, corrected by Holm. Raises ReportError for fewer than two methods.
    """
    results, methods = load_results(outputs, model, bench, name), evaluated_methods(outputs, model, [bench], name)
    held = {method: results[method][0] for method in methods if results[method][0].per_prompt}
    if len(held) < 2:
        raise ReportError(f"WINS=1 needs two methods of {model} with {bench} results that hold values per prompt")
    require_comparable("WINS=1", held.values())
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
        *made_with(held.values()),
    ]
    return pd.concat([frame, mirrored], ignore_index=True), notes

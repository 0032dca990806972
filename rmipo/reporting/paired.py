"""One method against the others, prompt by prompt: both answered the same prompts, which removes their difficulty."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rmipo.evaluation import BENCHMARKS, metric_label
from rmipo.evaluation.statistics import Interval, bootstrap, holm, interval, wins
from rmipo.reporting.provenance import made_with, require_comparable
from rmipo.reporting.results import ReportError, Result, evaluated_methods, load_result, method_label, model_label


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


def paired_title(against: str) -> str:
    ours = method_label(against)
    return f"{ours} minus each method on the same prompts, with its 95% bootstrap interval over prompts:"


def paired_line(what: str, differences: Iterable[tuple[str, str]]) -> list[str]:
    """A line of the differences to each method, to stand below `paired_title`; nothing without any."""
    texts = [f"{method_label(method)} {text}" for method, text in differences]
    return [f"{what}: {', '.join(texts)}."] if texts else []


def win_rates(outputs: Path, model: str, bench: str, name: str = "") -> tuple[pd.DataFrame, list[str]]:
    """How often one method's answer is better than another's, by the verdicts of one judge on each. And notes.

    A line for each two methods: row, column, rate (percent of prompts that the row's method wins, a tie is half), its 95%
    interval over prompts, n, and p of its being 50, corrected by Holm. Raises ReportError for fewer than two methods.
    """
    methods = evaluated_methods(outputs, model, [bench], name)
    results = {method: load_result(outputs, model, method, bench, name) for method in methods}
    held = {method: result for method, result in results.items() if result and result.per_prompt}
    if len(held) < 2:
        raise ReportError(f"WINS=1 needs two methods of {model} with {bench} results that hold values per prompt")
    require_comparable("WINS=1", held.values())
    # A benchmark's first metric is its main one.
    metric = next(key for key in BENCHMARKS[bench].metrics if all(key in result.per_prompt for result in held.values()))
    rows = []
    for row, ours in held.items():
        for column, theirs in held.items():
            if row == column:
                continue
            won = wins(*(np.array(result.per_prompt[metric], dtype=float) for result in (ours, theirs)))  # None is NaN
            won = won[~np.isnan(won)]
            found = bootstrap(100 * won - 50)  # so that p is that of no difference
            shares = {"rate": 50 + found.mean, "low": 50 + found.low, "high": 50 + found.high}
            rows.append({"row": row, "column": column, **shares, "n": len(won), "p": found.p})
    frame = pd.DataFrame(rows)
    # Each pair stands twice, mirrored: it is tested once.
    pairs = [tuple(sorted(pair)) for pair in zip(frame["row"], frame["column"], strict=True)]
    tested = dict(zip(pairs, frame["p"], strict=True))
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    frame["p_holm"] = [corrected[pair] for pair in pairs]
    what = f"Percent of {model_label(model)}'s prompts that the row's method wins by {metric_label(metric)}"
    stars_mean = "*, **, ***: other than 50 with p below 0.05, 0.01, 0.001, by Holm."
    notes = [f"{what}; a tie is half.", f"In brackets the 95% interval over prompts. {stars_mean}"]
    return frame, [*notes, *made_with(held.values())]

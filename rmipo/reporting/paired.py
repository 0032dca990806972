"""RMiPO against the other methods, prompt by prompt: both answered the same prompts, which removes their difficulty."""

from collections.abc import Iterable, Sequence

import numpy as np

from rmipo.evaluation.statistics import Interval, bootstrap, interval
from rmipo.reporting.results import METHODS, Result

OURS = "rmipo"
PAIRED_TITLE = f"{METHODS[OURS]} minus each method on the same prompts, with its 95% bootstrap interval over prompts:"


def paired_difference(ours: Sequence[Result], theirs: Sequence[Result], metric: str) -> Interval | None:
    """Ours minus theirs over the prompts that both have a value for, each method's the mean of its seeds.

    Of a metric that is no mean over prompts, the difference for each draw of prompts. None where a result has no values
    per prompt and no draws, or other prompts.
    """
    if not (ours and theirs):
        return None
    if all(metric in result.draws for result in (*ours, *theirs)):
        values = [np.mean([result.metrics[metric] for result in results]) for results in (ours, theirs)]
        draws = [np.mean([result.draws[metric] for result in results], axis=0) for results in (ours, theirs)]
        return interval(values[0] - values[1], draws[0] - draws[1])
    columns = [[result.per_prompt.get(metric, []) for result in results] for results in (ours, theirs)]
    lengths = {len(values) for results in columns for values in results}
    if len(lengths) != 1 or 0 in lengths:
        return None
    ours_each, theirs_each = (np.array(results, dtype=np.float64).mean(axis=0) for results in columns)  # None is NaN
    differences = ours_each - theirs_each
    differences = differences[~np.isnan(differences)]
    return bootstrap(differences) if len(differences) else None


def paired_note(what: str, differences: Iterable[tuple[str, Interval | None]], digits: int) -> list[str]:
    """A line of the differences to each method, to stand below PAIRED_TITLE; nothing without any."""
    texts = [
        f"{METHODS.get(method, method)} {mean:+z.{digits}f} [{low:+z.{digits}f}, {high:+z.{digits}f}]"
        for method, (mean, _, low, high) in ((method, found) for method, found in differences if found is not None)
    ]
    return [f"{what}: {', '.join(texts)}."] if texts else []

"""One method against the others, prompt by prompt: both answered the same prompts, which removes their difficulty."""

from collections.abc import Iterable, Sequence

import numpy as np

from rmipo.evaluation.statistics import Interval, bootstrap, interval
from rmipo.reporting.results import Result, method_label


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
    return (
        f"{method_label(against)} minus each method on the same prompts, with its 95% bootstrap interval over prompts:"
    )


def paired_line(what: str, differences: Iterable[tuple[str, str]]) -> list[str]:
    """A line of the differences to each method, to stand below `paired_title`; nothing without any."""
    texts = [f"{method_label(method)} {text}" for method, text in differences]
    return [f"{what}: {', '.join(texts)}."] if texts else []

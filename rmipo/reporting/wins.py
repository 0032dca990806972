"""How often one method's answer is better than another's to the same prompt, from the verdicts that results hold."""

from pathlib import Path

import numpy as np
import pandas as pd

from rmipo.evaluation import BENCHMARKS, metric_label
from rmipo.evaluation.statistics import bootstrap, holm, wins
from rmipo.reporting.paired import stars
from rmipo.reporting.provenance import made_with, require_comparable
from rmipo.reporting.render import latex_escape, markdown_table
from rmipo.reporting.results import ReportError, evaluated_methods, load_result, method_label, model_label


def win_rates(outputs: Path, model: str, bench: str, name: str = "") -> tuple[pd.DataFrame, list[str]]:
    """A line for each two methods: row, column, percent of prompts that the row's method wins (a tie is half), 95%
    interval over prompts, n, and p of its being 50, corrected by Holm. And notes.

    Raises ReportError for fewer than two methods with values per prompt.
    """
    results = {
        method: load_result(outputs, model, method, bench, name)
        for method in evaluated_methods(outputs, model, [bench], name)
    }
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
            rows.append({"row": row, "column": column, "rate": 50 + found.mean, "low": 50 + found.low,
                         "high": 50 + found.high, "n": len(won), "p": found.p})  # fmt: skip
    frame = pd.DataFrame(rows)
    # Each pair stands twice, mirrored: it is tested once.
    pairs = frame.apply(lambda line: tuple(sorted((line["row"], line["column"]))), axis=1)
    once = ~pairs.duplicated()
    frame["p_holm"] = pairs.map(dict(zip(pairs[once], holm(frame.loc[once, "p"]), strict=True)))
    title = f"Percent of {model_label(model)}'s prompts that the row's method wins by {metric_label(metric)}; a tie is half."
    marks = (
        "In brackets the 95% interval over prompts. *, **, ***: other than 50 with p below 0.05, 0.01, 0.001, by Holm."
    )
    return frame, [title, marks, *made_with(held.values())]


def render(frame: pd.DataFrame, notes: list[str]) -> dict[str, str]:
    """By the suffix of its file."""
    texts = [f"{c.rate:.1f} [{c.low:.1f}, {c.high:.1f}]{stars(c.p_holm)}" for c in frame.itertuples()]
    methods = list(dict.fromkeys(frame["row"]))
    matrix = (
        frame.assign(text=texts).pivot(index="row", columns="column", values="text").fillna("").loc[methods, methods]
    )
    matrix = matrix.rename(index=method_label, columns=method_label).rename_axis(index=None, columns=None)
    rows = [["Method", *matrix.columns], *([name, *cells] for name, *cells in matrix.itertuples())]
    text = "\n".join([notes[0], "", markdown_table(rows), "", *(f"- {note}" for note in notes[1:])]) + "\n"
    table = matrix.map(latex_escape).rename(index=latex_escape, columns=latex_escape)
    tex = table.to_latex(longtable=True, escape=False, caption=latex_escape(notes[0]))
    head = r"% needs \usepackage{booktabs,longtable}"
    comments = [f"% {note}" for note in notes[1:]]
    return {
        "md": text,
        "csv": frame.to_csv(index=False),
        "tex": "\n".join([head, r"{\scriptsize", tex + "}", *comments]) + "\n",
    }

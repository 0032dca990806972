"""A filled table as Markdown, CSV or LaTeX."""

import re
import textwrap

import pandas as pd

from rmipo.evaluation import metric_label
from rmipo.reporting.paired import interval_text, paired_line, paired_title, stars
from rmipo.reporting.provenance import made_with, missing_verdicts
from rmipo.reporting.results import Result, method_label, model_label
from rmipo.reporting.tables import Table

LATEX = {"α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\epsilon$", "γ": r"$\gamma$", "Δ": r"$\Delta$", "±": r"$\pm$"}
LATEX |= {"✓": r"\checkmark{}", "†": r"$^\dagger$", "–": "--", "−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}"}
LATEX |= {character: f"\\{character}" for character in "%&#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"_": r"\_\allowbreak{}", "/": r"/\allowbreak{}"}  # paths and settings may break there
MARKS = (
    "±: standard error of the evaluation; of a mean of (n) seeds their standard deviation. †: a trial, or not evaluated as in "
    "the paper, so no difference is printed unless asked for. *, **, ***: a difference with p below 0.05, 0.01, 0.001, by Holm "
    "for all of the table. [n]: not run yet. n/a: no such number."
)
HEAD = r"% needs \usepackage{booktabs,longtable,amssymb}"


def number_text(value: float, digits: int, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}z.{digits}f}"


def markdown_table(rows: list[list[str]]) -> str:
    """The first of `rows` is the header; all columns but the first are numbers."""
    head, *body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---", *["---:"] * (len(head) - 1)], *body])


def missing_numbers(table: Table) -> dict[tuple[str, ...], int]:
    """A number for each distinct list of commands that missing cells wait for, in reading order."""
    commands = dict.fromkeys(names for names in table.cells["commands"] if names)
    return {names: number for number, names in enumerate(commands, start=1)}


def cell_parts(cell, table: Table, numbers: dict[tuple[str, ...], int]) -> list[str]:
    """Paper, ours and difference, without what there is none of.

    Ours may be `36.6†(3) ±0.4`: not made as the paper's, and a mean of 3 seeds. A missing one points at its commands, as
    `[3]`, or is n/a.
    """
    if pd.isna(cell.ours):
        ours = f"[{numbers[cell.commands]}]" if cell.commands else "n/a"
    else:
        seeds = f"({len(cell.results)})" if len(cell.results) > 1 else ""
        ours = number_text(cell.ours, cell.digits) + "†" * bool(cell.deviations) + seeds
    if table.own and cell.best:
        ours = f"**{ours}**"
    if pd.notna(cell.error):
        ours += f" ±{number_text(cell.error, cell.digits)}"
    paper = [] if pd.isna(cell.paper) else [number_text(cell.paper, cell.digits)]
    difference = [] if pd.isna(cell.difference) else [number_text(cell.difference, cell.digits, signed=True)]
    return [*paper, ours, *difference]


def layout(table: Table) -> pd.DataFrame:
    """Lists of the parts of each cell. Rows are tuples of labels, columns (group, column), as they come."""
    # How far the method `against` is ahead of a row has a column of its own. A table of the paper has no room for it.
    numbers, texts = missing_numbers(table), {}
    compared = set(table.cells.dropna(subset="behind")["metric"]) if table.own else ()
    for cell in table.cells.itertuples():
        line = texts.setdefault(cell.row, {})
        line[cell.group, cell.column] = cell_parts(cell, table, numbers)
        if cell.metric in compared:
            ahead = "" if cell.behind is None else interval_text(cell.behind, cell.digits, cell.p)
            line[cell.group, f"{method_label(table.against)} − row, {cell.column}"] = [ahead]
    frame = pd.DataFrame([list(line.values()) for line in texts.values()])
    frame.index, frame.columns = list(texts), pd.MultiIndex.from_tuples(next(iter(texts.values())))
    return frame


def results_of(table: Table) -> list[Result]:
    return list({result.path: result for results in table.cells["results"] for result in results}.values())


def notes_of(table: Table) -> list[str]:
    """What has to be said under the table, each once."""
    unlike = dict.fromkeys(f"† {text}" for texts in table.cells["deviations"] for text in texts)
    results = results_of(table)
    return [MARKS, *unlike, *missing_verdicts(results), *made_with(results), *table.notes]


def paired(table: Table) -> list[str]:
    """In a table of the paper, the method `against` and each other prompt by prompt: a title, and a line for each model and
    metric; nothing without any."""
    lines = []
    for (model, metric), alike in table.cells.dropna(subset="behind").groupby(["model", "metric"], sort=False):
        texts = [(cell.method, interval_text(cell.behind, cell.digits, cell.p)) for cell in alike.itertuples()]
        lines += paired_line(f"{metric_label(metric)} of {model_label(model)}", texts)
    return [paired_title(table.against), *lines] if lines and not table.own else []


def markdown(table: Table) -> str:
    cells = layout(table)
    rows = [[*table.headers, *(f"{group} {name}".strip() for group, name in cells.columns)]]
    rows += [[*row, *map(" / ".join, line)] for row, line in zip(cells.index, cells.values, strict=True)]
    cells_are = "Cells: paper / ours / ours minus paper."
    title = f"{table.title}. Best in bold." if table.own else f"Table {table.number}: {table.title}. {cells_are}"
    lines = [title, "", markdown_table(rows)]
    if differences := paired(table):
        lines += ["", differences[0], "", *(f"- {line}" for line in differences[1:])]
    lines += ["", *(f"- {note}" for note in notes_of(table))]
    if numbers := missing_numbers(table):
        lines += ["", "Missing cells, and what fills them:", ""]
        lines += [f"- [{n}] " + ", then ".join(f"`{c}`" for c in commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """Long form, one line per cell, numbers unrounded."""
    cells = table.cells
    several = cells["results"].map(len) > 1  # then `error` is a deviation over seeds, which has a column of its own
    lines = pd.DataFrame(cells["row"].tolist(), columns=list(table.headers))
    lines["Column"] = (cells["group"] + " " + cells["column"]).str.strip()
    lines[["paper", "ours"]] = cells[["paper", "ours"]]
    lines["standard_error"] = cells["error"].mask(several)
    lines["seeds"] = cells["results"].map(len).replace(0, pd.NA).astype("Int64")
    lines["seed_deviation"] = cells["error"].where(several)
    lines["difference"] = cells["difference"]
    for end, name in {"": "mean", "_low": "low", "_high": "high"}.items():
        values = [getattr(found, name, None) for found in cells["behind"]]
        lines[f"behind_{table.against}{end}"] = pd.Series(values, dtype=float)
    lines["p_holm"] = cells["p"].where(cells["behind"].notna())
    lines["command"] = cells["commands"].map(" && ".join)
    lines["unlike_the_paper"] = cells["deviations"].map(" ".join)
    lines["note"] = [" ".join(missing_verdicts(results)) for results in cells["results"]]
    # A line that is copied elsewhere still says how its number was made.
    lines["made_with"] = [" ".join(made_with(results)) for results in cells["results"]]
    return lines.to_csv(index=False)


def latex(table: Table) -> str:
    """A longtable for each model or, where models are no rows, for each group of columns."""
    cells, headers = layout(table), table.headers
    # Four models side by side would not fit the width of a page.
    if len(headers) > 1:
        headers = headers[1:]
        models = dict.fromkeys(row[0] for row in cells.index)
        parts = {model: cells[[row[0] == model for row in cells.index]] for model in models}
        parts = {model: part.set_axis([row[1:] for row in part.index]) for model, part in parts.items()}
    else:
        groups = cells.columns.get_level_values(0)
        parts = {group: cells.loc[:, groups == group] for group in groups.unique()}
    tables = [
        latex_table(table.title + f" ({name})" * bool(name), headers, part.droplevel(0, axis="columns"))
        for name, part in parts.items()
    ]
    cells_are = "" if table.own else "Cells: paper, ours, ours minus paper. "
    notes = r"\par\noindent{\scriptsize " + latex_escape(cells_are + MARKS) + r"\par}"
    numbers = missing_numbers(table)
    # How each number was made is longer than the table: comments, from which an appendix can be written.
    comments = [f"% {line}" for line in (*paired(table), *notes_of(table))]
    comments += [f"% [{n}] " + ", then ".join(commands) for commands, n in numbers.items()]
    return "\n".join([HEAD, *tables, notes, *comments]) + "\n"


def latex_table(title: str, headers: tuple[str, ...], cells: pd.DataFrame) -> str:
    """A longtable of lists of parts."""
    rows = [
        [*map(latex_escape, row), *(stacked(parts) for parts in line)]
        for row, line in zip(cells.index, cells.values, strict=True)
    ]
    columns = [*map(latex_escape, headers), *(stacked(textwrap.wrap(str(name), 10)) for name in cells.columns)]
    text = pd.DataFrame(rows, columns=columns).to_latex(
        index=False,
        longtable=True,
        escape=False,
        caption=latex_escape(title + "."),
        column_format=f"@{{}}{'l' * len(headers)}{'r' * cells.shape[1]}@{{}}",
    )
    # Rows of several lines need a gap to be told apart.
    head, foot, body = text.partition("\\endlastfoot\n")
    body = body.replace(" \\\\\n", " \\\\ \\addlinespace\n")
    return r"{\scriptsize\setlength{\tabcolsep}{3pt}" + f"\n{head}{foot}{body}}}"


def stacked(parts: list[str]) -> str:
    """One below the other: side by side, eight columns would not fit a page."""
    # An interval and an error get lines of their own. Without the braces LaTeX would take [1] for the height of a line.
    lines = [line for part in parts for line in part.replace(" [", "\n[").replace(" ±", "\n±").split("\n")]
    lines = [re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", latex_escape(line)) for line in lines]
    return lines[0] if len(lines) == 1 else r"\begin{tabular}[t]{@{}r@{}}" + r"\\{}".join(lines) + r"\end{tabular}"


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(character, character if ord(character) < 256 else "?") for character in text)


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}


def render_wins(frame: pd.DataFrame, notes: list[str]) -> dict[str, str]:
    """The frame and notes of `paired.win_rates`, by the suffix of its file."""
    texts = {
        (c.row, c.column): f"{c.rate:.1f} [{c.low:.1f}, {c.high:.1f}]{stars(c.p_holm)}" for c in frame.itertuples()
    }
    methods = list(dict.fromkeys(frame["row"]))
    labels = [method_label(method) for method in methods]
    cells = [[texts.get((row, column), "") for column in methods] for row in methods]
    rows = [[label, *line] for label, line in zip(labels, cells, strict=True)]
    text = "\n".join([notes[0], "", markdown_table([["Method", *labels], *rows]), "", *(f"- {n}" for n in notes[1:])])
    frame_of_parts = pd.DataFrame([[[cell] for cell in line] for line in cells], [(label,) for label in labels], labels)
    tex = latex_table(notes[0].rstrip("."), ("Method",), frame_of_parts)
    comments = [f"% {note}" for note in notes[1:]]
    return {"md": text + "\n", "csv": frame.to_csv(index=False), "tex": "\n".join([HEAD, tex, *comments]) + "\n"}

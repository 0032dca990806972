"""A filled table as Markdown, CSV or LaTeX."""

import re

import pandas as pd

from rmipo.evaluation.statistics import Interval
from rmipo.reporting.results import made_with, method_label
from rmipo.reporting.tables import Table

# What pdflatex doesn't know, and where paths and settings may break.
LATEX = {"α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\epsilon$", "γ": r"$\gamma$", "Δ": r"$\Delta$", "±": r"$\pm$"}
LATEX |= {"†": r"$^\dagger$", "−": "$-$", "_": r"\_\allowbreak{}", "/": r"/\allowbreak{}"}
MARKS = (
    "±: standard error of the evaluation; of a mean of (n) seeds their standard deviation. †: a trial, or not evaluated as in "
    "the paper, so no difference is printed unless asked for. *, **, ***: a difference with p below 0.05, 0.01, 0.001, by Holm "
    "for all of the table. [n]: not run yet. n/a: no such number."
)
HEAD = r"% needs \usepackage{booktabs,longtable}"


def markdown_table(rows: list[list[str]]) -> str:
    """The first of `rows` is the header; all columns but the first are numbers."""
    head, *body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---", *["---:"] * (len(head) - 1)], *body])


def stars(p: float) -> str:
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def interval_text(found: Interval, digits: int, p: float = 1.0) -> str:
    """E.g. `+1.2 [+0.3, +2.1]*`; `p`, the corrected p-value, makes the stars."""
    return f"{found.mean:+z.{digits}f} [{found.low:+z.{digits}f}, {found.high:+z.{digits}f}]{stars(p)}"


def missing_numbers(table: Table) -> dict[tuple[str, ...], int]:
    """A number for each distinct list of commands that missing cells wait for, in reading order."""
    commands = dict.fromkeys(names for names in table.cells["commands"] if names)
    return {names: number for number, names in enumerate(commands, start=1)}


def cell_text(cell, table: Table, numbers: dict[tuple[str, ...], int]) -> str:
    """Paper / ours / ours minus the paper's / the method `against` minus ours, without what there is none of.

    Ours may be `36.6†(3) ±0.4`: not made as the paper's, and a mean of 3 seeds. A missing one points at its commands, as
    `[3]`, or is n/a.
    """
    if pd.isna(cell.ours):
        ours = f"[{numbers[cell.commands]}]" if cell.commands else "n/a"
    else:
        seeds = f"({len(cell.results)})" if len(cell.results) > 1 else ""
        ours = f"{cell.ours:z.{cell.digits}f}" + "†" * bool(cell.deviations) + seeds
    if table.number is None and cell.best:
        ours = f"**{ours}**"
    if pd.notna(cell.error):
        ours += f" ±{cell.error:.{cell.digits}f}"
    paper = [] if pd.isna(cell.paper) else [f"{cell.paper:.{cell.digits}f}"]
    difference = [] if pd.isna(cell.difference) else [f"{cell.difference:+z.{cell.digits}f}"]
    behind = [] if cell.behind is None else [interval_text(cell.behind, cell.digits, cell.p)]
    return " / ".join([*paper, ours, *difference, *behind])


def layout(table: Table) -> pd.DataFrame:
    """The text of each cell; the columns are (group, column)."""
    numbers = missing_numbers(table)
    cells = table.cells.assign(text=[cell_text(cell, table, numbers) for cell in table.cells.itertuples()])
    return cells.set_index([*table.headers, "group", "column"])["text"].unstack(["group", "column"], sort=False)


def title_of(table: Table) -> str:
    ahead = f"{method_label(table.against)} − row on the same prompts, with its 95% bootstrap interval"
    if table.number is None:
        return f"{table.title}. Best in bold. Cells: ours / {ahead}."
    return f"Table {table.number}: {table.title}. Cells: paper / ours / ours − paper / {ahead}."


def notes_of(table: Table) -> list[str]:
    """What has to be said under the table, each once."""
    unlike = dict.fromkeys(f"† {text}" for texts in table.cells["deviations"] for text in texts)
    made = made_with(result for results in table.cells["results"] for result in results)
    return [MARKS, *unlike, *made, *filter(None, [table.note])]


def markdown(table: Table) -> str:
    cells = layout(table)
    cells.columns = [f"{group} {name}".strip() for group, name in cells.columns]
    lines = [title_of(table), "", markdown_frame(cells), "", *(f"- {note}" for note in notes_of(table))]
    if numbers := missing_numbers(table):
        lines += ["", "Missing cells, and what fills them:", ""]
        lines += [f"- [{n}] " + ", then ".join(f"`{c}`" for c in commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


def markdown_frame(cells: pd.DataFrame) -> str:
    """A frame of texts, its index the first columns."""
    flat = cells.reset_index()
    return markdown_table([list(flat.columns), *flat.to_numpy().tolist()])


def csv_text(table: Table) -> str:
    """Long form, one line per cell, numbers unrounded."""
    cells = table.cells
    lines = cells[list(table.headers)].assign(Column=(cells["group"] + " " + cells["column"]).str.strip())
    lines[["paper", "ours", "error"]] = cells[["paper", "ours", "error"]]  # `error`: of several seeds their deviation
    lines["seeds"] = cells["results"].map(len)
    lines["difference"] = cells["difference"]
    for end, name in {"": "mean", "_low": "low", "_high": "high"}.items():
        values = [getattr(found, name, None) for found in cells["behind"]]
        lines[f"behind_{table.against}{end}"] = pd.Series(values, dtype=float)
    lines["p_holm"] = cells["p"].where(cells["behind"].notna())
    lines["command"] = cells["commands"].map(" && ".join)
    lines["unlike_the_paper"] = cells["deviations"].map(" ".join)
    # A line that is copied elsewhere still says how its number was made.
    lines["made_with"] = [" ".join(made_with(results)) for results in cells["results"]]
    return lines.to_csv(index=False)


def latex(table: Table) -> str:
    """A longtable for each model and group of columns: side by side, four models would not fit the width of a page."""
    cells = layout(table)
    if "Model" in table.headers:
        parts = dict(list(cells.groupby(level="Model", sort=False)))
        if "Method" in table.headers:  # else eight columns would not fit either
            parts = {model: part.droplevel("Model") for model, part in parts.items()}
    else:
        parts = {group: cells[[group]] for group in cells.columns.unique("group")}
    tables = [latex_table(f"{table.title} ({name})", part.droplevel("group", axis=1)) for name, part in parts.items()]
    notes = r"\par\noindent{\scriptsize " + latex_text(f"{title_of(table)} {MARKS}") + r"\par}"
    # How each number was made is longer than the table: comments, from which an appendix can be written.
    comments = [f"% {line}" for line in notes_of(table)]
    comments += [f"% [{n}] " + ", then ".join(commands) for commands, n in missing_numbers(table).items()]
    return "\n".join([HEAD, *tables, notes, *comments]) + "\n"


def latex_table(title: str, cells: pd.DataFrame) -> str:
    """A longtable of texts, which LaTeX breaks to fit eight columns on a page."""
    flat = cells.reset_index().map(latex_text).rename(columns=latex_text)
    width = 0.7 / cells.shape[1]
    columns = "l" * cells.index.nlevels + rf"p{{{width:.3f}\linewidth}}" * cells.shape[1]
    options = {"caption": latex_text(title + "."), "column_format": columns, "longtable": True}
    text = flat.to_latex(index=False, escape=False, **options)
    # Rows of several lines need a gap to be told apart.
    head, foot, body = text.partition("\\endlastfoot\n")
    body = body.replace(" \\\\\n", " \\\\ \\addlinespace\n")
    return r"{\scriptsize\raggedright\setlength{\tabcolsep}{3pt}" + f"\n{head}{foot}{body}}}"


def latex_text(text: str) -> str:
    """Escaped, with **bold**."""
    escaped = re.sub(r"([%&#$])", r"\\\1", text)
    escaped = "".join(LATEX.get(character, character) for character in escaped)
    return re.sub(r"\*\*([^* ]+)\*\*", r"\\textbf{\1}", escaped)


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}


def render_wins(frame: pd.DataFrame, notes: list[str]) -> dict[str, str]:
    """The frame and notes of `tables.win_rates`, by the suffix of its file."""
    texts = [f"{c.rate:.1f} [{c.low:.1f}, {c.high:.1f}]{stars(c.p_holm)}" for c in frame.itertuples()]
    cells = frame.assign(text=texts).pivot(index="row", columns="column", values="text")
    methods = frame["row"].unique()
    cells = cells.reindex(index=methods, columns=methods).fillna("").rename(index=method_label, columns=method_label)
    cells = cells.rename_axis(index="Method", columns=None)
    text = "\n".join([notes[0], "", markdown_frame(cells), "", *(f"- {note}" for note in notes[1:])])
    comments = [f"% {note}" for note in notes[1:]]
    tex = "\n".join([HEAD, latex_table(notes[0].rstrip("."), cells), *comments])
    return {"md": text + "\n", "csv": frame.to_csv(index=False), "tex": tex + "\n"}

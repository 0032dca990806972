"""A filled table as Markdown, CSV or LaTeX."""

import re
import textwrap

import pandas as pd

from rmipo.reporting.paired import interval_text, stars
from rmipo.reporting.provenance import made_with
from rmipo.reporting.results import method_label
from rmipo.reporting.tables import Table

LATEX = {"α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\epsilon$", "γ": r"$\gamma$", "Δ": r"$\Delta$", "±": r"$\pm$"}
LATEX |= {"†": r"$^\dagger$", "–": "--", "−": "$-$", "<": r"\textless{}", ">": r"\textgreater{}"}
LATEX |= {character: f"\\{character}" for character in "%&#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"_": r"\_\allowbreak{}", "/": r"/\allowbreak{}"}  # paths and settings may break there
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


def missing_numbers(table: Table) -> dict[tuple[str, ...], int]:
    """A number for each distinct list of commands that missing cells wait for, in reading order."""
    commands = dict.fromkeys(names for names in table.cells["commands"] if names)
    return {names: number for number, names in enumerate(commands, start=1)}


def cell_parts(cell, table: Table, numbers: dict[tuple[str, ...], int]) -> list[str]:
    """Paper, ours, ours minus the paper's, and the method `against` minus ours, without what there is none of.

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
    return [*paper, ours, *difference, *behind]


def layout(table: Table) -> pd.DataFrame:
    """Lists of the parts of each cell; the columns are (model, group, column)."""
    numbers = missing_numbers(table)
    cells = table.cells.assign(parts=[cell_parts(cell, table, numbers) for cell in table.cells.itertuples()])
    return cells.set_index([*table.headers, "group", "column"])["parts"].unstack(["group", "column"], sort=False)


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
    rows = [[*table.headers, *(f"{group} {name}".strip() for group, name in cells.columns)]]
    rows += [[*row, *map(" / ".join, line)] for row, line in zip(row_labels(cells), cells.values, strict=True)]
    lines = [title_of(table), "", markdown_table(rows), "", *(f"- {note}" for note in notes_of(table))]
    if numbers := missing_numbers(table):
        lines += ["", "Missing cells, and what fills them:", ""]
        lines += [f"- [{n}] " + ", then ".join(f"`{c}`" for c in commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


def row_labels(cells: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(cells.index.to_frame().itertuples(index=False, name=None))


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
    notes = r"\par\noindent{\scriptsize " + latex_escape(f"{title_of(table)} {MARKS}") + r"\par}"
    # How each number was made is longer than the table: comments, from which an appendix can be written.
    comments = [f"% {line}" for line in notes_of(table)]
    comments += [f"% [{n}] " + ", then ".join(commands) for commands, n in missing_numbers(table).items()]
    return "\n".join([HEAD, *tables, notes, *comments]) + "\n"


def latex_table(title: str, cells: pd.DataFrame) -> str:
    """A longtable of lists of parts."""
    headers = list(cells.index.names)
    rows = [
        [*map(latex_escape, row), *(stacked(parts) for parts in line)]
        for row, line in zip(row_labels(cells), cells.values, strict=True)
    ]
    columns = [*headers, *(stacked(textwrap.wrap(str(name), 10)) for name in cells.columns)]
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
    return "".join(LATEX.get(character, character) for character in text)


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}


def render_wins(frame: pd.DataFrame, notes: list[str]) -> dict[str, str]:
    """The frame and notes of `paired.win_rates`, by the suffix of its file."""
    frame = frame.assign(
        Method=frame["row"].map(method_label),
        text=[f"{c.rate:.1f} [{c.low:.1f}, {c.high:.1f}]{stars(c.p_holm)}" for c in frame.itertuples()],
    )
    methods = frame["row"].map(method_label).unique()
    cells = frame.assign(column=frame["column"].map(method_label)).pivot(
        index="Method", columns="column", values="text"
    )
    cells = cells.reindex(index=methods, columns=methods, fill_value="").fillna("")
    rows = [["Method", *methods], *([method, *line] for method, line in zip(methods, cells.values, strict=True))]
    text = "\n".join([notes[0], "", markdown_table(rows), "", *(f"- {note}" for note in notes[1:])])
    tex = latex_table(notes[0].rstrip("."), cells.map(lambda text: [text]))
    comments = [f"% {note}" for note in notes[1:]]
    csv = frame.drop(columns=["Method", "text"]).to_csv(index=False)
    return {"md": text + "\n", "csv": csv, "tex": "\n".join([HEAD, tex, *comments]) + "\n"}

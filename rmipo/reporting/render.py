"""A filled table as Markdown, CSV or LaTeX."""

import textwrap

import pandas as pd

from rmipo.reporting.filling import FilledTable
from rmipo.reporting.paired import interval_text, paired_title, stars
from rmipo.reporting.provenance import made_with, missing_note
from rmipo.reporting.results import method_label

PAPER_CELLS = "Cells: paper / ours / ours minus paper."
MAX_NUMBER_COLUMNS = 8  # of one LaTeX table: what fits the text width of an article, 345 pt
LATEX = {"α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\epsilon$", "γ": r"$\gamma$", "Δ": r"$\Delta$", "±": r"$\pm$"}
LATEX |= {"✓": r"\checkmark{}", "†": r"$^\dagger$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}"}
LATEX |= {character: f"\\{character}" for character in "%&#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"_": r"\_\allowbreak{}", "/": r"/\allowbreak{}"}  # paths and settings may break there


def number_text(value: float | None, digits: int, signed: bool = False) -> str:
    return "–" if pd.isna(value) else f"{value:{'+' if signed else ''}z.{digits}f}"


def markdown_table(rows: list[list[str]]) -> str:
    """The first of `rows` is the header; all columns but the first are numbers."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---", *["---:"] * (len(head) - 1)], *body])


def missing_numbers(filled: FilledTable) -> dict[tuple[str, ...], int]:
    """A number for each distinct list of commands that missing cells wait for, in reading order."""
    commands = dict.fromkeys(names for names in filled.cells["commands"] if names)
    return {names: number for number, names in enumerate(commands, start=1)}


def ours_text(cell, numbers: dict[tuple[str, ...], int]) -> str:
    """Our number with its marks, e.g. `36.6†(3)` of 3 seeds; a missing one points at its commands, as `[3]`, or is n/a."""
    if pd.isna(cell.ours):
        return f"[{numbers[cell.commands]}]" if cell.commands else "n/a"
    seeds = f"({len(cell.results)})" if len(cell.results) > 1 else ""
    return number_text(cell.ours, cell.digits) + "†" * bool(cell.deviations) + seeds


def cell_text(cell, numbers: dict[tuple[str, ...], int], bold: bool) -> str:
    """`paper / ours / difference`, without what there is none of."""
    paper = [] if pd.isna(cell.paper) else [number_text(cell.paper, cell.digits)]
    difference = [] if pd.isna(cell.difference) else [number_text(cell.difference, cell.digits, signed=True)]
    error = "" if pd.isna(cell.error) else f" ±{number_text(cell.error, cell.digits)}"
    ours = ours_text(cell, numbers)
    return " / ".join([*paper, (f"**{ours}**" if bold and cell.best else ours) + error, *difference])


def wide(texts: list[tuple[tuple, tuple, str]]) -> pd.DataFrame:
    """(row, column, text) as a frame, rows and columns in the order in which they come."""
    rows, columns, _ = zip(*texts, strict=True)
    frame = pd.Series({(row, *column): text for row, column, text in texts}).unstack([1, 2], fill_value="")
    return frame.loc[list(dict.fromkeys(rows)), list(dict.fromkeys(columns))]


def markdown(filled: FilledTable) -> str:
    table, numbers = filled.table, missing_numbers(filled)
    own = table.number is None
    compared = set(filled.cells.dropna(subset="behind")["metric"]) if own else ()
    texts = []
    for cell in filled.cells.itertuples():
        texts.append((cell.row, (cell.group, cell.column), cell_text(cell, numbers, bold=own)))
        if cell.metric in compared:
            delta = "" if cell.behind is None else interval_text(cell.behind, cell.digits, cell.p)
            texts.append((cell.row, (cell.group, f"{method_label(filled.against)} − row, {cell.column}"), delta))
    cells = wide(texts)
    rows = [[*table.headers, *(f"{group} {name}".strip() for group, name in cells.columns)]]
    rows += [[*row, *line] for row, line in zip(cells.index, cells.values, strict=True)]
    title = f"{table.title}. Best in bold." if own else f"Table {table.number}: {table.title}. {PAPER_CELLS}"
    lines = [title, "", markdown_table(rows)]
    if not own and (paired := filled.paired()):
        lines += ["", paired_title(filled.against), "", *(f"- {line}" for line in paired)]
    lines += ["", *(f"- {note}" for note in filled.notes())]
    if numbers:
        lines += ["", "Missing cells, and what fills them:", ""]
        lines += [f"- [{n}] " + ", then ".join(f"`{c}`" for c in commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


def csv_text(filled: FilledTable) -> str:
    """Long form, one line per cell, numbers unrounded; each line says how its number was made."""
    cells = filled.cells
    several = cells["results"].map(len) > 1  # then `error` is a deviation over seeds, which has a column of its own
    lines = pd.DataFrame(cells["row"].tolist(), columns=list(filled.table.headers))
    lines["Column"] = (cells["group"] + " " + cells["column"]).str.strip()
    lines[["paper", "ours"]] = cells[["paper", "ours"]]
    lines["standard_error"] = cells["error"].mask(several)
    lines["seeds"] = cells["results"].map(len).replace(0, pd.NA).astype("Int64")
    lines["seed_deviation"] = cells["error"].where(several)
    lines["difference"] = cells["difference"]
    for end, name in {"": "mean", "_low": "low", "_high": "high"}.items():
        values = [getattr(found, name, None) for found in cells["behind"]]
        lines[f"behind_{filled.against}{end}"] = pd.Series(values, dtype=float)
    lines["p_holm"] = cells["p"].where(cells["behind"].notna())
    lines["command"] = cells["commands"].map(" && ".join)
    lines["unlike_the_paper"] = cells["deviations"].map(" ".join)
    lines["note"] = [" ".join(missing_note(texts)) for texts in cells["missing"]]
    lines["made_with"] = [" ".join(made_with(results)) for results in cells["results"]]
    return lines.to_csv(index=False)


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(character, character if ord(character) < 256 else "?") for character in text)


def latex_header(name: str) -> str:
    """Broken into short lines: eight columns have to fit a page."""
    lines = [latex_escape(line) for line in textwrap.wrap(name, 10)]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r"\\".join(lines) + "}"


def latex(filled: FilledTable) -> str:
    """A longtable for each model where models are rows, and for each group of columns where all don't fit the text width.

    A missing cell is a number in brackets. Its commands, and how each number was made, are in comments.
    """
    table, numbers = filled.table, missing_numbers(filled)
    by_model = len(table.headers) > 1  # then the model is in the caption, not beside each row
    parts = [("", filled.cells)]
    if by_model:
        parts = [(cells["row"].iloc[0][0], cells) for _, cells in filled.cells.groupby("model", sort=False)]
    elif filled.cells[["group", "column"]].drop_duplicates().shape[0] > MAX_NUMBER_COLUMNS:
        parts = list(filled.cells.groupby("group", sort=False))
    tables = [latex_table(filled, part, cells, numbers, by_model) for part, cells in parts]
    # What made the numbers is longer than the table: it goes into comments, for an appendix.
    marks = filled.marks()
    if numbers:
        marks.append("[1], ...: not run yet; the commands are comments in the source.")
    notes = r"\par\noindent{\scriptsize " + latex_escape(" ".join(marks)) + r"\par}"
    paired = [] if table.number is None else [paired_title(filled.against), *filled.paired()]
    comments = [f"% {line}" for line in (*paired, *filled.notes())] if filled.made_with() else []
    comments += [f"% [{n}] " + ", then ".join(commands) for commands, n in numbers.items()]
    return "\n".join([r"% needs \usepackage{booktabs,longtable,amssymb}", *tables, notes, *comments]) + "\n"


def latex_table(
    filled: FilledTable, part: str, cells: pd.DataFrame, numbers: dict[tuple[str, ...], int], by_model: bool
) -> str:
    texts = []
    for cell in cells.itertuples():
        for source, text in latex_lines(cell, filled, numbers).items():
            texts.append(((*cell.row[by_model:], source), (cell.group, cell.column), text))
    frame = wide(texts)
    frame = frame[(frame != "").any(axis=1)]  # of a model that the paper doesn't have, the paper's lines are empty
    labels = pd.DataFrame([[latex_escape(label) for label in row[:-1]] + [row[-1]] for row in frame.index])
    labels.loc[labels.duplicated(list(labels.columns[:-1])), labels.columns[:-1]] = ""  # once a row
    labels.columns = pd.MultiIndex.from_tuples([("", header) for header in (*filled.table.headers[by_model:], " ")])
    frame.columns = frame.columns.map(lambda column: (latex_escape(column[0]), latex_header(column[1])))
    whole = pd.concat([labels, frame.reset_index(drop=True)], axis=1)
    if not cells["group"].any():
        whole.columns = whole.columns.droplevel(0)
    caption = latex_escape(filled.table.title + (f" ({part})" if part else "") + ".")
    columns = f"@{{}}{'l' * labels.shape[1]}{'r' * frame.shape[1]}@{{}}"
    text = whole.to_latex(
        index=False, longtable=True, escape=False, caption=caption, column_format=columns, multicolumn_format="c"
    )
    return r"{\scriptsize\setlength{\tabcolsep}{2pt}\renewcommand{\arraystretch}{0.85}" + f"\n{text}}}"


def latex_lines(cell, filled: FilledTable, numbers: dict[tuple[str, ...], int]) -> dict[str, str]:
    """The lines of one cell, by what they are."""

    def line(value: float, signed: bool = False) -> str:
        text = number_text(value, cell.digits, signed)
        return "" if pd.isna(value) else f"${text}$" if signed else text

    ours, lines = latex_escape(ours_text(cell, numbers)), {"paper": line(cell.paper)}
    own = filled.table.number is None
    lines["ours"] = rf"\textbf{{{ours}}}" if own and cell.best else ours
    lines |= {r"\hfill$\pm$": line(cell.error), r"\hfill diff.": line(cell.difference, signed=True)}
    if own:
        against, found = latex_escape(method_label(filled.against)), cell.behind
        lines[rf"\hfill {against} $-$ row"] = "" if found is None else line(found.mean, True) + stars(cell.p)
        low_high = "" if found is None else f"[{found.low:+z.{cell.digits}f}, {found.high:+z.{cell.digits}f}]"
        lines[r"\hfill 95\%"] = low_high
    return lines


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}

"""A filled table as Markdown, CSV or LaTeX."""

import csv
import io

from rmipo.reporting.filling import Entry, FilledTable

LATEX = {"α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\epsilon$", "✓": r"\checkmark", "–": "--"}
LATEX |= {character: f"\\{character}" for character in "%_&#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def number_text(value: float | None, digits: int, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def missing_numbers(filled: FilledTable) -> dict[tuple[str, ...], int]:
    """A number for each distinct list of commands that missing cells wait for, in reading order."""
    numbers: dict[tuple[str, ...], int] = {}
    for entry in (entry for row in filled.entries for entry in row):
        if entry.commands:
            numbers.setdefault(entry.commands, len(numbers) + 1)
    return numbers


def cell_text(entry: Entry, numbers: dict[tuple[str, ...], int]) -> str:
    """`paper | ours | difference`; a missing cell points at the command that fills it, as `[3]`, or is n/a."""
    paper = number_text(entry.paper, entry.digits)
    if entry.ours is None:
        return f"{paper} / " + (f"[{numbers[entry.commands]}]" if entry.commands else "n/a")
    difference = "" if entry.difference is None else f" / {number_text(entry.difference, entry.digits, signed=True)}"
    return f"{paper} / {number_text(entry.ours, entry.digits)}{difference}"


def column_titles(filled: FilledTable) -> list[str]:
    return [f"{group} {name}".strip() for group, name in filled.columns]


def markdown(filled: FilledTable) -> str:
    table, numbers = filled.table, missing_numbers(filled)
    header = [*table.row_headers, *column_titles(filled)]
    lines = [f"Table {table.number}: {table.title}. Cells: paper / ours / ours minus paper.", ""]
    lines += ["| " + " | ".join(header) + " |"]
    lines += ["|" + "|".join(["---"] * len(table.row_headers) + ["---:"] * len(filled.columns)) + "|"]
    for labels, entries in zip(table.rows, filled.entries, strict=True):
        lines.append("| " + " | ".join([*labels, *(cell_text(entry, numbers) for entry in entries)]) + " |")
    if filled.notes:
        lines += ["", *(f"- {note}" for note in filled.notes)]
    if numbers:
        lines += ["", "Missing cells, and what fills them:", ""]
        lines += [f"- [{n}] " + ", then ".join(f"`{c}`" for c in commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


def csv_text(filled: FilledTable) -> str:
    """Long form, one line per cell, numbers unrounded; `note` is what a cell's number can't be shown without."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*filled.table.row_headers, "Column", "paper", "ours", "difference", "command", "note"])
    for labels, entries in zip(filled.table.rows, filled.entries, strict=True):
        for title, entry in zip(column_titles(filled), entries, strict=True):
            values = ["" if v is None else repr(v) for v in (entry.paper, entry.ours, entry.difference)]
            writer.writerow([*labels, title, *values, " && ".join(entry.commands), " ".join(entry.notes)])
    return file.getvalue()


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def latex_cell(entry: Entry, numbers: dict[tuple[str, ...], int]) -> str:
    paper = latex_escape(number_text(entry.paper, entry.digits))
    if entry.ours is None:
        return rf"{paper} / " + (f"[{numbers[entry.commands]}]" if entry.commands else r"\emph{n.a.}")
    ours = number_text(entry.ours, entry.digits)
    if entry.difference is None:
        return f"{paper} / {ours}"
    return rf"{paper} / {ours} {{\scriptsize(${number_text(entry.difference, entry.digits, signed=True)}$)}}"


def latex(filled: FilledTable) -> str:
    """A booktabs table with its notes; cells are `paper / ours (difference)`.

    A missing cell is a number in brackets, whose commands are in comments at the end.
    """
    table, numbers = filled.table, missing_numbers(filled)
    groups = [group for group, _ in filled.columns]
    lines = [
        r"% needs \usepackage{booktabs,amssymb}",
        r"\begin{table*}\centering\small",
        rf"\caption{{{latex_escape(table.title)}. Cells: paper / ours (difference).}}",
        rf"\begin{{tabular}}{{{'l' * len(table.row_headers)}{'r' * len(filled.columns)}}}",
        r"\toprule",
    ]
    if any(groups):
        spans = [[group, groups.count(group)] for group in dict.fromkeys(groups)]
        heads = [rf"\multicolumn{{{n}}}{{c}}{{{latex_escape(group)}}}" for group, n in spans]
        lines.append(" & ".join([""] * len(table.row_headers) + heads) + r" \\")
    names = [latex_escape(name) for name in (*table.row_headers, *(name for _, name in filled.columns))]
    lines += [" & ".join(names) + r" \\", r"\midrule"]
    for labels, entries in zip(table.rows, filled.entries, strict=True):
        cells = [latex_escape(label) for label in labels] + [latex_cell(entry, numbers) for entry in entries]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    notes = filled.notes + ["[1], ...: not run yet; the commands are comments below this table."] * bool(numbers)
    if notes:
        lines += ["", r"\raggedright\footnotesize", *(latex_escape(note) + r"\par" for note in notes)]
    lines.append(r"\end{table*}")
    lines += [f"% [{n}] " + ", then ".join(commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}

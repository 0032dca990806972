"""A filled table as Markdown, CSV or LaTeX."""

import pandas as pd

from rmipo.reporting.filling import Entry, FilledTable, notes_text
from rmipo.reporting.paired import PAIRED_TITLE

LINES_OF_A_PAGE = 55  # of a LaTeX table, with its notes, in the larger print
CHARACTERS_OF_A_LINE = 100  # of a note, about
PAIRED = {"": "mean", "_low": "low", "_high": "high"}  # columns of the CSV
MAX_NUMBER_COLUMNS = 8  # of one LaTeX table: what fits the text width of an article, 345 pt
LATEX = {"α": r"$\alpha$", "β": r"$\beta$", "ε": r"$\epsilon$", "γ": r"$\gamma$", "Δ": r"$\Delta$", "±": r"$\pm$"}
LATEX |= {"✓": r"\checkmark{}", "†": r"$^\dagger$", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}"}
LATEX |= {character: f"\\{character}" for character in "%&#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"_": r"\_\allowbreak{}", "/": r"/\allowbreak{}"}  # paths and settings may break there


def number_text(value: float | None, digits: int, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}z.{digits}f}"


def missing_numbers(filled: FilledTable) -> dict[tuple[str, ...], int]:
    """A number for each distinct list of commands that missing cells wait for, in reading order."""
    commands = dict.fromkeys(entry.commands for entry in filled.entries if entry.commands)
    return {names: number for number, names in enumerate(commands, start=1)}


def ours_text(entry: Entry, numbers: dict[tuple[str, ...], int]) -> str:
    """Our number with its marks, e.g. `36.6†(3)` of 3 seeds; a missing one points at its commands, as `[3]`, or is n/a."""
    if entry.ours is None:
        return f"[{numbers[entry.commands]}]" if entry.commands else "n/a"
    seeds = f"({len(entry.results)})" if len(entry.results) > 1 else ""
    return number_text(entry.ours, entry.digits) + "†" * bool(entry.deviations) + seeds


def cell_text(entry: Entry, numbers: dict[tuple[str, ...], int]) -> str:
    """`paper / ours / difference`, without what there is none of."""
    paper = [] if entry.cell.paper is None else [number_text(entry.cell.paper, entry.digits)]
    difference = [] if entry.difference is None else [number_text(entry.difference, entry.digits, signed=True)]
    error = "" if entry.error is None else f" ±{number_text(entry.error, entry.digits)}"
    return " / ".join([*paper, ours_text(entry, numbers) + error, *difference])


def grid_of(entries: list[Entry], text) -> pd.DataFrame:
    """A frame of texts, rows and columns in the order of the table; column labels are (group, name)."""
    frame = pd.DataFrame([(entry.cell.row, entry.cell.column, text(entry)) for entry in entries])
    columns = list(dict.fromkeys(frame[1]))
    wide = frame.pivot(index=0, columns=1, values=2).reindex(frame[0].unique())[columns]
    return wide.set_axis(pd.MultiIndex.from_tuples(columns), axis=1)


def markdown(filled: FilledTable) -> str:
    table, numbers = filled.table, missing_numbers(filled)
    cells = grid_of(filled.entries, lambda entry: cell_text(entry, numbers))
    header = [*table.headers, *(f"{group} {name}".strip() for group, name in cells.columns)]
    lines = [f"Table {table.number}: {table.title}. Cells: paper / ours / ours minus paper.", ""]
    lines += ["| " + " | ".join(header) + " |"]
    lines += ["|" + "|".join(["---"] * len(table.headers) + ["---:"] * len(cells.columns)) + "|"]
    lines += ["| " + " | ".join([*row, *texts]) + " |" for row, texts in zip(cells.index, cells.values, strict=True)]
    if paired := filled.paired():
        lines += ["", PAIRED_TITLE, "", *(f"- {line}" for line in paired)]
    if notes := filled.notes():
        lines += ["", *(f"- {note}" for note in notes)]
    if numbers:
        lines += ["", "Missing cells, and what fills them:", ""]
        lines += [f"- [{n}] " + ", then ".join(f"`{c}`" for c in commands) for commands, n in numbers.items()]
    return "\n".join(lines) + "\n"


def csv_text(filled: FilledTable) -> str:
    """Long form, one line per cell, numbers unrounded; each line says how its number was made."""
    lines = []
    for entry in filled.entries:
        of_seeds = len(entry.results) > 1
        lines.append(
            dict(zip(filled.table.headers, entry.cell.row, strict=True))
            | {"Column": " ".join(entry.cell.column).strip(), "paper": entry.cell.paper, "ours": entry.ours}
            | {"standard_error": None if of_seeds else entry.error, "seeds": len(entry.results) or None}
            | {"seed_deviation": entry.error if of_seeds else None, "difference": entry.difference}
            | {f"behind_rmipo{end}": entry.behind and getattr(entry.behind, name) for end, name in PAIRED.items()}
            | {"command": " && ".join(entry.commands), "unlike_the_paper": " ".join(entry.deviations)}
            | {
                "note": " ".join(notes_text(entry.notes)),
                "made_with": " ".join(FilledTable(filled.table, [entry]).made_with()),
            }
        )
    return pd.DataFrame(lines).astype({"seeds": "Int64"}).to_csv(index=False)


def latex_escape(text: str) -> str:
    return "".join(LATEX.get(character, character if ord(character) < 256 else "?") for character in text)


def latex(filled: FilledTable) -> str:
    """booktabs tables with their notes; a row has a line each for the paper's numbers, ours, errors and differences.

    A table for each model where models are rows, and for as many groups of columns as fit the text width of an article.
    A missing cell is a number in brackets, whose commands are in comments at the end.
    """
    numbers, parts = missing_numbers(filled), []
    for block in filled.blocks():
        fitting: list[list[str]] = []
        sizes = block.column_groups()
        for group, size in sizes.items():
            if fitting and sum(sizes[name] for name in fitting[-1]) + size <= MAX_NUMBER_COLUMNS:
                fitting[-1].append(group)
            else:
                fitting.append([group])
        parts += [block.only(groups) for groups in fitting]
    tables = [latex_table(part, numbers, several=len(parts) > 1) for part in parts]
    if paired := filled.paired():  # under a table of twelve methods they would not fit the page
        caption = rf"\caption{{{latex_escape(f'{filled.table.title}. {PAIRED_TITLE}')}}}"
        tables += [r"\begin{table*}\raggedright", caption, r"\scriptsize"]
        lines = [*paired, *filled.made_with()]  # it may stand on another page than the table
        tables += [*(latex_escape(line) + r"\par" for line in lines), r"\end{table*}"]
    comments = [f"% [{n}] " + ", then ".join(commands) for commands, n in numbers.items()]
    return "\n".join([r"% needs \usepackage{booktabs,amssymb}", *tables, *comments]) + "\n"


def latex_table(filled: FilledTable, numbers: dict[tuple[str, ...], int], several: bool) -> str:
    table, groups = filled.table, filled.column_groups()
    by_model = len(table.headers) > 1  # then the model is in the caption, not beside each row
    headers, body = table.headers[by_model:], []
    for row in dict.fromkeys(entry.cell.row for entry in filled.entries):
        labels = [latex_escape(label) for label in row[by_model:]]
        lines = latex_lines([entry for entry in filled.entries if entry.cell.row == row], numbers)
        body += [r"\addlinespace[2pt]"] if body and len(lines) > 1 else []
        for source, cells in lines.items():
            body.append(" & ".join([*labels, source, *cells]) + r" \\")
            labels = [""] * len(labels)  # once a row
    names = dict.fromkeys(entry.cell.column for entry in filled.entries)
    part = filled.entries[0].cell.row[0] if by_model else ", ".join(groups) if several else ""
    heads = [rf"\multicolumn{{{size}}}{{c}}{{{latex_escape(group)}}}" for group, size in groups.items()]
    notes = filled.notes()
    if any(entry.commands for entry in filled.entries):
        notes.append("[1], ...: not run yet; the commands are comments in the source.")
    lines = len(body) + sum(1 + len(note) // CHARACTERS_OF_A_LINE for note in notes)
    size = r"\scriptsize" if lines > LINES_OF_A_PAGE else r"\footnotesize"
    return "\n".join(
        [
            rf"\begin{{table*}}\centering{size}" r"\setlength{\tabcolsep}{2pt}\renewcommand{\arraystretch}{0.85}",
            rf"\caption{{{latex_escape(table.title + (f' ({part})' if part else ''))}.}}",
            rf"\begin{{tabular}}{{@{{}}{'l' * (len(headers) + 1)}{'r' * len(names)}@{{}}}}",
            r"\toprule",
            *([" & ".join([*[""] * (len(headers) + 1), *heads]) + r" \\"] if any(groups) else []),
            " & ".join([*headers, "", *(rf"\scriptsize {latex_escape(name)}" for _, name in names)]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(["", r"\smallskip\raggedright\scriptsize"] if notes else []),
            *(latex_escape(note) + r"\par" for note in notes),
            r"\end{table*}",
        ]
    )


def latex_lines(entries: list[Entry], numbers: dict[tuple[str, ...], int]) -> dict[str, list[str]]:
    """The lines of one row, by what they are; those without any number are left out, except ours."""

    def line(*values: float | None, signed: bool = False) -> list[str]:
        texts = [
            (value, number_text(value, entry.digits, signed)) for value, entry in zip(values, entries, strict=True)
        ]
        return ["" if value is None else f"${text}$" if signed else text for value, text in texts]

    lines = {
        "paper": line(*(entry.cell.paper for entry in entries)),
        "ours": [latex_escape(ours_text(entry, numbers)) for entry in entries],
        r"\hfill$\pm$": line(*(entry.error for entry in entries)),
        r"\hfill diff.": line(*(entry.difference for entry in entries), signed=True),
    }
    return {source: cells for source, cells in lines.items() if any(cells)}


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}

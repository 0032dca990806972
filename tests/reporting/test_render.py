"""The three formats of a table, and the script that writes them."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rmipo.reporting.filling import fill
from rmipo.reporting.render import FORMATS, csv_text, latex, markdown, number_text
from rmipo.reporting.tables import TABLES, Cell, build_table
from tests.helpers.result_files import JUDGES, write_result

LLAMA = "llama3-8b-instruct"


def lines_of_csv(filled) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["Method"], line["Column"]): line for line in csv.DictReader(io.StringIO(csv_text(filled)))}


def test_numbers():
    assert number_text(-0.04, 1, signed=True) == "+0.0" and number_text(-0.04, 1) == "0.0"
    assert number_text(-12.46, 1, signed=True) == "-12.5" and number_text(None, 1) == "–"


@pytest.fixture
def filled(tmp_path):
    metrics = {"alpacaeval2_lc": 47.25, "alpacaeval2_lc_standard_error": 1.44, "alpacaeval2_wr": 40.0}
    write_result(tmp_path, LLAMA, "alpha-dpo", "alpacaeval", metrics | {"alpacaeval2_length": 1834.4})
    return fill(build_table(1, [LLAMA]), tmp_path)


def test_markdown(filled):
    text = markdown(filled)
    assert "| Method | Llama3-8B-Instruct LC (%) | Llama3-8B-Instruct WR (%) | Llama3-8B-Instruct Length |" in text
    assert "| α-DPO | 46.6 / 47.2 ±1.4 / +0.6 | 38.1 / 40.0 / +1.9 | 1834 | 8.1 / [15] |" in text
    assert f"- [15] `make train MODEL={LLAMA} METHOD=alpha-dpo`, then `make eval" in text


def test_csv(filled):
    line = lines_of_csv(filled)["α-DPO", "Llama3-8B-Instruct LC (%)"]
    assert (line["paper"], line["ours"], line["standard_error"], line["seeds"]) == ("46.6", "47.25", "1.44", "1")
    assert float(line["difference"]) == pytest.approx(0.65) and line["command"] == line["note"] == ""
    assert "judge_endpoint api.openai.com/v1" in line["made_with"] and line["unlike_the_paper"] == ""


def test_latex(filled):
    text = latex(filled)
    rows = [r"$\alpha$-DPO & paper & 46.6 & 38.1 &  & 8.1 \\", " & ours & 47.2 & 40.0 & 1834 & [15] \\\\"]
    rows += [r" & \hfill$\pm$ & 1.4 &  &  &  \\", r" & \hfill diff. & $+0.6$ & $+1.9$ &  &  \\"]
    assert "\n".join(rows) in text
    assert r"\multicolumn{4}{c}{Llama3-8B-Instruct}" in text and r"LC (\%)" in text
    # The first cell without a number points at the first comment.
    assert r"Initial & paper & 26.0 & 25.3 &  & 8.1 \\" in text and " & ours & [1] & [1] & [1] & [2] " in text
    comments = text.split(r"\end{table*}")[1].splitlines()[1:]
    assert comments[0] == f"% [1] make eval MODEL={LLAMA} METHOD=initial BENCH=alpacaeval"
    assert len(comments) == 12 + 11 and all(line.startswith("% [") for line in comments)


def test_a_model_that_the_paper_does_not_have_gets_one_line_a_row(tmp_path):
    write_result(tmp_path, "tiny", "rmipo", "mtbench", {"mt_bench": 6.0})
    text = latex(fill(build_table(1, ["tiny"]), tmp_path))
    rows = [line for line in text.splitlines() if line.startswith("RMiPO")]
    assert len(rows) == 1 and rows[0].endswith(r"& 6.0 \\") and "paper &" not in text


def test_another_judge_is_said_in_all_three_formats(tmp_path):
    judged = {"mt_bench": 6.0, "mt_bench_missing": 7}
    settings = {"judge_endpoint": "127.0.0.1:8000/v1", "first_n": 4}
    write_result(tmp_path, LLAMA, "rmipo", "mtbench", judged, settings=settings)
    filled = fill(build_table(1, [LLAMA]), tmp_path)
    trial = "TRIAL, not the benchmark itself: MT-Bench with first_n=4."
    judge = "MT-Bench: judge_endpoint is 127.0.0.1:8000/v1, the paper's is api.openai.com/v1."
    made_with = (
        "MT-Bench: judge_model gpt-4, judge_reference_model gpt-4, judge_endpoint 127.0.0.1:8000/v1, "
        f"temperatures {json.dumps(JUDGES['mtbench']['temperatures'], sort_keys=True)}, max_new_tokens 1024, first_n 4; "
        "lm_eval 0.4.13. MT-Bench of Llama3-8B-Instruct: generation.top_p 1.0, generation.top_k 0."
    )
    missing = f"MISSING verdicts: 7 in {LLAMA}/rmipo/eval/mtbench.json."
    text = markdown(filled)
    assert "8.3 / 6.0† |" in text
    assert all(f"- {note}\n" in text for note in (f"† {trial}", f"† {judge}", missing))
    assert all(f"{part}." in text for part in made_with.removesuffix(".").split(". "))
    line = lines_of_csv(filled)["RMiPO", "Llama3-8B-Instruct MT-Bench"]
    assert line["unlike_the_paper"] == f"{trial} {judge}" and line["difference"] == ""
    assert line["made_with"] == made_with and line["note"] == missing
    line = lines_of_csv(filled)["DPO", "Llama3-8B-Instruct MT-Bench"]
    assert line["made_with"] == line["unlike_the_paper"] == ""
    plain = latex(filled).replace(r"\allowbreak{}", "")
    assert (
        r"6.0$^\dagger$ \\" in plain
        and r"$^\dagger$ TRIAL, not the benchmark itself: MT-Bench with first\_n=4.\par" in plain
    )
    assert r"judge\_endpoint 127.0.0.1:8000/v1, temp" in plain and r"first\_n 4; lm\_eval 0.4.13.\par" in plain


def compiled(folder: Path, source: str) -> str:
    """The log of pdflatex over a document with these tables. The PDF stays in `folder`."""
    preamble = r"\documentclass{article}\usepackage{booktabs,amssymb}\begin{document}"
    (folder / "tables.tex").write_text(f"{preamble}\n{source}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return (folder / "tables.log").read_text(errors="replace")


def write_wide(outputs: Path, cell: Cell, as_the_paper: bool) -> None:
    """A result with wide numbers and long notes: made as in the paper, or by another judge in a trial."""
    metrics = {"alpacaeval2_lc": 48.71, "alpacaeval2_wr": 45.28, "alpacaeval2_length": 1834.0, "mt_bench": 8.13}
    metrics |= dict.fromkeys(("ifeval", "bbh", "math", "gpqa", "musr", "mmlu_pro"), 68.88)
    metrics |= {f"{name}_standard_error": 1.44 for name in metrics}
    settings = {"reference_sha256": "0123456789abcdef"}
    if not as_the_paper:
        metrics |= {"mt_bench_missing": 7}
        settings |= {"judge_endpoint": "a-judge-with-a-long-name.example.org:8123/v1"}
        settings |= {"limit": 100} if cell.bench == "leaderboard" else {"first_n": 100}
    versions = {"alpaca_eval": "0.6.6", "scikit-learn": "1.9.0", "transformers": "5.23.0", "vllm": "0.30.0"}
    write_result(outputs, cell.model, cell.method, cell.bench, metrics, settings=settings, versions=versions)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex isn't installed")
@pytest.mark.parametrize("number", sorted(TABLES))
def test_latex_fits_an_article(tmp_path, number):
    """Nothing sticks out of a page's width or height: with nothing run, everything as in the paper, nothing so."""
    table = build_table(number)
    sources = [latex(fill(table, tmp_path / "outputs"))]
    for as_the_paper in (True, False):
        for cell in table.cells:
            write_wide(tmp_path / "outputs", cell, as_the_paper)
        sources.append(latex(fill(table, tmp_path / "outputs")))
    log = compiled(tmp_path, "\n".join(sources))
    assert re.findall(r"Overfull \\[hv]box.*", log) == []
    assert "Float too large" not in log


def test_script_writes_three_formats(tmp_path, run_script, capsys):
    assert run_script("table.py", folder=tmp_path, N="7", MODEL="tiny") == 0
    files = {path.name for path in (tmp_path / "outputs/reports").iterdir()}
    assert files == {f"table7-tiny.{suffix}" for suffix in FORMATS}
    assert "METHOD=table7-linear" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["4", ""])
def test_script_refuses_other_tables_in_one_line(tmp_path, run_script, capsys, number):
    assert run_script("table.py", folder=tmp_path, N=number) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "[1, 2, 3, 5, 7, 8]" in error and error.count("\n") == 1


def test_a_table_of_another_evaluation(tmp_path, run_script):
    """By EVAL_NAME, in files of its own: results of the usual one have no part in it."""
    open_judge = {"name": "open", "settings": {"judge_endpoint": "127.0.0.1:8000/v1"}}
    write_result(tmp_path / "outputs", LLAMA, "dpo", "mtbench", {"mt_bench": 7.0}, **open_judge)
    for method in ("dpo", "simpo"):
        write_result(tmp_path / "outputs", LLAMA, method, "mtbench", {"mt_bench": 8.0})
    assert run_script("table.py", folder=tmp_path, N="1", MODEL=LLAMA, EVAL_NAME="open") == 0
    lines = csv.DictReader((tmp_path / f"outputs/reports/table1-{LLAMA}-open.csv").open())
    ours = {line["Method"]: (line["ours"], line["command"]) for line in lines if "MT-Bench" in line["Column"]}
    assert ours["DPO"] == ("7.0", "")
    train = f"make train MODEL={LLAMA} METHOD=simpo"
    assert ours["SimPO"] == ("", f"{train} && make eval MODEL={LLAMA} METHOD=simpo BENCH=mtbench EVAL_NAME=open ...")

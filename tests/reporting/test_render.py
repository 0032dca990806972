"""The three formats of a table, tables of any benchmark, win rates, and the script that writes them."""

import csv
import io
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rmipo.evaluation.statistics import holm
from rmipo.reporting.render import FORMATS, csv_text, latex, markdown, markdown_table, render_wins
from rmipo.reporting.results import ReportError
from rmipo.reporting.tables import TABLES, benchmark_table, build_table, fill, win_rates
from tests.helpers.programs import run_here
from tests.helpers.result_files import write_result

LLAMA = "llama3-8b-instruct"


def lines_of_csv(filled) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["Method"], line["Column"]): line for line in csv.DictReader(io.StringIO(csv_text(filled)))}


def row_of(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_three_formats(tmp_path):
    metrics = {"alpacaeval2_lc": 47.25, "alpacaeval2_lc_standard_error": 1.44, "alpacaeval2_wr": 40.0}
    write_result(tmp_path, LLAMA, "alpha-dpo", "alpacaeval", metrics | {"alpacaeval2_length": 1834.4})
    filled = fill(build_table(1, [LLAMA]), tmp_path)
    text = markdown(filled)
    assert "| Method | Llama3-8B-Instruct LC (%) | Llama3-8B-Instruct WR (%) | Llama3-8B-Instruct Length |" in text
    assert "| α-DPO | 46.6 / 47.2 ±1.4 / +0.6 | 38.1 / 40.0 / +1.9 | 1834 | 8.1 / [15] |" in text
    assert f"- [15] `make train MODEL={LLAMA} METHOD=alpha-dpo`, then `make eval" in text
    line = lines_of_csv(filled)["α-DPO", "Llama3-8B-Instruct LC (%)"]
    assert (line["paper"], line["ours"], line["error"], line["seeds"]) == ("46.6", "47.25", "1.44", "1")
    assert float(line["difference"]) == pytest.approx(0.65) and line["command"] == ""
    assert "judge_endpoint api.openai.com/v1" in line["made_with"] and line["unlike_the_paper"] == ""
    text = latex(filled)
    assert r"$\alpha$-DPO & 46.6 /\allowbreak{} 47.2 $\pm$1.4 /\allowbreak{} +0.6 & " in text
    assert r"\caption{AlpacaEval 2 and MT-Bench (Llama3-8B-Instruct).}" in text and r"LC (\%)" in text
    assert r"Initial & 26.0 /\allowbreak{} [1] &" in text  # the first cell without a number and the first command
    comments = [line for line in text.splitlines() if line.startswith("% [")]
    assert comments[0] == f"% [1] make eval MODEL={LLAMA} METHOD=initial BENCH=alpacaeval" and len(comments) == 12 + 11


def test_another_judge_is_said_in_all_three_formats(tmp_path):
    settings = {"judge_endpoint": "127.0.0.1:8000/v1", "first_n": 4}
    write_result(tmp_path, LLAMA, "rmipo", "mtbench", {"mt_bench": 6.0}, settings=settings)
    filled = fill(build_table(1, [LLAMA]), tmp_path)
    trial = "TRIAL, not the benchmark itself: MT-Bench with first_n=4."
    judge = "MT-Bench of Llama3-8B-Instruct: judge_endpoint is 127.0.0.1:8000/v1, the paper's is api.openai.com/v1."
    text = markdown(filled)
    assert "8.3 / 6.0† |" in text and all(f"- {note}\n" in text for note in (f"† {trial}", f"† {judge}"))
    line = lines_of_csv(filled)["RMiPO", "Llama3-8B-Instruct MT-Bench"]
    assert line["unlike_the_paper"] == f"{trial} {judge}" and line["difference"] == ""
    assert "judge_endpoint 127.0.0.1:8000/v1" in line["made_with"] and "lm_eval 0.4.13" in line["made_with"]
    asked = lines_of_csv(fill(build_table(1, [LLAMA]), tmp_path, all_differences=True))
    assert float(asked["RMiPO", "Llama3-8B-Instruct MT-Bench"]["difference"]) == pytest.approx(6.0 - 8.3)
    plain = latex(filled)
    assert r"6.0$^\dagger$ \\" in plain and f"% † {trial}\n" in plain and f"% † {judge}\n" in plain


METHODS = {"rmipo": 3.0, "dpo": 0.0, "initial": -20.0}


@pytest.fixture
def benchmarks(tmp_path) -> Path:
    """Results of two benchmarks: RMiPO is ahead of DPO on every second prompt by 6, and far ahead of the start."""
    draw = random.Random(0)
    ease = [draw.uniform(30, 60) for _ in range(40)]
    for method, ahead in METHODS.items():
        values = [e + 2 * ahead * (i % 2) for i, e in enumerate(ease)]
        kl = [ahead + draw.gauss(0, 1) for _ in ease]
        metrics = {"constraints_all": sum(values) / 40, "constraints_all_standard_error": 2.0, "constraints_cut": 70.0}
        made = {"commit": f"{method:0<12}", "settings": {"prompts_sha256": "0a", "skip_n": 0}}
        write_result(tmp_path, "tiny", method, "constraints", metrics, per_prompt={"constraints_all": values}, **made)
        metrics = {"repetition": 20.0 + ahead, "kl_initial": sum(kl) / 40}
        write_result(tmp_path, "tiny", method, "specificity", metrics, per_prompt={"kl_initial": kl})
    return tmp_path


def test_a_table_of_benchmarks(benchmarks):
    filled = fill(benchmark_table(benchmarks, "tiny", ["constraints", "specificity"]), benchmarks)
    text = markdown(filled)
    columns, *rows = (row_of(text, label) for label in ("Method", "RMiPO", "DPO", "Initial"))
    ours, dpo, start = (dict(zip(columns, row, strict=True)) for row in rows)
    rate = "Verifiable constraints All constraints (%)"
    assert re.fullmatch(r"\*\*\d\d\.\d\*\* ±2\.0", ours[rate])  # the highest
    repetition = "Specificity Repeated 4-grams (%)"
    assert start[repetition] == "**0.0**" and ours[repetition] == "23.0"  # the lowest
    assert ours["Specificity KL to the initial model (nats)"].count("*") == 0  # neither is better
    assert ours["Verifiable constraints Cut (%)"] == "70.0"
    assert ours["Specificity PMI (nats)"] == "n/a"
    assert re.fullmatch(r"\d\d\.\d ±2\.0 / \+3\.0 \[\+2\.\d, \+3\.\d\]\*\*\*", dpo[rate])
    assert text.count("†") == 1  # in the legend: the benchmark's own settings make no trial of it
    assert "n 40" in text and "prompts_sha256 0a" in text and "rmipo0000000" in text
    line = lines_of_csv(filled)["DPO", rate]
    assert float(line["behind_rmipo"]) == pytest.approx(3.0) and float(line["p_holm"]) < 1e-6
    against = fill(benchmark_table(benchmarks, "tiny", ["constraints"]), benchmarks, against="dpo")
    assert float(lines_of_csv(against)["RMiPO", rate]["behind_dpo"]) == pytest.approx(-3.0)
    with pytest.raises(ReportError, match="reward"):
        benchmark_table(benchmarks, "tiny", ["reward"])


def test_p_values_are_corrected_and_parts_stand_in_a_benchmarks_own_table_alone(tmp_path):
    assert holm([0.01, 0.04, 0.03, 0.5]).tolist() == pytest.approx([0.04, 0.09, 0.09, 0.5])  # 4, 3, 2, 1 times, rising
    assert markdown_table([["log pi(y|x)", "n"], ["a", "1"]]).startswith(r"| log pi(y\|x) | n |")  # ends no cell
    metrics = {"mt_bench": 6.0, "mt_bench_turn1": 6.5, "mt_bench_math": 3.25}
    write_result(tmp_path, "tiny", "rmipo", "mtbench", metrics)
    write_result(tmp_path, "tiny", "rmipo", "constraints", {"constraints_all": 3.0}, settings={"first_n": 4})
    assert "| MT-Bench Math |" in markdown(fill(benchmark_table(tmp_path, "tiny", ["mtbench"]), tmp_path))
    both = markdown(fill(benchmark_table(tmp_path, "tiny", ["mtbench", "constraints"]), tmp_path))
    assert "Math" not in both and "3.0**†" not in both and "**3.0†**" in both and "first_n=4" in both  # a trial


def test_win_rates_between_any_two_methods(benchmarks):
    frame, notes = win_rates(benchmarks, "tiny", "constraints")
    cells = {(line["row"], line["column"]): line for line in frame.to_dict("records")}
    assert cells["rmipo", "dpo"]["rate"] == 75.0  # ahead on half of the prompts, equal on the others
    assert cells["dpo", "rmipo"]["rate"] == 25.0 and cells["rmipo", "dpo"]["n"] == 40
    half = 1.96 * 25 / math.sqrt(40)
    assert cells["rmipo", "dpo"]["low"] == pytest.approx(75 - half, abs=1.5)
    assert cells["rmipo", "dpo"]["p_holm"] == cells["dpo", "rmipo"]["p_holm"] < 0.001
    texts = render_wins(frame, notes)
    assert row_of(texts["md"], "RMiPO")[1].startswith("75.0 [") and row_of(texts["md"], "RMiPO")[2] == ""
    assert "n 40" in texts["md"] and r"\begin{longtable}" in texts["tex"] and "rmipo,dpo,75.0" in texts["csv"]
    with pytest.raises(ReportError):
        win_rates(benchmarks, "tiny", "mtbench")


def test_a_rate_of_half_is_no_difference(tmp_path):
    for method, first in (("rmipo", 100.0), ("dpo", 0.0)):
        values = {"constraints_all": [first, 100.0 - first] * 20}
        write_result(tmp_path, "tiny", method, "constraints", {"constraints_all": 50.0}, per_prompt=values)
    frame, _ = win_rates(tmp_path, "tiny", "constraints")
    assert frame["rate"].tolist() == [50.0, 50.0] and frame["p_holm"].tolist() == [1.0, 1.0]
    assert all(low < 40 and high > 60 for low, high in zip(frame["low"], frame["high"], strict=True))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex isn't installed")
def test_latex_compiles(tmp_path):
    write_result(tmp_path, LLAMA, "rmipo", "mtbench", {"mt_bench": 6.0}, settings={"first_n": 4})
    source = "\n".join(latex(fill(build_table(number), tmp_path)) for number in TABLES)
    preamble = r"\documentclass{article}\usepackage{booktabs,longtable}\begin{document}"
    (tmp_path / "tables.tex").write_text(f"{preamble}\n{source}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_script_writes_three_formats(tmp_path, benchmarks):
    for given, shown in (
        ({"N": "7"}, "METHOD=table7-linear"),
        ({"BENCH": "constraints,specificity", "AGAINST": "dpo"}, "DPO − row on"),
        ({"WINS": "1", "BENCH": "constraints", "MODEL": str(benchmarks / "tiny")}, "75.0 ["),
    ):
        ended = run_here("table", "--outputs", str(benchmarks), folder=tmp_path, env={"MODEL": "tiny"} | given)
        assert ended.code == 0 and shown in ended.out
    names = ("table7-tiny", "table-constraints-specificity-tiny", "wins-constraints-tiny")
    files = {path.name for path in (benchmarks / "reports").iterdir()}
    assert files == {f"{name}.{suffix}" for name in names for suffix in FORMATS}


def test_a_table_of_another_evaluation(tmp_path):
    """By EVAL_NAME, in files of its own: results of the usual one have no part in it."""
    open_judge = {"name": "open", "settings": {"judge_endpoint": "127.0.0.1:8000/v1"}}
    write_result(tmp_path / "outputs", LLAMA, "dpo", "mtbench", {"mt_bench": 7.0}, **open_judge)
    for method in ("dpo", "simpo"):
        write_result(tmp_path / "outputs", LLAMA, method, "mtbench", {"mt_bench": 8.0})
    assert run_here("table", folder=tmp_path, env={"N": "1", "MODEL": LLAMA, "EVAL_NAME": "open"}).code == 0
    lines = csv.DictReader((tmp_path / f"outputs/reports/table1-{LLAMA}-open.csv").open())
    ours = {line["Method"]: (line["ours"], line["command"]) for line in lines if "MT-Bench" in line["Column"]}
    assert ours["DPO"] == ("7.0", "")
    train = f"make train MODEL={LLAMA} METHOD=simpo"
    assert ours["SimPO"] == ("", f"{train} && make eval MODEL={LLAMA} METHOD=simpo BENCH=mtbench EVAL_NAME=open ...")
    own = benchmark_table(tmp_path / "outputs", LLAMA, ["mtbench"], "open")
    assert set(own.cells["method"]) == {"dpo"}

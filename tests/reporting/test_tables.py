"""Tables: the paper's own averages, differences by hand, missing cells, mixed versions, the three formats."""

import csv
import io
import subprocess
import sys

import pytest

from rmipo.evaluation import benchmark_of
from rmipo.fingerprints import trained_fingerprint
from rmipo.reporting.filling import average_ranks, competition_ranks, fill
from rmipo.reporting.render import FORMATS, csv_text, latex, markdown
from rmipo.reporting.results import METHODS, PAPER_MODELS, ReportError, load_result, paper_rows
from rmipo.reporting.tables import LEADERBOARD, TABLES, build_table
from tests.helpers.paths import ROOT
from tests.helpers.result_files import write_result, write_run


def test_competition_ranks_by_hand():
    assert competition_ranks([9.0, 7.0, 7.0, 5.0]) == [1, 2, 2, 4]
    assert competition_ranks([1.0, 1.0, 1.0]) == [1, 1, 1]
    assert average_ranks([[3.0, 1.0], [2.0, 2.0], [2.0, 3.0]]) == [2.0, 2.0, 1.5]


@pytest.mark.parametrize("model", ["mistral-7b-instruct", "llama3-8b-instruct"])
def test_the_papers_averages_follow_from_its_rows(model):
    rows = [row for row in paper_rows("table2") if row["setting"] == model]
    scores = [[float(row[metric]) for metric in LEADERBOARD] for row in rows]
    assert len(rows) == 7
    for row, values, rank in zip(rows, scores, average_ranks(scores), strict=True):
        assert sum(values) / 6 == pytest.approx(float(row["avg_score"]), abs=0.005 + 1e-9), row["method"]
        assert rank == pytest.approx(float(row["avg_rank"]), abs=0.005), row["method"]


@pytest.mark.parametrize("number", sorted(TABLES))
def test_a_table_filled_with_the_papers_numbers_differs_nowhere(number, tmp_path):
    """Each cell reads its own file and metric: feeding back what the paper prints must give differences of 0."""
    table = build_table(number)
    by_file: dict[tuple[str, str, str], dict[str, float]] = {}
    printed: dict[tuple[str, str, str], set[float]] = {}
    for cell in (cell for row in table.cells for cell in row):
        assert cell.paper is not None
        by_file.setdefault((cell.model, cell.method, benchmark_of(cell.metric).name), {})[cell.metric] = cell.paper
        printed.setdefault((cell.model, cell.method, cell.metric), set()).add(cell.paper)
    assert all(len(values) == 1 for values in printed.values())
    for key, metrics in by_file.items():
        write_result(tmp_path, *key, metrics)
    filled = fill(table, tmp_path)
    entries = [entry for row in filled.entries for entry in row]
    assert len(entries) == {1: 144, 2: 112, 3: 36, 5: 20, 7: 8, 8: 8}[number]
    assert all(abs(entry.difference) < 0.005 + 1e-9 for entry in entries)
    assert "Missing cells" not in markdown(filled)


@pytest.mark.parametrize(
    ("number", "model", "method", "metric", "printed"),
    [  # read in the paper's text
        (1, "mistral-7b-base", "initial", "alpacaeval2_lc", 8.4),
        (1, "mistral-7b-instruct", "epsilon-dpo", "alpacaeval2_wr", 29.6),
        (1, "llama3-8b-base", "rmipo", "mt_bench", 7.8),
        (1, "llama3-8b-instruct", "cpo", "alpacaeval2_wr", 32.2),
        (2, "mistral-7b-instruct", "simper", "musr", 9.47),
        (2, "llama3-8b-instruct", "rmipo", "gpqa", 3.50),
        (3, "llama3-8b-instruct", "table3-row2", "bbh", 26.94),
        (3, "llama3-8b-instruct", "table3-row4", "mmlu_pro", 28.91),
        (5, "mistral-7b-instruct", "table5-alpha-dpo", "alpacaeval2_wr", 38.4),
        (5, "llama3-8b-instruct", "dpo", "alpacaeval2_lc", 40.2),
        (5, "llama3-8b-instruct", "table5-simper", "alpacaeval2_lc", 41.7),
        (7, "mistral-7b-instruct", "table7-cosine", "alpacaeval2_lc", 35.5),
        (7, "llama3-8b-instruct", "table7-constant", "alpacaeval2_lc", 47.2),
        (8, "mistral-7b-instruct", "table8-1-1.2", "alpacaeval2_lc", 36.9),
        (8, "llama3-8b-instruct", "table8-0-2", "alpacaeval2_lc", 50.4),
    ],
)
def test_the_papers_numbers_stand_at_their_runs(number, model, method, metric, printed):
    cells = [cell for row in build_table(number).cells for cell in row]
    assert [c.paper for c in cells if (c.model, c.method, c.metric) == (model, method, metric)] == [printed]


def test_labels_stand_over_and_beside_their_cells():
    """The label of a column or row, and the run and metric that is read there."""
    table = build_table(5)
    assert table.columns[3] == ("Llama3-8B-Instruct", "WR (%)") and table.rows[3] == ("SimPER",)
    cell = table.cells[3][3]
    assert (cell.model, cell.method, cell.metric) == ("llama3-8b-instruct", "table5-simper", "alpacaeval2_wr")
    table = build_table(3)
    assert table.rows[1] == ("Llama3-8B-Instruct", "", "✓", "") and table.columns[4] == ("", "MUSR")
    assert (table.cells[1][4].method, table.cells[1][4].metric) == ("table3-row2", "musr")
    table = build_table(8)
    assert table.columns[2] == ("", "[0.5, 1.4]") and table.cells[0][2].method == "table8-0.5-1.4"


def test_papers_table1_covers_every_method_and_model():
    keys = {(row["method"], row["setting"]) for row in paper_rows("table1")}
    assert keys == {(method, model) for method in METHODS for model in PAPER_MODELS}


def test_difference_and_missing_cells(tmp_path):
    metrics = {"alpacaeval2_lc": 36.64, "alpacaeval2_wr": 30.0}
    write_result(tmp_path, "llama3-8b-instruct", "rmipo", "alpacaeval", metrics)
    write_run(tmp_path / "llama3-8b-instruct" / "dpo", {"name": "dpo"}, [])
    text = markdown(fill(build_table(1, ["llama3-8b-instruct"]), tmp_path))
    assert "| RMiPO | 49.1 / 36.6 / -12.5 | 46.3 / 30.0 / -16.3 | 8.3 / [" in text  # 36.64 - 49.1 = -12.46
    lines = text.splitlines()
    # dpo is trained, so only its evaluation is missing; simpo has to be trained first.
    assert any(line.endswith("] `make eval MODEL=llama3-8b-instruct METHOD=dpo BENCH=alpacaeval`") for line in lines)
    train, evaluate = (f"`make {verb} MODEL=llama3-8b-instruct METHOD=simpo" for verb in ("train", "eval"))
    assert any(f"{train}`, then {evaluate} BENCH=mtbench`" in line for line in lines)
    # Nothing has to be trained for the first row of an Instruct setting, SFT for that of a Base setting.
    initial = "`make eval MODEL=llama3-8b-{} METHOD=initial BENCH=alpacaeval`"
    assert any(line.endswith("] " + initial.format("instruct")) for line in lines)
    base = markdown(fill(build_table(1, ["llama3-8b-base"]), tmp_path))
    assert "] `make train MODEL=llama3-8b-base STAGE=sft`, then " + initial.format("base") in base


def test_unfinished_results_and_runs_count_as_missing(tmp_path):
    metrics = dict.fromkeys(LEADERBOARD, 10.0)
    write_result(tmp_path, "llama3-8b-instruct", "rmipo", "leaderboard", metrics, finished=False)
    write_run(tmp_path / "llama3-8b-instruct" / "rmipo", {"name": "rmipo"}, [], finished=False)
    filled = fill(build_table(2, ["llama3-8b-instruct"]), tmp_path)
    entry = filled.entries[-1][0]
    assert entry.ours is None and entry.paper == 69.07 and len(entry.commands) == 2


def test_ranks_among_fewer_methods_are_not_compared(tmp_path):
    for method, score in (("rmipo", 30.0), ("dpo", 20.0)):
        write_result(tmp_path, "llama3-8b-instruct", method, "leaderboard", dict.fromkeys(LEADERBOARD, score))
    filled = fill(build_table(2, ["llama3-8b-instruct"]), tmp_path)
    by_method = {labels[1]: row for labels, row in zip(filled.table.rows, filled.entries, strict=True)}
    score, rank = by_method["RMiPO"][-2:]
    assert score.ours == 30.0 and score.difference == pytest.approx(30.0 - 24.9)
    assert rank.ours == 1.0 and rank.difference is None
    assert by_method["DPO"][-1].ours == 2.0 and by_method["SimPO"][-1].ours is None
    assert any("2 of 7 methods" in note for note in filled.notes)


def test_a_length_controlled_rate_that_was_left_out_can_be_added(tmp_path):
    path = write_result(tmp_path, "tiny", "rmipo", "alpacaeval", {"alpacaeval2_wr": 40.0})
    lc, wr, _ = fill(build_table(1, ["tiny"]), tmp_path).entries[-1]
    assert wr.ours == 40.0 and lc.ours is None
    evaluate = "make eval MODEL=tiny METHOD=rmipo BENCH=alpacaeval ARGS='--set alpacaeval.length_controlled=true'"
    assert lc.commands == (f"rm {path}", evaluate)


def test_a_stand_in_has_no_length_controlled_rate(tmp_path):
    settings = {"reference": "pairs/test.jsonl", "length_controlled": False}
    write_result(tmp_path, "tiny", "rmipo", "alpacaeval", {"alpacaeval2_wr": 40.0}, settings=settings)
    filled = fill(build_table(1, ["tiny"]), tmp_path)
    assert filled.entries[-1][0].commands == () and filled.entries[-2][0].commands
    text = markdown(filled)
    assert "| RMiPO | – / n/a | – / 40.0 | – / [" in text and "n/a: the length-controlled model knows" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "isn't JSON"),
        ("[]", "holds a list"),
        ('{"finished": true, "bench": "leaderboard"}', r"lacks \['metrics', 'versions', 'settings'\]"),
        ('{"finished": true, "bench": "hh", "metrics": {}, "versions": {}, "settings": {}}', "its name says"),
    ],
)
def test_broken_result_files_are_named(tmp_path, content, message):
    path = write_result(tmp_path, "tiny", "rmipo", "leaderboard", {})
    path.write_text(content)
    with pytest.raises(ReportError, match=message) as raised:
        fill(build_table(2, ["tiny"]), tmp_path)
    assert str(path) in str(raised.value)


def test_a_result_of_other_weights_is_refused(tmp_path):
    path = write_result(tmp_path, "tiny", "initial", "leaderboard", dict.fromkeys(LEADERBOARD, 10.0), fingerprint="0a")
    folder = tmp_path / "tiny" / "initial"
    assert load_result(tmp_path, "tiny", "initial", "leaderboard").metrics["bbh"] == 10.0  # copied without the weights
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ReportError) as raised:
        load_result(tmp_path, "tiny", "initial", "leaderboard")
    assert str(raised.value) == (
        f"{path} is of other weights than those now in {folder}; delete it, and {folder}/eval/leaderboard if that is "
        "there, and run `make eval MODEL=tiny METHOD=initial BENCH=leaderboard`"
    )
    path.write_text(path.read_text().replace("0a", trained_fingerprint(folder)))
    assert load_result(tmp_path, "tiny", "initial", "leaderboard") is not None


def test_csv_and_latex(tmp_path):
    metrics = {"alpacaeval2_lc": 47.25, "alpacaeval2_wr": 40.0}
    write_result(tmp_path, "llama3-8b-instruct", "alpha-dpo", "alpacaeval", metrics)
    filled = fill(build_table(1, ["llama3-8b-instruct"]), tmp_path)
    rows = list(csv.DictReader(io.StringIO(csv_text(filled))))
    row = next(row for row in rows if row["Method"] == "α-DPO" and row["Column"] == "Llama3-8B-Instruct LC (%)")
    assert (row["paper"], row["ours"], row["command"], row["note"]) == ("46.6", "47.25", "", "")
    assert float(row["difference"]) == pytest.approx(0.65)
    text = latex(filled)
    cells = [r"46.6 / 47.2 {\scriptsize($+0.6$)}", r"38.1 / 40.0 {\scriptsize($+1.9$)}", "8.1 / [15]"]
    assert " & ".join([r"$\alpha$-DPO", *cells]) + r" \\" in text
    assert r"\multicolumn{3}{c}{Llama3-8B-Instruct}" in text and r"LC (\%)" in text
    assert all(line.count("&") == 3 for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line)


def test_notes_and_commands_are_in_all_three_formats(tmp_path):
    judged = {"mt_bench": 6.0, "mt_bench_missing": 7}
    path = write_result(tmp_path, "tiny", "rmipo", "mtbench", judged, settings={"first_n": 4})
    filled = fill(build_table(1, ["tiny"]), tmp_path)
    notes = [
        f"TRIAL, not the benchmark itself: {path} was made with first_n=4.",
        f"MISSING: {path}, 7 verdicts.",
    ]
    assert filled.notes[1:] == notes
    assert all(f"- {note}\n" in markdown(filled) for note in notes)
    rows = {(row["Method"], row["Column"]): row for row in csv.DictReader(io.StringIO(csv_text(filled)))}
    assert rows["RMiPO", "tiny MT-Bench"]["note"] == " ".join(notes)
    assert rows["DPO", "tiny MT-Bench"]["note"] == ""
    text = latex(filled)
    tabular, after = text.split(r"\end{tabular}")
    assert r"first\_n=4.\par" in after and ", 7 verdicts.\\par" in after
    # The first cell without a number points at the first comment.
    assert "Initial & -- / [1] & -- / [1] & -- / [2]" in tabular
    assert "[1], ...: not run yet; the commands are comments below this table.\\par" in after
    comments = after.split(r"\end{table*}")[1].splitlines()[1:]
    assert comments[0] == (
        "% [1] make train MODEL=tiny STAGE=sft, then make eval MODEL=tiny METHOD=initial BENCH=alpacaeval"
    )
    assert len(comments) == 12 + 11 and all(line.startswith("% [") for line in comments)


def test_an_average_carries_the_notes_of_its_row(tmp_path):
    write_result(tmp_path, "tiny", "rmipo", "leaderboard", dict.fromkeys(LEADERBOARD, 10.0), settings={"limit": 5})
    row = fill(build_table(2, ["tiny"]), tmp_path).entries[-1]
    assert [entry.notes for entry in row] == [row[0].notes] * 8 and "limit=5" in row[0].notes[0]


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **environment})


def test_script_writes_three_formats(tmp_path):
    done = run_script("--outputs", str(tmp_path), N="7", MODEL="tiny")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {f"table7-tiny.{suffix}" for suffix in FORMATS}
    assert "METHOD=table7-linear" in done.stdout


@pytest.mark.parametrize("number", ["4", ""])
def test_script_refuses_other_tables_in_one_line(tmp_path, number):
    done = run_script("--outputs", str(tmp_path), **({"N": number} if number else {}))
    assert done.returncode != 0 and "[1, 2, 3, 5, 7, 8]" in done.stderr and "Traceback" not in done.stderr

"""Tables: the paper's numbers at their runs, differences and ranks by hand, missing cells, seeds, other judges.

Differences prompt by prompt, against a slow bootstrap by hand.
"""

import csv
import math
import random
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
import yaml

from rmipo.fingerprints import trained_fingerprint
from rmipo.recipe.files import GENERATION
from rmipo.reporting.render import csv_text, markdown
from rmipo.reporting.results import ReportError, load_result, paper_table
from rmipo.reporting.tables import TABLES, Table, benchmark_table, build_table, fill, paired_difference
from tests.helpers.paths import ROOT
from tests.helpers.result_files import DECODING, write_result, write_run

PAPER_TEXT = Path(__file__).with_name("paper_tables.txt")
LLAMA = "llama3-8b-instruct"
LEADERBOARD = ("ifeval", "bbh", "math", "gpqa", "musr", "mmlu_pro")


def cell_of(filled: Table, *labels: str):
    (found,) = [c for c in filled.cells.itertuples() if set(labels) <= {c.Method, c.group, c.column}]
    return found


def transcribed(number: int) -> list[list[str]]:
    blocks = PAPER_TEXT.read_text().split("[table")
    lines = next(block for block in blocks if block.startswith(f"{number}]")).splitlines()[1:]
    return [[cell.strip().replace("ϵ", "ε").replace(" -", "-") for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize("number", sorted(TABLES))
def test_numbers_and_labels_are_those_of_the_papers_text(number):
    """Against a second transcription: a number or row that is swapped in the CSV or in the code is found."""
    rows: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for cell in build_table(number).cells.itertuples():
        row = tuple(getattr(cell, header) for header in build_table(number).headers)
        rows[row] += [] if pd.isna(cell.paper) else [cell.paper]
    labels = {1: 1, 2: 2, 3: 3, 5: 1, 7: 1, 8: 1}[number]
    width = {1: 12, 2: 6, 3: 6, 5: 4, 7: 4, 8: 4}[number]
    for (row, numbers), text in zip(rows.items(), transcribed(number), strict=True):
        shown = [cell for cell in text[labels:] if cell]
        assert numbers == [float(cell) for cell in shown[:width]], row
        if number == 3:
            assert [mark in row[1] for mark in ("GM", "MI", "ED")] == [cell == "✓" for cell in text[:3]]
        elif number < 7:
            assert row[-1] == text[labels - 1]
        else:
            assert row[0].split("-")[0].rstrip("3") == text[0].split("-")[0]
    printed = paper_table("table2")[["avg_score", "avg_rank"]].to_numpy().tolist()
    assert printed == [[float(cell) for cell in row[-2:]] for row in transcribed(2)]


@pytest.mark.parametrize("number", sorted(TABLES))
def test_a_table_filled_with_the_papers_numbers_differs_nowhere(number, tmp_path):
    """Each cell reads its own file and metric; the averages of Table 2 follow from its rows."""
    by_file: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    table = build_table(number)
    for cell in fill(table, tmp_path).cells.itertuples():
        if not cell.metric.startswith("avg_"):
            by_file[cell.model, cell.method, cell.bench][cell.metric] = 1000.0 if pd.isna(cell.paper) else cell.paper
    for key, metrics in by_file.items():
        write_result(tmp_path, *key, metrics)
    cells = fill(table, tmp_path).cells
    compared = cells[cells["metric"] != "alpacaeval2_length"]
    assert len(compared) == {1: 144, 2: 112, 3: 36, 5: 20, 7: 8, 8: 8}[number]
    assert (compared["difference"].abs() < 0.005 + 1e-9).all() and not compared["difference"].isna().any()


def test_labels_stand_over_and_beside_their_cells_and_decoding_is_that_of_the_recipes():
    cell = build_table(5).cells.iloc[-5]
    assert (cell.Method, cell.group, cell.column) == ("SimPER", "Llama3-8B-Instruct", "WR (%)")
    assert (cell.model, cell.method, cell.metric) == (LLAMA, "table5-simper", "alpacaeval2_wr")
    cell = build_table(3).cells.iloc[6 + 4]
    assert (cell.Model, cell.Method, cell.column) == ("Llama3-8B-Instruct", "MI", "MUSR")
    assert (cell.method, cell.metric) == ("table3-row2", "musr")
    for number, expected in (
        (7, {"Exponential": "rmipo", "Linear": "table7-linear", "Cosine": "table7-cosine", "w/o": "table7-constant"}),
        (8, {"[0, 2]": "table8-0-2", "[0.3, 1.6]": "rmipo", "[0.5, 1.4]": "table8-0.5-1.4",
             "[1.0, 1.2]": "table8-1-1.2"}),
    ):  # fmt: skip
        assert dict(build_table(number).cells[["column", "method"]].values[:4]) == expected
    decoding = paper_table("decoding").set_index("setting").to_dict("index")
    assert decoding == DECODING
    for model, values in decoding.items():
        generation = yaml.safe_load((ROOT / "recipes" / model / "eval.yaml").read_text())["generation"]
        assert values.items() <= (GENERATION | generation).items(), model


def test_difference_and_missing_cells(tmp_path):
    write_result(tmp_path, LLAMA, "rmipo", "alpacaeval", {"alpacaeval2_lc": 36.64, "alpacaeval2_wr": 30.0})
    write_run(tmp_path / LLAMA / "dpo", {"name": "dpo"}, [])
    filled = fill(build_table(1, [LLAMA]), tmp_path)
    assert cell_of(filled, "RMiPO", "LC (%)").difference == pytest.approx(36.64 - 49.1)
    # dpo is trained, so only its evaluation is missing; simpo has to be trained first.
    assert cell_of(filled, "DPO", "LC (%)").commands == (f"make eval MODEL={LLAMA} METHOD=dpo BENCH=alpacaeval",)
    assert cell_of(filled, "SimPO", "MT-Bench").commands == (
        f"make train MODEL={LLAMA} METHOD=simpo",
        f"make eval MODEL={LLAMA} METHOD=simpo BENCH=mtbench",
    )
    # Nothing has to be trained for the first row of an Instruct setting, SFT for that of a Base setting.
    initial = "make eval MODEL=llama3-8b-{} METHOD=initial BENCH=alpacaeval"
    assert cell_of(filled, "Initial", "LC (%)").commands == (initial.format("instruct"),)
    base = fill(build_table(1, ["llama3-8b-base"]), tmp_path)
    sft = "make train MODEL=llama3-8b-base STAGE=sft"
    assert cell_of(base, "Initial", "LC (%)").commands == (sft, initial.format("base"))


def test_unfinished_results_and_lacking_tasks_count_as_missing(tmp_path):
    write_result(tmp_path, LLAMA, "rmipo", "leaderboard", dict.fromkeys(LEADERBOARD, 10.0), finished=False)
    write_run(tmp_path / LLAMA / "rmipo", {"name": "rmipo"}, [], finished=False)
    cell = cell_of(fill(build_table(2, [LLAMA]), tmp_path), "RMiPO", "IFEval")
    assert pd.isna(cell.ours) and cell.paper == 69.07 and len(cell.commands) == 2
    path = write_result(tmp_path, "tiny", "rmipo", "leaderboard", {"ifeval": 50.0})
    cell = cell_of(fill(build_table(2, ["tiny"]), tmp_path), "RMiPO", "BBH")
    assert cell.commands == ("make eval MODEL=tiny METHOD=rmipo BENCH=leaderboard",) and path.exists()  # is added to it


def test_averages_need_all_of_their_scores_and_carry_what_is_said_of_their_row(tmp_path):
    for method, score in (("rmipo", 30.0), ("dpo", 20.0)):
        write_result(tmp_path, LLAMA, method, "leaderboard", dict.fromkeys(LEADERBOARD, score))
    filled = fill(build_table(2, [LLAMA]), tmp_path)
    score, rank = cell_of(filled, "RMiPO", "Avg. Score"), cell_of(filled, "RMiPO", "Avg. Rank")
    assert score.ours == 30.0 and score.difference == pytest.approx(30.0 - 24.9)
    assert pd.isna(rank.ours) and pd.isna(cell_of(filled, "SimPO", "Avg. Score").ours)
    write_result(tmp_path, "tiny", "rmipo", "leaderboard", dict.fromkeys(LEADERBOARD, 10.0), settings={"limit": 5})
    row = [cell for cell in fill(build_table(2, ["tiny"]), tmp_path).cells.itertuples() if cell.Method == "RMiPO"]
    assert len(row) == 8 and all(cell.deviations == row[0].deviations for cell in row)
    assert "limit=5" in row[0].deviations[0]


def test_a_finished_result_without_the_metric_has_no_command(tmp_path):
    write_result(tmp_path, "tiny", "rmipo", "alpacaeval", {"alpacaeval2_wr": 40.0})
    filled = fill(build_table(1, ["tiny"]), tmp_path)
    assert cell_of(filled, "RMiPO", "WR (%)").ours == 40.0 and cell_of(filled, "RMiPO", "LC (%)").commands == ()


def write_seed(outputs: Path, folder: str, seed: int, value: float, **more) -> None:
    write_run(outputs / LLAMA / folder, {"name": "rmipo", "beta": 2.0}, [], seed=seed, **more)
    metrics = {"mt_bench": value, "mt_bench_standard_error": 0.25}
    write_result(outputs, LLAMA, folder, "mtbench", metrics)


def test_seeds_are_averaged_and_nothing_else_is(tmp_path):
    write_seed(tmp_path, "rmipo", 42, 7.0)
    cell = cell_of(fill(build_table(1, [LLAMA]), tmp_path), "RMiPO", "MT-Bench")
    assert (cell.ours, cell.error, len(cell.results)) == (7.0, 0.25, 1)
    write_seed(tmp_path, "rmipo-seed43", 43, 8.0, save_steps=5)
    write_seed(tmp_path, "again", 42, 1.0)  # the same seed once more
    write_seed(tmp_path, "other-rate", 44, 1.0, learning_rate=1e-6)
    write_seed(tmp_path, "other-pairs", 45, 1.0, fingerprints={"train": "0b"})
    write_seed(tmp_path, "open", 46, 1.0, finished=False)
    write_seed(tmp_path, "unjudged", 47, 1.0)
    write_result(tmp_path, LLAMA, "unjudged", "mtbench", {}, finished=False)
    cell = cell_of(fill(build_table(1, [LLAMA]), tmp_path), "RMiPO", "MT-Bench")
    assert (cell.ours, len(cell.results)) == (7.5, 2)
    assert cell.error == pytest.approx(0.5**0.5) and cell.difference == pytest.approx(7.5 - 8.3)
    own = fill(benchmark_table(tmp_path, LLAMA, ["mtbench"]), tmp_path)
    assert own.cells["Method"].unique().tolist() == ["RMiPO", "other-pairs", "other-rate"]  # once each
    assert own.cells["ours"].dropna().tolist() == [7.5, 1.0, 1.0]
    (tmp_path / LLAMA / "other-rate/model.safetensors").write_bytes(b"trained anew, and not of Table 1")
    assert cell_of(fill(build_table(1, [LLAMA]), tmp_path), "RMiPO", "MT-Bench").ours == 7.5


def test_a_result_of_other_weights_is_refused(tmp_path):
    path = write_result(tmp_path, "tiny", "initial", "leaderboard", dict.fromkeys(LEADERBOARD, 10.0), fingerprint="0a")
    folder = tmp_path / "tiny" / "initial"
    assert load_result(tmp_path, "tiny", "initial", "leaderboard").metrics["bbh"] == 10.0  # copied without the weights
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ReportError) as raised:
        load_result(tmp_path, "tiny", "initial", "leaderboard")
    assert str(path) in str(raised.value) and str(folder) in str(raised.value)
    path.write_text(path.read_text().replace("0a", trained_fingerprint(folder)))
    assert load_result(tmp_path, "tiny", "initial", "leaderboard") is not None


DRAW = random.Random(0)
EASE = [DRAW.uniform(0, 80) for _ in range(60)]  # of the prompts, for every method alike
OURS = [ease + DRAW.uniform(0, 20) for ease in EASE]
THEIRS = [ease + DRAW.uniform(0, 15) for ease in EASE]


def result(outputs: Path, method: str, values: list[float | None], metric: str = "mt_bench", **changes):
    known = [value for value in values if value is not None]
    write_result(
        outputs, LLAMA, method, "mtbench", {metric: sum(known) / len(known)}, per_prompt={metric: values}, **changes
    )
    return load_result(outputs, LLAMA, method, "mtbench")


def test_against_a_bootstrap_by_hand(tmp_path):
    found = paired_difference([result(tmp_path, "rmipo", OURS)], [result(tmp_path, "dpo", THEIRS)], "mt_bench")
    draw, means = random.Random(1), []
    for _ in range(4000):
        prompts = [draw.randrange(60) for _ in range(60)]
        means.append(sum(OURS[i] for i in prompts) / 60 - sum(THEIRS[i] for i in prompts) / 60)
    means.sort()
    assert found.mean == pytest.approx((sum(OURS) - sum(THEIRS)) / 60)
    assert found.low == pytest.approx(means[100], abs=0.15) and found.high == pytest.approx(means[3900], abs=0.15)
    assert found.high - found.low < 5  # the prompts' ease, of standard deviation 23, has gone
    assert found.p == pytest.approx(math.erfc(found.mean / found.standard_error / 2**0.5)) and 0 < found.p < 0.05


def test_seeds_are_averaged_prompts_without_a_verdict_left_out_and_draws_compared_one_by_one(tmp_path):
    ours = [result(tmp_path, "rmipo", [8.0, 2.0, None, 7.0]), result(tmp_path, "again", [6.0, 5.0, 5.0, 7.0])]
    theirs = [result(tmp_path, "dpo", [5.0, 1.0, 3.0, None])]
    found = paired_difference(ours, theirs, "mt_bench")  # of the first two prompts: 7 - 5 and 3.5 - 1
    assert found.mean == 2.25 and (found.low, found.high) == (2.0, 2.5)
    assert paired_difference(ours, [result(tmp_path, "short", [5.0])], "mt_bench") is None
    write_result(tmp_path, LLAMA, "old", "mtbench", {"mt_bench": 7.0})
    assert paired_difference(ours, [load_result(tmp_path, LLAMA, "old", "mtbench")], "mt_bench") is None
    assert paired_difference([], theirs, "mt_bench") is None

    def lc(method: str, rate: float, draws: list[float]):
        write_result(tmp_path, LLAMA, method, "alpacaeval", {"alpacaeval2_lc": rate}, draws={"alpacaeval2_lc": draws})
        return load_result(tmp_path, LLAMA, method, "alpacaeval")

    ours = [lc("rmipo", 30.0, [29.0, 31.0, 35.0]), lc("again", 32.0, [31.0, 33.0, 33.0])]  # means 30, 32, 34
    theirs = [lc("dpo", 28.0, [27.0, 31.0, 31.0])]
    found = paired_difference(ours, theirs, "alpacaeval2_lc")  # draws 3, 1, 3
    assert found.mean == 3.0 and found.low == pytest.approx(1.1) and found.high == 3.0
    assert found.standard_error == pytest.approx((8 / 9) ** 0.5)


def test_a_table_of_the_paper_has_the_differences(tmp_path):
    for method, values in (("rmipo", [7.0, 9.0]), ("dpo", [6.5, 8.5]), ("initial", [7.0, 9.5])):
        result(tmp_path, method, values)
    write_result(tmp_path, LLAMA, "simpo", "mtbench", {"mt_bench": 7.0})  # of before, without values per prompt
    filled = fill(build_table(1, [LLAMA]), tmp_path)
    lines = [line for line in markdown(filled).splitlines() if line.startswith(("| Initial", "| DPO", "| SimPO"))]
    ends = ["8.1 / 8.2 / +0.2 / -0.2 [-0.5, +0.0] |", "8.0 / 7.5 / -0.5 / +0.5 [+0.5, +0.5] |", "8.0 / 7.0 / -1.0 |"]
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True))
    rows = {row["Method"]: row for row in csv.DictReader(csv_text(filled).splitlines()) if "MT" in row["Column"]}
    columns = [rows["DPO"][f"behind_rmipo{end}"] for end in ("", "_low", "_high")]
    assert columns == ["0.5"] * 3 and rows["RMiPO"]["behind_rmipo"] == rows["SimPO"]["behind_rmipo"] == ""

"""`make compare`: the same start, pairs and budget for every method; nothing is trained twice; numbers by hand."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import runpy
import shutil
import signal
import types
from pathlib import Path
from statistics import mean

import numpy as np
import psutil
import pytest
import torch
from transformers import TrainerState

from rmipo.compare import program as programs
from rmipo.compare import runs as compared
from rmipo.compare.runs import Log, execute
from rmipo.compare.study import FLOOR, INITIAL, METHODS, PairsTask, Study, Trial
from rmipo.errors import ConfigError
from rmipo.evaluation.statistics import contrast
from rmipo.objectives import OBJECTIVES
from rmipo.reporting import comparison
from rmipo.tiny.files import write_world
from rmipo.tiny.world import CLASSES, load_world_config
from tests.helpers.launched import launch, wait_until
from tests.helpers.paths import ROOT
from tests.helpers.programs import held, run_here
from tests.helpers.rows import pair, pairs, user, write

SMALL = {"names": 4, "values_per_attribute": 4, "sft_train": 60, "sft_test": 8, "pairs_train": 40, "pairs_test": 24}
SMALL |= {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32}
ARGUMENTS = "--max_steps 3 --warmup_steps 0 --global_batch_size 8 --per_device_train_batch_size 4"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of what a comparison reads, with a small world whose untrained model takes the SFT model's place."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("rmipo", "recipes", "configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    config = dataclasses.replace(load_world_config(ROOT / "recipes/tiny/world.yaml"), **SMALL)
    write_world(folder / "outputs/tiny/world", config)
    shutil.copytree(folder / "outputs/tiny/world/model", folder / "outputs/tiny/sft")
    (folder / "outputs/tiny/sft/run.json").write_text('{"finished": true}')
    (folder / "recipes/tiny/search.yaml").write_text("parameters: {learning_rate: {values: [1.0e-3, 2.0e-2]}}\n")
    return folder


@pytest.fixture
def study(repository, monkeypatch):
    monkeypatch.chdir(repository)
    return Study("tiny", arguments=ARGUMENTS)


def run_of(method="rmipo", purpose="report", rate=1e-3, seed=0, noise=0.0):
    return Trial(purpose, method, rate, seed, noise)


def test_every_method_has_the_same_start_pairs_order_and_length(study):
    recipes = {method: study.recipe(run_of(method, rate=2e-4, seed=7)).values for method in METHODS}
    for method, values in recipes.items():
        assert values["objective"]["name"] == (method if method in OBJECTIVES else "rmipo")
        assert {key for key in values if values[key] != recipes["rmipo"].get(key)} <= {"objective"}
        assert values["seed"] == 7 and values["learning_rate"] == 2e-4


def test_seeds_draw_other_pairs_of_the_same_facts_and_noise_swaps_some(study, monkeypatch):
    first, other, noisy_rows = (
        study.task.train_pairs(run_of(seed=seed, noise=noise)).to_list()
        for seed, noise in ((0, 0.0), (1, 0.0), (0, 0.15))
    )
    assert len(first) == len(other) == len(noisy_rows) == 40 and first != other
    right = {answer for fact in study.task.world.facts for answer in fact.answers}
    assert all(row["chosen"][0]["content"] in right for row in first + other)
    kept = swapped = 0
    for row, noisy in zip(first, noisy_rows, strict=True):
        kept += row == noisy
        swapped += row | {"chosen": row["rejected"], "rejected": row["chosen"]} == noisy
    assert (kept, swapped) == (34, 6)
    before = study.task.identity()
    assert study.task.identity() == before
    monkeypatch.setattr("rmipo.tiny.world.BOILERPLATE", ("Bye.",) * 4)
    assert study.task.identity() != before  # other code draws other pairs


def test_what_selects_is_not_what_is_reported(study):
    search, report = (run_of(purpose=purpose) for purpose in ("search", "report"))
    asked, reported = study.task.questions(search), study.task.questions(report)
    pairs, reported_pairs = (study.task.held_out_pairs(run) for run in (search, report))
    assert len(asked) + len(reported) == len(study.task.world.held_out_questions)
    assert not {question.fact for question in asked} & {question.fact for question in reported}
    assert len(pairs) + len(reported_pairs) == 24 and min(len(pairs), len(reported_pairs)) > 4
    prompts = [{row[0]["content"] for row in part["prompt"]} for part in (pairs, reported_pairs)]
    assert not prompts[0] & prompts[1]


def test_other_people_s_pairs_are_divided_by_prompt(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository)
    for split, count in (("train", 20), ("test", 12)):
        write(tmp_path / f"{split}.jsonl", [pair(i, [user(f"Q{i % 6}?")]) for i in range(count)])
    study = Study("tiny", f"{ARGUMENTS} --dataset_name {tmp_path}")
    assert not study.task.swaps_labels  # noise would be told of runs on clean labels
    assert Study("tiny").task.swaps_labels
    assert type(study.task) is PairsTask and study.task.selection_metric == "preference_accuracy"
    parts = [study.task.held_out_pairs(run_of(purpose=purpose)) for purpose in ("search", "report")]
    assert [len(pairs) for pairs in parts] == [6, 6]
    assert len({json.dumps(prompt) for pairs in parts for prompt in pairs["prompt"]}) == 6
    result = execute(study, run_of("simpo"))
    assert set(result["metrics"]) == {"preference_accuracy", "preference_margin", "per_prompt"}


def test_answers_to_constraints_are_measured_as_eval_yaml_and_search_yaml_say(repository, monkeypatch):
    """A setting like smollm2-135m-instruct with the world's random model: its pairs, its benchmarks, its settings."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.chdir(repository)
    shutil.copytree("recipes/smollm2-135m-instruct", "recipes/own", ignore=shutil.ignore_patterns("weights*", "pairs*"))
    own = {"outputs/smollm2-135m-instruct/weights": "outputs/tiny/sft", "smollm2-135m-instruct": "own"}
    own["tokens: 120"] = "tokens: 4"
    for path, (old, new) in itertools.product(Path("recipes/own").glob("*.yaml"), own.items()):
        path.write_text(path.read_text().replace(old, new))
    measure = {"search": {"first_n": 3}, "report": {"skip_n": 3, "first_n": 2, "answers": 1}}
    search = {"parameters": {"learning_rate": {"values": [1.0e-3]}}}
    search["measure"] = {purpose: {"constraints": settings} for purpose, settings in measure.items()}
    Path("recipes/own/search.yaml").write_text(json.dumps(search))
    for split in ("train", "test"):
        write(Path(f"outputs/own/pairs/{split}.jsonl"), pairs(*range(8)))
    study = Study("own", arguments=f"{ARGUMENTS} --bf16 false --max_length 64 --max_prompt_length 32")
    generation = {"temperature": 0.3, "top_p": 1.0, "max_new_tokens": 4, "seed": 42, "batch_size": 32}
    generation |= {"dtype": "bfloat16", "engine": "transformers"}  # no vLLM beside the trained model on a GPU
    assert study.task.settings == {
        "search": {"constraints": {"answers": 2, "first_n": 3, "generation": generation}},
        "report": {"constraints": {"answers": 1, "skip_n": 3, "first_n": 2, "generation": generation}},
    }
    metrics = execute(study, run_of())["metrics"]
    assert study.task.selection_metric in metrics
    assert len(metrics["per_prompt"]["constraints_solved"]) == 2


@pytest.mark.parametrize("method", ["rmipo", "kto", "epsilon-dpo", FLOOR])
def test_a_run_trains_from_the_sft_model_and_measures(study, method):
    initial, result = execute(study, run_of(INITIAL, rate=None)), execute(study, run_of(method, rate=2e-2))
    metrics = result["metrics"]
    assert sum(metrics[name] for name in CLASSES) == pytest.approx(1)
    assert 0 <= metrics["right_probability"] <= 1 and initial["curve"] == []
    start, end = result["curve"]
    assert (start["step"], end["step"]) == (0, 3)
    assert start["preference_margin"] == pytest.approx(initial["metrics"]["preference_margin"], abs=1e-5)
    assert end["preference_margin"] == pytest.approx(metrics["preference_margin"], abs=1e-5)
    assert end["preference_margin"] != start["preference_margin"]
    assert result["seconds_per_step"] > 0


def test_the_time_of_a_step_is_without_that_of_its_curve(monkeypatch):
    """20 steps of 2 s; a measurement of 100 s before them and after every 10th."""
    clock = [7.0]

    def wait(seconds):
        clock[0] += seconds
        return {"preference_margin": clock[0]}

    monkeypatch.setattr(compared, "seconds", lambda device: clock[0])
    monkeypatch.setattr(compared.judge, "preference_metrics", lambda model, pairs: wait(100))
    monkeypatch.setattr(compared.attention, "attach", lambda model, kind: None)
    state = TrainerState(max_steps=20)

    def train(trainer, callbacks):
        (curve,) = callbacks
        curve.on_train_begin(trainer.args, state, None)
        for state.global_step in range(1, 21):
            wait(2)
            curve.on_step_end(trainer.args, state, None)

    trainer = types.SimpleNamespace(args=types.SimpleNamespace(device=torch.device("cpu")), state=state)
    result = compared.train_and_time(types.SimpleNamespace(train=train), trainer, None)
    assert result["seconds_per_step"] == 2
    assert [point["step"] for point in result["curve"]] == [0, 10, 20]


def test_runs_are_repeatable_and_divergence_is_a_result(study):
    first, second = (execute(study, run_of("dpo", rate=2e-2, noise=0.15)) for _ in range(2))
    assert first["metrics"] == second["metrics"] and first["curve"] == second["curve"]
    result = execute(study, run_of("slic", rate=1e30))
    assert result["metrics"] == {"diverged": True}


def test_a_line_is_found_by_everything_that_defines_its_run(study, tmp_path):
    path = tmp_path / "runs.jsonl"
    log = Log(path, study, 1)
    log.add(run_of(), {"metrics": {"right_probability": 0.5}, "curve": []}, {"commit": "abc"})
    line = log.find(run_of())
    assert line["commit"] == "abc" and line["learning_rate"] == 1e-3
    others = [run_of("dpo"), run_of(rate=2e-3), run_of(seed=1), run_of(noise=0.15), run_of(purpose="search")]
    assert [log.find(run) for run in others] == [None] * 5
    with open(path, "a") as file:
        file.write('{"key": "cut sh')  # killed while writing
    again = Log(path, study, 1)
    assert again.find(run_of()) == line and path.read_text().count("\n") == 1
    again.add(run_of(seed=1), {"metrics": {"right_probability": 0.6}}, {})
    assert [line["seed"] for line in again.train("runs", [run_of(seed=1), run_of()])] == [1, 0]
    longer = dataclasses.replace(study, arguments=ARGUMENTS.replace("max_steps 3", "max_steps 4"))
    assert Log(path, longer, 1).find(run_of()) is None


def found(method, rate, value, kl=0.0, objective=()):
    """A line of the search."""
    own = [list(each) for each in objective]
    metrics = {"diverged": True} if value is None else {"solved": value, "kl_initial": kl}
    return {"method": method, "learning_rate": rate, "objective": own, "metrics": metrics}


def test_the_best_run_of_each_method_is_chosen():
    lines = [found("dpo", 1e-4, 0.5), found("dpo", 2e-4, 0.7), found("kto", 1e-4, 0.6), found("kto", 2e-4, 0.2)]
    lines.append(found("kto", 5e-5, 0.6))  # of equal ones the highest rate
    best = programs.best_runs(lines, "solved")
    assert {method: line["learning_rate"] for method, line in best.items()} == {"dpo": 2e-4, "kto": 1e-4}
    wide, narrow = (("gamma", 1.6),), (("gamma", 0.3),)
    tuned = [found("simpo", 1.0, 5.0), found("simpo", 1.0, 7.0, 0, wide), found("simpo", 1.0, 7.0, 0, narrow)]
    assert programs.best_runs(tuned, "solved")["simpo"] is tuned[1]  # of equal ones the first
    lines[1] = found("dpo", 2e-4, None)
    assert programs.best_runs(lines, "solved")["dpo"]["learning_rate"] == 1e-4
    lines[0] = found("dpo", 1e-4, None)
    with pytest.raises(ConfigError, match="dpo diverge"):
        programs.best_runs(lines, "solved")


def test_rates_are_chosen_by_the_distance_too():
    searched = [found("rmipo", 1.0, 1, 0.1), found("rmipo", 2.0, 5, 0.4), found("dpo", 2.0, 5, 0.2)]
    searched += [found("dpo", 4.0, 8, 0.5), found("dpo", 8.0, None)]
    assert programs.nearest_rates(searched, {"rmipo": 2.0, "dpo": 4.0}) == {"rmipo": 2.0, "dpo": 4.0}
    assert programs.nearest_rates(searched, {"rmipo": 1.0, "dpo": 4.0}) == {"rmipo": 1.0, "dpo": 2.0}
    assert programs.nearest_rates([], {"rmipo": 1.0}) == {}


def line_of(method, seed, value, noise=0.0, rate=2e-4):
    curve = [{"step": 0, "preference_accuracy": 0.5, "preference_margin": 0.0}]
    metrics = dict.fromkeys(comparison.METRICS, 0.25) | {"right_probability": value}
    costs = {"seconds_per_step": 0.1 + seed, "peak_memory_mib": 50.0}
    run = {"method": method, "seed": seed, "noise": noise, "objective": (), "learning_rate": rate}
    made_with = {"commit": "abc", "versions": {"torch": "2", "trl": "1"}, "hardware": ["2 CPU cores"]}
    return {**run, "metrics": metrics, "curve": curve, **costs, **made_with}


LINES = [
    *(line_of("rmipo", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))),
    *(line_of("dpo", seed, value) for seed, value in enumerate((0.6, 0.5, 0.9))),
    *(line_of("simpo", seed, value, rate=4e-4) for seed, value in enumerate((0.4, 0.5, 0.6))),
]


def test_means_spreads_and_differences_paired_by_seed_or_prompt():
    rows = comparison.summarize(LINES, "right_probability").set_index("method").to_dict("index")
    assert rows["rmipo"]["right_probability"] == pytest.approx(0.6)
    assert rows["rmipo"]["right_probability_std"] == pytest.approx(0.1)
    assert rows["rmipo"]["seconds_per_step"] == pytest.approx(1.1)
    assert rows["dpo"]["difference"] == pytest.approx(0.2 / 3)  # 0.1, -0.1, 0.2
    # Of three seeds drawn again one in 27 has the lowest three times; wider by sqrt(3 / 2), as a seed too few is drawn.
    assert rows["dpo"]["difference_low"] == pytest.approx(0.2 / 3 - 1.5**0.5 * (0.1 + 0.2 / 3))
    assert rows["dpo"]["difference_high"] == pytest.approx(0.2 / 3 + 1.5**0.5 * (0.2 - 0.2 / 3))
    for bound in ("", "_low", "_high"):
        assert rows["simpo"][f"difference{bound}"] == pytest.approx(-0.1)

    def with_answers(line, shares):
        return line | {"metrics": {"per_prompt": {"constraints_solved": shares}, "constraints_solved": mean(shares)}}

    answers = np.random.default_rng(0).integers(0, 3, (2, 2, 60)) * 50.0  # method, seed, prompt
    runs = [(method, seed) for method in (0, 1) for seed in (0, 1)]
    lines = [with_answers(line_of(("rmipo", "dpo")[m], seed, 0.5), [*answers[m, seed]]) for m, seed in runs]
    lines += [with_answers(line_of(("rmipo", "dpo")[m], seed, 0.5, noise=0.15), [50.0] * 60) for m, seed in runs]
    lines += [line_of("rmipo", 2, 0.5), line_of("dpo", 2, 0.5) | {"metrics": {"diverged": True}}]
    row = comparison.summarize(lines, "constraints_solved").set_index(["noise", "method"]).loc[0.0, "dpo"]
    expected = contrast(answers[1], answers[0])
    assert row["difference"] == pytest.approx((answers[1] - answers[0]).mean()) == expected.mean
    assert (row["difference_low"], row["difference_high"]) == (expected.low, expected.high)


def test_a_report_has_the_search_runs_that_diverged_and_all_commits():
    searched = [line_of("rmipo", 1000, rate * 1e3, rate=rate) for rate in (1e-4, 2e-4, 4e-4)]
    diverged = {**line_of("kto", 0, 0.0), "metrics": {"diverged": True}}
    lines = [*LINES, diverged, {**LINES[0], "commit": "def", "hardware": ["8 CPU cores"]}]
    text = comparison.report({"right_probability": comparison.summarize(lines, "right_probability")}, lines, searched)
    assert "| RMiPO | 0.100 | 0.200 | 0.400 |" in text and "| KTO | 0.0002 | diverged |" in text
    assert "Commit abc and def; torch 2, trl 1; 2 CPU cores and 8 CPU cores." in text


CHOICES = {"MODEL": "tiny", "METHODS": "dpo", "SEEDS": "0", "NOISE": "0", "ARGS": ARGUMENTS, "WORKERS": "2"}


def compare(repository):
    program = launch(["scripts/compare.py"], root=repository, **CHOICES)
    assert program.wait() == 0, program.output[-6000:]
    return program.output


@pytest.mark.slow
def test_a_comparison_is_finished_where_it_was_interrupted(repository):
    output = compare(repository)
    folder = repository / "outputs/tiny/compare"
    path = folder / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["peak_memory_mib"] > 0 for line in lines if line["method"] != INITIAL)
    assert len(lines) == 2 * 2 + 3 == len({line["key"] for line in lines})
    assert "| RMiPO |" in output
    assert (folder / "compare.png").stat().st_size > 10_000
    assert len((folder / "table.csv").read_text().splitlines()) == 4
    assert len((folder / "curves.csv").read_text().splitlines()) == 1 + 2 * 2

    kept = path.read_text().splitlines(keepends=True)[:-1]
    path.write_text("".join(kept))
    compare(repository)
    assert path.read_text().splitlines(keepends=True)[:-1] == kept
    assert json.loads(path.read_text().splitlines()[-1])["metrics"] == lines[-1]["metrics"]


@pytest.mark.slow
def test_a_study_of_margins_searches_a_rate_for_all_arms_of_a_kind(repository):
    (repository / "recipes/tiny/margins.yaml").write_text(
        "arms: {rmipo: {learning_rate: [1.0e-3, 2.0e-2], methods: [simpo, rmipo, shuffled]},"
        " dpo: {learning_rate: 3.0e-3, methods: [dpo]}}\nobjectives: {simpo: {gamma: [1.0, 0.3]}}\n"
        "arm_seeds: 2\nnoise: [0.0]\ngrids: {simpo: {beta: [1.0, 2.0]}}\ngrid_seeds: 1\n"
    )
    run = launch(["scripts/compare.py", "--margins"], root=repository, MODEL="tiny", ARGS=ARGUMENTS)
    assert run.wait() == 0, run.output
    lines = [json.loads(line) for line in (repository / "outputs/tiny/margins/runs.jsonl").read_text().splitlines()]
    searched = {
        line["learning_rate"]: line for line in lines if line["purpose"] == "search" and line["method"] == "rmipo"
    }
    best = max(searched, key=lambda rate: searched[rate]["metrics"]["right_probability"])
    tuned = [line for line in lines if line["purpose"] == "search" and line["method"] == "simpo"]
    assert searched.keys() == {1e-3, 2e-2} and {line["learning_rate"] for line in tuned} == {best}
    assert sorted(line["objective"] for line in tuned) == [[], [["gamma", 0.3]]]  # 1.0 is the recipe's own
    reported = [line for line in lines if line["purpose"] == "report"]
    assert {line["method"] for line in reported[:4]} == {"rmipo", "shuffled"}  # the primary contrast comes first
    rates = {"rmipo": best, "shuffled": best, "simpo": best, "dpo": 3e-3}
    assert all(line["learning_rate"] == rates[line["method"]] for line in reported)
    mean_gammas = [line["gamma_mean"] for line in reported if line["method"] == "rmipo"]
    report = (repository / "outputs/tiny/margins/table.md").read_text()
    for metric in ("right_probability", "preference_accuracy"):
        values = " | ".join(f"{searched[rate]['metrics'][metric]:.3f}" for rate in (1e-3, 2e-2))
        assert f"| RMiPO | {values} |" in report
    gamma = max(tuned, key=lambda line: line["metrics"]["right_probability"])["objective"]
    # With its own gamma an arm's run is the grid's point of its own beta.
    assert len(reported) == 4 * 2 + 2 + 2 - (gamma == [])
    assert [line["objective"] for line in reported if line["method"] == "simpo"][:2] == [gamma] * 2
    own = [dict(line["objective"])["gamma"] for line in reported if {"beta", "gamma"} == {*dict(line["objective"])}]
    assert sorted(own) == pytest.approx(sorted(mean_gammas), abs=1e-4)


@pytest.mark.slow
def test_ctrl_c_ends_a_comparison_and_its_workers_at_once(repository):
    """SIGINT to the program alone, as `kill -INT` sends it, while two runs train for an hour."""
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job ignores it
        "runpy.run_path('scripts/compare.py', run_name='__main__')"
    )
    log = repository / "outputs/tiny/compare/workers.log"
    log.unlink(missing_ok=True)
    choices = CHOICES | {"ARGS": ARGUMENTS.replace("--max_steps 3", "--max_steps 1000000")}
    program = launch(["-c", code], root=repository, **choices)
    try:
        wait_until(lambda: log.is_file() and log.read_text().count("Loading weights: 100%") >= 2, program)
        pid = program.processes[0].pid
        workers = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGINT)
        assert program.wait() == 130 and len(workers) >= 3
        assert program.output.endswith("interrupted\n") and "Traceback" not in program.output
        psutil.wait_procs(workers)  # which would train for an hour
    finally:  # of a test that fails
        with contextlib.suppress(psutil.NoSuchProcess):
            program.end()


def test_choices_and_their_defaults(repository, monkeypatch):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError, match="make train MODEL=tiny"):
        programs.compare({"MODEL": "tiny", "ARGS": "--model_name_or_path outputs/tiny/none"})
    assert programs.read_choices({}, swaps_labels=True) == (list(METHODS), [0, 1, 2], [0.0, 0.15])
    chosen = programs.read_choices({"METHODS": "simpo dpo", "SEEDS": "3"}, swaps_labels=False)
    assert chosen == (["rmipo", "dpo", "simpo"], [3], [0.0])
    # Where labels are not swapped, a run "with noise" would be trained on clean ones.
    for name, value in (("METHODS", "dpo,ppo"), ("NOISE", "0,0.15")):
        with pytest.raises(ConfigError, match=f"{name}='{value}'"):
            programs.read_choices({name: value}, swaps_labels=False)


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_a_comparison_sees_one_gpu(monkeypatch, given, used):
    """transformers would copy a model to all GPUs that one process sees."""
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, given or "")  # so that what the script sets is undone
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    runpy.run_path(str(ROOT / "scripts/compare.py"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used


def test_two_comparisons_never_run_in_one_folder(repository):
    with held(repository / "outputs/tiny/compare"):
        second = run_here("compare", env=CHOICES, root=repository)
    assert second.code == 2 and "another run is active in outputs/tiny/compare" in second.err


def test_grids_and_arms_by_hand():
    assert programs.points_of({"beta": [1.0, 2.0], "gamma_min, gamma_max": [[0.5, 1.4]]}) == [
        (("beta", 1.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
        (("beta", 2.0), ("gamma_min", 0.5), ("gamma_max", 1.4)),
    ]
    (line, *_) = lines("rmipo", [0.5], noise=0.15, gamma=1.23456)
    assert programs.mean_gamma_arm(line) == Trial("report", "simpo", 2e-4, 0, 0.15, (("beta", 2.0), ("gamma", 1.2346)))


def test_contrasts_over_seeds_and_prompts():
    ours, theirs = [[0.5], [0.6], [0.7], [0.8]], [[0.4], [0.5], [0.5], [0.5]]  # differences 0.1, 0.1, 0.2, 0.3
    result = contrast(ours, theirs)
    assert result.mean == pytest.approx(0.175)
    assert result.p == 2 / 16  # all signs, or none, turned
    assert result.standard_error == pytest.approx(0.0957 / 2, rel=0.03)  # of a mean of four: sd 0.0957
    assert result.low < 0.1 and result.high > 0.25
    # One seed's difference varies by prompt, the seeds agree: the interval is that of the prompts alone.
    rng = np.random.default_rng(1)
    by_prompt = rng.normal(0.2, 1.0, size=100)
    result = contrast([by_prompt.tolist()] * 20, [[0.0] * 100] * 20)
    half_width = 1.96 * by_prompt.std() / 10
    assert (result.high - result.low) / 2 == pytest.approx(half_width, rel=0.1)
    assert not math.isclose(result.mean, 0.0)
    some = contrast([[50.0, None, 75.0], [25.0, None, 75.0]], [[25.0, None, 50.0], [None, None, 50.0]])
    assert some == contrast([[75.0], [75.0]], [[50.0], [50.0]]) and some.mean == 25.0


def lines(method, values, noise=0.0, objective=(), gamma=None):
    for seed, value in enumerate(values):
        own = {"noise": noise, "objective": [list(each) for each in objective], "gamma_mean": gamma}
        yield line_of(method, seed, value) | own


def test_the_report_names_the_arm_at_the_mean_margin_and_corrects_all_but_the_first_contrast():
    arms = [
        *lines("rmipo", [0.5, 0.6, 0.7, 0.8, 0.5, 0.8], gamma=1.25),
        *lines("shuffled", [0.4, 0.5, 0.6, 0.7, 0.4, 0.7], gamma=1.25),
        *lines("simpo", [0.5, 0.5, 0.7, 0.7, 0.5, 0.8]),
        *lines(comparison.MEAN_GAMMA, [0.4, 0.5, 0.6, 0.7, 0.4, 0.7]),
        *lines("dpo" + comparison.AT_KL, [0.4, 0.5, 0.6, 0.7, 0.4, 0.7]),
    ]
    grids = [
        *lines("simpo", [0.2, 0.4], objective=(("beta", 1.0),)),
        *lines("simpo", [0.5, 0.7], objective=(("beta", 2.0),)),
    ]
    text = comparison.report(
        {"right_probability": comparison.summarize(arms, "right_probability", "shuffled")}, arms, [],
        programs.spread_table(programs.outcomes(grids, "right_probability")),
    )  # fmt: skip
    rows = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert rows["RMiPO"][2] == "0.650 ± 0.138" and rows["RMiPO"][7] == "1.250 ± 0.000"
    # Every seed differs by 0.1: 2 of 64 sign flips are as far from 0. Of three secondary contrasts the smallest p triples.
    assert rows["shuffled"][3:5] == ["-0.100 [-0.100, -0.100]", "0.031"]
    for arm in ("SimPO at RMiPO's mean γ", "DPO at RMiPO's KL"):
        assert rows[arm][3:5] == ["-0.100 [-0.100, -0.100]", "0.094"]
    (grid,) = (line for line in text.partition("Spread")[2].splitlines() if line.startswith("| simpo "))
    assert grid.split(" | ")[1:5] == ["2", "0.600", "0.450", "0.300"]

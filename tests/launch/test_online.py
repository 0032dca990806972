"""Online rounds: each trains the policy before it on that policy's own answers, and goes on where it stopped."""

import json
import types
from pathlib import Path

import pytest

from rmipo.errors import ConfigError, EvaluationError
from rmipo.fingerprints import model_fingerprint
from rmipo.generation.pairs import PairsConfig, make_pairs
from rmipo.launch.online import OnlineConfig, Round
from rmipo.launch.pipeline import load_steps
from rmipo.launch.train import train
from rmipo.recipe.files import read_yaml, typed
from rmipo.record import recorded_run
from rmipo.reporting.online import measure, report
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.tiny_model import write_model

MODEL = "smollm2-135m-instruct"  # its recipe makes nothing in outputs/ when it is given other weights and pairs
GENERATION = {"temperature": 1.0, "max_new_tokens": 6, "batch_size": 16, "dtype": "float32"}
ORACLE = "def score(messages, answers):\n    return [len(set(answer.split())) for answer in answers]\n"
ARGS = "--bf16 false --dtype float32 --max_length 64 --max_prompt_length 32 --generation_samples 0 --learning_rate 1e-2"


@pytest.fixture
def config(tmp_path) -> OnlineConfig:
    (tmp_path / "oracle.py").write_text(ORACLE)
    rows = [{"prompt": f"w{i % 20} w{i // 20} w{i}"} for i in range(80)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"prompts": f"{tmp_path}/prompts.jsonl", "oracle": {"function": f"{tmp_path}/oracle.py:score"}}
    pairs |= {"answers": 4, "keep_cut": True}
    overrides = [{"num_train_epochs": 2}, {"num_train_epochs": 1}]
    return OnlineConfig(32, PairsConfig(**pairs), f"{tmp_path}/prompts.jsonl", 8, overrides)


def test_shipped_file_has_the_oracle_of_its_setting_and_mistakes_are_named(tmp_path):
    path = ROOT / f"recipes/{MODEL}/online.yaml"
    config = typed(OnlineConfig, read_yaml(path), path)
    assert read_yaml(ROOT / f"recipes/{MODEL}/pairs.yaml")["oracle"] == config.pairs.oracle
    with pytest.raises(ConfigError, match="prompts_per_round"):
        typed(OnlineConfig, read_yaml(path) | {"prompts_per_round": 0}, path)


@pytest.mark.parametrize("method", ["rmipo", "dpo"])
def test_recipes_of_the_rounds(config, method):
    home = f"outputs/{MODEL}/online-{method}"
    rounds = [Round(config, Path(home), Path("outputs/start"), n) for n in (1, 2, 3)]
    env = {"METHOD": method, "ARGS": "--seed 7"}
    steps = [load_steps(MODEL, ["weights", "pairs", "rmipo"], each.environment(env)) for each in rounds]
    recipes = [step.recipe.values for (step,) in steps]  # nothing is made first
    assert [r["model_name_or_path"] for r in recipes] == ["outputs/start", f"{home}/round-1", f"{home}/round-2"]
    assert [r["dataset_name"] for r in recipes] == [f"{home}/pairs-{n}" for n in (1, 2, 3)]
    assert [r["output_dir"] for r in recipes] == [f"{home}/round-{n}" for n in (1, 2, 3)]
    assert [r["num_train_epochs"] for r in recipes] == [2, 1, 1] and {r["seed"] for r in recipes} == {7}
    assert {r["objective"]["name"] for r in recipes} == {method}
    groups = {each.environment({})["WANDB_RUN_GROUP"] for each in rounds}
    assert groups == {f"{MODEL}-online-{method}"}
    skipped = [(each.pairs_config.skip_prompts, each.pairs_config.max_prompts) for each in rounds]
    assert skipped == [(0, 32), (32, 32), (64, 32)]
    own = load_steps(MODEL, ["rmipo"], rounds[0].environment({"ARGS": "--num_train_epochs=5"}))[0].recipe.values
    assert own["num_train_epochs"] == 5


@pytest.mark.slow
def test_two_rounds(config, tmp_path):
    start = tmp_path / "start"
    write_model(start)
    rounds = [Round(config, tmp_path / MODEL / "online-rmipo", start, n) for n in (1, 2)]
    env = {"MODEL": MODEL, "ARGS": ARGS, "PATH": "", "PYTHONPATH": str(ROOT)}
    env |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    rows = [{"round": 0, **measure(start, start, config, GENERATION, tmp_path / "round-0")}]
    prompts = []
    for each in rounds:
        made = make_pairs(each.policy, GENERATION, each.pairs_config, each.pairs)
        assert made["model"]["fingerprint"] == model_fingerprint(each.policy)
        prompts.append({json.loads(line)["prompt_id"] for line in (each.pairs / "candidates.jsonl").open()})
        assert train(each.environment(env)) == 0
        run = recorded_run(each.folder)
        assert run["finished"] and run["fingerprints"]["model"] == model_fingerprint(each.policy)
        rows.append({"round": each.number, **measure(each.folder, start, config, GENERATION, each.folder / "eval")})
    assert len(prompts[0]) == len(prompts[1]) == 32 and not prompts[0] & prompts[1]
    assert rows[0]["kl_initial"] == 0 and 0 not in (rows[1]["kl_initial"], rows[2]["kl_initial"])
    table = report(rows, tmp_path)
    assert table.count("\n") == 5 and (tmp_path / "rounds.png").stat().st_size > 10_000
    # The same command: nothing is trained, sampled or scored again.
    files = [
        rounds[1].pairs / "answers.jsonl",
        rounds[1].pairs / "scores.jsonl",
        rounds[1].folder / "model.safetensors",
    ]
    before = {path: path.stat().st_mtime_ns for path in files}
    (rounds[1].folder / "eval/specificity.jsonl").unlink()
    make_pairs(rounds[1].policy, GENERATION, rounds[1].pairs_config, rounds[1].pairs)
    assert train(rounds[1].environment(env)) == 0
    assert rows[2] == {"round": 2, **measure(rounds[1].folder, start, config, GENERATION, rounds[1].folder / "eval")}
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_reward_is_of_the_oracle_that_is_asked(config, tmp_path):
    start, folder = tmp_path / "start", tmp_path / "round-0"
    write_model(start)
    first = measure(start, start, config, GENERATION, folder)
    (tmp_path / "oracle.py").write_text(ORACLE.replace("len(", "1 + len("))
    with pytest.raises(EvaluationError, match=r"scores\.jsonl"):
        measure(start, start, config, GENERATION, folder)
    (folder / "scores.jsonl").unlink()
    assert measure(start, start, config, GENERATION, folder)["reward"] == pytest.approx(first["reward"] + 1)


def test_what_the_setting_and_the_user_say_reaches_every_round(monkeypatch):
    home, start = Path(f"outputs/{MODEL}/online-dpo"), Path("start")
    made, measured, trained = [], [], []

    def sample(model_dir, generation, config, folder):
        made.append((model_dir, generation, config.skip_prompts, config.max_prompts, folder))
        return {"pairs": 1, "prompts": 3, "mean_score": 0.0}

    def evaluate(model_dir, start, config, generation, folder):
        measured.append((model_dir, start, config.held_out_prompts, generation, folder))
        return {}

    target = types.SimpleNamespace(folder=start, settings={"generation": GENERATION})
    program = types.SimpleNamespace(run=lambda command, env: trained.append((env["METHOD"], env["ARGS"])))
    monkeypatch.setattr("rmipo.evaluation.target.find_target", lambda *given: target)
    monkeypatch.setattr("rmipo.launch.pipeline.make_weights", lambda model: None)
    monkeypatch.setattr("rmipo.launch.train.Program", lambda: program)
    monkeypatch.setattr("rmipo.generation.pairs.make_pairs", sample)
    monkeypatch.setattr("rmipo.reporting.online.measure", evaluate)
    monkeypatch.setattr("rmipo.reporting.online.report", lambda rows, home: [row["round"] for row in rows])
    given = ["--rounds", "2", "--prompts_per_round", "3", "--held_out_prompts", "5", "--seed", "7"]
    done = run_here("online", "--model", MODEL, "--method", "dpo", *given)
    assert done.code == 0 and "[0, 1]" in done.out and "[0, 1, 2]" in done.out, done.err
    policies, folders = [start, home / "round-1"], [home / "pairs-1", home / "pairs-2"]
    assert made == [(policies[n], GENERATION, 3 * n, 3, folders[n]) for n in (0, 1)]
    after = [(home / f"round-{n}", start, 5, GENERATION, home / f"round-{n}/eval") for n in (1, 2)]
    assert measured == [(start, start, 5, GENERATION, home / "round-0"), *after]
    assert [method for method, _ in trained] == ["dpo", "dpo"]
    assert all(
        f"--output_dir={home}/round-{n}" in text and "--seed 7" in text for n, (_, text) in enumerate(trained, 1)
    )

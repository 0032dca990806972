"""Searches: W&B's agent and `make sweep` train the same points, each in its own folder, and finished ones are kept."""

import json
import shutil
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from rmipo.launch.pipeline import load_steps
from rmipo.launch.sweep import Sweep, load_sweep, make_point
from rmipo.recipe.files import override_value
from rmipo.recipe.load import ConfigError
from tests.helpers.families import save
from tests.helpers.launched import launch
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here
from tests.helpers.rows import assistant, pair, write

METHODS = sorted(path.stem for path in ROOT.glob("recipes/sweeps/*.yaml"))
SETTING = "llama3-8b-instruct"


def wandb_command(path, values):
    """What W&B's agent starts for a point: its own functions, and the loop of `Agent._command_run`."""
    content = load_sweep_config(str(path))
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [content["program"]]}
    words = [str(word) for word in create_sweep_command(content["command"])]
    return [text for word in words for text in (macros[word[2:-1]] if word.startswith("${") else [word])]


@pytest.mark.parametrize("method", METHODS)
def test_every_point_has_its_own_folder_and_wandb_means_the_same_one(method):
    points = load_sweep(method, SETTING).points
    count = {"simpo": 4 * 6 * 4, "rmipo": 4}.get(method, len(points))  # Table 4's grid
    assert len(points) == count == len({str(point) for point in points})
    points = points[:: max(1, len(points) // 4)]
    env = {"MODEL": SETTING, "METHOD": method}
    folders = set()
    for values in points:
        point = make_point(values, env)
        command = wandb_command(ROOT / f"recipes/sweeps/{method}.yaml", values)
        assert command[:7] == ["/usr/bin/env", "python", "scripts/sweep.py", "--model", SETTING, "--method", method]
        given = dict(word.removeprefix("--").split("=", 1) for word in command[7:])
        given = {key: override_value(text) for key, text in given.items()}
        assert make_point(given, env).step.recipe.values == point.step.recipe.values
        folders.add(Path(point.step.output_dir))
        for key, value in values.items():
            name = key.removeprefix("objective.")
            assert (point.step.recipe.values["objective"] if "." in key else point.step.recipe.values)[name] == value
    assert len(folders) == len(points) > 1
    assert {folder.parent for folder in folders} == {Path(f"outputs/{SETTING}/sweep-{method}")}


def test_points_have_folders_by_value_and_are_trained_on_what_the_search_is_told():
    env = {"MODEL": SETTING, "METHOD": "simpo"}
    as_json = {"objective.beta": 2, "learning_rate": 3e-7}  # W&B's server has no 2.0
    as_yaml = {"objective.beta": 2.0, "learning_rate": 3e-7}
    assert make_point(as_json, env).step == make_point(as_yaml, env).step
    folder = f"outputs/{SETTING}/sweep-simpo/learning_rate-3e-07_beta-2"
    assert make_point(as_yaml, env).step.output_dir == folder
    of_data = make_point(as_yaml, env | {"DATA": "my/pairs.jsonl"}).step.output_dir
    assert of_data == folder.replace("simpo", "simpo-pairs")
    told = {"MODEL": SETTING, "METHOD": "simpo", "DATA": "my/pairs.jsonl", "GPUS": "4", "SHARDING": "zero3-offload"}
    point = make_point({"learning_rate": 3e-7}, told | {"ARGS": "--seed 7"})
    assert told.items() <= point.environment.items()
    assert (point.step.recipe.values["dataset_name"], point.step.recipe.values["seed"]) == ("my/pairs.jsonl", 7)


def test_what_ranks_the_points_is_logged_and_the_best_is_the_first():
    for goal, first in (("maximize", 3.0), ("minimize", 1.0)):
        sweep = Sweep(method="grid", metric={"name": "eval/loss", "goal": goal}, parameters={"objective.beta": [1.0]})
        assert sweep.ranked([{"eval_loss": loss} for loss in (2.0, 3.0, 1.0)])[0] == {"eval_loss": first}
    for method in METHODS:
        sweep = load_sweep(method, SETTING)
        recipe = make_point(sweep.points[0], {"MODEL": SETTING, "METHOD": method}).step.recipe
        sweep.check_metric(recipe)
    sweep.metric.name = "eval/common/acc_logratio"
    with pytest.raises(ValueError, match="eval_common/acc_avg_logp"):
        sweep.check_metric(recipe)


@pytest.mark.parametrize(
    ("sweep", "own"),
    [
        ("method: grid\nmetric: {name: rewards/margins, goal: maximize}\nparameters: {beta: {values: [1]}}\n", ""),
        ("method: random\nmetric: {name: eval/loss, goal: minimize}\nparameters: {beta: {values: [1]}}\n", ""),
        (None, "paramters: {learning_rate: {values: [1e-4]}}\n"),
    ],
)
def test_a_file_that_is_no_search_is_refused(tmp_path, monkeypatch, sweep, own):
    write(tmp_path / "recipes/sweeps/dpo.yaml", [])
    (tmp_path / "recipes/sweeps/dpo.yaml").write_text(sweep or (ROOT / "recipes/sweeps/dpo.yaml").read_text())
    (tmp_path / f"recipes/{SETTING}").mkdir()
    (tmp_path / f"recipes/{SETTING}/search.yaml").write_text(own or "measure: {}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="search.yaml" if own else "dpo.yaml"):
        load_sweep("dpo", SETTING)


def test_wandb_s_command_reaches_the_training_command(capfd):
    values = {"objective.beta": 0.05, "learning_rate": 5e-7}
    command = wandb_command(ROOT / "recipes/sweeps/dpo.yaml", values)
    assert command[2] == "scripts/sweep.py"
    done = run_here("sweep", *command[3:], env={"DRY": "1"})
    assert done.code == 0, done.err
    out = capfd.readouterr().out  # of the program that it started
    assert "accelerate launch" in out and "recipes/methods/dpo.yaml" in out
    assert f"output_dir: outputs/{SETTING}/sweep-dpo/learning_rate-5e-07_beta-0.05\n" in out


@pytest.fixture
def repository(tmp_path):
    """A copy of what a sweep reads, in which `tiny` starts from a random model and has two learning rates."""
    for name in ("rmipo", "recipes", "configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "recipes/tiny/world.yaml").unlink()
    (tmp_path / "recipes/tiny/search.yaml").write_text("parameters: {learning_rate: {values: [1.0e-4, 1.0e-2]}}\n")
    save("llama3", tmp_path / "outputs/tiny/sft")
    for split, count in (("train", 32), ("test", 8)):
        rows = [pair(i, chosen=[assistant(f"yes {i}")], rejected=[assistant(f"no no {i}")]) for i in range(count)]
        write(tmp_path / f"outputs/tiny/world/pairs/{split}.jsonl", rows)
    return tmp_path


def test_a_sweep_that_is_stopped_trains_no_further_point(repository, monkeypatch):
    codes = iter((75,))
    monkeypatch.setattr("rmipo.launch.train.Program.run", lambda *given, **streams: next(codes))
    monkeypatch.setattr("rmipo.launch.sweep.record", lambda *given: [{"values": {}}])  # one was finished before
    stopped = run_here("sweep", env={"MODEL": "tiny", "METHOD": "rmipo"}, root=repository)
    assert stopped.code == 75 and "failed" not in stopped.out


def test_a_grid_is_trained_once_and_the_best_is_named(repository, monkeypatch):
    env = {"MODEL": "tiny", "METHOD": "rmipo", "ARGS": "--max_steps 2 --generation_samples 0 --warmup_steps 0"}
    env |= {"OMP_NUM_THREADS": "1"}
    monkeypatch.chdir(repository)
    point = make_point({"learning_rate": 1e-4}, env)  # finished runs count, whoever trained them
    (step,) = load_steps("tiny", ["rmipo"], point.environment)
    trained = launch(step.command(0)[1:], root=repository)
    assert trained.wait() == 0, trained.output
    record = (repository / Path(point.step.output_dir) / "run.json").read_text()
    first = run_here("sweep", env=env, root=repository)
    assert first.code == 0 and "2 points, 1 not finished" in first.out, first.out + first.err
    folder = repository / "outputs/tiny/sweep-rmipo"
    lines = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    assert [line["values"]["learning_rate"] for line in lines] == [1e-4, 1e-2]
    accuracies = [line["eval_common/acc_avg_logp"] for line in lines]
    best = lines[accuracies.index(max(accuracies))]
    assert f"in {best['output_dir']}\n" in first.out.partition("points:\n")[2].splitlines(keepends=True)[0]
    assert (repository / lines[0]["output_dir"] / "run.json").read_text() == record
    assert json.loads((repository / lines[1]["output_dir"] / "run.json").read_text())["finished"]

    shutil.rmtree(repository / lines[1]["output_dir"])
    codes = iter((0, 1))  # of the finished point, which is started again, and of the other one
    with monkeypatch.context() as patched:
        patched.setattr("rmipo.launch.train.Program.run", lambda *given, **streams: next(codes))
        failed = run_here("sweep", env=env, root=repository)
    assert failed.code == 1 and "failed with exit code 1: --learning_rate=0.01" in failed.out and "best:" in failed.out

    other = run_here("sweep", env=env | {"ARGS": "--max_steps 3"}, root=repository)
    assert other.code == 2 and "holds a run of another recipe" in other.err

    pairs = repository / "outputs/tiny/world/pairs/train.jsonl"
    pairs.write_text(pairs.read_text().replace("yes 3", "yes, 3"))
    changed = run_here("sweep", env=env, root=repository)
    assert changed.code == 2 and "best:" not in changed.out

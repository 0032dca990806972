"""`make eval` and `make samples` from the command line, on a random model."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from rmipo.data.chat import PROBES, ChatFormat
from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.benchmark import contradictions
from rmipo.evaluation.target import find_target, load_settings, model_folder
from rmipo.fingerprints import prompting_fingerprint, trained_fingerprint
from rmipo.generation.answers import check_settings
from tests.helpers.paths import ROOT
from tests.helpers.programs import Ended, run_here
from tests.helpers.rows import assistant, pair, user, write
from tests.helpers.tiny_model import write_model

TINY = ROOT / "recipes/tiny/rmipo.yaml"


@pytest.fixture
def outputs(tmp_path) -> Path:
    folder = tmp_path / "outputs"
    for method, seed in (("rmipo", 0), ("simpo", 1)):
        write_model(folder / "tiny" / method, seed)
    answers = [assistant("w1 w2 w3")], [assistant("w4")]
    write(folder / "pairs/test.jsonl", [pair(i, [user(f"w{i} w{i + 1}")], *answers) for i in range(9)])
    return folder


def run(script: str, outputs: Path, *arguments: str, **environment: str) -> Ended:
    return run_here(script, "--model", "tiny", "--outputs", str(outputs), *arguments, env=environment)


def test_settings_are_read_as_recipes_are_and_compared_with_a_results(tmp_path, monkeypatch):
    for path in ROOT.glob("recipes/*/eval.yaml"):
        settings = load_settings(path, [])
        assert settings
        check_settings(settings.get("generation", {}))
    monkeypatch.setenv("HOME", "/users/me")
    path = tmp_path / "eval.yaml"
    path.write_text("alpacaeval:\n  max_cost: 1e1\n  reference: ~/x.jsonl\nhh:\n")
    expected = {"alpacaeval": {"max_cost": 10.0, "reference": "/users/me/x.jsonl"}, "hh": {}}
    assert load_settings(path, []) == expected
    assert load_settings(path, ["hh.max_length=2e1"])["hh"] == {"max_length": 20.0}
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    recorded = {"limit": 4, "price": [1.0, 2.0], "generation": {"temperature": 0.9, "engine": "vllm"}}
    assert contradictions({"price": [9.0, 9.0], "generation": {"engine": "auto"}, "limit": 4}, recorded) == []
    assert contradictions({"limit": 8, "generation": {"temperature": 0.1}}, recorded) == [
        "limit is 4 there, 8 here", "generation.temperature is 0.9 there, 0.1 here",
    ]  # fmt: skip
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1/")
    judged = {"judge_endpoint": "api.openai.com/v1"}
    assert contradictions({}, judged) == ["the judge's endpoint is api.openai.com/v1 there, 127.0.0.1:8000/v1 here"]
    assert contradictions({}, {"judge_endpoint": "127.0.0.1:8000/v1"}) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("generation.temperature=hot", "generation: temperature is 'hot'"),
        ("constraints.first_n=0", "constraints: first_n is 0"),
        ("constraints.generation.seed=x", "constraints, generation: seed is 'x'"),
        ("samples.prompt=x", "samples: unknown keys ['prompt'] (did you mean prompts"),
    ],
)
def test_wrong_keys_and_values_of_another_type_are_refused(tmp_path, override, named):
    path = tmp_path / "eval.yaml"
    path.write_text("leaderboard: {batch_size: auto, limit: null}\nconstraints: {first_n: 4.0}\n")
    assert load_settings(path, [])["leaderboard"] == {"batch_size": "auto", "limit": None}
    with pytest.raises(EvaluationError, match=re.escape(named)):
        load_settings(path, [override])


def test_models_that_are_none(outputs):
    (outputs / "tiny/lora").mkdir()
    (outputs / "tiny/lora/adapter_config.json").write_text("{}")
    cases = [("none", None, "MODEL=none "), (str(outputs), "dpo", "METHOD=dpo"), ("tiny", "dpo", "tiny/dpo")]
    for model, method, named in (*cases, (str(outputs), None, str(outputs)), ("tiny", "lora", "adapter")):
        with pytest.raises(EvaluationError, match=named):
            find_target(model, method, outputs, [])


def small_recipe(tmp_path: Path, source: Path, template: Path | None = None) -> Path:
    recipe = tmp_path / "recipes/small/rmipo.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    changes = {"model_name_or_path": str(source), "chat_template": template and str(template)}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | changes))
    return recipe


def record(folder: Path, finished: bool = True, header_in_response: bool = False) -> list:
    """A run.json as training leaves it beside the model in `folder`; returns its probe."""
    chat = ChatFormat.probe(AutoTokenizer.from_pretrained(folder), header_in_response=header_in_response)
    probe = [chat.prompt_ids(messages) for messages in PROBES]
    (folder / "run.json").write_text(json.dumps({"finished": finished, "prompt_probe": probe}))
    return probe


def test_model_trained_with_another_template_or_header_is_refused(outputs):
    folder = outputs / "tiny/rmipo"
    probe = record(folder)
    assert model_folder(TINY, outputs, "rmipo") == folder
    # The released code's way: the assistant header is scored with the response, and isn't in the training prompt.
    assert record(folder, header_in_response=True) != probe
    assert model_folder(TINY, outputs, "rmipo") == folder
    record(folder, finished=False)
    with pytest.raises(EvaluationError, match=f"{folder} holds a run that hasn't finished"):
        model_folder(TINY, outputs, "rmipo")
    record(folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ m['content'] }}", "w0 {{ m['content'] }}"))
    done = run("evaluate", outputs, "--bench", "hh")
    assert done.code == 2 and done.err.startswith(f"error: {folder} was trained with another chat template")


def test_initial_model_is_linked_with_the_recipe_s_template_and_held_to_its_own_training(
    outputs, tmp_path, monkeypatch
):
    source, template = outputs / "tiny/simpo", tmp_path / "template.jinja"
    template.write_text((source / "chat_template.jinja").read_text().replace(" </s>", " w0 </s>"))
    prompting = set()
    for offline in (False, True):  # once more: as before, and without what another source has left
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        folder = model_folder(small_recipe(tmp_path, source, template), outputs, "initial")
        assert folder == outputs / "small/initial"
        assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
        assert (folder / "model.safetensors").resolve() == source / "model.safetensors"
        assert (folder / "chat_template.jinja").read_text() == template.read_text()
        assert (source / "chat_template.jinja").read_text() != template.read_text()
        (folder / "model-00001-of-00002.safetensors").symlink_to(source / "model.safetensors")
        prompting.add(prompting_fingerprint(folder))
    assert len(prompting) == 1
    recipe = small_recipe(tmp_path, source)
    record(source, finished=False)
    with pytest.raises(EvaluationError, match=f"{source} holds a run that hasn't finished"):
        model_folder(recipe, outputs, "initial")
    record(source)
    model_folder(recipe, outputs, "initial")
    template.write_text((source / "chat_template.jinja").read_text().replace("{{ m['c", "w0 {{ m['c"))
    with pytest.raises(EvaluationError, match="initial was trained with another chat template"):
        model_folder(small_recipe(tmp_path, source, template), outputs, "initial")


def test_result_of_other_weights_is_refused(outputs):
    options = [f"--set=hh.{subset}={{dataset_name: {outputs}/pairs}}" for subset in ("helpful", "harmless")]
    folder, path = outputs / "tiny/rmipo", outputs / "tiny/rmipo/eval/hh.json"
    assert run("evaluate", outputs, "--bench", "hh", *options).code == 0
    before = path.read_bytes()
    weights = trained_fingerprint(folder)
    assert json.loads(before)["fingerprint"] == weights
    for name in ("helpful", "harmless"):
        assert torch.load(path.with_name(f"hh_{name}.pt"), weights_only=True)["fingerprint"] == weights
    again = run("evaluate", outputs, "--bench", "hh", *options)
    assert again.code == 0 and "finished before" in again.out
    other = (*options, "--set", "hh.max_length=64")
    again = run("evaluate", outputs, "--bench", "hh", *other)
    assert again.code == 2 and "max_length is 128 there, 64 here" in again.err
    again = run("evaluate", outputs, "--bench", "hh", "--eval_name", "short", *other)
    assert again.code == 0 and path.read_bytes() == before
    assert json.loads((path.parent / "short/hh.json").read_text())["settings"]["max_length"] == 64
    kept = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(json.dumps(json.loads(kept) | {"eos_token_id": [1, 2]}))
    done = run("evaluate", outputs, "--bench", "hh", *options)
    assert done.code == 2 and "another tokenizer, chat template or generation_config" in done.err
    (folder / "generation_config.json").write_text(kept)
    write_model(folder, seed=7)
    done = run("evaluate", outputs, "--bench", "hh", *options)
    assert done.code == 2 and str(path) in done.err and "other weights" in done.err
    assert path.read_bytes() == before


def test_tasks_are_added_to_those_of_a_finished_result(outputs):
    def run_tasks(model_dir, output_dir, settings):
        return {"metrics": dict.fromkeys(settings["tasks"], 1.0), "versions": {}, "settings": settings}

    benchmark = dataclasses.replace(BENCHMARKS["leaderboard"], measure=run_tasks)
    evaluate = runpy.run_path(str(ROOT / "scripts/evaluate.py"))["evaluate"]
    for tasks in (["bbh"], ["math", "bbh"]):
        evaluate(outputs / "tiny/rmipo", {"tasks": tasks}, benchmark, "")
    result = json.loads((outputs / "tiny/rmipo/eval/leaderboard.json").read_text())
    assert list(result["metrics"]) == result["settings"]["tasks"] == ["bbh", "math"]


def test_samples_side_by_side_and_of_a_reference(outputs):
    prompts = ["--prompt", "w1 <b> & w2", "--prompt", "w3 ```"]
    done = run("samples", outputs, "--methods", "rmipo,simpo", *prompts)
    assert done.code == 0, done.err
    answers = {}
    for method in ("rmipo", "simpo"):
        (file,) = (outputs / f"tiny/{method}/eval/answers").glob("samples-*.jsonl")
        answers[method] = [json.loads(line)["output"] for line in file.read_text().splitlines()[1:]]
    assert answers["rmipo"] != answers["simpo"] and all(answers["rmipo"])
    page = (outputs / "reports/samples-tiny.html").read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page, re.DOTALL)
    expected = [["w1 &lt;b&gt; &amp; w2", "w3 ```"], *answers.values()]
    assert cells == [column[row].replace("<", "&lt;").replace(">", "&gt;") for row in (0, 1) for column in expected]
    assert "\n    w3 ```\n" in (outputs / "reports/samples-tiny.md").read_text()
    choose = runpy.run_path(str(ROOT / "scripts/samples.py"))["choose_prompts"]
    prompts, known = choose(None, {"reference": f"{outputs}/pairs/test.jsonl", "first_n": 4})
    assert prompts == [f"w{i} w{i + 1}" for i in range(4)] and known == {"reference": ["w1 w2 w3"] * 4}


def test_folders_and_hub_models_are_targets(tmp_path, monkeypatch):
    model = tmp_path / "somewhere/model"
    write_model(model)
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "eos_token_id": [1, 9]}
    (model / "generation_config.json").write_text(json.dumps(own))
    target = find_target(str(model), None, tmp_path / "outputs", ["generation.max_new_tokens=5"])
    assert target.folder == model
    settings = {"dtype": "auto", "temperature": 0.6, "top_p": 0.9, "top_k": 7, "max_new_tokens": 5}
    assert target.settings == {"generation": settings}
    for config, temperature in ((own | {"do_sample": False}, 0.0), ({"do_sample": True}, 1.0)):  # 1: transformers' own
        (model / "generation_config.json").write_text(json.dumps(config))
        found = find_target(str(model), None, tmp_path / "outputs", [])
        assert found.settings == {"generation": {"dtype": "auto", "temperature": temperature}}
    snapshot = tmp_path / "hub/models--owner--name/snapshots/0"
    write_model(snapshot)
    write(snapshot.parents[1] / "refs/main", []).write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    target = find_target("owner/name", None, tmp_path / "outputs", [])
    assert target.folder == tmp_path / "outputs/owner--name/initial"
    assert (target.folder / "model.safetensors").resolve() == snapshot / "model.safetensors"
    assert "chat_template.jinja" in {path.name for path in target.folder.iterdir()}

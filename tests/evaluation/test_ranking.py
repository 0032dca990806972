"""How models rank the initial model's answers: the AUC by hand, and the benchmark against one sequence at a time."""

import json
import statistics

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from rmipo.constraints import prompts as prompts_module
from rmipo.errors import EvaluationError
from rmipo.evaluation import BENCHMARKS, ranking
from rmipo.evaluation.ranking import auc, by_prompt, verified
from rmipo.generation.answers import ENGINES
from tests.helpers.tiny_model import naive_scores, write_model

GENERATION = {"temperature": 1.0, "max_new_tokens": 20, "dtype": "float32", "engine": "transformers"}
SETTINGS = {"generation": GENERATION, "first_n": 6, "skip_n": 1, "answers": 5}
COMMA, TITLE = ({"id": name, "arguments": {}} for name in ("punctuation:no_comma", "detectable_format:title"))
LETTERS = {"let_frequency": 8, "let_relation": "at least", "letter": "w"}
BOTH = [{"id": "keywords:letter_frequency", "arguments": LETTERS}, COMMA]
ASKED = [[TITLE], [COMMA], [COMMA], [TITLE], BOTH, [TITLE], [COMMA]]
PROMPTS = [
    {"prompt": f"w{i} w{2 * i}", "keywords": [f"w{n}" for n in range(30)], "subject": ["w"], "constraints": asked}
    for i, asked in enumerate(ASKED)
]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of an initial model, and of one that stands for a model trained from it. Prompts that they can follow."""
    monkeypatch.setattr(prompts_module, "read_prompts", {"test": PROMPTS}.get)
    for seed, name in enumerate(("initial", "model")):
        write_model(tmp_path / name, seed=seed)
    return tmp_path / "initial", tmp_path / "model"


def test_the_auc_is_the_share_of_couples_and_a_tie_is_half():
    # (3, 1), (3, 2) and (2, 1) are won, (2, 2) is a tie.
    assert auc([3.0, 1.0, 2.0, 2.0], [True, False, True, False]) == 87.5
    assert auc([-5.0, -4.0, -3.0], [True, False, False]) == 0.0
    assert auc([1.0, 2.0], [True, True]) is auc([1.0, 2.0], [False, False]) is auc([], []) is None


def test_answers_are_ranked_among_those_to_the_same_prompt():
    rows = [
        {"prompt": prompt, "right": right, "logp": logp, "pmi": pmi}
        for prompt, right, logp, pmi in [
            (0, True, -1.0, 0.1), (0, False, -2.0, 0.3), (0, False, -0.5, 0.0),
            (2, False, -9.0, 0.9), (2, True, -9.5, 1.0),  # less likely than any answer to prompt 0
            (3, True, -1.0, 1.0),
        ]
    ]  # fmt: skip
    assert by_prompt(rows, 4) == {"ranking_auc": [50.0, None, 0.0, None], "ranking_pmi_auc": [50.0, None, 100.0, None]}


def test_the_benchmark_against_one_sequence_at_a_time(models, tmp_path, monkeypatch):
    initial, model = models
    settings = SETTINGS | {"initial": str(initial)}
    result = BENCHMARKS["ranking"].run(model, tmp_path / "eval", settings)
    metrics = result["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "eval/ranking.jsonl").read_text().splitlines()]
    (file,) = (initial / "eval/answers").glob("ranking-*.jsonl")
    sampled = sorted((json.loads(line) for line in file.read_text().splitlines()[1:]), key=lambda row: row["key"])
    assert len(sampled) == 30 and metrics["ranking_cut"] == sum(row["finish"] == "length" for row in sampled) / 0.3

    expected: dict = {"ranking_auc": [], "ranking_pmi_auc": []}
    verdicts: list[bool] = []
    for number, prompt in enumerate(PROMPTS[1:7]):
        mine = [row for row in rows if row["prompt"] == number]
        own = sampled[5 * number : 5 * number + 5]
        found = verified(prompt, [row["output"] for row in own], [row["finish"] for row in own])
        verdicts += found.values()
        if len({*found.values()}) < 2:
            assert not mine
            expected["ranking_auc"].append(None)
            expected["ranking_pmi_auc"].append(None)
            continue
        assert [(row["answer"], row["right"]) for row in mine] == [*found.items()]
        pairs = [{"prompt": prompt["prompt"], "chosen": row["answer"], "rejected": row["answer"]} for row in mine]
        naive = naive_scores(model, pairs)
        a = naive["chosen_logps"] / naive["chosen_lengths"]
        pmi = a - naive["prior_chosen_logps"] / naive["chosen_lengths"]
        assert [row["logp"] for row in mine] == pytest.approx(a.tolist(), abs=1e-5)
        assert [row["pmi"] for row in mine] == pytest.approx(pmi.tolist(), abs=1e-5)
        for name, scores in (("ranking_auc", a), ("ranking_pmi_auc", pmi)):
            expected[name].append(auc(scores.tolist(), [*found.values()]))
    assert None in expected["ranking_auc"]  # a prompt whose answers are all right or all wrong
    assert len({*expected["ranking_auc"]}) > 2 and expected["ranking_auc"] != expected["ranking_pmi_auc"]
    for name, values in expected.items():
        assert result["per_prompt"][name] == pytest.approx(values)
        known = [value for value in values if value is not None]
        assert metrics[name] == pytest.approx(statistics.mean(known))
        assert metrics[f"{name}_standard_error"] == pytest.approx(statistics.stdev(known) / len(known) ** 0.5)
    assert metrics["ranking_prompts"] == len(known)
    assert metrics["ranking_right"] == pytest.approx(100 * sum(verdicts) / len(verdicts))

    # The answers are there: no model is sampled for another one that was trained from the same.
    monkeypatch.setitem(ENGINES, "transformers", None)
    itself = BENCHMARKS["ranking"].run(initial, tmp_path / "of-itself", SETTINGS)
    assert itself["fingerprint"] == itself["settings"]["initial_fingerprint"] != result["fingerprint"]
    assert itself["settings"] == result["settings"] and itself["metrics"]["ranking_auc"] != metrics["ranking_auc"]


def test_a_whole_text_counts_once_and_is_right_if_it_follows_all():
    prompt = {"keywords": ["a", "d"], "subject": ["a", "d"], "constraints": [COMMA, TITLE]}
    answers = ["a", "<<a>>, d", "<<a>>", "<<d>>", "<<d>>", "<<b>>"]
    finishes = ["stop", "stop", "length", "stop", "stop", "stop"]
    assert verified(prompt, answers, finishes) == {"a": False, "<<a>>, d": False, "<<d>>": True, "<<b>>": False}


def test_prompts_of_one_kind_say_what_to_do(models, tmp_path):
    settings = SETTINGS | {"generation": GENERATION | {"temperature": 0.0}}
    with pytest.raises(EvaluationError, match=r"none of 6 prompts .*% cut.*ranking\.first_n"):
        ranking.run(models[0], tmp_path / "eval", settings)  # greedy: five times the same answer


def test_an_initial_model_of_the_hub_has_to_be_a_folder(models, tmp_path):
    (models[1] / "run.json").write_text(json.dumps({"recipe": {"model_name_or_path": "owner/name"}}))
    with pytest.raises(EvaluationError, match=r"owner/name is no folder.*METHOD=initial.*ranking\.initial"):
        ranking.run(models[1], tmp_path / "eval", SETTINGS)

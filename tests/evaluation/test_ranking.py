"""Short tasks: how models rank the initial model's answers, against one sequence at a time, and which they solve."""

import json
import statistics

import pytest

# Before the imports: the instructions' own module needs the package.
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from rmipo.constraints import prompts as prompts_module
from rmipo.constraints.instructions import DRAWN, answered, followed, solved
from rmipo.evaluation import BENCHMARKS
from rmipo.evaluation.constraints import BOILERPLATE, FAMILIES, by_family, fixed_text
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


def test_aucs_and_verdicts_by_hand():
    assert auc([3.0, 1.0, 2.0, 2.0], [True, False, True, False]) == 87.5
    assert auc([-5.0, -4.0, -3.0], [True, False, False]) == 0.0
    assert auc([1.0, 2.0], [True, True]) is auc([1.0, 2.0], [False, False]) is auc([], []) is None
    rows = [
        {"prompt": prompt, "right": right, "logp": logp, "pmi": pmi}
        for prompt, right, logp, pmi in [
            (0, True, -1.0, 0.1), (0, False, -2.0, 0.3), (0, False, -0.5, 0.0),
            (2, False, -9.0, 0.9), (2, True, -9.5, 1.0),  # less likely than any answer to prompt 0
            (3, True, -1.0, 1.0),
        ]
    ]  # fmt: skip
    assert by_prompt(rows, 4) == {"ranking_auc": [50.0, None, 0.0, None], "ranking_pmi_auc": [50.0, None, 100.0, None]}
    prompt = {"keywords": ["a", "d"], "subject": ["a", "d"], "constraints": [COMMA, TITLE]}
    answers = ["a", "<<a>>, d", "<<a>>", "<<d>>", "<<d>>", "<<b>>"]
    whole = [True, True, False, True, True, True]
    assert verified(prompt, answers, whole) == {"a": False, "<<a>>, d": False, "<<d>>": True, "<<b>>": False}


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
        found = verified(prompt, [row["output"] for row in own], [row["finish"] != "length" for row in own])
        verdicts += found.values()
        if len({*found.values()}) < 2:
            assert not mine
            for values in expected.values():
                values.append(None)
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


TASKS = [
    {"prompt": f"w{i} w{2 * i}", "keywords": [f"w{i}{n}" for n in range(5)], "subject": ["w"], "constraints": [asked]}
    for i, asked in enumerate([COMMA] * 7 + [TITLE] * 2)
]


def test_shares_of_answers_that_solve_answer_and_follow(tmp_path, monkeypatch):
    """On tasks that a small model solves by chance."""
    monkeypatch.setattr(prompts_module, "read_prompts", {"test": TASKS}.get)
    write_model(tmp_path)

    def run(**settings):
        settings["generation"] = GENERATION | {"max_new_tokens": 12}
        result = BENCHMARKS["constraints"].run(tmp_path, tmp_path / "eval", settings)
        return result, [json.loads(line) for line in (tmp_path / "eval/constraints.jsonl").read_text().splitlines()]

    result, rows = run(answers=8)
    metrics = result["metrics"]
    assert len(rows) == 9 and all(len(row["answers"]) == 8 for row in rows)
    assert sum(len(set(row["answers"])) > 4 for row in rows) > 6  # one seed for each answer
    (path,) = (tmp_path / "eval/answers").glob("*.jsonl")
    sampled = sorted((json.loads(line) for line in path.read_text().splitlines()[1:]), key=lambda row: row["key"])
    ends = [answer["finish"] != "length" for answer in sampled]
    assert [answer for row in rows for answer in row["answers"]] == [answer["output"] for answer in sampled]
    expected = {"constraints_solved": [], "constraints_answered": [], "constraints_all": []}
    for number, row in enumerate(rows):
        whole = ends[8 * number : 8 * number + 8]
        good = [solved(row, answer) and ended for answer, ended in zip(row["answers"], whole, strict=True)]
        expected["constraints_solved"].append(100 * statistics.mean(good))
        expected["constraints_answered"].append(100 * statistics.mean(answered(row, a) for a in row["answers"]))
        follows = [all(followed(row["constraints"], answer)) for answer in row["answers"]]
        expected["constraints_all"].append(100 * statistics.mean(follows))
    assert len({statistics.mean(values) for values in expected.values()}) == 3 and 0 < sum(ends) < 72
    assert result["per_prompt"] == expected
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(statistics.mean(values))
        # The error is over prompts.
        assert metrics[f"{name}_standard_error"] == pytest.approx(statistics.stdev(values) / 3)
    assert metrics["constraints_cut"] == pytest.approx(100 * (72 - sum(ends)) / 72)
    assert by_family(rows).items() <= metrics.items()
    fixed = fixed_text(TASKS)
    assert metrics["constraints_fixed"] == pytest.approx(100 / 9 * sum(solved(row, fixed) for row in TASKS))
    assert metrics["constraints_repeated"] == pytest.approx(100 / 9 * sum(solved(row, row["prompt"]) for row in TASKS))
    _, rows = run(first_n=3, skip_n=2)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in TASKS[2:5]]


def test_fixed_texts_and_families():
    """docs/RESULTS.md has its share beside the models'."""
    reported = prompts_module.read_prompts("test")[100:]
    counts = [sum(solved(row, text) for row in reported) for text in (fixed_text(reported), BOILERPLATE)]
    assert len(reported) == 473 and counts == [30, 0]
    title, comma = ({"id": name} for name in ("detectable_format:title", "punctuation:no_comma"))
    rows = [
        {"constraints": [title, comma], "followed": [[True, False], [True, True]]},
        {"constraints": [comma], "followed": [[False], [False]]},
    ]
    assert by_family(rows) == {"constraints_title": 100.0, "constraints_no_comma": 25.0}
    assert [name.partition(":")[2] for name in DRAWN] == list(FAMILIES)

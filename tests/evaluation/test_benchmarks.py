"""The registry of benchmarks: light to import, complete, and true to what each benchmark returns and takes."""

import re

from rmipo.evaluation import BENCHMARKS, benchmark_of, metric_label
from tests.helpers.paths import ROOT
from tests.helpers.tiny_model import write_model


def test_a_metric_belongs_to_one_benchmark():
    names = [name for benchmark in BENCHMARKS.values() for name in benchmark.metrics]
    assert len(names) == len(set(names))
    assert benchmark_of("bbh").name == "leaderboard" and metric_label("bbh") == "BBH"
    assert benchmark_of("loss") is None and metric_label("loss") == "loss"


def test_settings_that_are_compared_exist():
    # Added to a result by `run`.
    recorded = {"judge_endpoint", "other_pairs", "model_fingerprint", "initial_fingerprint"}
    recorded |= {f"{name}_sha256" for name in ("judge", "reference", "pairs", "prompts", "answers")}
    for benchmark in BENCHMARKS.values():
        named = {*benchmark.same, *benchmark.same_per_model, *benchmark.trial, *benchmark.paper}
        assert {name.partition(".")[0] for name in named} <= benchmark.defaults.keys() | recorded, benchmark.name
        assert set(benchmark.optional) <= set(benchmark.same)


def test_the_benchmark_in_the_docs_runs(tmp_path):
    page = (ROOT / "docs/EVALUATION.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(code, names)
    write_model(tmp_path)
    generation = {"dtype": "float32", "engine": "transformers", "max_new_tokens": 4}
    result = names["BENCHMARK"].run(tmp_path, tmp_path / "eval", {"first_n": 3, "generation": generation})
    assert result["metrics"]["sums"] == 0.0  # the model has no digits
    assert result["metrics"].keys() == {"sums", "sums_standard_error", "sums_cut"} and result["versions"]

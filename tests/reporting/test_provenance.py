"""Results that were made in different ways don't share a table: each kind of mix, and what is no mix."""

import pytest

from rmipo.evaluation import BENCHMARKS
from rmipo.reporting.provenance import conflicts, deviations, missing_verdicts
from rmipo.reporting.results import ReportError, load_result
from rmipo.reporting.tables import LEADERBOARD, build_table, fill
from tests.helpers.result_files import DECODING, write_result

SCORES = dict.fromkeys(LEADERBOARD, 10.0)
BENCHES = {"mtbench": {"mt_bench": 5.0}, "leaderboard": SCORES, "alpacaeval": {"alpacaeval2_wr": 5.0}, "hh": {}}


def compare(outputs, bench, first, second, models=("tiny", "tiny")) -> list[str]:
    """Texts of the conflicts between two results; `first` and `second` are what their files differ in."""
    for model, method, facts in ((models[0], "dpo", first), (models[1], "rmipo", second)):
        write_result(outputs, model, method, bench, BENCHES.get(bench, {}), **facts)
    results = [load_result(outputs, models[0], "dpo", bench), load_result(outputs, models[1], "rmipo", bench)]
    return [text.replace(f"{outputs}/", "") for text in conflicts(results)]


def files(bench, first, second) -> str:
    return f"{first} in tiny/dpo/eval/{bench}.json (1 files); {second} in tiny/rmipo/eval/{bench}.json (1 files)"


def test_a_package_that_only_one_has_is_a_mix(tmp_path):
    first, second = ({"versions": {"torch": "2.13.0", engine: "5.22.0"}} for engine in ("vllm", "transformers"))
    assert compare(tmp_path, "mtbench", first, second) == [
        f"mtbench: transformers {files('mtbench', 'absent', '5.22.0')}",
        f"mtbench: vllm {files('mtbench', '5.22.0', 'absent')}",
    ]


# What decides a benchmark's numbers, written out a second time: without one of these names two judges share a table.
DECISIVE = {
    "alpacaeval": "annotators_config judge_sha256 judge_endpoint reference_sha256 first_n",
    "mtbench": "judge_model judge_reference_model judge_endpoint temperatures max_new_tokens first_n",
    "leaderboard": "include_path apply_chat_template fewshot_as_multiturn dtype limit",
    "hh": "helpful harmless pairs_sha256.helpful pairs_sha256.harmless limit max_length max_prompt_length dtype",
    "reward": "model model_fingerprint reference_sha256 first_n dtype",
    "specificity": "prompts split first_n initial_fingerprint generation.temperature generation.max_new_tokens",
    "ranking": "prompts_sha256 first_n skip_n answers initial_fingerprint generation.temperature generation.seed",
    "constraints": "first_n skip_n answers generation.temperature generation.top_p generation.max_new_tokens",
}


def test_every_benchmark_with_metrics_is_compared():
    assert DECISIVE.keys() == {name for name, benchmark in BENCHMARKS.items() if benchmark.metrics}


@pytest.mark.parametrize("bench", DECISIVE)
def test_results_that_differ_in_what_decides_them_are_a_mix(tmp_path, bench):
    for name in DECISIVE[bench].split():
        block, _, key = name.rpartition(".")
        first, second = ({"settings": {block: {key: value}} if block else {key: value}} for value in ("a", "b"))
        texts = compare(tmp_path, bench, first, second)
        assert any(text.startswith(f"{bench}: {name} {files(bench, 'a', 'b')}") for text in texts), name


@pytest.mark.parametrize(
    ("bench", "change"),
    [
        ("alpacaeval", {"annotators_config": "mine"}),
        ("alpacaeval", {"judge_sha256": "0a"}),
        ("alpacaeval", {"judge_endpoint": "127.0.0.1:8000/v1"}),
        ("alpacaeval", {"generation": DECODING["llama3-8b-base"] | {"top_p": 0.5}}),
        ("mtbench", {"judge_model": "gpt-5"}),
        ("mtbench", {"judge_reference_model": "gpt-5"}),
        ("mtbench", {"max_new_tokens": 64}),
        ("mtbench", {"generation": DECODING["llama3-8b-base"] | {"top_k": 40}}),
    ],
)
def test_what_is_not_made_as_the_paper_s_is_said(tmp_path, bench, change):
    write_result(tmp_path, "llama3-8b-base", "rmipo", bench, {}, settings={})
    assert deviations(load_result(tmp_path, "llama3-8b-base", "rmipo", bench)) == []
    write_result(tmp_path, "llama3-8b-base", "rmipo", bench, {}, settings=change)
    (said,) = deviations(load_result(tmp_path, "llama3-8b-base", "rmipo", bench))
    assert "the paper's is" in said


def test_decoding_is_compared_within_a_model_alone(tmp_path):
    first, second = ({"settings": {"generation": {"temperature": t, "batch_size": 8 * t}}} for t in (0.9, 0.1))
    expected = f"alpacaeval of tiny: generation.temperature {files('alpacaeval', '0.9', '0.1')}"
    assert compare(tmp_path, "alpacaeval", first, second) == [expected]
    assert compare(tmp_path, "alpacaeval", first, second, models=("llama3-8b-base", "mistral-7b-base")) == []


def test_what_is_no_mix(tmp_path):
    one = {"helpful": {"dataset_name": "a"}, "harmless": None, "pairs_sha256": {"helpful": "0a"}}
    both = {"helpful": {"dataset_name": "a"}, "harmless": {"dataset_name": "b"}}
    both |= {"pairs_sha256": {"helpful": "0a", "harmless": "0b"}}
    assert compare(tmp_path, "hh", {"settings": one}, {"settings": both}) == []
    costs = [{"settings": {"price": [price, 1.0], "max_cost": price, "concurrency": 4}} for price in (1.0, 2.0)]
    assert compare(tmp_path, "mtbench", *costs) == []


def test_tables_refuse_mixes(tmp_path):
    write_result(tmp_path, "llama3-8b-instruct", "rmipo", "leaderboard", SCORES)
    write_result(tmp_path, "llama3-8b-instruct", "dpo", "leaderboard", SCORES, versions={"lm_eval": "0.4.9"})
    table = build_table(2, ["llama3-8b-instruct"])
    with pytest.raises(ReportError, match=r"0\.4\.9 in .*dpo/eval/leaderboard\.json.*0\.4\.13 in .*rmipo"):
        fill(table, tmp_path)


def test_missing_verdicts_are_counted(tmp_path):
    metrics = {"mt_bench": 5.0, "mt_bench_missing": 7, "other_missing": 0}
    write_result(tmp_path, "tiny", "rmipo", "mtbench", metrics)
    (line,) = missing_verdicts([load_result(tmp_path, "tiny", "rmipo", "mtbench")] * 2)
    assert line.count("7 in tiny/rmipo/eval/mtbench.json") == 1

"""AlpacaEval 2 through the alpaca-eval package: length-controlled and raw win rate against the reference outputs."""

import functools
import importlib.util
import json
import logging
from pathlib import Path
from statistics import mean, stdev

import yaml

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.statistics import resamples
from rmipo.files import write_atomically
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import OPENAI, check_cost, check_judge, judge_endpoint, shown
from rmipo.recipe.files import read_yaml
from rmipo.record import require_package

DEFAULTS = {
    "generation": {},
    "generate_only": False,  # stop before the judge, for GPU nodes without a network
    "annotators_config": "weighted_alpaca_eval_gpt4_turbo",  # alpaca-eval's name for a judge, or a folder with its YAML
    "reference": None,  # None: the hub's GPT-4 outputs, which are the benchmark. Else see load_reference: a trial run
    "first_n": None,  # instructions; anything but null is a trial run
    "length_controlled": True,
    "concurrency": 5,  # requests at once, and verdicts stored together: a restart repeats at most this many
    "price": [10.0, 30.0],  # US dollars per million input and output tokens: gpt-4-1106-preview
    "max_cost": 20.0,  # US dollars
    "max_missing": 0,  # verdicts that may be unusable in a finished result
}
CLIENT = {"max_retries": 6, "timeout": 120}  # retries of one request, with growing pauses, and its seconds

HUB_DATA = "tatsu-lab/alpaca_eval"
REFERENCE_FILE = "alpaca_eval_gpt4_baseline.json"
PAPERS_JUDGE = "595455fc9cc923f5"  # `judge_sha256` of alpaca-eval's own weighted_alpaca_eval_gpt4_turbo
DRAWS = 1000  # resamples of the prompts for the length-controlled rate; a fit each, a tenth of a second for 805 prompts


def load_reference(path: str | None) -> tuple[list[dict], str]:
    """The reference outputs, which are the benchmark's prompts too, and their file's hash: the hub's if `path` is None.

    A JSON list of {"instruction", "output"}; or preference pairs as JSONL ({"prompt", "chosen"} as messages), whose
    chosen responses are the reference. Either may end in .gz. Of a repeated prompt the first output is taken.
    """
    import pandas as pd
    from huggingface_hub import hf_hub_download

    file = Path(path or hf_hub_download(HUB_DATA, REFERENCE_FILE, repo_type="dataset"))
    rows = pd.read_json(file, lines=".jsonl" in file.suffixes, dtype=False)
    if "chosen" in rows:
        rows["instruction"], rows["output"] = (rows[name].str[-1].str["content"] for name in ("prompt", "chosen"))
    rows["generator"] = rows.get("generator", "reference")
    # alpaca-eval would pair repeated ones crosswise.
    rows = rows.drop_duplicates("instruction")[["instruction", "output", "generator"]]
    return rows.to_dict("records"), text_fingerprint(file.read_bytes())


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict | None:
    """Win rates in percent; `alpacaeval2_length`: mean characters of an answer; `alpacaeval2_missing`: unusable verdicts.

    Answers are kept in `model_dir`/eval/answers and verdicts in `output_dir`/alpacaeval: a run that was cut short goes on
    from them.
    """
    from rmipo.generation.answers import Generator, questions

    endpoint = None if settings["generate_only"] else judge_endpoint()
    reference, reference_sha256 = load_reference(settings["reference"])
    reference = reference[: settings["first_n"]]
    if endpoint is not None:
        require_package("alpaca_eval")
        # The length-controlled model has learned a difficulty for each of the 805 and joins on row numbers: for others it
        # would compute a number without meaning.
        if settings["length_controlled"] and (settings["reference"] or settings["first_n"]):
            raise EvaluationError("alpacaeval.length_controlled needs AlpacaEval's own reference, and all of it")
        check_judge(endpoint, read_judge(settings["annotators_config"])[1]["completions_kwargs"]["model_name"])
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.ask("alpacaeval", questions(row["instruction"] for row in reference))
    outputs = [
        {"instruction": row["instruction"], "output": answer, "generator": model_dir.name}
        for row, answer in zip(reference, answers, strict=True)
    ]
    write_atomically(output_dir / "alpacaeval/model_outputs.json", json.dumps(outputs, indent=2) + "\n")
    if endpoint is None:
        return None
    metrics, by_prompts, judge_sha256 = judge(outputs, reference, output_dir / "alpacaeval", endpoint, settings)
    settings |= {"judge_endpoint": shown(endpoint), "judge_sha256": judge_sha256, "reference_sha256": reference_sha256}
    metrics["alpacaeval2_cut"] = generator.cut
    return generator.result(metrics, settings, ["alpaca_eval", "scikit-learn"], **by_prompts)


def judge(
    outputs: list[dict], reference: list[dict], folder: Path, endpoint: str, settings: dict
) -> tuple[dict, dict, str]:
    """Win rates of `outputs` against `reference` (rows of {"instruction", "output", "generator"}, same instructions).

    Verdicts are kept in `folder`, a file for each judge and endpoint. Returns the metrics; `per_prompt`, for each output
    how far it won in percent (None without a usable verdict), with `draws`, the length-controlled rates of resampled
    prompts; and a hash of the judge's YAML and prompts.
    """
    import alpaca_eval
    import pandas as pd
    from alpaca_eval.annotators import PairwiseAnnotator

    logging.getLogger().setLevel(logging.ERROR)  # importing alpaca-eval has every request logged
    name, judge_file, made_of = read_judge(settings["annotators_config"])
    cache = folder / f"verdicts-{text_fingerprint(made_of + endpoint.encode())[:8]}.json"
    characters = len(made_of) * len(outputs)  # the judge's prompt
    for ours, theirs in zip(outputs, reference, strict=True):
        characters += len(ours["instruction"] + ours["output"] + theirs["output"])
    tokens_out = len(outputs) * judge_file["completions_kwargs"].get("max_tokens", 1)
    check_cost("AlpacaEval", len(outputs), characters, tokens_out, settings)

    # alpaca-eval reads a judge from a file.
    config = folder.resolve() / "judge/configs.yaml"
    write_atomically(config, yaml.safe_dump({name: judge_file}))
    drop_unusable(cache)
    annotator, size = {"annotators_config": config, "caching_path": cache}, settings["concurrency"]
    requests = {"chunksize": size, "num_procs": size, "client_kwargs": {"base_url": endpoint} | CLIENT}
    # A judge that gives no usable verdict at all is found out by its first few answers.
    first = PairwiseAnnotator(**annotator).annotate_head2head(reference[:size], outputs[:size], **requests)
    if all(pd.isna(row["preference"]) for row in first):
        found = f"none of the first {len(first)} answers of {shown(endpoint)} is a verdict"
        raise EvaluationError(f"{found}: does the judge return log-probs?")
    # Nothing is written: the default for weights leads into site-packages.
    options = {"output_path": None, "is_cache_leaderboard": False, "metric_kwargs": {"save_weights_dir": None}}
    if not settings["length_controlled"]:
        options |= {"fn_metric": "get_winrate", "sort_by": "win_rate", "metric_kwargs": None}
    options |= {"precomputed_leaderboard": None, "is_return_instead_of_print": True, "annotation_kwargs": requests}
    leaderboard, annotations = alpaca_eval.evaluate(outputs, reference, **annotator, **options)

    won = {row["instruction"]: 100 * (row["preference"] - 1) for row in annotations if pd.notna(row["preference"])}
    if (missing := len(outputs) - len(won)) > settings["max_missing"]:
        kept = f"the others are kept in {cache}; the same command asks for these again"
        raise EvaluationError(f"{missing} of {len(outputs)} verdicts can't be used, more than max_missing; {kept}")
    by_prompts = {"per_prompt": {"alpacaeval2_wr": [won.get(row["instruction"]) for row in outputs]}}
    rates = leaderboard.iloc[0]
    metrics = {
        "alpacaeval2_wr": float(rates["win_rate"]),
        "alpacaeval2_wr_standard_error": float(rates["standard_error"]),
        "alpacaeval2_length": mean(len(output["output"]) for output in outputs),
        "alpacaeval2_missing": missing,
    }
    if settings["length_controlled"]:
        draws = length_controlled_draws(annotations)
        metrics["alpacaeval2_lc"] = float(rates["length_controlled_winrate"])
        metrics["alpacaeval2_lc_standard_error"] = stdev(draws)
        by_prompts["draws"] = {"alpacaeval2_lc": draws}
    return metrics, by_prompts, text_fingerprint(made_of)


def length_controlled_draws(annotations: list[dict]) -> list[float]:
    """The length-controlled win rate (percent) of each of DRAWS resamples of `annotations`, which are alpaca-eval's.

    Every method gets the same draws of prompts, so the differences between two methods, draw by draw, are the paired
    bootstrap. Their spread is the standard error. alpaca-eval's own takes the fit for exact and can be far too small.
    """
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate
    from tqdm import tqdm

    # The regularisation rows come from the hub: asked for once, not for every draw.
    glm_winrate.hf_hub_download = functools.cache(glm_winrate.hf_hub_download)
    rows = pd.DataFrame(annotations)  # its index is the row number that leads to an instruction's difficulty
    options = {"save_weights_dir": None, "is_warn_extreme_changes": False}
    draws = tqdm(resamples(len(rows), DRAWS), total=DRAWS, desc="resampling prompts for LC")
    fits = (glm_winrate.get_length_controlled_winrate(rows.iloc[draw].copy(), **options) for draw in draws)
    return [float(fitted["length_controlled_winrate"]) for fitted in fits]


def read_judge(name: str) -> tuple[str, dict, bytes]:
    """A judge's name and what its YAML says of it, and the YAML's bytes with its prompt's, which is one of alpaca-eval's.

    `name`: of one of alpaca-eval's judges, or a folder.
    """
    packaged = Path(importlib.util.find_spec("alpaca_eval").origin).parent / "evaluators_configs"
    file = (Path(name) if Path(name).is_dir() else packaged / name) / "configs.yaml"
    ((own_name, judge_file),) = read_yaml(file).items()
    # A whole path: where another leads to no file, alpaca-eval shows the judge its name in place of its text.
    judge_file["prompt_template"] = str(packaged / judge_file["prompt_template"])
    prompt = Path(judge_file["prompt_template"]).read_text()
    return own_name, judge_file, file.read_bytes() + json.dumps([prompt]).encode()


def drop_unusable(cache: Path) -> None:
    """Remove the verdicts from the file that can't be used: alpaca-eval would not ask for those again."""
    if cache.is_file():
        usable = [row for row in json.loads(cache.read_text()) if row["preference"] >= 1]
        cache.unlink()  # alpaca-eval can't read an empty list
        if usable:
            write_atomically(cache, json.dumps(usable, indent=2))


BENCHMARK = Benchmark(
    name="alpacaeval",
    title="AlpacaEval 2",
    in_paper=True,
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "alpacaeval2_lc": Metric("LC (%)"),
        "alpacaeval2_wr": Metric("WR (%)"),
        "alpacaeval2_length": Metric("Length", digits=0, better=None),
        "alpacaeval2_cut": Metric("Cut (%)", better=None),
    },
    same=("annotators_config", "judge_sha256", "judge_endpoint", "reference_sha256", "first_n"),
    # The paper samples each model in its own way, and all methods of a model alike.
    same_per_model=DECODING,
    trial=("first_n", "reference"),
    paper={
        "annotators_config": DEFAULTS["annotators_config"],
        "judge_sha256": PAPERS_JUDGE,  # a folder of one's own may have that name
        "judge_endpoint": OPENAI,
    },
)

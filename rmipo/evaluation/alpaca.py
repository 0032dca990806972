"""AlpacaEval 2 through the alpaca-eval package: length-controlled and raw win rate against the reference outputs."""

import contextlib
import functools
import gzip
import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import yaml

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import DECODING, Benchmark, Metric
from rmipo.evaluation.statistics import resamples
from rmipo.files import replacing, write_atomically
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import OPENAI, check_cost, check_judge, http_client, judge_endpoint, shown
from rmipo.recipe.files import read_yaml
from rmipo.recipe.settings import merge_settings
from rmipo.record import require_package

DEFAULTS = {
    "generation": {},
    "generate_only": False,  # stop before the judge, for GPU nodes without a network
    "annotators_config": "weighted_alpaca_eval_gpt4_turbo",  # alpaca-eval's name for a judge, or a folder with its YAML
    "reference": None,  # None: the hub's GPT-4 outputs, which are the benchmark. Else see load_reference: a trial run
    "first_n": None,  # instructions; anything but null is a trial run
    "length_controlled": True,
    "concurrency": 5,  # requests at once, and verdicts stored together: a restart repeats at most this many
    "max_retries": 6,  # of one request, with growing pauses, before the run stops
    "timeout": 120,  # seconds for one request
    "price": [10.0, 30.0],  # US dollars per million input and output tokens: gpt-4-1106-preview
    "max_cost": 20.0,  # US dollars
    "max_missing": 0,  # verdicts that may be unusable in a finished result
}

HUB_DATA = "tatsu-lab/alpaca_eval"
REFERENCE_FILE = "alpaca_eval_gpt4_baseline.json"
GAMED_FILE = "df_gamed.csv"  # instruction difficulties and regularisation rows of the length-controlled model
PAPERS_JUDGE = "595455fc9cc923f5"  # `judge_sha256` of alpaca-eval's own weighted_alpaca_eval_gpt4_turbo
DRAWS = 1000  # resamples of the prompts for the length-controlled rate; a fit each, a tenth of a second for 805 prompts


def load_reference(path: str | None) -> tuple[list[dict], Path]:
    """The reference outputs, which are the benchmark's prompts too, and their file: the hub's if `path` is None.

    A JSON list of {"instruction", "output"}; or preference pairs as JSONL ({"prompt", "chosen"} as messages), whose
    chosen responses are the reference, the first one where a prompt is repeated. Raises EvaluationError otherwise.
    """
    file = Path(path).expanduser() if path else hub_file(REFERENCE_FILE)
    rows: dict[str, dict] = {}  # by instruction
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        if ".jsonl" in file.suffixes:
            pairs = map(json.loads, content.splitlines())
            found = [{"instruction": p["prompt"][-1]["content"], "output": p["chosen"][-1]["content"]} for p in pairs]
        else:
            found = json.loads(content)
            if len({row["instruction"] for row in found}) < len(found):  # alpaca-eval would pair them crosswise
                raise ValueError("it repeats instructions")
        for row in found:
            made_by = {"generator": row.get("generator", "reference")}
            rows.setdefault(row["instruction"], {key: row[key] for key in ("instruction", "output")} | made_by)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"alpacaeval.reference: {file} has none of the two formats ({error!r})") from error
    return list(rows.values()), file


def hub_file(name: str) -> Path:
    """A file of AlpacaEval's dataset on the hub, downloaded or from the cache."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(HUB_DATA, name, repo_type="dataset"))


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict | None:
    """Generate answers with the model in `model_dir`, have them judged, return the result.

    Answers are kept in `model_dir`/eval/answers and verdicts in `output_dir`/alpacaeval; a run that was cut short goes on
    from them. Metrics in percent: `alpacaeval2_lc`, `alpacaeval2_wr`; `alpacaeval2_length`, mean characters of an
    answer; `alpacaeval2_missing`, verdicts that couldn't be used; `alpacaeval2_cut`, percent of answers that were cut.
    """
    from rmipo.generation.answers import Generator, check_settings, questions

    settings = merge_settings("alpacaeval", DEFAULTS, settings)
    settings["generation"] = check_settings(settings["generation"])
    endpoint = None if settings["generate_only"] else judge_endpoint()
    reference, reference_path = load_reference(settings["reference"])
    reference = reference[: settings["first_n"]]
    if endpoint is not None:
        require_package("alpaca_eval")
        if settings["length_controlled"]:
            hub_file(GAMED_FILE)
            # Its model has learned a difficulty for each of the 805 and joins on row numbers: for others it would compute a
            # number without meaning.
            ours, theirs = ([row["instruction"] for row in rows] for rows in (reference, load_reference(None)[0]))
            if ours != theirs:
                needed = f"all {len(theirs)} instructions, not these {len(ours)}"
                raise EvaluationError(f"alpacaeval.length_controlled needs {needed}")
        (judge_file, *_) = read_yaml(find_judge(settings["annotators_config"])).values()
        check_judge(endpoint, judge_file["completions_kwargs"]["model_name"])
    folder = Path(output_dir) / "alpacaeval"

    requests = questions(row["instruction"] for row in reference)
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.ask("alpacaeval", requests)
    outputs = [
        {"instruction": row["instruction"], "output": answer, "generator": Path(model_dir).name}
        for row, answer in zip(reference, answers, strict=True)
    ]
    write_atomically(folder / "model_outputs.json", json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")
    if endpoint is None:
        return None

    metrics, by_prompts, judge_sha256 = judge(outputs, reference, folder, endpoint, settings)
    settings |= {"judge_endpoint": shown(endpoint), "judge_sha256": judge_sha256}
    settings["reference_sha256"] = text_fingerprint(reference_path.read_bytes())
    metrics["alpacaeval2_cut"] = generator.cut
    return generator.result(metrics, settings, ["alpaca_eval", "scikit-learn"], **by_prompts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without alpaca-eval's log: it warns with every request, and prints the traceback of an error that is raised here.

    Importing it sets the root logger's level, so that is done inside.
    """
    root = logging.getLogger()
    level = root.level
    import alpaca_eval  # noqa: F401

    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


@quiet()
def judge(
    outputs: list[dict], reference: list[dict], folder: Path, endpoint: str, settings: dict
) -> tuple[dict, dict, str]:
    """Win rates of `outputs` against `reference` (rows of {"instruction", "output", "generator"}, same instructions).

    Verdicts are kept in `folder`, a file for each judge and endpoint. Returns the metrics; `per_prompt`, for each output
    how far it won in percent (None without a usable verdict), with `draws`, the length-controlled rates of resampled
    prompts; and a hash of the judge's YAML and prompts.
    """
    import alpaca_eval
    from alpaca_eval.annotators import PairwiseAnnotator

    class AtomicAnnotator(PairwiseAnnotator):
        """A kill while verdicts are written leaves the older file whole: they have been paid for."""

        def save(self, path=None):
            with replacing(Path(path or self.caching_path)) as temporary:
                super().save(temporary)

    config = judge_config(settings["annotators_config"], folder)
    annotator = AtomicAnnotator(annotators_config=str(config), caching_path=None)
    # What a judge is: its YAML as its author wrote it, and the texts of the prompt files that the YAML names.
    prompts = [single.prompt_template for single in annotator.annotators.values()]
    text = find_judge(settings["annotators_config"]).read_bytes() + json.dumps(prompts).encode()
    cache = folder / f"verdicts-{text_fingerprint(text + endpoint.encode())[:8]}.json"
    known = keep_usable(cache)
    annotator.caching_path = cache
    annotator.load_()
    estimate_cost(annotator, outputs, reference, known, settings)

    size = settings["concurrency"]
    client = {"http_client": http_client(endpoint)} | {key: settings[key] for key in ("max_retries", "timeout")}
    requests = {"chunksize": size, "num_procs": size, "client_kwargs": client}
    if settings["length_controlled"]:
        metric = {"metric_kwargs": {"save_weights_dir": None}}  # its default writes into site-packages
    else:
        metric = {"fn_metric": "get_winrate", "sort_by": "win_rate"}
    try:
        # A judge that gives no usable verdict at all is found out by its first few answers.
        first = annotator.annotate_head2head(outputs_1=reference[:size], outputs_2=outputs[:size], **requests)
        if not any(map(is_usable, first)):
            raise EvaluationError(f"none of its first {len(first)} answers is a verdict: does it return log-probs?")
        leaderboard, annotations = alpaca_eval.evaluate(
            model_outputs=outputs,
            reference_outputs=reference,
            annotators_config=str(config),
            output_path=None,
            precomputed_leaderboard=None,
            is_cache_leaderboard=False,
            is_return_instead_of_print=True,
            annotation_kwargs=requests,
            caching_path=cache,
            Annotator=AtomicAnnotator,
            **metric,
        )
    except Exception as error:  # whatever a broken endpoint makes of alpaca-eval, the verdicts so far are on disk
        raise EvaluationError(
            f"the judge at {shown(endpoint)} failed: {type(error).__name__}: {error} {len(keep_usable(cache))} of "
            f"{len(outputs)} verdicts are kept in {cache}; the same command asks for the others"
        ) from error

    missing = sum(not is_usable(row) for row in annotations)
    if missing > settings["max_missing"]:
        kept = f"the others are kept in {cache}; the same command asks for these again"
        raise EvaluationError(f"{missing} of {len(outputs)} verdicts can't be used, more than max_missing; {kept}")
    won = {row["instruction"]: 100 * (row["preference"] - 1) if is_usable(row) else None for row in annotations}
    by_prompts = {"per_prompt": {"alpacaeval2_wr": [won[row["instruction"]] for row in outputs]}}
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
    return metrics, by_prompts, text_fingerprint(text)


def length_controlled_draws(annotations: list[dict]) -> list[float]:
    """The length-controlled win rate (percent) of each of DRAWS resamples of `annotations`, which are alpaca-eval's.

    Every method gets the same draws of prompts, so the differences between two methods, draw by draw, are the paired
    bootstrap. Their spread is the standard error. alpaca-eval's own is that of the mean of the fitted preferences: it
    takes the fit for exact and can be far too small.
    """
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate
    from tqdm import tqdm

    # The regularisation rows come from the hub: asked for once, not for every draw.
    glm_winrate.hf_hub_download = functools.cache(glm_winrate.hf_hub_download)
    rows = pd.DataFrame(annotations)  # its index is the row number that leads to an instruction's difficulty
    options = {"save_weights_dir": None, "is_warn_extreme_changes": False}
    rates = [
        glm_winrate.get_length_controlled_winrate(rows.iloc[draw].copy(), **options)["length_controlled_winrate"]
        for draw in tqdm(resamples(len(rows), DRAWS), total=DRAWS, desc="resampling prompts for LC")
    ]
    return [float(rate) for rate in rates]


def packaged_judges() -> Path:
    return Path(importlib.util.find_spec("alpaca_eval").origin).parent / "evaluators_configs"


def find_judge(name: str) -> Path:
    """The YAML of one of alpaca-eval's judges, or of a user's own folder. Raises EvaluationError."""
    for folder in (Path(name).expanduser(), packaged_judges() / name):
        if (folder / "configs.yaml").is_file():
            return (folder / "configs.yaml").resolve()
    raise EvaluationError(f"alpacaeval.annotators_config: {name!r} is no judge of alpaca-eval's, nor a folder of one")


def judge_config(name: str, folder: Path) -> Path:
    """The YAML of a judge as alpaca-eval reads it: a copy in `folder`, with the paths of the prompt files.

    A prompt file is beside the YAML's folder, or one of alpaca-eval's. Where there is none, alpaca-eval itself would show
    the judge the file's name in place of its text.
    """
    config = find_judge(name)
    judges = read_yaml(config)
    for judge in judges.values():
        places = [place / judge["prompt_template"] for place in (config.parents[1], packaged_judges())]
        prompt = next((place for place in places if place.is_file()), None)
        if prompt is None:
            raise EvaluationError(f"{config}: there is no prompt file {judge['prompt_template']} ({places[0]})")
        judge["prompt_template"] = str(prompt)
    copy = folder / "judge/configs.yaml"
    write_atomically(copy, yaml.safe_dump(judges, sort_keys=False))
    return copy


def estimate_cost(annotator, outputs: list[dict], reference: list[dict], known: list[dict], settings: dict) -> None:
    done = {(row["instruction"], row["output_1"], row["output_2"]) for row in known}
    template = max(len(single.prompt_template) for single in annotator.annotators.values())
    characters = [
        template + len(theirs["instruction"]) + len(theirs["output"]) + len(ours["output"])
        for ours, theirs in zip(outputs, reference, strict=True)
        if (theirs["instruction"], theirs["output"], ours["output"]) not in done
    ]
    tokens_out = max(single.completions_kwargs.get("max_tokens", 1) for single in annotator.annotators.values())
    check_cost("AlpacaEval", len(characters), sum(characters), len(characters) * tokens_out, settings)


def is_usable(annotation: dict) -> bool:
    preference = annotation["preference"]
    return preference is not None and 1 <= preference <= 2


def keep_usable(cache: Path) -> list[dict]:
    """The usable verdicts in the file; the others are removed from it: alpaca-eval would not ask for those again."""
    if not cache.is_file():
        return []
    usable = [row for row in json.loads(cache.read_text()) if is_usable(row)]
    write_atomically(cache, json.dumps(usable, indent=2))
    if not usable:
        cache.unlink()  # alpaca-eval can't read an empty list
    return usable


BENCHMARK = Benchmark(
    name="alpacaeval",
    title="AlpacaEval 2",
    in_paper=True,
    run=run,
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

"""AlpacaEval 2 through the alpaca-eval package: length-controlled and raw win rate against the reference outputs."""

import importlib.util
import json
import logging
from pathlib import Path
from statistics import stdev

import yaml

from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca_length import length_controlled_draws
from rmipo.evaluation.alpaca_reference import (
    GAMED_FILE,
    check_same_prompts,
    hub_file,
    load_reference,
    require_benchmark,
)
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.files import replacing, write_atomically
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import OPENAI, check_cost, check_judge, judge_endpoint, shown
from rmipo.recipe.files import read_yaml
from rmipo.recipe.settings import merge_settings
from rmipo.record import package_versions, require_package

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

PAPERS_JUDGE = "595455fc9cc923f5"  # `judge_sha256` of alpaca-eval's own weighted_alpaca_eval_gpt4_turbo


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict | None:
    """Generate answers with the model in `model_dir`, have them judged, return the result.

    Answers are kept in `model_dir`/eval/answers and verdicts in `output_dir`/alpacaeval; a run that was cut short goes on
    from them. Metrics in percent: `alpacaeval2_lc`, `alpacaeval2_wr`; `alpacaeval2_length`, mean characters of an
    answer; `alpacaeval2_missing`, verdicts that couldn't be used; `alpacaeval2_cut`, percent of answers that were cut at
    the limit. With `generate_only`, nothing is judged and None returned.

    Raises EvaluationError for wrong settings or a missing key before a model is loaded, for a cost above `max_cost`
    before the first request, and for a judge that fails or gives unusable verdicts, with what there is kept.
    """
    from rmipo.generation.answers import Generator, Request, check_settings

    settings = merge_settings("alpacaeval", DEFAULTS, settings)
    settings["generation"] = check_settings(settings["generation"])
    endpoint = None if settings["generate_only"] else judge_endpoint()
    reference, reference_path = load_reference(settings["reference"])
    reference = reference[: settings["first_n"]]
    if not settings["generate_only"]:
        require_package("alpaca_eval")
        if settings["length_controlled"]:
            hub_file(GAMED_FILE)
            require_benchmark(reference)
        check_judge(endpoint, judge_model(settings["annotators_config"]))
    folder = Path(output_dir) / "alpacaeval"
    name = Path(model_dir).name

    requests = [Request(str(i), [{"role": "user", "content": row["instruction"]}]) for i, row in enumerate(reference)]
    with Generator(model_dir, settings["generation"]) as generator:
        answers = generator.answer(requests, generator.file("alpacaeval", requests))
    outputs = [
        {"instruction": row["instruction"], "output": answer, "generator": name}
        for row, answer in zip(reference, answers, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_outputs.json").write_text(json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")
    if settings["generate_only"]:
        return None

    metrics, by_prompts, judge_sha256 = judge(outputs, reference, folder, endpoint, settings)
    settings |= {
        "generation": generator.settings,
        "judge_endpoint": shown(endpoint),
        "judge_sha256": judge_sha256,
        "reference_sha256": text_fingerprint(reference_path.read_bytes()),
    }
    versions = generator.versions | package_versions("alpaca_eval", "scikit-learn")
    metrics["alpacaeval2_cut"] = generator.cut
    result = {"metrics": metrics, **by_prompts, "versions": versions, "settings": settings}
    return result | {"fingerprint": generator.fingerprint}


def judge(
    outputs: list[dict], reference: list[dict], folder: Path, endpoint: str, settings: dict
) -> tuple[dict, dict, str]:
    """Win rates of `outputs` against `reference` (rows of {"instruction", "output", "generator"}, same instructions).

    Verdicts are kept in `folder`, a file for each judge and endpoint. Returns the metrics; `per_prompt`, for each output
    how far it won in percent (None without a usable verdict), with `draws`, the length-controlled rates of resampled
    prompts; and a hash of the judge's YAML and prompts. Raises EvaluationError as `run` does.
    """
    check_same_prompts(outputs, reference)
    folder.mkdir(parents=True, exist_ok=True)
    import alpaca_eval
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    quiet(logging.getLogger())

    class AtomicAnnotator(PairwiseAnnotator):
        """Writes its verdicts beside the file and then renames: a kill while writing leaves the older file whole."""

        def save(self, path=None):
            target = Path(path or self.caching_path)
            with replacing(target) as temporary:
                super().save(temporary)

    config = judge_config(settings["annotators_config"], EVALUATORS_CONFIG_DIR, folder)
    annotator = AtomicAnnotator(annotators_config=str(config), caching_path=None)
    text = judge_text(find_judge(settings["annotators_config"], EVALUATORS_CONFIG_DIR), annotator)
    cache = folder / f"verdicts-{text_fingerprint(text + endpoint.encode())[:8]}.json"
    drop_unusable(cache)
    annotator.caching_path = cache
    annotator.load_()
    completions = remember_completions(annotator)
    estimate_cost(annotator, outputs, reference, settings)
    size = settings["concurrency"]
    requests = {
        "chunksize": size,
        "num_procs": size,
        "client_kwargs": {"max_retries": settings["max_retries"], "timeout": settings["timeout"]},
    }
    if settings["length_controlled"]:
        metric = {"metric_kwargs": {"save_weights_dir": None}}  # its default writes into site-packages
    else:
        metric = {"fn_metric": "get_winrate", "sort_by": "win_rate"}
    try:
        # A judge that gives no usable verdict at all is found out by its first few answers.
        first = annotator.annotate_head2head(outputs_1=reference[:size], outputs_2=outputs[:size], **requests)
        if all(is_missing(row) for row in first):
            raise EvaluationError(
                f"none of the judge's first {len(first)} answers could be read as a verdict. They are read as the "
                "judge's YAML says: for the weighted judge from the log-probs of the first token, which the server "
                f"has to return. The last answer: {describe(completions[-1])}"
            )
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
    except EvaluationError:
        raise
    except Exception as error:  # whatever a broken endpoint makes of alpaca-eval, the verdicts so far are on disk
        raise EvaluationError(
            f"the judge at {shown(endpoint)} failed: {type(error).__name__}: {str(error).rstrip('.')}. {stored(cache)} "
            f"of {len(outputs)} verdicts are kept in {cache}; the same command asks for the others."
        ) from error

    missing = sum(is_missing(row) for row in annotations)
    if missing > settings["max_missing"]:
        raise EvaluationError(
            f"{missing} of {len(outputs)} verdicts couldn't be used, max_missing is {settings['max_missing']}. "
            f"The others are kept in {cache}; the same command asks again for the missing ones."
        )
    won = {row["instruction"]: None if is_missing(row) else 100 * (row["preference"] - 1) for row in annotations}
    by_prompts = {"per_prompt": {"alpacaeval2_wr": [won[row["instruction"]] for row in outputs]}}
    metrics = metrics_of(leaderboard.iloc[0], outputs, missing)
    if settings["length_controlled"]:
        draws = length_controlled_draws(annotations)
        metrics["alpacaeval2_lc_standard_error"] = stdev(draws)
        by_prompts["draws"] = {"alpacaeval2_lc": draws}
    return metrics, by_prompts, text_fingerprint(text)


def find_judge(name: str, packaged: Path) -> Path:
    """The YAML of one of alpaca-eval's judges, in `packaged`, or of a user's own folder. Raises EvaluationError."""
    for folder in (Path(name).expanduser(), packaged / name):
        if (folder / "configs.yaml").is_file():
            return (folder / "configs.yaml").resolve()
    raise EvaluationError(
        f"alpacaeval.annotators_config: {name!r} is neither one of alpaca-eval's judges nor a folder with configs.yaml"
    )


def judge_model(annotators_config: str) -> str:
    """The name that the judge's server knows it by. Raises EvaluationError."""
    packaged = Path(importlib.util.find_spec("alpaca_eval").origin).parent / "evaluators_configs"
    judges = read_yaml(find_judge(annotators_config, packaged))
    return next(iter(judges.values()))["completions_kwargs"]["model_name"]


def judge_config(name: str, packaged: Path, folder: Path) -> Path:
    """The YAML of a judge: one of alpaca-eval's, or a copy in `folder` of a user's own, its prompt file found.

    A prompt file may be beside the YAML's folder, in it, or one of alpaca-eval's. Raises EvaluationError without it:
    alpaca-eval itself would show the judge the file's name in place of its text.
    """
    config = find_judge(name, packaged)
    if config.is_relative_to(packaged.resolve()):
        return config
    judges = read_yaml(config)
    for judge in judges.values():
        places = [place / judge["prompt_template"] for place in (config.parents[1], config.parent, packaged)]
        prompt = next((place for place in places if place.is_file()), None)
        if prompt is None:
            raise EvaluationError(f"{config}: there is no prompt file {judge['prompt_template']} ({places[0]})")
        judge["prompt_template"] = str(prompt)
    copy = folder / "judge/configs.yaml"
    write_atomically(copy, yaml.safe_dump(judges, sort_keys=False))
    return copy


def judge_text(config: Path, annotator) -> bytes:
    """What a judge is: its YAML as its author wrote it, and the texts of the prompt files that the YAML names."""
    prompts = [single.prompt_template for single in annotator.annotators.values()]
    return config.read_bytes() + json.dumps(prompts).encode()


def remember_completions(annotator) -> list:
    """A list of what the judge answers from now on, as received: alpaca-eval doesn't keep what it can't read."""
    completions = []
    for single in annotator.annotators.values():

        def parse(completion, parser=single.fn_completion_parser):
            completions.append(completion)
            return parser(completion)

        single.fn_completion_parser = parse
    return completions


def describe(completion: dict | str) -> str:
    """A judge's answer for an error message: its text, and whether log-probs came with it."""
    if isinstance(completion, str):  # of a judge that is read by its text
        return f"{completion[:300]!r}"
    return f"{completion['text'][:300]!r}, with{'' if completion.get('logprobs') else 'out'} log-probs"


def metrics_of(row, outputs: list[dict], missing: int) -> dict[str, float]:
    """The project's names for alpaca-eval's numbers, in percent; `row` is one row of its leaderboard."""
    metrics = {
        "alpacaeval2_wr": float(row["win_rate"]),
        "alpacaeval2_wr_standard_error": float(row["standard_error"]),
        "alpacaeval2_length": sum(len(output["output"]) for output in outputs) / len(outputs),
        "alpacaeval2_missing": missing,
    }
    if "length_controlled_winrate" in row:
        metrics["alpacaeval2_lc"] = float(row["length_controlled_winrate"])
    return metrics


def estimate_cost(annotator, outputs: list[dict], reference: list[dict], settings: dict) -> None:
    known = set()
    if annotator.df_annotations is not None:
        table = annotator.df_annotations
        known = set(zip(table["instruction"], table["output_1"], table["output_2"], strict=True))
    template = max(len(single.prompt_template) for single in annotator.annotators.values())
    characters = [
        template + len(theirs["instruction"]) + len(theirs["output"]) + len(ours["output"])
        for ours, theirs in zip(outputs, reference, strict=True)
        if (theirs["instruction"], theirs["output"], ours["output"]) not in known
    ]
    tokens_out = max(single.completions_kwargs.get("max_tokens", 1) for single in annotator.annotators.values())
    check_cost("AlpacaEval", len(characters), sum(characters), len(characters) * tokens_out, settings)


def quiet(root: logging.Logger) -> None:
    """Take back the level INFO that importing alpaca-eval sets, and what comes with every request.

    That is advice, and the traceback of a failed request, whose error is raised and told once.
    """
    root.setLevel(logging.WARNING)
    repeated = (
        "openai_configs.yaml wasn't found",
        "Saving_path is given",
        "Unknown error:",
        "for computing price per token",
    )
    root.addFilter(lambda record: not any(text in record.getMessage() for text in repeated))


def is_missing(annotation: dict) -> bool:
    preference = annotation["preference"]
    return preference is None or not 1 <= preference <= 2


def drop_unusable(cache: Path) -> None:
    """Remove unusable verdicts from the file: alpaca-eval stores them too, and would not ask again.

    Without any other the file goes: alpaca-eval can't read an empty list.
    """
    if not cache.is_file():
        return
    usable = [row for row in json.loads(cache.read_text()) if not is_missing(row)]
    if usable:
        write_atomically(cache, json.dumps(usable, indent=2))
    else:
        cache.unlink()


def stored(cache: Path) -> int:
    return len([row for row in json.loads(cache.read_text()) if not is_missing(row)]) if cache.is_file() else 0


BENCHMARK = Benchmark(
    name="alpacaeval",
    title="AlpacaEval 2",
    in_paper=True,
    run=run,
    defaults=DEFAULTS,
    metrics={
        "alpacaeval2_lc": Metric("LC (%)", standard_error="alpacaeval2_lc_standard_error"),
        "alpacaeval2_wr": Metric("WR (%)", standard_error="alpacaeval2_wr_standard_error"),
        "alpacaeval2_length": Metric("Length", digits=0),
    },
    same=("annotators_config", "judge_sha256", "judge_endpoint", "reference_sha256", "first_n"),
    # The paper samples each model in its own way, and all methods of a model alike.
    same_per_model=tuple(f"generation.{key}" for key in ("temperature", "top_p", "top_k", "max_new_tokens", "dtype")),
    trial=("first_n", "reference"),
    paper={
        "annotators_config": DEFAULTS["annotators_config"],
        "judge_sha256": PAPERS_JUDGE,  # a folder of one's own may have that name
        "judge_endpoint": OPENAI,
    },
)

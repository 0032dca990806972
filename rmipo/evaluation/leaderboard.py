"""Open LLM Leaderboard v2 through lm-eval, with the leaderboard's normalisation, and two tests of alignment tax.

lm-eval reports raw scores only; the paper's Table 2 prints normalised ones. A score is rescaled so that guessing is 0
and a perfect run is 100, subtask by subtask where the number of answer choices differs, then averaged unweighted.
"""

import gc
import json
from collections import namedtuple
from pathlib import Path

import numpy as np

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.files import write_atomically
from rmipo.fingerprints import json_fingerprint, trained_fingerprint
from rmipo.recipe.settings import merge_settings, nearest
from rmipo.record import package_versions, require_package

BBH_CHOICES = {
    "boolean_expressions": 2, "causal_judgement": 2, "formal_fallacies": 2, "hyperbaton": 2, "navigate": 2,
    "snarks": 2, "sports_understanding": 2, "web_of_lies": 2,
    "disambiguation_qa": 3, "logical_deduction_three_objects": 3, "tracking_shuffled_objects_three_objects": 3,
    "temporal_sequences": 4,
    "logical_deduction_five_objects": 5, "penguins_in_a_table": 5, "tracking_shuffled_objects_five_objects": 5,
    "date_understanding": 6, "movie_recommendation": 6, "ruin_names": 6, "salient_translation_error_detection": 6,
    "logical_deduction_seven_objects": 7, "tracking_shuffled_objects_seven_objects": 7,
    "geometric_shapes": 11, "reasoning_about_colored_objects": 18, "object_counting": 19,
}  # fmt: skip
MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
GPQA_CHOICES = 4
MMLU_PRO_CHOICES = 10


Part = namedtuple("Part", ["name", "label", "data"])  # lm-eval's name of it; its data on the hub
TASKS = {  # by their names in TASKS=...
    "ifeval": Part("leaderboard_ifeval", "IFEval", "wis-k/instruction-following-eval"),
    "bbh": Part("leaderboard_bbh", "BBH", "SaylorTwift/bbh"),
    "math": Part("leaderboard_math_hard", "MATH", "DigitalLearningGmbH/MATH-lighteval"),
    "gpqa": Part("leaderboard_gpqa", "GPQA", "Idavidrein/gpqa"),
    "musr": Part("leaderboard_musr", "MUSR", "TAUR-Lab/MuSR"),
    "mmlu_pro": Part("leaderboard_mmlu_pro", "MMLU-PRO", "TIGER-Lab/MMLU-Pro"),
    # Not the leaderboard's: what preference training costs elsewhere.
    "gsm8k": Part("gsm8k", "GSM8K", "openai/gsm8k"),
    "mmlu": Part("mmlu", "MMLU", "cais/mmlu"),
}
# lm-eval's "auto" begins with 64 prompts as long as the model's context: more than a CPU's memory, and no error ends it.
CPU_BATCH = 8
DEFAULTS = {
    "tasks": list(TASKS)[:6],
    "include_path": None,  # a folder of task YAMLs used instead of lm-eval's own (offline runs)
    "apply_chat_template": True,
    "fewshot_as_multiturn": True,
    "engine": "auto",  # vllm where there is a GPU, else transformers
    "batch_size": "auto",  # on a GPU the largest that fits ("auto:4": found anew four times), on a CPU CPU_BATCH
    "dtype": "auto",
    "limit": None,  # examples per task, below 1 their share; anything but null is a trial run, and the tables say so
}


Score = tuple[float, float]  # value and standard error, in percent


def score(results: dict[str, dict], task: str, metric: str, filter_: str = "none") -> Score:
    """From `results` of lm-eval: task name -> {"acc_norm,none": ..., "acc_norm_stderr,none": ...}."""
    error = results[task].get(f"{metric}_stderr,{filter_}")
    return 100 * float(results[task][f"{metric},{filter_}"]), 100 * error if isinstance(error, float) else 0.0


def rescaled(raw: Score, choices: int) -> Score:
    """Percent above guessing among `choices` answers: 100 * max(0, v - 1/n) / (1 - 1/n)."""
    guess = 1 / choices
    return 100 * max(0.0, raw[0] / 100 - guess) / (1 - guess), raw[1] / (1 - guess)


def unweighted(results: dict[str, dict], group: str, choices: dict[str, int]) -> Score:
    """Mean over subtasks. lm-eval's own group value is weighted by subtask size; the leaderboard's is not."""
    scores = [rescaled(score(results, f"{group}_{task}", "acc_norm"), n) for task, n in choices.items()]
    return sum(value for value, _ in scores) / len(scores), sum(e**2 for _, e in scores) ** 0.5 / len(scores)


def by_size(results: dict[str, dict], group: str, metric: str) -> Score:
    """Mean over the examples of all subtasks of a group, named <group>_<subtask>."""
    prefix = f"{group.removesuffix('_hard')}_"
    tasks = [name for name in results if name.startswith(prefix) and name != group]
    if not tasks:
        return score(results, group, metric)
    sizes = np.array([results[name]["sample_len"] for name in tasks], dtype=float)
    scores = np.array([score(results, name, metric) for name in tasks])
    return float(sizes @ scores[:, 0] / sizes.sum()), float(np.linalg.norm(sizes * scores[:, 1]) / sizes.sum())


def metrics_of(task: str, results: dict[str, dict], samples: list[dict] = ()) -> dict[str, float]:
    """One column of Table 2, in percent, with its standard error as `<name>_standard_error`; `samples`: IFEval's.

    MATH has both of lm-eval's scorers: `math` is the leaderboard's first one, `math_verify` the one that lm-eval now
    calls exact_match and the leaderboard changed to in February 2025, which reads more ways to write an answer.
    """
    name = TASKS[task].name
    if task == "ifeval":
        strict = [score(results, name, f"{level}_level_strict_acc")[0] for level in ("prompt", "inst")]
        scores = {"ifeval": (sum(strict) / 2, ifeval_error(samples))}
    elif task in ("bbh", "musr"):
        scores = {task: unweighted(results, name, {"bbh": BBH_CHOICES, "musr": MUSR_CHOICES}[task])}
    elif task == "math":
        scorers = {"math": "exact_match_original", "math_verify": "exact_match"}
        scores = {key: by_size(results, name, metric) for key, metric in scorers.items()}
    elif task == "gpqa":
        scores = {"gpqa": rescaled(by_size(results, name, "acc_norm"), GPQA_CHOICES)}
    elif task == "mmlu_pro":
        scores = {"mmlu_pro": rescaled(score(results, name, "acc"), MMLU_PRO_CHOICES)}
    elif task == "gsm8k":
        filters = {"gsm8k": "flexible-extract", "gsm8k_strict": "strict-match"}
        scores = {key: score(results, name, "exact_match", filter_) for key, filter_ in filters.items()}
    else:
        scores = {"mmlu": score(results, name, "acc")}
    values = {name: value for name, (value, _) in scores.items()}
    return values | {f"{name}_standard_error": error for name, (_, error) in scores.items()}


def ifeval_error(samples: list[dict]) -> float:
    """Standard error of the mean of both strict accuracies, in percent, from each prompt's share in them.

    The instructions of one prompt aren't independent, and prompts have one to three: a ratio of two means.
    """
    if len(samples) < 2:
        return 0.0
    prompts = np.array([float(np.all(sample["prompt_level_strict_acc"])) for sample in samples])
    counts = np.array([np.size(sample["inst_level_strict_acc"]) for sample in samples])
    followed = np.array([np.sum(sample["inst_level_strict_acc"]) for sample in samples])
    rate = followed.sum() / counts.sum()
    parts = (prompts - prompts.mean()) / 2 + (followed - rate * counts) / (2 * counts.mean())
    return float(100 * parts.std(ddof=1) / len(samples) ** 0.5)


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Evaluate the model in `model_dir` on `settings["tasks"]`, one after the other.

    Each finished task leaves lm-eval's results in `output_dir`/leaderboard/<task>.json and what it was asked and answered
    in <task>.samples.jsonl; a run that was cut short goes on with the next task.
    """
    settings = merge_settings("leaderboard", DEFAULTS, settings)
    if unknown := [task for task in settings["tasks"] if task not in TASKS]:
        raise EvaluationError(f"leaderboard.tasks: unknown {unknown}{nearest(unknown, TASKS)}")
    require_package("lm_eval")
    if settings["include_path"] is None:
        from rmipo.plan.preflight import check_access

        for task in settings["tasks"]:  # before hours of generation for those before it
            check_access(TASKS[task].data, "dataset")

    import torch

    from rmipo.generation.engines import choose_engine

    engine = settings["engine"] = choose_engine(settings["engine"])
    if str(settings["batch_size"]).startswith("auto") and not torch.cuda.is_available():
        settings["batch_size"] = CPU_BATCH
    versions = package_versions(*sorted({"lm_eval", "transformers", "torch", engine}))
    identity = {
        "settings": {key: value for key, value in settings.items() if key not in ("tasks", "batch_size")},
        "versions": versions,
        "weights": trained_fingerprint(Path(model_dir)),
    }
    metrics: dict[str, float] = {}
    model, folder = None, Path(output_dir) / "leaderboard"
    for task in settings["tasks"]:
        path = folder / f"{task}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if found.get("identity") != json_fingerprint(identity):
            model = model or load(model_dir, settings)
            found = {"identity": json_fingerprint(identity), **evaluate(model, task, settings, path)}
            write_atomically(path, json.dumps(found, indent=2, default=str) + "\n")
        metrics |= found["metrics"]
    del model
    gc.collect()  # lm-eval's model refers to itself; without this the weights outlive the call
    return {"metrics": metrics, "versions": versions, "settings": settings}


def load(model_dir: str | Path, settings: dict):
    """lm-eval's model; safetensors alone, and no code from the folder."""
    import torch
    from lm_eval.api.registry import get_model

    from rmipo.generation.engines import release_memory, vllm_dtype

    arguments = {"pretrained": str(model_dir), "dtype": settings["dtype"], "trust_remote_code": False}
    more = {"batch_size": settings["batch_size"]}
    if settings["engine"] == "vllm":
        release_memory()
        arguments |= {"dtype": vllm_dtype(model_dir, settings["dtype"]), "load_format": "safetensors"}
        return get_model("vllm").create_from_arg_obj(arguments, more)
    more["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return get_model("hf").create_from_arg_obj(arguments | {"use_safetensors": True}, more)


def evaluate(model, task: str, settings: dict, path: Path) -> dict:
    """{"metrics", "results", ...} of one task; its samples go to a file beside `path`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    include_path = settings["include_path"]
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    raw = lm_eval.simple_evaluate(
        model=model,
        tasks=[TASKS[task].name],
        task_manager=manager,
        limit=settings["limit"],
        apply_chat_template=settings["apply_chat_template"],
        fewshot_as_multiturn=settings["fewshot_as_multiturn"],
        log_samples=True,
    )
    # A task that is written inside its group's file is called "group::task".
    results = {task.rpartition("::")[2]: scores for task, scores in raw["results"].items()}
    samples = [
        {"task": task.rpartition("::")[2], **{key: value for key, value in sample.items() if key != "arguments"}}
        for task, rows in raw["samples"].items()
        for sample in rows
    ]
    text = "".join(json.dumps(sample, default=str) + "\n" for sample in samples)
    write_atomically(path.with_suffix(".samples.jsonl"), text)
    kept = {key: raw[key] for key in ("versions", "n-samples", "n-shot")}
    return {"metrics": metrics_of(task, results, samples), "results": results, **kept}


BENCHMARK = Benchmark(
    name="leaderboard",
    title="Open LLM Leaderboard v2",
    in_paper=True,
    run=run,
    defaults=DEFAULTS,
    metrics={name: Metric(task.label, 2) for name, task in TASKS.items()},
    same=("include_path", "apply_chat_template", "fewshot_as_multiturn", "dtype", "limit"),
    trial=("limit", "include_path"),
    parts="tasks",
)

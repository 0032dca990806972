"""Open LLM Leaderboard v2 through lm-eval, with the leaderboard's normalisation, and two tests of alignment tax.

lm-eval reports raw scores only; the paper's Table 2 prints normalised ones. A score is rescaled so that guessing is 0
and a perfect run is 100, subtask by subtask where the number of answer choices differs, then averaged unweighted.
"""

import functools
import gc
import importlib.util
import json
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import standard_error
from rmipo.files import write_atomically
from rmipo.fingerprints import json_fingerprint, trained_fingerprint
from rmipo.recipe.files import read_yaml
from rmipo.record import package_versions, require_package

MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
GPQA_CHOICES = 4
MMLU_PRO_CHOICES = 10
GSM8K = {"gsm8k": "exact_match,flexible-extract", "gsm8k_strict": "exact_match,strict-match"}
# The leaderboard's first scorer; and the one that lm-eval now calls exact_match and the leaderboard changed to in February
# 2025, which reads more ways to write an answer.
MATH = {"math": "exact_match_original,none", "math_verify": "exact_match,none"}

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
    "engine": "auto",  # vllm where there is a GPU, else transformers
    "batch_size": "auto",  # on a GPU the largest that fits ("auto:4": found anew four times), on a CPU CPU_BATCH
    "dtype": "auto",
    "limit": None,  # examples per task, below 1 their share; anything but null is a trial run, and the tables say so
}


@functools.cache
def bbh_choices() -> dict[str, int]:
    """BBH's subtasks and how many answers each has to choose from, by lm-eval's files."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks/leaderboard/bbh_mc"
    return {path.stem: len(read_yaml(path)["doc_to_choice"]) for path in folder.glob("[a-z]*.yaml")}


def scores_of(results: dict[str, dict], tasks: Iterable[str], metric: str) -> np.ndarray:
    """(tasks, 2): value and standard error in percent, from lm-eval's task -> {"acc,none": ..., "acc_stderr,none": ...}."""
    error = metric.replace(",", "_stderr,")
    # lm-eval writes "N/A" where it has no error.
    rows = [[results[task][metric], pd.to_numeric(results[task].get(error, 0), errors="coerce")] for task in tasks]
    return 100 * np.nan_to_num(np.array(rows, dtype=float))


def rescaled(scores: np.ndarray, choices: Iterable[int]) -> np.ndarray:
    """Percent above guessing among `choices` answers: 100 * max(0, v - 1/n) / (1 - 1/n)."""
    guess = 1 / np.array(list(choices))
    return np.stack([np.maximum(0, scores[:, 0] - 100 * guess), scores[:, 1]], axis=1) / (1 - guess)[:, None]


def averaged(scores: np.ndarray, sizes: Iterable[float] | None = None) -> np.ndarray:
    """(1, 2): the mean over tasks, weighted by their `sizes` where there are any, and its error."""
    weights = np.ones(len(scores)) if sizes is None else np.array(list(sizes), dtype=float)
    weights /= weights.sum()
    return np.array([[weights @ scores[:, 0], np.linalg.norm(weights * scores[:, 1])]])


def by_size(results: dict[str, dict], group: str, metric: str) -> np.ndarray:
    """Mean over the examples of all subtasks of a group, named <group>_<subtask>."""
    prefix = f"{group.removesuffix('_hard')}_"
    tasks = [name for name in results if name.startswith(prefix) and name != group] or [group]
    return averaged(scores_of(results, tasks, metric), (results[name].get("sample_len", 1) for name in tasks))


def metrics_of(task: str, results: dict[str, dict], samples: list[dict] = ()) -> dict[str, float]:
    """One column of Table 2, in percent, with its standard error as `<name>_standard_error`; `samples`: IFEval's."""
    name = TASKS[task].name
    if task == "ifeval":
        levels = ("prompt_level_strict_acc", "inst_level_strict_acc")
        value = np.mean([scores_of(results, [name], f"{level},none")[0, 0] for level in levels])
        # The instructions of one prompt aren't independent: each prompt counts with the mean of its shares in both.
        error = standard_error([50 * sum(np.mean(sample[level]) for level in levels) for sample in samples])
        scores = {"ifeval": np.array([[value, error]])}
    elif task in ("bbh", "musr"):
        # lm-eval's own group value is weighted by subtask size; the leaderboard's is not.
        choices = bbh_choices() if task == "bbh" else MUSR_CHOICES
        raw = scores_of(results, (f"{name}_{subtask}" for subtask in choices), "acc_norm,none")
        scores = {task: averaged(rescaled(raw, choices.values()))}
    elif task == "math":
        scores = {key: by_size(results, name, metric) for key, metric in MATH.items()}
    elif task == "gpqa":
        scores = {"gpqa": rescaled(by_size(results, name, "acc_norm,none"), [GPQA_CHOICES])}
    elif task == "mmlu_pro":
        scores = {"mmlu_pro": rescaled(scores_of(results, [name], "acc,none"), [MMLU_PRO_CHOICES])}
    else:
        metrics = {"mmlu": "acc,none"} if task == "mmlu" else GSM8K
        scores = {key: scores_of(results, [name], metric) for key, metric in metrics.items()}
    values = {name: float(score[0, 0]) for name, score in scores.items()}
    return values | {f"{name}_standard_error": float(score[0, 1]) for name, score in scores.items()}


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict:
    """Evaluate the model in `model_dir` on `settings["tasks"]`, one after the other.

    Each finished task leaves lm-eval's results in `output_dir`/leaderboard/<task>-<hash>.json, and what it was asked and
    answered in <task>-<hash>.samples.jsonl; a run that was cut short goes on with the next task.
    """
    if unknown := [task for task in settings["tasks"] if task not in TASKS]:
        raise EvaluationError(f"leaderboard.tasks: unknown {unknown}")
    require_package("lm_eval")
    import torch

    from rmipo.generation.engines import choose_engine
    from rmipo.plan.preflight import check_access

    for task in settings["tasks"] if settings["include_path"] is None else ():
        check_access(TASKS[task].data, "dataset")  # before hours of generation for the tasks before it
    engine = settings["engine"] = choose_engine(settings["engine"])
    if str(settings["batch_size"]).startswith("auto") and not torch.cuda.is_available():
        settings["batch_size"] = CPU_BATCH
    versions = package_versions(*sorted({"lm_eval", "transformers", "torch", engine}))
    used = {key: value for key, value in settings.items() if key not in ("tasks", "batch_size")}
    identity = json_fingerprint([used, versions, trained_fingerprint(model_dir)])
    metrics: dict[str, float] = {}
    model = None
    for task in settings["tasks"]:
        path = output_dir / "leaderboard" / f"{task}-{identity[:8]}.json"
        if not path.is_file():
            model = model or load(model_dir, settings)
            evaluate(model, task, settings, path)
        metrics |= json.loads(path.read_text())["metrics"]
    del model
    gc.collect()  # lm-eval's model refers to itself; without this the weights outlive the call
    return {"metrics": metrics, "versions": versions, "settings": settings}


def load(model_dir: Path, settings: dict):
    """lm-eval's model, on the GPU where there is one; safetensors alone, and no code from the folder."""
    import torch
    from lm_eval.api.registry import get_model

    from rmipo.generation.engines import release_memory, vllm_dtype

    arguments = {"pretrained": str(model_dir), "trust_remote_code": False, "batch_size": settings["batch_size"]}
    if settings["engine"] == "vllm":
        release_memory()
        dtype = vllm_dtype(model_dir, settings["dtype"])
        return get_model("vllm")(dtype=dtype, load_format="safetensors", **arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return get_model("hf")(dtype=settings["dtype"], device=device, use_safetensors=True, **arguments)


def evaluate(model, task: str, settings: dict, path: Path) -> None:
    """Write {"metrics", "results"} of one task to `path`, and its samples to a file beside it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    include_path = settings["include_path"]
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    options = {"limit": settings["limit"], "apply_chat_template": True, "fewshot_as_multiturn": True}
    raw = lm_eval.simple_evaluate(model, tasks=[TASKS[task].name], task_manager=manager, **options)
    # A task that is written inside its group's file is called "group::task".
    results = {name.rpartition("::")[2]: scores for name, scores in raw["results"].items()}
    samples = [{"task": name, **sample} for name, rows in raw["samples"].items() for sample in rows]
    text = "".join(json.dumps(sample, default=str) + "\n" for sample in samples)
    write_atomically(path.with_suffix(".samples.jsonl"), text)
    found = {"metrics": metrics_of(task, results, samples), "results": results}
    write_atomically(path, json.dumps(found, indent=2, default=str) + "\n")


BENCHMARK = Benchmark(
    name="leaderboard",
    title="Open LLM Leaderboard v2",
    in_paper=True,
    measure=measure,
    defaults=DEFAULTS,
    metrics={name: Metric(task.label, 2) for name, task in TASKS.items()},
    same=("include_path", "dtype", "limit"),
    trial=("limit", "include_path"),
    parts="tasks",
)

"""Open LLM Leaderboard v2: lm-eval's task group `leaderboard`, and the leaderboard's normalisation of its scores.

lm-eval reports raw scores only; the paper's Table 2 prints normalised ones. A score is rescaled so that guessing is 0
and a perfect run is 100, subtask by subtask where the number of answer choices differs, then averaged unweighted.
"""

import gc
import json
from pathlib import Path

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric, require_package
from rmipo.recipe.settings import merge_settings
from rmipo.record import package_versions

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

DEFAULTS = {
    "tasks": ["leaderboard"],
    "include_path": None,  # a folder of task YAMLs used instead of lm-eval's own (offline runs)
    "apply_chat_template": True,
    "fewshot_as_multiturn": True,
    "batch_size": "auto",
    "dtype": "auto",
    "device": None,  # null: cuda where there is a GPU, else cpu
    "limit": None,  # examples per task; anything but null is a trial run, and the tables say so
}


def normalize(value: float, choices: int) -> float:
    """Percent above guessing among `choices` answers: 100 * max(0, v - 1/n) / (1 - 1/n)."""
    guess = 1 / choices
    return 100 * max(0.0, value - guess) / (1 - guess)


def leaderboard_metrics(results: dict[str, dict]) -> dict[str, float]:
    """The six columns of Table 2, in percent, from `results` of lm-eval (task name -> {"acc_norm,none": ...}).

    Raises EvaluationError naming every task or metric that is missing.
    """
    missing = []

    def score(task: str, metric: str) -> float:
        value = results.get(task, {}).get(f"{metric},none")
        if value is None:
            missing.append(f"{task} ({metric})")
            return 0.0
        return float(value)

    def mean_over_subtasks(group: str, choices: dict[str, int]) -> float:
        # lm-eval's own group value is weighted by subtask size; the leaderboard's is not.
        scores = [normalize(score(f"leaderboard_{group}_{task}", "acc_norm"), n) for task, n in choices.items()]
        return sum(scores) / len(scores)

    strict = [score("leaderboard_ifeval", f"{level}_level_strict_acc") for level in ("prompt", "inst")]
    metrics = {
        "ifeval": 100 * sum(strict) / 2,
        "bbh": mean_over_subtasks("bbh", BBH_CHOICES),
        "math": 100 * score("leaderboard_math_hard", "exact_match"),
        "gpqa": normalize(score("leaderboard_gpqa", "acc_norm"), GPQA_CHOICES),
        "musr": mean_over_subtasks("musr", MUSR_CHOICES),
        "mmlu_pro": normalize(score("leaderboard_mmlu_pro", "acc"), MMLU_PRO_CHOICES),
    }
    if missing:
        raise EvaluationError(f"lm-eval's results lack {len(missing)} scores of the leaderboard: {', '.join(missing)}")
    return metrics


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Evaluate the model in `model_dir` on the leaderboard's tasks; `settings` overrides DEFAULTS.

    lm-eval's own results go to `output_dir`/leaderboard_raw.json. Returns {"metrics", "versions", "settings"}.
    Raises EvaluationError for an unknown setting or a missing package, before anything is loaded.
    """
    settings = merge_settings("leaderboard", DEFAULTS, settings)
    require_package("lm_eval")

    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    settings["device"] = settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    include_path = settings["include_path"]
    raw = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(model_dir),
            "dtype": settings["dtype"],
            "trust_remote_code": False,
            "use_safetensors": True,
        },
        tasks=list(settings["tasks"]),
        task_manager=TaskManager(include_path=include_path, include_defaults=include_path is None),
        batch_size=settings["batch_size"],
        device=settings["device"],
        limit=settings["limit"],
        apply_chat_template=settings["apply_chat_template"],
        fewshot_as_multiturn=settings["fewshot_as_multiturn"],
        log_samples=False,
    )
    gc.collect()  # lm-eval's model refers to itself; without this the weights outlive the call

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # A task that is written inside its group's file is called "group::task".
    results = {name.rpartition("::")[2]: scores for name, scores in raw["results"].items()}
    kept = {"results": results, **{key: raw[key] for key in ("versions", "n-samples", "n-shot")}}
    (output_dir / "leaderboard_raw.json").write_text(json.dumps(kept, indent=2, default=str) + "\n")
    return {
        "metrics": leaderboard_metrics(results),
        "versions": package_versions("lm_eval", "transformers", "torch"),
        "settings": settings,
    }


BENCHMARK = Benchmark(
    name="leaderboard",
    title="Open LLM Leaderboard v2",
    run=run,
    defaults=DEFAULTS,
    metrics={
        "ifeval": Metric("IFEval", digits=2),
        "bbh": Metric("BBH", digits=2),
        "math": Metric("MATH", digits=2),
        "gpqa": Metric("GPQA", digits=2),
        "musr": Metric("MUSR", digits=2),
        "mmlu_pro": Metric("MMLU-PRO", digits=2),
    },
    same=("tasks", "include_path", "apply_chat_template", "fewshot_as_multiturn", "dtype", "limit"),
    trial=("limit", "include_path"),
)

"""Anthropic-HH win rate by log-probability: the share of test pairs in which the model prefers the chosen response.

The main number, for every method alike, is the share with A(w) > A(l), A the log-probability per token. The paper says
neither that nor otherwise (Figure 5), so the share by summed log-probability S and by the method's own reward stand
beside it. A tie counts as a loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import standard_error
from rmipo.fingerprints import rows_fingerprint, trained_fingerprint
from rmipo.recipe.settings import merge_settings
from rmipo.record import package_versions, recorded_run

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from rmipo.data.report import DataReport

SUBSETS = ("helpful", "harmless")
HUB_PAIRS = "Anthropic/hh-rlhf"
PUBLISHED = {name: {"datasets": [{"path": HUB_PAIRS, "data_dir": f"{name}-base"}]} for name in SUBSETS}
DEFAULTS = {
    "helpful": None,  # each a block of data keys as in a recipe; its test split is scored. Without both: PUBLISHED
    "harmless": None,
    "limit": None,  # pairs of each subset; anything but null is a trial run
    "max_length": 2048,
    "max_prompt_length": 1800,
    "dtype": "auto",
}

Rewards = "tuple[torch.Tensor, torch.Tensor]"  # of chosen and rejected responses, (pairs,) each


def won(scores: dict[str, torch.Tensor], rewards: Rewards | None) -> dict[str, torch.Tensor]:
    """(pairs,) each, True for a pair won: "" by A, "_sum" by S, and "_native" by `rewards` where given."""
    logps, lengths = ([scores[f"{side}_{name}"] for side in ("chosen", "rejected")] for name in ("logps", "lengths"))
    found = {"": logps[0] / lengths[0] > logps[1] / lengths[1], "_sum": logps[0] > logps[1]}
    return found if rewards is None else found | {"_native": rewards[0] > rewards[1]}


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Score the HH test pairs of `settings["helpful"]` and `settings["harmless"]` with the model in `model_dir`.

    One of the two may be left out; then there is no average. Without both, the hub's pairs are scored. Per-pair scores,
    log pi(y) among them for Figure 3, go to `output_dir`/hh_<subset>.pt, with the `fingerprint` of the weights.
    """
    import torch

    from rmipo.data.pairs import LIMITS, load_pairs
    from rmipo.data.sources import mixture_entries
    from rmipo.recipe.schema import DataConfig

    settings = merge_settings("hh", DEFAULTS, settings)
    if not any(settings[name] for name in SUBSETS):
        settings |= PUBLISHED
    blocks = {name: DataConfig(**settings[name]) for name in SUBSETS if settings[name]}
    pairs = {name: load_pairs(block, "test") for name, block in blocks.items()}
    if settings["limit"] is not None:
        pairs = {name: rows.select(range(min(settings["limit"], len(rows)))) for name, rows in pairs.items()}

    options = {key: settings[key] for key in (*LIMITS, "dtype") if key in settings}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    metrics, per_prompt, weights = {}, {}, trained_fingerprint(Path(model_dir))
    for name in pairs:
        scores, rewards, report = score_subset(model_dir, pairs[name], f"HH {name}", options)
        wins = won(scores, rewards)
        metrics |= {f"hh_{name}{end}": 100 * values.double().mean().item() for end, values in wins.items()}
        per_prompt[f"hh_{name}"] = (100.0 * wins[""]).tolist()
        metrics[f"hh_{name}_standard_error"] = standard_error(per_prompt[f"hh_{name}"])
        counts = {"pairs": report.kept, "dropped": report.dropped_rows, "cut": report.rows_cut}
        metrics |= {f"hh_{name}_{count}": value for count, value in counts.items()}
        torch.save(scores | {"fingerprint": weights}, Path(output_dir) / f"hh_{name}.pt")
    if len(pairs) == 2:
        for end in wins:
            metrics[f"hh_average{end}"] = sum(metrics[f"hh_{name}{end}"] for name in SUBSETS) / 2
        errors = [metrics[f"hh_{name}_standard_error"] for name in SUBSETS]
        metrics["hh_average_standard_error"] = sum(error**2 for error in errors) ** 0.5 / 2
    # What is scored in place of Anthropic's pairs is another benchmark, and is said under every number.
    sources = {entry["path"] for block in blocks.values() for entry in mixture_entries(block)}
    settings["other_pairs"] = sorted(sources - {HUB_PAIRS}) or None
    settings["pairs_sha256"] = {name: rows_fingerprint(rows) for name, rows in pairs.items()}
    versions = package_versions("transformers", "torch")
    return {"metrics": metrics, "per_prompt": per_prompt, "versions": versions, "settings": settings}


def score_subset(
    model_dir: str | Path, pairs: Dataset, description: str, options: dict
) -> tuple[dict, Rewards | None, DataReport]:
    """Per-pair scores (and `row`) of the model, its own rewards if it was trained here, and what was dropped and cut."""
    import torch

    from rmipo.evaluation.pair_scores import native_rewards, needs_reference, score_model
    from rmipo.objectives import OBJECTIVES

    record = recorded_run(model_dir) or {}
    objective = record["objective"] if record.get("objective", {}).get("name") in OBJECTIVES else None
    scores, rows, report = score_model(model_dir, pairs, prior_context="header", description=description, **options)
    if objective is not None and needs_reference(objective):
        recipe = record["recipe"]
        reference, _, _ = score_model(
            recipe["model_name_or_path"],
            pairs,
            revision=recipe.get("model_revision", "main"),
            tokenizer_dir=model_dir,  # has the template that both were scored with in training
            description=f"{description}, reference",
            **options,
        )
        scores |= {f"ref_{side}_logps": reference[f"{side}_logps"] for side in ("chosen", "rejected")}
    rewards = None if objective is None else native_rewards(objective, scores)
    return scores | {"row": torch.tensor(rows)}, rewards, report


HASHES = tuple(f"pairs_sha256.{name}" for name in SUBSETS)
BENCHMARK = Benchmark(
    name="hh",
    title="Anthropic-HH",
    in_paper=True,
    run=run,
    defaults=DEFAULTS,
    metrics={
        "hh_helpful": Metric("HH helpful (%)"),
        "hh_harmless": Metric("HH harmless (%)"),
        "hh_average": Metric("HH (%)"),
    },
    same=(*SUBSETS, *HASHES, "limit", "max_length", "max_prompt_length", "dtype"),
    trial=("limit", "other_pairs"),
    optional=(*SUBSETS, *HASHES),  # an evaluation of one subset doesn't contradict one of both
)

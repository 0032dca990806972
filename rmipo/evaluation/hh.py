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


def ranked_right(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """(pairs,), True where A(w) > A(l)."""
    return scores["chosen_logps"] / scores["chosen_lengths"] > scores["rejected_logps"] / scores["rejected_lengths"]


def win_rates(scores: dict[str, torch.Tensor], rewards: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, float]:
    """Percent of pairs won: "" by A, "_sum" by S, and "_native" by `rewards` (chosen, rejected) where given.

    `_standard_error` is that of the first.
    """
    won = {"": ranked_right(scores), "_sum": scores["chosen_logps"] > scores["rejected_logps"]}
    if rewards is not None:
        won["_native"] = rewards[0] > rewards[1]
    rates = {name: 100 * values.double().mean().item() for name, values in won.items()}
    return rates | {"_standard_error": 100 * standard_error(won[""].double().tolist())}


def run(model_dir: str | Path, output_dir: str | Path, settings: dict) -> dict:
    """Score the HH test pairs of `settings["helpful"]` and `settings["harmless"]` with the model in `model_dir`.

    One of the two may be left out; then there is no average. Without both, the hub's pairs are scored. Per-pair scores,
    log pi(y) among them for Figure 3, go to `output_dir`/hh_<subset>.pt, with the `fingerprint` of the weights.
    """
    import torch

    from rmipo.data.pairs import load_pairs
    from rmipo.recipe.schema import DataConfig

    settings = merge_settings("hh", DEFAULTS, settings)
    if not any(settings[name] for name in SUBSETS):
        settings |= PUBLISHED
    pairs = {name: load_pairs(DataConfig(**settings[name]), "test") for name in SUBSETS if settings[name]}
    if settings["limit"] is not None:
        pairs = {name: rows.select(range(min(settings["limit"], len(rows)))) for name, rows in pairs.items()}

    options = {key: settings[key] for key in ("max_length", "max_prompt_length", "dtype")}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    per_prompt: dict[str, list[float]] = {}
    weights = trained_fingerprint(Path(model_dir))
    for name in pairs:
        scores, rewards, report = score_subset(model_dir, pairs[name], f"HH {name}", options)
        metrics |= {f"hh_{name}{suffix}": value for suffix, value in win_rates(scores, rewards).items()}
        per_prompt[f"hh_{name}"] = (100.0 * ranked_right(scores)).tolist()
        counts = {"pairs": report.kept, "dropped": report.dropped_rows, "cut": report.rows_cut}
        metrics |= {f"hh_{name}_{count}": value for count, value in counts.items()}
        torch.save(scores | {"fingerprint": weights}, Path(output_dir) / f"hh_{name}.pt")
    if len(pairs) == 2:
        suffixes = ("", "_sum") if rewards is None else ("", "_sum", "_native")
        metrics |= {f"hh_average{end}": sum(metrics[f"hh_{name}{end}"] for name in SUBSETS) / 2 for end in suffixes}
        errors = [metrics[f"hh_{name}_standard_error"] for name in SUBSETS]
        metrics["hh_average_standard_error"] = sum(error**2 for error in errors) ** 0.5 / 2
    settings["other_pairs"] = other_pairs(settings)
    settings["pairs_sha256"] = {name: rows_fingerprint(rows) for name, rows in pairs.items()}
    versions = package_versions("transformers", "torch")
    return {"metrics": metrics, "per_prompt": per_prompt, "versions": versions, "settings": settings}


def other_pairs(settings: dict) -> list[str] | None:
    """What is scored in place of Anthropic's pairs; None where these are."""
    from rmipo.data.sources import mixture_entries
    from rmipo.recipe.schema import DataConfig

    blocks = [DataConfig(**settings[name]) for name in SUBSETS if settings[name]]
    sources = {entry["path"] for block in blocks for entry in mixture_entries(block)}
    return sorted(sources - {HUB_PAIRS}) or None


def score_subset(
    model_dir: str | Path, pairs: Dataset, description: str, options: dict
) -> tuple[dict, tuple[torch.Tensor, torch.Tensor] | None, DataReport]:
    """Per-pair scores (and `row`) of the model, its own rewards if it was trained here, and what was dropped and cut."""
    import torch

    from rmipo.evaluation.pair_scores import known_objective, native_rewards, needs_reference, score_model

    run_record = recorded_run(model_dir)
    objective = known_objective(run_record)
    scores, rows, report = score_model(model_dir, pairs, prior_context="header", description=description, **options)
    if objective is not None and needs_reference(objective):
        recipe = run_record["recipe"]
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

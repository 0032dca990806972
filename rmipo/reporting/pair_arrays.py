"""Per-pair arrays for figures 3, 6 and 8: from the HH evaluation's files, or by scoring a run's own preference data."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rmipo.data.pairs import LIMITS, load_pairs
from rmipo.data.sources import load_rows, mixture_entries
from rmipo.evaluation.hh import score_model
from rmipo.objectives import PairScores, RMiPO, build_objective
from rmipo.objectives.rmipo import delta_pmi, pmi
from rmipo.plots import AT_MAX, AT_MIN
from rmipo.recipe.schema import DataConfig, of_recipe
from rmipo.record import package_versions
from rmipo.reporting.results import ReportError, Result, RunFolder, eval_command, load_result


def hh_signals(outputs: Path, model: str, method: str) -> tuple[dict[str, dict[str, np.ndarray]], Result]:
    """Figure 3: subset -> log-likelihood and PMI differences in nats per token, from eval/hh_<subset>.pt; and the result
    that those belong to. Raises ReportError without any.
    """
    evaluation = load_result(outputs, model, method, "hh")
    if evaluation is None:
        raise ReportError(f"figure 3 has no HH scores of {model} {method}: run `{eval_command(model, method, 'hh')}`")
    files = {subset: evaluation.path.with_name(f"hh_{subset}.pt") for subset in ("helpful", "harmless")}
    # Scores of a subset without a number are of an earlier evaluation.
    scored = {subset: path for subset, path in files.items() if f"hh_{subset}" in evaluation.metrics}
    return {subset: differences(torch.load(path, weights_only=True)) for subset, path in scored.items()}, evaluation


def differences(scores: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A(w) - A(l), and Delta_pmi (Eq. 7), (pairs,), in nats per token."""
    logps, priors, lengths = (
        [scores[name.format(side)] for side in ("chosen", "rejected")]
        for name in ("{}_logps", "prior_{}_logps", "{}_lengths")
    )
    chosen, rejected = map(pmi, logps, priors, lengths)
    loglik = logps[0] / lengths[0] - logps[1] / lengths[1]
    return {"loglik": loglik.numpy(), "pmi": delta_pmi(chosen, rejected).numpy()}


def run_scores(
    run: RunFolder, split: str, max_pairs: int, prior_context: str | None, header_in_response: bool = False
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Scores of a run's own pairs under its final policy, and their source rows: the pairs that `make look` draws."""
    pairs = load_pairs(of_recipe(DataConfig, run.record["recipe"]), split)
    # As the page draws them: its pairs are among these.
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:max_pairs]
    pairs = pairs.select(sorted(drawn.tolist()))
    options = {"prior_context": prior_context, "header_in_response": header_in_response, **scoring_options(run)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=bool(run.record["recipe"].get("bf16"))):  # as it was trained
        scores, rows, _ = score_model(run.folder, pairs, description=f"{run.folder.name}, {split} pairs", **options)
    return scores, rows


def scoring_options(run: RunFolder) -> dict:
    """Those of the run's own recipe: its pairs are scored as they were in training."""
    recipe = run.record["recipe"]
    return {name: recipe[name] for name in (*LIMITS, "dtype") if name in recipe}


def scored_with(run: RunFolder, split: str) -> str:
    """For a note under figures 6 and 8: pairs, arithmetic and versions behind `run_scores`."""
    sources = ", ".join(entry["path"] for entry in mixture_entries(of_recipe(DataConfig, run.record["recipe"])))
    facts = (
        scoring_options(run) | {"bf16": run.record["recipe"].get("bf16")} | package_versions("torch", "transformers")
    )
    made = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"Log-probabilities of given responses, {split} pairs of {sources}: {made}."


def judge_differences(run: RunFolder, split: str, rows: list[int]) -> np.ndarray:
    """Figure 6's REF: the judge's score of chosen minus rejected for the given source rows."""
    config = of_recipe(DataConfig, run.record["recipe"])
    scored = load_rows(config, split, lambda rows, _: rows.select_columns(["score_chosen", "score_rejected", "row"]))
    scored = scored.to_pandas().set_index("row").loc[rows]
    return (scored["score_chosen"] - scored["score_rejected"]).to_numpy(dtype=float)


def reward_differences(run: RunFolder, split: str, max_pairs: int) -> tuple[np.ndarray, list[int]]:
    """Figure 6: the run's own reward of chosen minus rejected, and the source rows."""
    scores, rows = run_scores(run, split, max_pairs, prior_context=None)
    # Margins, which read log pi(y), are no part of rewards: any values serve.
    scores |= {f"prior_{side}_logps": scores[f"{side}_logps"] for side in ("chosen", "rejected")}
    output = build_objective(run.objective)(PairScores(**scores))
    return (output.chosen_rewards - output.rejected_rewards).numpy(), rows


def gamma_readings(run: RunFolder, split: str, max_pairs: int) -> dict[str, pd.DataFrame]:
    """Figure 8: a run's pairs under its final policy, by three readings of the formula; "as in the recipe" marks its own.

    A line for each pair: delta_pmi, gamma, length_difference (tokens, y_w - y_l).
    """
    # Bounds, schedule and what the prior of the first two is conditioned on are the run's; the rest is what each reading
    # says, since the paper doesn't (docs/FIDELITY.md).
    objective = rmipo_objective(run)
    context = "header" if objective.prior_context == "none" else objective.prior_context
    # The first two readings differ in what they divide by, and share their log-probabilities.
    matched, _ = run_scores(run, split, max_pairs, prior_context=context)
    released, _ = run_scores(run, split, max_pairs, prior_context="none", header_in_response=True)
    paper = {"fidelity": "paper", "prior_context": context}
    choices = {
        "per token": (paper | {"pmi_normalization": "token"}, matched),
        "summed, as printed": (paper | {"pmi_normalization": "sequence"}, matched),
        "released code": ({"fidelity": "release", "pmi_normalization": "token", "prior_context": "none"}, released),
    }
    readings = {}
    for name, (choice, scores) in choices.items():
        reading = build_objective(run.objective | choice)
        output = reading(PairScores(**scores))
        lengths = scores["chosen_lengths"] - scores["rejected_lengths"]
        columns = {"delta_pmi": output.diagnostics["delta_pmi"], "gamma": output.gamma, "length_difference": lengths}
        frame = pd.DataFrame({column: values.double().numpy() for column, values in columns.items()})
        readings[name + ", as in the recipe" * (reading == objective)] = frame
    return readings


def summarize(readings: dict[str, pd.DataFrame], gamma_min: float, gamma_max: float) -> pd.DataFrame:
    """A row for each reading: where delta_pmi and gamma lie, and how far delta_pmi follows the difference in length."""
    rows = []
    for reading in readings.values():
        signal, gamma = reading["delta_pmi"], reading["gamma"]
        spread = signal.describe(percentiles=[0.05, 0.5, 0.95])[["mean", "std", "5%", "50%", "95%"]]
        rows.append(spread.rename({"mean": "delta_pmi mean", "50%": "median"}).to_dict() | {
            "chosen higher": (signal > 0).mean(),
            "mean gamma": gamma.mean(),
            "at gamma_max": (gamma >= gamma_max - AT_MAX).mean(),
            "within 0.01 of gamma_min": (gamma <= gamma_min + AT_MIN).mean(),
            "correlation with length difference": signal.corr(reading["length_difference"]),
        })  # fmt: skip
    return pd.DataFrame(rows, index=list(readings))


def rmipo_objective(run: RunFolder) -> RMiPO:
    """The objective of a run whose gamma Figure 8 can show; ReportError for any other."""
    # A constant margin, or one that another signal drives, would be drawn as if Delta_pmi had made it.
    objective = build_objective(run.objective) if run.objective else None
    follows = isinstance(objective, RMiPO) and (objective.target, objective.signal) == ("gamma", "pmi")
    if not follows or objective.schedule == "constant" or objective.gamma_min == objective.gamma_max:
        raise ReportError(f"figure 8 shows gamma over Delta_pmi, which that of {run.folder} doesn't follow")
    return objective

"""Anthropic-HH win rate by log-probability: the share of test pairs in which the model prefers the chosen response.

The main number, for every method alike, is the share with A(w) > A(l), A the log-probability per token. The paper says
neither that nor otherwise (Figure 5), so the share by summed log-probability S stands beside it. A tie counts as a loss.
"""

import math
from pathlib import Path

from rmipo.errors import EvaluationError
from rmipo.evaluation.benchmark import Benchmark, Metric
from rmipo.evaluation.statistics import means
from rmipo.fingerprints import rows_fingerprint, trained_fingerprint
from rmipo.record import package_versions

SUBSETS = ("helpful", "harmless")
HUB_PAIRS = "Anthropic/hh-rlhf"
DEFAULTS = {
    "helpful": None,  # each a block of data keys as in a recipe; its test split is scored. Without both: Anthropic's
    "harmless": None,
    "limit": None,  # pairs of each subset; anything but null is a trial run
    "max_length": 2048,
    "max_prompt_length": 1800,
    "dtype": "auto",
}


def measure(model_dir: Path, output_dir: Path, settings: dict) -> dict:
    """Score the HH test pairs of `settings["helpful"]` and `settings["harmless"]` with the model in `model_dir`.

    One of the two may be left out; then there is no average. Without both, the hub's pairs are scored. Per-pair scores,
    log pi(y) among them for Figure 3, go to `output_dir`/hh_<subset>.pt, with the `fingerprint` of the weights.
    """
    import torch

    from rmipo.data.pairs import LIMITS, load_pairs
    from rmipo.data.sources import mixture_entries
    from rmipo.recipe.schema import DataConfig

    if not any(settings[name] for name in SUBSETS):
        settings |= {name: {"datasets": [{"path": HUB_PAIRS, "data_dir": f"{name}-base"}]} for name in SUBSETS}
    blocks = {name: DataConfig(**settings[name]) for name in SUBSETS if settings[name]}
    pairs = {name: load_pairs(block, "test") for name, block in blocks.items()}
    if settings["limit"] is not None:
        pairs = {name: rows.take(min(settings["limit"], len(rows))) for name, rows in pairs.items()}
    options = {"prior_context": "header"} | {key: settings[key] for key in (*LIMITS, "dtype")}
    output_dir.mkdir(parents=True, exist_ok=True)
    metrics, per_prompt, weights = {}, {}, trained_fingerprint(model_dir)
    for name, rows in pairs.items():
        scores, numbers, report = score_model(model_dir, rows, description=f"HH {name}", **options)
        chosen, rejected = scores["chosen_logps"], scores["rejected_logps"]
        wins = chosen / scores["chosen_lengths"] > rejected / scores["rejected_lengths"]
        per_prompt[f"hh_{name}"] = (100.0 * wins).tolist()
        counts = {"pairs": report.kept, "dropped": report.rows - report.kept, "cut": report.rows_cut}
        metrics |= {f"hh_{name}_sum": 100 * (chosen > rejected).double().mean().item()}
        metrics |= {f"hh_{name}_{what}": count for what, count in counts.items()}
        kept = scores | {"row": torch.tensor(numbers), "fingerprint": weights}
        torch.save(kept, output_dir / f"hh_{name}.pt")
    metrics |= means(per_prompt)
    if len(pairs) == 2:
        for end in ("", "_sum"):
            metrics[f"hh_average{end}"] = sum(metrics[f"hh_{name}{end}"] for name in SUBSETS) / 2
        errors = [metrics[f"hh_{name}_standard_error"] for name in SUBSETS]
        metrics["hh_average_standard_error"] = math.hypot(*errors) / 2
    # What is scored in place of Anthropic's pairs is another benchmark, and is said under every number.
    sources = {entry["path"] for block in blocks.values() for entry in mixture_entries(block)}
    settings["other_pairs"] = sorted(sources - {HUB_PAIRS}) or None
    settings["pairs_sha256"] = {name: rows_fingerprint(rows) for name, rows in pairs.items()}
    versions = package_versions("transformers", "torch")
    return {"metrics": metrics, "per_prompt": per_prompt, "versions": versions, "settings": settings}


def score_model(
    model_dir: str | Path,
    pairs,
    prior_context: str | None = None,
    header_in_response: bool = False,
    dtype: str = "auto",
    description: str = "scoring",
    **limits: int,
) -> tuple[dict, list[int], object]:
    """Score every usable pair of the dataset `pairs` (columns prompt, chosen, rejected, row) without gradients.

    Args:
        prior_context: "header", "bos" or "none" to score log pi(y) too (see `ChatFormat.prior_context`), else None.
        header_in_response: whether the assistant header is scored as part of the response (the released code).
        limits: `data.pairs.LIMITS`, where they are not `tokenize_pairs`' own.

    Returns float32 tensors `(pairs,)` named like the fields of `PairScores`, the source row of each pair, and the
    `DataReport` of what was dropped and cut.
    """
    import torch
    from tqdm import tqdm

    from rmipo.data.chat import ChatFormat
    from rmipo.data.pairs import tokenize_pairs
    from rmipo.recipe.schema import ModelConfig
    from rmipo.training.loading import check_limits, load_model, load_tokenizer
    from rmipo.training.scoring import by_tokens, pair_length, score_pairs

    source = ModelConfig(model_name_or_path=str(model_dir), dtype=dtype)
    tokenizer = load_tokenizer(source)
    chat = ChatFormat.probe(tokenizer, header_in_response=header_in_response)
    # An evaluation counts what it can't use instead of refusing.
    tokenized, report = tokenize_pairs(pairs, chat, max_dropped_fraction=1.0, max_truncated_fraction=1.0, **limits)
    for line in report.lines():
        tqdm.write(f"{description}: {line}")
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in tokenized]
    check_limits(tokenizer, source, max(lengths, default=0))
    model = load_model(source).to("cuda" if torch.cuda.is_available() else "cpu")
    context = None if prior_context is None else chat.prior_context(prior_context)
    progress = tqdm(tokenized, desc=description, unit="pair")
    scores = score_pairs(model, by_tokens(progress, pair_length), context)
    for name, values in scores.items():
        if not values.isfinite().all():  # a comparison with NaN is False, which would count as a pair lost
            raise EvaluationError(f"{description}: {name} of {model_dir} is not finite")
    return scores, list(tokenized["row"]), report


OPTIONAL = (*SUBSETS, "pairs_sha256.helpful", "pairs_sha256.harmless")
BENCHMARK = Benchmark(
    name="hh",
    title="Anthropic-HH",
    in_paper=True,
    measure=measure,
    defaults=DEFAULTS,
    metrics={
        "hh_helpful": Metric("HH helpful (%)"),
        "hh_harmless": Metric("HH harmless (%)"),
        "hh_average": Metric("HH (%)"),
    },
    same=(*OPTIONAL, "limit", "max_length", "max_prompt_length", "dtype"),
    trial=("limit", "other_pairs"),
    optional=OPTIONAL,  # an evaluation of one subset doesn't contradict one of both
)

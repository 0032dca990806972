"""Score preference pairs with a saved model: what the HH win rate and the per-pair figures are computed from."""

from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

from rmipo.data.chat import ChatFormat
from rmipo.data.formats import DataReport
from rmipo.data.pairs import tokenize_pairs
from rmipo.errors import EvaluationError
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import check_limits, load_model, load_tokenizer
from rmipo.training.scoring import by_tokens, pair_length, score_pairs


def score_model(
    model_dir: str | Path,
    pairs: Dataset,
    *,
    prior_context: str | None = None,
    header_in_response: bool = False,
    dtype: str = "auto",
    description: str = "scoring",
    **limits: int,
) -> tuple[dict[str, torch.Tensor], list[int], DataReport]:
    """Score every usable pair of `pairs` (columns prompt, chosen, rejected, row) without gradients.

    Args:
        prior_context: "header", "bos" or "none" to score log pi(y) too (see `ChatFormat.prior_context`), else None.
        header_in_response: whether the assistant header is scored as part of the response (the released code).
        limits: `data.pairs.LIMITS`, where they are not `tokenize_pairs`' own.

    Returns float32 tensors `(pairs,)` named like the fields of `PairScores`, the source row of each pair, and what was
    dropped and cut.
    """
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

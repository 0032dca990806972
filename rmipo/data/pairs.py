"""Preference pairs: loaded, rendered, tokenised, cut, and the unusable ones dropped, with a report."""

import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from rmipo.data.chat import ChatFormat, DataError, TokenPair
from rmipo.data.formats import SIDES, DataReport, code_digest, read_pair, unusable_pair
from rmipo.data.sources import load_converted
from rmipo.recipe.schema import DataConfig, PairConfig

TOKEN_IDS = List(Value("int32"))
# Keys that decide what becomes of a pair. Whoever scores the pairs of a run later takes the run's own.
LIMITS = {name: getattr(PairConfig, name) for name in ("max_length", "max_prompt_length")}  # with their defaults


def load_pairs(data_config: DataConfig, split: str) -> Dataset:
    """Columns `prompt`, `chosen`, `rejected`: lists of {"role", "content"}; and `row`; see `load_converted`.

    Rows that can't be trained on are still there: `tokenize_pairs` counts, reports and drops them.
    """
    return load_converted(data_config, split, read_pair, SIDES)


def tokenize_pairs(
    dataset: Dataset,
    chat_format: ChatFormat,
    *,
    max_length: int = LIMITS["max_length"],
    max_prompt_length: int = LIMITS["max_prompt_length"],
    max_dropped_fraction: float,
    max_truncated_fraction: float,
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Render, tokenise and cut pairs; drop the unusable ones.

    A prompt keeps its end up to `max_prompt_length` tokens, BOS included; each response is cut to what then fits in
    `max_length` and so loses its end token. (The authors' release cuts to a fixed length.)

    Returns:
        Columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`, and the report of what was dropped and cut.

    Raises DataError if more rows are unusable or cut than the recipe allows, or if none is left.
    """
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    tokenized = dataset.map(
        tokenize_one,
        fn_kwargs={"chat_format": chat_format, "code": code_digest(), **limits},
        remove_columns=[name for name in dataset.column_names if name != "row"],
        features=Features(
            {"row": Value("int64"), "reason": Value("string")}
            | {f"{side}_ids": TOKEN_IDS for side in SIDES}
            | {f"{side}_cut": Value("bool") for side in SIDES}
        ),
        num_proc=num_proc,
        desc="Tokenising pairs",
    )
    # Dropped rows are named in the report, so they are dropped only after all have been tokenised.
    report = DataReport(
        tokenized["row"],
        tokenized["reason"],
        lengths={side: pc.list_value_length(tokenized.data[f"{side}_ids"]).to_numpy() for side in SIDES},
        cut={side: tokenized.data[f"{side}_cut"].to_numpy() for side in SIDES},
    )
    report.check(max_dropped_fraction, max_truncated_fraction)
    kept = tokenized.select([i for i, reason in enumerate(tokenized["reason"]) if reason is None])
    return kept.select_columns([*(f"{side}_ids" for side in SIDES), "row"]), report


def tokenize_one(row: dict, chat_format: ChatFormat, max_length: int, max_prompt_length: int, code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`."""
    messages = [row[side] for side in SIDES]
    whole = ids = ([], [], [])
    reason = unusable_pair(*messages)
    if reason is None:
        try:
            whole = chat_format.pair_ids(*messages)
            ids = cut_pair(whole, chat_format.bos_id, max_length, max_prompt_length)
            reason = unusable_tokens(whole, ids, chat_format)
        except DataError as error:
            reason = str(error)
    cut = {f"{side}_cut": len(kept) < len(every) for side, kept, every in zip(SIDES, ids, whole, strict=True)}
    return {"reason": reason, **{f"{side}_ids": kept for side, kept in zip(SIDES, ids, strict=True)}, **cut}


def cut_pair(pair: TokenPair, bos_id: int | None, max_length: int, max_prompt_length: int) -> TokenPair:
    """Keep the prompt's end (behind its BOS) up to `max_prompt_length`, then of each response what fits."""
    prompt, chosen, rejected = pair
    if len(prompt) > max_prompt_length:
        bos = [] if bos_id is None else [bos_id]
        prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
    # Per response, not for the longer of the two: otherwise a long rejected response would shorten the chosen one.
    room = max(0, max_length - len(prompt))
    return prompt, chosen[:room], rejected[:room]


def unusable_tokens(whole: TokenPair, cut: TokenPair, chat_format: ChatFormat) -> str | None:
    """Why a tokenised pair can't be trained on, None if it can."""
    if not cut[1]:
        return "the prompt fills the window"
    if chat_format.bos_id not in (None, chat_format.end_id) and whole[0].count(chat_format.bos_id) != 1:
        # For the model that is the start of another document.
        return "the prompt's text has a BOS token in it"
    # Of the whole responses: a cut one has lost its end token, which is no fault of the text.
    for side, ids in zip(SIDES[1:], whole[1:], strict=True):
        if ids[-1] != chat_format.end_id or ids.count(chat_format.end_id) != 1:
            return f"the text of {side} contains an end token"
    if cut[1] == cut[2]:  # the loss would be a constant, and gamma its maximum
        return "chosen and rejected are identical after the cut"
    return None

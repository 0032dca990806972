"""Preference pairs: loaded, rendered, tokenised, cut, and the unusable ones dropped, with a report."""

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from rmipo.data.chat import ChatFormat, DataError, TokenPair
from rmipo.data.convert import MESSAGES, code_digest, load_converted
from rmipo.data.formats import PAIRS, SIDES, has_markers, unusable_pair
from rmipo.data.report import DataReport, rows_by_reason
from rmipo.recipe.arguments import PairConfig
from rmipo.recipe.schema import DataConfig

TOKEN_IDS = List(Value("int32"))
# Keys that decide what becomes of a pair. Whoever scores the pairs of a run later takes the run's own.
LIMITS = {name: getattr(PairConfig, name) for name in ("max_length", "max_prompt_length")}  # with their defaults


def load_pairs(data_config: DataConfig, split: str) -> Dataset:
    """Columns `prompt`, `chosen`, `rejected`: lists of {"role", "content"}; and `row`; see `load_converted`.

    Rows that can't be trained on are still there: `tokenize_pairs` counts, reports and drops them.
    """
    return load_converted(data_config, split, PAIRS, dict.fromkeys(SIDES, MESSAGES))


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
    `max_length` and so loses its end token (DESIGN: unlike the authors' release, which cuts to a fixed length).

    Returns:
        Columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`, and the report of what was dropped and cut.

    Raises DataError if more rows are unusable or cut than the recipe allows, or if none is left.
    """
    tokenized = dataset.map(
        tokenize_batch,
        batched=True,
        fn_kwargs={
            "chat_format": chat_format,
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "code": code_digest(),
        },
        remove_columns=[name for name in dataset.column_names if name != "row"],
        features=Features(
            {"row": Value("int64")}
            | {f"{side}_ids": TOKEN_IDS for side in SIDES}
            | {f"{side}_cut": Value("bool") for side in SIDES}
            | {"reason": Value("string"), "marked": Value("bool"), "altered": Value("bool")}
        ),
        num_proc=num_proc,
        desc="Tokenising pairs",
    )
    # The dropped rows are named in the report, so they are dropped only after all have been tokenised.
    keep = np.array([reason is None for reason in tokenized["reason"]])
    cut = {side: np.array(tokenized[f"{side}_cut"])[keep] for side in SIDES}
    lengths = {side: pc.list_value_length(tokenized.data[f"{side}_ids"]).to_numpy()[keep] for side in SIDES}
    report = DataReport(rows=len(tokenized), dropped=rows_by_reason(tokenized["reason"], tokenized["row"]))
    report.note_markers(np.array(tokenized["row"])[np.array(tokenized["marked"])].tolist())
    if count := int(np.array(tokenized["altered"]).sum()):
        report.notes.append(
            f"of {count} rows the chat template leaves out part of an earlier answer, or adds text of its own to a response"
        )
    report.check_dropped(max_dropped_fraction)
    report.measure(lengths, cut)
    report.check_cut(max_truncated_fraction, f"max_length ({max_length}) or max_prompt_length ({max_prompt_length})")
    columns = [*(f"{side}_ids" for side in SIDES), "row"]
    return tokenized.select(np.flatnonzero(keep)).select_columns(columns), report


def tokenize_batch(batch: dict, chat_format: ChatFormat, max_length: int, max_prompt_length: int, code: str) -> dict:
    """Called by `Dataset.map`; `code` is only there for its cache, see `code_digest`."""
    rows = list(zip(*(batch[side] for side in SIDES), strict=True))
    texts, reasons = [], []
    for row in rows:
        text, reason = None, unusable_pair(*row)
        if reason is None:
            try:
                text = chat_format.render_pair(*row)
            except DataError as error:
                reason = str(error)
        texts.append(text)
        reasons.append(reason)
    # All at once: fast tokenizers take a batch in parallel.
    encoded = iter(chat_format.encode([text for text in texts if text is not None]))
    out: dict[str, list] = {f"{side}_{what}": [] for side in SIDES for what in ("ids", "cut")}
    out |= {"row": batch["row"], "reason": []}
    out["marked"] = [any(map(has_markers, row)) for row in rows]
    out["altered"] = [
        text is not None and chat_format.alters(*row, text) for row, text in zip(rows, texts, strict=True)
    ]
    for text, reason in zip(texts, reasons, strict=True):
        whole = ids = ([], [], [])
        if text is not None:
            whole = next(encoded)
            ids = cut_pair(whole, chat_format.bos_id, max_length, max_prompt_length)
            reason = unusable_tokens(whole, ids, chat_format)
        out["reason"].append(reason)
        for side, kept, all_ids in zip(SIDES, ids, whole, strict=True):
            out[f"{side}_ids"].append(kept)
            out[f"{side}_cut"].append(len(kept) < len(all_ids))
    return out


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
        # Nothing is left of the chosen response to learn.
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

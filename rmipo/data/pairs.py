"""Preference pairs and dialogues: rows of any accepted form -> messages -> tokenised pairs, with a report."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from rmipo.data.chat import ChatFormat, DataError, TokenPair
from rmipo.data.formats import (
    DIALOGUE_FORMS,
    PAIR_FORMS,
    SIDES,
    read_dialogue,
    read_pair,
    unusable_dialogue,
    unusable_pair,
)
from rmipo.data.sources import MissingSplitError, check_columns, load_rows
from rmipo.recipe.schema import DataConfig

__all__ = [
    "ChatFormat",
    "DataError",
    "DataReport",
    "load_messages",
    "load_pairs",
    "load_splits",
    "tokenize_pairs",
]

logger = logging.getLogger(__name__)

MESSAGES = List({"role": Value("string"), "content": Value("string")})
TOKEN_IDS = List(Value("int32"))
SHOWN_ROWS = 5


def load_pairs(data_config: DataConfig, split: str) -> Dataset:
    """Load preference pairs of a split ("train" or "test").

    Returns:
        Columns `prompt`, `chosen`, `rejected`: lists of {"role", "content"}; `row`: row number in the source.
        Rows that can't be trained on are still there: `tokenize_pairs` counts, reports and drops them.

    Raises DataError for sources that can't be read, missing columns, and values that aren't messages or texts.
    """

    def convert(dataset: Dataset, source: str) -> Dataset:
        check_columns(dataset, ["chosen", "rejected"], source, PAIR_FORMS)
        return convert_rows(dataset, source, read_pair, SIDES, data_config.dataset_num_proc, PAIR_FORMS)

    return load_rows(data_config, split, convert)


def load_messages(data_config: DataConfig, split: str) -> Dataset:
    """Load dialogues for SFT: column `messages`, which ends with an assistant message, and `row`.

    Rows that can't be trained on are dropped with a warning, up to `max_dropped_fraction`; then DataError.
    """

    def convert(dataset: Dataset, source: str) -> Dataset:
        if "messages" not in dataset.column_names:
            check_columns(dataset, ["prompt", "completion"], source, DIALOGUE_FORMS)
        return convert_rows(dataset, source, read_dialogue, ("messages",), data_config.dataset_num_proc, DIALOGUE_FORMS)

    dataset = load_rows(data_config, split, convert)
    reasons = [unusable_dialogue(messages) for messages in dataset["messages"]]
    report = DataReport(rows=len(dataset), dropped=rows_by_reason(reasons, dataset["row"]))
    report.check_dropped(data_config.max_dropped_fraction)
    if report.dropped:
        logger.warning("%s: %s", split, "\n".join(report.lines()))
    return dataset.select([i for i, reason in enumerate(reasons) if not reason])


def load_splits(
    load: Callable[[DataConfig, str], Dataset], data_config: DataConfig, evaluating: bool
) -> dict[str, Dataset]:
    """`load` of "train", and of "test" where there is such a split.

    Args:
        load: `load_pairs` or `load_messages`.
        evaluating: the recipe evaluates during training: then a missing test split is a DataError.
    """
    splits = {"train": load(data_config, "train")}
    try:
        splits["test"] = load(data_config, "test")
    except MissingSplitError as error:
        if evaluating:
            raise DataError(f"{error} Or train without evaluation: eval_strategy: no.") from error
        logger.warning("no evaluation, since there is no test split: %s", error)
    return splits


def convert_rows(dataset: Dataset, source: str, read, columns: tuple[str, ...], num_proc, forms: str) -> Dataset:
    """Apply `read(row) -> one list of messages per column` to every row; all unreadable rows make one DataError."""

    def read_batch(batch: dict) -> dict:
        out = {name: [] for name in (*columns, "problem")}
        rows = batch.pop("row")
        for values in zip(*batch.values(), strict=True):
            try:
                lists, problem = read(dict(zip(batch, values, strict=True))), None
            except DataError as error:
                lists, problem = [[] for _ in columns], str(error)
            for name, value in zip(out, [*lists, problem], strict=True):
                out[name].append(value)
        return out | {"row": rows}

    features = Features(dict.fromkeys(columns, MESSAGES) | {"problem": Value("string"), "row": Value("int64")})
    converted = dataset.map(
        read_batch,
        batched=True,
        remove_columns=[name for name in dataset.column_names if name != "row"],
        features=features,
        num_proc=num_proc,
        desc=f"Reading {source}",
    )
    problems = rows_by_reason(converted["problem"], converted["row"])
    if problems:
        lines = [f"- {problem}: {name_rows(rows)}" for problem, rows in problems.items()]
        raise DataError("\n".join([f"{source}: rows that can't be read", *lines, forms]))
    return converted.remove_columns("problem")


def tokenize_pairs(
    dataset: Dataset,
    chat_format: ChatFormat,
    *,
    max_length: int,
    max_prompt_length: int,
    max_dropped_fraction: float,
    max_truncated_fraction: float,
    num_proc: int | None = None,
) -> tuple[Dataset, "DataReport"]:
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
        fn_kwargs={"chat_format": chat_format, "max_length": max_length, "max_prompt_length": max_prompt_length},
        remove_columns=[name for name in dataset.column_names if name != "row"],
        features=Features(
            {"row": Value("int64")}
            | {f"{side}_ids": TOKEN_IDS for side in SIDES}
            | {f"{side}_cut": Value("bool") for side in SIDES}
            | {"reason": Value("string")}
        ),
        num_proc=num_proc,
        desc="Tokenising pairs",
    )
    keep = np.array([reason is None for reason in tokenized["reason"]], dtype=bool)
    cut = {side: np.array(tokenized[f"{side}_cut"], dtype=bool)[keep] for side in SIDES}
    lengths = {side: pc.list_value_length(tokenized.data[f"{side}_ids"]).to_numpy()[keep] for side in SIDES}
    report = DataReport(
        rows=len(tokenized),
        dropped=rows_by_reason(tokenized["reason"], tokenized["row"]),
        prompts_cut=int(cut["prompt"].sum()),
        chosen_cut=int(cut["chosen"].sum()),
        rejected_cut=int(cut["rejected"].sum()),
        pairs_cut=int((cut["prompt"] | cut["chosen"] | cut["rejected"]).sum()),
    )
    report.check_dropped(max_dropped_fraction)
    report.tokens = {side: int(values.sum()) for side, values in lengths.items()}
    report.lengths = {
        side: {"median": int(np.median(values)), "p95": int(np.percentile(values, 95)), "max": int(values.max())}
        for side, values in lengths.items()
    }
    if report.pairs_cut > max_truncated_fraction * report.kept:
        raise DataError(
            f"{report.pairs_cut} of {report.kept} pairs are cut, more than max_truncated_fraction: "
            f"{max_truncated_fraction} allows. Raise max_length ({max_length}) or max_prompt_length "
            f"({max_prompt_length}), or max_truncated_fraction.\n" + "\n".join(report.lines())
        )
    columns = [*(f"{side}_ids" for side in SIDES), "row"]
    return tokenized.select(np.flatnonzero(keep)).select_columns(columns), report


def tokenize_batch(batch: dict, chat_format: ChatFormat, max_length: int, max_prompt_length: int) -> dict:
    reasons: list[str | None] = []
    rendered = []
    for prompt, chosen, rejected in zip(*(batch[side] for side in SIDES), strict=True):
        reason = unusable_pair(prompt, chosen, rejected)
        if reason is None:
            try:
                rendered.append(chat_format.render_pair(prompt, chosen, rejected))
            except DataError as error:
                reason = str(error)
        reasons.append(reason)
    encoded = iter(chat_format.encode(rendered))
    out: dict[str, list] = {"row": batch["row"], "reason": []}
    out |= {f"{side}_{what}": [] for side in SIDES for what in ("ids", "cut")}
    for reason in reasons:
        ids = cut = ([], [], [])
        if reason is None:
            whole = next(encoded)
            ids = cut_pair(whole, chat_format.bos_id, max_length, max_prompt_length)
            cut = tuple(len(short) < len(long) for short, long in zip(ids, whole, strict=True))
            reason = unusable_tokens(whole, ids, chat_format)
        out["reason"].append(reason)
        for i, side in enumerate(SIDES):
            out[f"{side}_ids"].append(ids[i] if reason is None else [])
            out[f"{side}_cut"].append(bool(cut[i]))
    return out


def cut_pair(pair: TokenPair, bos_id: int | None, max_length: int, max_prompt_length: int) -> TokenPair:
    """Keep the prompt's end (behind its BOS) up to `max_prompt_length`, then of each response what fits."""
    prompt, chosen, rejected = pair
    if len(prompt) > max_prompt_length:
        bos = [] if bos_id is None else [bos_id]
        prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
    room = max(0, max_length - len(prompt))
    return prompt, chosen[:room], rejected[:room]


def unusable_tokens(whole: TokenPair, cut: TokenPair, chat_format: ChatFormat) -> str | None:
    """Why a tokenised pair can't be trained on, None if it can."""
    if not cut[1]:
        return "the prompt fills the window"
    if chat_format.bos_id not in (None, chat_format.end_id) and whole[0].count(chat_format.bos_id) != 1:
        return "the prompt's text has a BOS token in it"
    for side, ids in zip(SIDES[1:], whole[1:], strict=True):
        if ids[-1] != chat_format.end_id or ids.count(chat_format.end_id) != 1:
            return f"the text of {side} has an end token in it"
    if cut[1] == cut[2]:
        return "chosen and rejected are identical after the cut"
    return None


@dataclass
class DataReport:
    """What became of the rows of a split. A cut response has lost its end token.

    Attributes:
        dropped: reason -> row numbers. `tokens`: total per side. `lengths`: median, p95 and max tokens per side.
    """

    rows: int
    dropped: dict[str, list[int]]
    prompts_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0
    pairs_cut: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def dropped_rows(self) -> int:
        return sum(len(rows) for rows in self.dropped.values())

    @property
    def kept(self) -> int:
        return self.rows - self.dropped_rows

    def check_dropped(self, max_dropped_fraction: float) -> None:
        if self.kept == 0 or self.dropped_rows > max_dropped_fraction * self.rows:
            raise DataError(
                f"{self.dropped_rows} of {self.rows} rows can't be used, more than max_dropped_fraction: "
                f"{max_dropped_fraction} allows. Repair or remove them, or raise max_dropped_fraction.\n"
                + "\n".join(self.dropped_lines())
            )

    def dropped_lines(self) -> list[str]:
        return [f"- {len(rows)} dropped, {reason}: {name_rows(rows)}" for reason, rows in self.dropped.items()]

    def lines(self) -> list[str]:
        """Short lines to print."""
        lines = [f"{self.kept} of {self.rows} rows used", *self.dropped_lines()]
        if self.pairs_cut:
            lines.append(
                f"- {self.pairs_cut} pairs cut: {self.prompts_cut} prompts lost their start, {self.chosen_cut} chosen "
                f"and {self.rejected_cut} rejected responses lost their end and end token"
            )
        for side, values in self.lengths.items():
            numbers = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"{side} tokens: {self.tokens[side]:,} ({numbers})")
        return lines

    def as_dict(self) -> dict:
        return {**asdict(self), "kept": self.kept}


def rows_by_reason(reasons, rows) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for reason, row in zip(reasons, rows, strict=True):
        if reason:
            grouped.setdefault(reason, []).append(row)
    return grouped


def name_rows(rows: list[int]) -> str:
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:SHOWN_ROWS]))}{more}"

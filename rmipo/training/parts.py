"""What a `PreferenceTrainer` trains with, made from what its user passes: chat format, tokenised pairs, model."""

import copy
import datetime
from collections.abc import Mapping

import pyarrow.compute as pc
import torch
import trl
import xxhash
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmipo.data.chat import PROBES, ChatFormat, DataError, freeze_date
from rmipo.data.formats import MESSAGES, SIDES, DataReport, convert_rows, of_split, read_pair
from rmipo.data.pairs import LIMITS, tokenize_pairs
from rmipo.fingerprints import json_fingerprint, model_fingerprint, rows_fingerprint
from rmipo.objectives import PRIORS, build_objective
from rmipo.recipe.schema import ModelConfig, PairConfig
from rmipo.training.distributed import on_main_process
from rmipo.training.loading import check_adapters, check_limits, load_model, load_tokenizer

TOKENIZED = tuple(f"{side}_ids" for side in SIDES)
# Pairs of plain texts under a tokenizer without a template: response after prompt, and the end token, as in TRL.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
Named = str | trl.ModelConfig
Loaded = PreTrainedModel | PeftModel


def source_of(model: Named | Loaded) -> ModelConfig | Loaded:
    """What a user passes as `model`, with names and TRL's configurations as `ModelConfig`."""
    if isinstance(model, str):
        return ModelConfig(model_name_or_path=model)
    return ModelConfig(**vars(model)) if isinstance(model, trl.ModelConfig) else model


def name_of(model: ModelConfig | Loaded) -> str:
    """Where the model comes from: a folder or hub id; empty for one made in memory."""
    return model.model_name_or_path if isinstance(model, ModelConfig) else model.config._name_or_path


def tokenizer_of(model: ModelConfig | Loaded) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with `model`. Raises DataError for a model made in memory, LoadingError."""
    if not name_of(model):
        raise DataError("the model was not loaded from a folder or hub: expected its tokenizer as processing_class")
    return load_tokenizer(model if isinstance(model, ModelConfig) else source_of(name_of(model)))


def is_tokenized(rows: Dataset) -> bool:
    return set(TOKENIZED) <= set(rows.column_names)


def is_plain_text(rows: Dataset) -> bool:
    """Whether the rows are TRL's standard format: `prompt`, `chosen` and `rejected` are texts."""
    return all(getattr(rows.features.get(side), "dtype", None) in ("string", "large_string") for side in SIDES)


class TokenizedPairs:
    """Pairs as a trainer takes them: what a script makes before its model is loaded, and a trainer from raw rows.

    Args:
        rows: split -> pairs of any format of `data.formats`, or tokenised ones, which are taken as they are.
        tokenizer: None only where all rows are tokenised. Its clock, if its template reads one, is stopped at today.
        model: whose tokens and positions have to be enough.

    Attributes:
        splits: split -> columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`.
        chat: what the tokenizer's template does; None without a tokenizer or template.
        reports: split -> what was dropped and cut, which is printed too; of the splits that were tokenised here.

    Raises DataError where more rows are unusable or cut than `args` allow, LoadingError for a model that is too small.
    """

    def __init__(
        self,
        rows: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase | None,
        args: PairConfig,
        model: ModelConfig | Loaded,
    ):
        self.args, self.objective = args, build_objective(args.objective)
        self.chat: ChatFormat | None = None
        if tokenizer is not None:
            check_limits(tokenizer, model, args.max_length)
            if tokenizer.chat_template is None and rows and all(map(is_plain_text, rows.values())):
                tokenizer = with_plain_template(tokenizer)
            if tokenizer.chat_template is not None:
                # A run over midnight would otherwise have two kinds of prompts.
                freeze_date(tokenizer, datetime.date.today())
                self.chat = ChatFormat.probe(tokenizer, self.objective.header_in_response)
        self.reports: dict[str, DataReport] = {}
        self.splits = {split: self.add(given, split) for split, given in rows.items()}
        if self.reports:  # a script's pairs are tokenised when its trainer gets them, and were spoken of
            self.say_what_is_trained()

    def add(self, rows: Dataset, split: str) -> Dataset:
        """`rows` tokenised."""
        args = self.args
        if is_tokenized(rows):
            # Taken as they are, so nothing cuts them to the window.
            table = rows.select_columns(list(TOKENIZED)).with_format("arrow")[:]
            prompt, chosen, rejected = (pc.list_value_length(table.column(name)) for name in TOKENIZED)
            longest = pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py() or 0
            if longest > args.max_length:
                raise DataError(f"{split}: a pair has {longest} tokens, more than max_length ({args.max_length})")
            return rows if "row" in rows.column_names else numbered(rows)
        if self.chat is None:
            raise DataError(f"{split}: the tokenizer (processing_class) has no chat template: set `chat_template`")
        with PartialState().main_process_first(), of_split(split):
            rows = as_messages(rows, args.dataset_num_proc)
            if self.chat.tokenizer.chat_template == PLAIN_TEMPLATE and max(map(len, rows["prompt"]), default=1) > 1:
                raise DataError("the texts are dialogues of several turns, and the tokenizer has no chat template")
            dataset, self.reports[split] = tokenize_pairs(
                rows,
                self.chat,
                max_dropped_fraction=args.max_dropped_fraction,
                max_truncated_fraction=args.max_truncated_fraction,
                num_proc=args.dataset_num_proc,
                **{name: getattr(args, name) for name in LIMITS},
            )
        for line in self.reports[split].lines():
            PartialState().print(f"{split}: {line}")
        return dataset

    def say_what_is_trained(self) -> None:
        """Print the first pair as it is tokenised, and how many held-out prompts are trained on too."""
        say, (split, rows) = PartialState().print, next(iter(self.splits.items()))
        say(f"{split}: row {rows[0]['row']} as the model reads it, responses are scored whole")
        for side in SIDES:
            say(f"  {side:<8} {self.chat.tokenizer.decode(rows[0][f'{side}_ids'])[:300]!r}")
        if self.chat.added:
            say(f"notice: the chat template starts each response with {self.chat.added!r}, which is scored too")
        prompts = {name: [hash(tuple(ids)) for ids in pairs["prompt_ids"]] for name, pairs in self.splits.items()}
        known = set(prompts.pop("train", ()))
        for name, held_out in prompts.items():
            # Its metrics would look better than they are.
            if count := sum(prompt in known for prompt in held_out):
                say(f"notice: {count} of {len(held_out)} pairs of {name} have a prompt that training has too")

    def prior_context(self) -> list[int] | None:
        """Token ids in front of a response when log pi(y) is scored; None where the objective doesn't read it."""
        if not self.objective.needs & PRIORS:
            return None
        if self.chat is None:
            raise DataError("without a chat template, log pi(y) needs prior_context, the ids in front of a response")
        return self.chat.prior_context(self.objective.prior_context)

    def fingerprints(self) -> dict[str, str]:
        return {split: rows_fingerprint(dataset) for split, dataset in self.splits.items()}

    def facts(self) -> dict:
        """What a run's record says of objective and data."""
        return {
            "objective": vars(self.objective) | {"name": self.objective.name},
            "prompt_probe": [self.chat.prompt_ids(messages) for messages in PROBES],
            "data": {split: vars(report) for split, report in self.reports.items()},
        }


def with_plain_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with the plain template, as what is saved shall have none."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        tokenizer.bos_token = None  # it begins no text with one
    return tokenizer


def as_messages(rows: Dataset, num_proc: int | None) -> Dataset:
    """Pairs of any format of `data.formats` as messages, with a column `row`; tokenised ones and messages as they are."""
    if is_tokenized(rows) or (
        "row" in rows.column_names and all(rows.features.get(side) == MESSAGES for side in SIDES)
    ):
        return rows
    return convert_rows(numbered(rows), "the dataset", read_pair, SIDES, num_proc)


def numbered(rows: Dataset) -> Dataset:
    """With a column `row`, by which messages name rows."""
    if "row" in rows.column_names:
        rows = rows.remove_columns("row")
    return rows.add_column("row", list(range(len(rows))))


def policy(model: ModelConfig | Loaded, peft_config: PeftConfig | None = None) -> Loaded:
    """The model to train, loaded if `model` names one, with new adapters if there is a `peft_config`.

    It has no dropout but that of adapters, as in TRL's DPO and SimPO's code: both responses of a pair, the prior and the
    reference are then scored by one network.
    """
    if isinstance(model, ModelConfig):
        model = load_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        for key, value in vars(module).items():  # of those that call functional dropout, such as OPT
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel):
        check_adapters(model)
    return model


def weights_fingerprint(model: ModelConfig | Loaded) -> str:
    """Of the initial weights: of a model's files, or of a loaded model, which may differ from them."""
    if isinstance(model, ModelConfig):
        return on_main_process(lambda: model_fingerprint(model.model_name_or_path, model.model_revision))
    digest = xxhash.xxh3_128()
    for key, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 a process has a part of each
        digest.update(key.encode())
        # Bytes, as numpy has no bfloat16.
        digest.update(own.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return json_fingerprint(gather_object([digest.hexdigest()]))

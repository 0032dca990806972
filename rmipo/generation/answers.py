"""Answers of a trained model to a benchmark's prompts, kept in a JSONL file that an interrupted run continues.

Prompts are rendered and tokenised by `ChatFormat`, as in training, and reach the engine as token ids: a server or
engine that is given text may write a second BOS.
"""

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerBase

from rmipo.data.chat import ChatFormat, freeze_date
from rmipo.errors import EvaluationError
from rmipo.files import read_lines
from rmipo.fingerprints import has_weights, json_fingerprint, trained_fingerprint
from rmipo.generation.engines import ENGINES, TokenPrompt, choose_engine
from rmipo.generation.prompts import kept_lines
from rmipo.recipe.files import GENERATION, merge_settings
from rmipo.recipe.schema import ModelConfig
from rmipo.record import package_versions
from rmipo.training.loading import load_tokenizer, read_generation_config


@dataclass(frozen=True)
class Request:
    """One prompt: `key` names it in the file; `temperature` and `seed` None mean the settings' own."""

    key: str
    messages: list[dict[str, str]]
    temperature: float | None = None
    seed: int | None = None


def questions(texts: Iterable[str]) -> list[Request]:
    """Requests of one user message each, numbered."""
    return [Request(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


def check_settings(settings: dict) -> dict:
    """The settings with defaults filled in. Raises EvaluationError naming every wrong value."""
    return merge_settings("generation", GENERATION, settings)


def own_settings(model_dir: str | Path) -> dict:
    """The settings that a model's own generation_config.json stands for; greedy decoding where it doesn't sample."""
    config = read_generation_config(model_dir)
    if not config.get("do_sample"):
        return {"dtype": "auto", "temperature": 0.0}
    named = {key: config[key] for key in ("temperature", "top_p", "top_k") if config.get(key) is not None}
    return {"dtype": "auto", "temperature": 1.0} | named


def stop_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> list[int]:
    """Where an answer ends: at the end of turn, and at every EOS token that tokenizer, model and generation config name."""
    configs = [read_generation_config(model_dir), json.loads((model_dir / "config.json").read_text())]
    named = [chat.end_id, tokenizer.eos_token_id, *(config.get("eos_token_id") for config in configs)]
    return sorted({token for ids in named for token in (ids if isinstance(ids, list) else [ids]) if token is not None})


class Generator:
    """Answers of the model in `model_dir`; use it in a `with` statement, which gives the engine's memory back.

    The engine is loaded at the first prompt without an answer, and serves every file that is filled after that.

    Attributes:
        settings: with the engine that answers, once there are answers.
        versions: of the packages that made the answers, which may have been others than those installed now.
        fingerprint: of the weights that made the answers.
    """

    def __init__(self, model_dir: str | Path, settings: dict):
        self.model_dir = Path(model_dir)
        self.settings = check_settings(settings)
        self.fingerprint: str | None = None
        self.finishes: list[str] = []
        self.versions: dict[str, str] | None = None
        self.engine = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    @property
    def cut(self) -> float:
        """Percent of the answers so far that were cut at `max_new_tokens` or the end of the context."""
        return 100 * self.finishes.count("length") / max(1, len(self.finishes))

    def file(self, name: str, requests: list[Request]) -> Path:
        """The file for the answers to `requests`; other prompts or another decoding have another one beside it."""
        # Beside the model, not the evaluation: another judge or another benchmark finds the answers there.
        decoding = {key: value for key, value in self.settings.items() if key != "engine"}
        key = json_fingerprint([decoding, [asdict(request) for request in requests]])[:8]
        return self.model_dir / "eval/answers" / f"{name}-{key}.jsonl"

    def answer(self, requests: list[Request], path: str | Path) -> list[str]:
        """The answers, in the order of `requests`; those that are in `path` already are not made again.

        An answer depends on the model, its prompt and the seed alone. A file that transformers was interrupted in ends
        as that of an uninterrupted run.

        Raises EvaluationError, before the model is loaded, for prompts that don't fit the model, for missing weights,
        and for a file made by another model, other settings or, if it has to be continued, other package versions.
        """
        path = Path(path)
        found, *rows = read_lines(path) or [{}]
        tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(self.model_dir)))
        # A chat template may tell the model which day it is: an answer of tomorrow is told today's.
        date = found.get("date", str(datetime.date.today()))
        dated = {"date": date} if freeze_date(tokenizer, datetime.date.fromisoformat(date)) else {}
        chat = ChatFormat.probe(tokenizer)
        prompts = self.prompts(requests, chat)

        if self.settings["engine"] == "auto" and found:
            self.settings["engine"] = found["decoding"]["engine"]
        whole = len(rows) >= len(requests)
        if not whole:
            self.settings["engine"] = choose_engine(self.settings["engine"])
        # Complete answers need no weights: a machine that only judges has the folder without its *.safetensors.
        packages = sorted({self.settings["engine"], "torch", "transformers"})
        versions = found["versions"] if whole else package_versions(*packages)
        if self.versions not in (None, versions):  # one result can't state both
            raise EvaluationError(f"{path}: made with {versions}, earlier answers with {self.versions}: delete it")
        self.versions = versions
        known = whole and not has_weights(self.model_dir)
        self.fingerprint = found["model"] if known else trained_fingerprint(self.model_dir)
        # Temperatures and seeds are in the prompts: a benchmark may have its own for each.
        stops = stop_ids(self.model_dir, tokenizer, chat)
        decoding = {key: value for key, value in self.settings.items() if key != "temperature"} | {"stop_ids": stops}
        header = {"decoding": decoding, "versions": self.versions, "model": self.fingerprint, **dated}
        header["prompts"] = json_fingerprint([asdict(prompt) for prompt in prompts])
        answers = {row["key"]: row for row in kept_lines(path, header)}

        wanted = [i for i, request in enumerate(requests) if request.key not in answers]
        if wanted and self.engine is None:
            self.engine = ENGINES[self.settings["engine"]](self.model_dir, self.settings, stops)
        made = self.engine.answers(prompts, wanted) if wanted else ()
        with path.open("a") as file:
            for i, (ids, finish) in tqdm(made, f"answers of {self.model_dir.name}", len(wanted), unit="answer"):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                row = {"key": requests[i].key, "output": text, "tokens": len(ids), "finish": finish}
                # Flushed: a kill loses the answer in progress and no other.
                print(json.dumps(row), file=file, flush=True)
                answers[requests[i].key] = row
        self.finishes += [answers[request.key]["finish"] for request in requests]
        return [answers[request.key]["output"] for request in requests]

    def ask(self, name: str, requests: list[Request]) -> list[str]:
        """The answers to `requests`, kept in the model's own file for them."""
        return self.answer(requests, self.file(name, requests))

    def result(self, metrics: dict, settings: dict, packages: Iterable[str] = (), **more) -> dict:
        """What a benchmark returns, with what the answers were made with."""
        versions = package_versions(*packages) | self.versions
        settings = settings | {"generation": dict(self.settings)}
        own = {"metrics": metrics, "versions": versions, "settings": settings, "fingerprint": self.fingerprint}
        return own | more

    def prompts(self, requests: list[Request], chat: ChatFormat) -> list[TokenPrompt]:
        """Raises EvaluationError for prompts that don't start with one BOS, or leave no room for an answer."""
        context = AutoConfig.from_pretrained(self.model_dir, trust_remote_code=False).max_position_embeddings
        prompts = []
        for request in requests:
            ids = chat.prompt_ids(request.messages)
            # A second BOS makes worse answers in silence; a prompt without room would end the run after hours.
            if chat.bos_id is not None and [token == chat.bos_id for token in ids[:2]] != [True, False]:
                raise EvaluationError(f"prompt {request.key} doesn't start with exactly one BOS (id {chat.bos_id})")
            if len(ids) >= context:
                raise EvaluationError(f"prompt {request.key} has {len(ids)} tokens, the model's context {context}")
            own = self.settings | {key: value for key, value in asdict(request).items() if value is not None}
            stream = int(json_fingerprint([own["seed"], ids])[:15], 16)  # whatever the place of the prompt
            prompts.append(TokenPrompt(ids, own["temperature"], stream))
        return prompts

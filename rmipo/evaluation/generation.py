"""Answers of a trained model to a benchmark's prompts, kept in a JSONL file that an interrupted run continues.

Prompts are rendered and tokenised by `ChatFormat`, as in training, and reach the engine as token ids: a server or
engine that is given text may write a second BOS.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from rmipo.chat import PROBES
from rmipo.data import ChatFormat

from . import EvaluationError, merge_settings
from .engines import ENGINES, Prompt

DEFAULTS = {
    "temperature": 0.7,
    "top_p": 1.0,
    "max_new_tokens": 2048,
    "seed": 42,
    "batch_size": 16,  # prompts answered and written together; a restart repeats at most this many
    "dtype": "bfloat16",
    "engine": "auto",  # vllm where there is a GPU, else transformers
}
SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Request:
    """One prompt: `key` names it in the file; `temperature` None means the settings' own."""

    key: str
    messages: list[dict[str, str]]
    temperature: float | None = None


def check_settings(settings: dict) -> dict:
    """The settings with defaults filled in. Raises EvaluationError naming every wrong value."""
    settings = merge_settings("generation", DEFAULTS, settings)
    problems = []
    for key in ("max_new_tokens", "batch_size"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            problems.append(f"{key} is {settings[key]!r}, expected a whole number of at least 1")
    if not 0 <= settings["temperature"] <= 2:
        problems.append(f"temperature is {settings['temperature']}, expected 0 (greedy) to 2")
    if not 0 < settings["top_p"] <= 1:
        problems.append(f"top_p is {settings['top_p']}, expected more than 0, at most 1")
    if settings["engine"] not in ("auto", *ENGINES):
        problems.append(f"engine is {settings['engine']!r}, expected one of {['auto', *ENGINES]}")
    if problems:
        raise EvaluationError("eval.yaml, generation: " + "; ".join(problems))
    if settings["engine"] == "auto":
        settings["engine"] = "vllm" if torch.cuda.is_available() else "transformers"
    return settings


def generate(model_dir: str | Path, requests: list[Request], path: str | Path, settings: dict) -> list[str]:
    """Answer `requests` with the model in `model_dir`; answers that are in `path` already are not made again.

    An answer depends on the model, its prompt and `settings["seed"]` alone. Batches are cut from the whole list, also
    when some of it is done, so that the file of an interrupted and restarted run is that of an uninterrupted one.

    Returns the answers in the order of `requests`, stripped of surrounding space.
    Raises EvaluationError, before the model is loaded, for wrong settings, prompts that don't fit the model, prompts
    that training rendered otherwise, and a file made by another model or other settings.
    """
    model_dir, path = Path(model_dir), Path(path)
    settings = check_settings(settings)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat = ChatFormat.probe(tokenizer)
    check_trained_prompts(model_dir, chat)
    prompts = [
        Prompt(ids, settings["temperature"] if r.temperature is None else r.temperature, seed_of(settings["seed"], ids))
        for r, ids in ((request, chat.prompt_ids(request.messages)) for request in requests)
    ]
    check_prompts(requests, prompts, chat, AutoConfig.from_pretrained(model_dir).max_position_embeddings)

    decoding = {key: settings[key] for key in ("top_p", "max_new_tokens", "seed", "batch_size", "dtype", "engine")}
    header = {"decoding": decoding, "model": fingerprint(model_dir), "prompts": digest([asdict(p) for p in prompts])}
    answers = open_answers(path, header)
    size = settings["batch_size"]
    batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    missing = [batch for batch in batches if any(requests[i].key not in answers for i in batch)]
    if missing:
        stop_ids = sorted({chat.end_id, tokenizer.eos_token_id} - {None})
        engine = ENGINES[settings["engine"]](model_dir, settings, stop_ids)
        with path.open("a") as file, tqdm(total=len(prompts), initial=len(answers), unit="answer") as progress:
            progress.set_description(f"answers of {model_dir.name}")
            for batch in missing:
                for i, answer in zip(batch, engine([prompts[i] for i in batch]), strict=True):
                    if requests[i].key in answers:
                        continue
                    text = tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
                    row = {"key": requests[i].key, "output": text, "tokens": len(answer.ids), "finish": answer.finish}
                    file.write(json.dumps(row) + "\n")
                    answers[requests[i].key] = row
                    progress.update()
                file.flush()
    return [answers[request.key]["output"] for request in requests]


def seed_of(seed: int, ids: list[int]) -> int:
    """A seed for one prompt, from the run's seed and the prompt itself."""
    return int(digest([seed, ids])[:15], 16)


def check_trained_prompts(model_dir: Path, chat: ChatFormat) -> None:
    """Compare how this tokenizer renders the two dialogues that training recorded as `prompt_probe` in run.json.

    Models from elsewhere have no run.json, and nothing to compare with.
    """
    record = model_dir / "run.json"
    trained = json.loads(record.read_text()).get("prompt_probe") if record.is_file() else None
    if trained is None:
        return
    for messages, ids in zip(PROBES, trained, strict=True):
        now = chat.prompt_ids(messages)
        # Training may have scored the assistant header as part of the response; generation always starts after it.
        if now[: len(ids)] != ids or now[len(ids) :] not in ([], list(chat.header_ids)):
            raise EvaluationError(
                f"{model_dir} was trained with another chat template or tokenizer than the one now in that folder: "
                f"{messages!r} was {ids} in training (run.json) and is {now} here. "
                "Put the tokenizer files of the training back."
            )


def check_prompts(requests: list[Request], prompts: list[Prompt], chat: ChatFormat, context: int) -> None:
    """Raises EvaluationError, listing all that is wrong: repeated keys, BOS, lengths."""
    problems = []
    keys = [request.key for request in requests]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        problems.append(f"keys that occur more than once: {repeated[:5]}")
    if chat.bos_id is not None:
        starts = [[token == chat.bos_id for token in prompt.ids[:2]] for prompt in prompts]
        wrong = [request.key for request, start in zip(requests, starts, strict=True) if start != [True, False]]
        if wrong:
            problems.append(f"{len(wrong)} prompts don't start with exactly one BOS (id {chat.bos_id}): {wrong[:5]}")
    long = [f"{r.key} ({len(p.ids)} tokens)" for r, p in zip(requests, prompts, strict=True) if len(p.ids) >= context]
    if long:
        problems.append(f"prompts that leave no room in the model's context of {context} tokens: {long[:5]}")
    if problems:
        raise EvaluationError("; ".join(problems))


def open_answers(path: Path, header: dict) -> dict[str, dict]:
    """Answers in `path` by key; a new file is started with `header`, and a line that a kill cut short is removed.

    Raises EvaluationError if the file's first line is another header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        file.truncate(end)
        if end == 0:
            file.write(json.dumps(header).encode() + b"\n")
            return {}
    found, *answers = [json.loads(line) for line in content[:end].splitlines()]
    different = [key for key in header if found.get(key) != header[key]]
    if different:
        raise EvaluationError(
            f"{path} holds answers made with another {', another '.join(different)}: its first line has "
            f"{ {key: found.get(key) for key in different} }, this run { {key: header[key] for key in different} }. "
            "Move or delete that file, or take its settings back."
        )
    return {answer["key"]: answer for answer in answers}


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(model_dir: Path) -> str:
    """Identifies the weights without reading 16 GB: sizes, and the first and last MiB of every weight file."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise EvaluationError(f"{model_dir} holds no *.safetensors: train the model first (make train)")
    state = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        state.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            state.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, size - SAMPLED_BYTES))
            state.update(content.read())
    return state.hexdigest()[:16]

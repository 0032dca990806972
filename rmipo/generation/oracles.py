"""What scores answers: a function of the user's, a reward model, or a judge. One class each, in ORACLES.

An oracle's `score` yields scores as they come, so that a run that is cut short keeps those there are.
"""

import functools
import inspect
import json
import math
import re
import runpy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rmipo.errors import PairsError, UserError
from rmipo.files import read_lines
from rmipo.fingerprints import text_fingerprint
from rmipo.generation import judge
from rmipo.generation.prompts import Prompt
from rmipo.recipe.settings import merge_settings

QUESTION = """Rate the response to the user's last message for its helpfulness, relevance, accuracy, depth and clarity. \
Be objective. End with the rating from 1 to 10 in double brackets, such as: Rating: [[5]].

[Conversation]
{conversation}

[Response]
{answer}
[End of response]"""

TEMPERATURES = (0, 1, 1)  # of the attempts at one rating: a reply without any would be given again at 0


class OracleError(UserError, ValueError):
    """An oracle that can't be used, or whose scores can't."""


Scored = Iterator[dict[str, float]]  # by key of the answer, some at a time


class FunctionOracle:
    """`file.py:name`: name(messages, answers) -> one score per answer, higher is better; called once for each prompt.

    A function with further arguments gets the columns of those names from the prompt's row. Those without a default are
    `required`.
    """

    defaults = {"function": None}

    def __init__(self, settings: dict):
        file, _, name = str(settings["function"]).rpartition(":")
        if not Path(file).is_file():
            raise OracleError(f"oracle.function is {settings['function']!r}: expected <file.py>:<function>")
        # The user's own file: nothing of a model's repository is run.
        self.function, self.name = runpy.run_path(file)[name], settings["function"]
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        columns = [p for p in inspect.signature(self.function).parameters.values() if p.kind not in starred][2:]
        self.columns = [column.name for column in columns]
        self.required = [column.name for column in columns if column.default is column.empty]
        # Scores of a function that was changed since are scores of another oracle.
        self.identity = {**settings, "fingerprint": text_fingerprint(Path(file).read_bytes())}

    def score(self, prompts: list[Prompt]) -> Scored:
        for prompt in prompts:
            columns = {name: prompt.columns[name] for name in self.columns if name in prompt.columns}
            where = f"oracle {self.name}, prompt {prompt.key} ({prompt.messages[-1]['content'][:60]!r})"
            try:
                scores = self.function(prompt.messages, list(prompt.answers.values()), **columns)
                by_key = dict(zip(prompt.answers, scores, strict=True))
            except Exception as error:
                raise OracleError(f"{where}: {type(error).__name__}: {error}") from error
            yield checked(by_key, where)


class RewardModelOracle:
    """Any sequence classifier with one output and a chat template: hub id or folder. No code of its repository is run."""

    defaults = {"reward_model": None, "dtype": "bfloat16"}
    required = ()

    def __init__(self, settings: dict):
        self.settings = self.identity = settings
        self.name = settings["reward_model"]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        options = {"dtype": self.settings["dtype"], "use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForSequenceClassification.from_pretrained(self.name, **options)
        # A classifier's first class would be taken for a reward.
        if model.config.num_labels != 1:
            raise OracleError(f"reward model {self.name} has {model.config.num_labels} outputs, expected 1")
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def score(self, prompts: list[Prompt]) -> Scored:
        """Raises OracleError, before anything is scored, for dialogues longer than the model's context."""
        encoded = {}
        for prompt in prompts:
            for key, text in prompt.answers.items():
                dialogue = [*prompt.messages, {"role": "assistant", "content": text}]
                encoded[key] = self.tokenizer.apply_chat_template(dialogue, return_dict=True)["input_ids"]
        window = getattr(self.model.config, "max_position_embeddings", None)
        if window and (longest := max(map(len, encoded.values()), default=0)) > window:
            raise OracleError(f"{self.name}: a dialogue has {longest} tokens, its context is {window}")
        # transformers takes the reward at the last token that isn't the pad token. That can be the EOS token, which ends a
        # dialogue; without any it is the last one.
        self.model.config.get_text_config().pad_token_id = None
        # One at a time: in a batch the rounding depends on the other dialogues, and the same answer of two methods would be
        # a win for one of them. Dialogues of a thousand tokens fill a GPU.
        for key, ids in encoded.items():
            with torch.no_grad():
                reward = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, 0].item()
            yield checked({key: reward}, f"reward model {self.name}")


class JudgeOracle:
    """A chat model behind any OpenAI-compatible endpoint, which rates each answer from 1 to 10."""

    defaults = {"judge": None, "price": [10.0, 30.0], "max_cost": 20.0, "concurrency": 5, "max_tokens": 512}
    required = ()

    def __init__(self, settings: dict):
        self.settings = settings
        self.client = judge.open_client(judge.judge_endpoint())
        self.identity = {"judge": settings["judge"], "endpoint": judge.shown(judge.judge_endpoint())}

    def score(self, prompts: list[Prompt]) -> Scored:
        questions = {}
        for prompt in prompts:
            conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
            for key, text in prompt.answers.items():
                questions[key] = QUESTION.format(conversation=conversation, answer=text)
        characters, tokens = sum(map(len, questions.values())), self.settings["max_tokens"] * len(questions)
        judge.check_cost("judge", len(questions), characters, tokens, self.settings, len(TEMPERATURES))
        # Ratings are yielded as they come, so that those that are paid for are kept when one fails.
        pool = ThreadPoolExecutor(self.settings["concurrency"])
        try:
            for done in as_completed([pool.submit(self.rate, *question) for question in questions.items()]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def rate(self, key: str, question: str) -> dict[str, float]:
        request = {"messages": [{"role": "user", "content": question}], "max_tokens": self.settings["max_tokens"]}
        for temperature in TEMPERATURES:
            reply = judge.complete(self.client, self.settings["judge"], temperature=temperature, **request)
            text = reply.choices[0].message.content or ""
            rating = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
            if rating and 1 <= float(rating[1]) <= 10:
                return {key: float(rating[1])}
        raise OracleError(f"the judge rated answer {key} in none of {len(TEMPERATURES)} replies: {text[-200:]!r}")


ORACLES = {"function": FunctionOracle, "reward_model": RewardModelOracle, "judge": JudgeOracle}


def make_oracle(settings: dict):
    """The oracle that a block such as `{function: my.py:score}` or `{judge: gpt-4, max_cost: 5}` names.

    Raises OracleError, before anything is scored, for a block that names none or several, and for wrong settings.
    """
    named = [name for name in ORACLES if settings.get(name)]
    # Of two oracles one would be left out without a word.
    if len(named) != 1:
        raise OracleError(f"oracle is {settings!r}: expected exactly one of {', '.join(ORACLES)}")
    cls = ORACLES[named[0]]
    return cls(merge_settings(f"oracle {named[0]}", cls.defaults, settings))


def checked(scores: dict[str, Any], where: str) -> dict[str, float]:
    """`scores` as floats. Raises OracleError if one is no finite number: a NaN would be neither best nor worst."""
    for key, score in scores.items():
        try:
            finite = math.isfinite(float(score))  # also a NumPy or torch scalar
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise OracleError(f"{where}, answer {key}: the score is {score!r}, expected a finite number")
    return {key: float(score) for key, score in scores.items()}


def keep_scores(path: Path, header: dict, prompts: list[Prompt], score, description: str) -> dict[str, float]:
    """Scores by answer key, kept in `path`; those that are there are not asked for again.

    Raises PairsError if the file holds scores of other answers or another oracle.
    """
    # The first line says what the scores are of, so that those of an older oracle are not taken for these.
    found, *lines = read_lines(path) or [None]
    if found is None:
        path.write_text(json.dumps(header) + "\n")
    elif found != json.loads(json.dumps(header)):
        raise PairsError(f"{path} holds scores of other answers or of another oracle: delete it to score again")
    scores = {key: value for line in lines for key, value in line.items()}
    rest = [{key: text for key, text in p.answers.items() if key not in scores} for p in prompts]
    missing = [replace(p, answers=answers) for p, answers in zip(prompts, rest, strict=True) if answers]
    total = sum(len(p.answers) for p in prompts)
    with path.open("a") as file, tqdm(total=total, initial=len(scores), desc=description, unit="answer") as progress:
        for some in score(missing) if missing else ():
            file.write(json.dumps(some) + "\n")
            file.flush()
            scores |= some
            progress.update(len(some))
    return scores

"""What scores answers: a function of the user's, a reward model, or a judge. One class each, in ORACLES.

An oracle's `score` yields scores as they come, so that a run that is cut short keeps those there are.
"""

import importlib.util
import inspect
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmipo.data.chat import Messages
from rmipo.errors import UserError
from rmipo.fingerprints import text_fingerprint
from rmipo.generation import judge
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


@dataclass(frozen=True)
class Candidates:
    """The answers to one prompt, by key; `columns`: what else the prompt's row holds."""

    key: str
    messages: Messages
    answers: dict[str, str]
    columns: dict[str, Any] = field(default_factory=dict)


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
        spec = importlib.util.spec_from_file_location(f"oracle_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.function, self.name = getattr(module, name), settings["function"]
        columns = list(inspect.signature(self.function).parameters.values())[2:]
        self.columns = [column.name for column in columns]
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [column for column in columns if column.default is column.empty and column.kind not in starred]
        self.required = [column.name for column in needed]
        self.identity = {**settings, "fingerprint": text_fingerprint(Path(file).read_bytes())}

    def score(self, prompts: list[Candidates]) -> Scored:
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
    """A sequence-classification model: hub id or folder."""

    defaults = {"reward_model": None, "dtype": "bfloat16", "batch_size": 16}
    required = ()

    def __init__(self, settings: dict):
        self.settings = self.identity = settings

    def score(self, prompts: list[Candidates]) -> Scored:
        from rmipo.generation.reward_model import RewardModel

        model = RewardModel(self.settings["reward_model"], self.settings["dtype"], self.settings["batch_size"])
        answers = [(prompt, key, text) for prompt in prompts for key, text in prompt.answers.items()]
        dialogues = [[*p.messages, {"role": "assistant", "content": text}] for p, _, text in answers]
        for number, reward in model.score(dialogues):
            key = answers[number][1]
            yield checked({key: reward}, f"reward model {model.name}, answer {key}")


class JudgeOracle:
    """A chat model behind any OpenAI-compatible endpoint, which rates each answer from 1 to 10."""

    defaults = {"judge": None, "price": [10.0, 30.0], "max_cost": 20.0, "concurrency": 5, "max_tokens": 512}
    required = ()

    def __init__(self, settings: dict):
        self.settings = settings
        self.client = judge.open_client(judge.judge_endpoint())
        self.identity = {"judge": settings["judge"], "endpoint": judge.shown(judge.judge_endpoint())}

    def score(self, prompts: list[Candidates]) -> Scored:
        questions = {
            key: QUESTION.format(
                conversation="\n\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages), answer=text
            )
            for prompt in prompts
            for key, text in prompt.answers.items()
        }
        characters, tokens = sum(map(len, questions.values())), self.settings["max_tokens"] * len(questions)
        judge.check_cost("judge", len(questions), characters, tokens, self.settings, len(TEMPERATURES))
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
    if len(named) != 1:
        raise OracleError(f"oracle is {settings!r}: expected exactly one of {', '.join(ORACLES)}")
    cls = ORACLES[named[0]]
    return cls(merge_settings(f"oracle {named[0]}", cls.defaults, settings))


def checked(scores: dict[str, Any], where: str) -> dict[str, float]:
    """`scores` as floats. Raises OracleError if one is no finite number: a NaN would be neither best nor worst."""
    numbers = {}
    for key, score in scores.items():
        try:
            numbers[key] = float(score)  # also of a NumPy or torch scalar
        except (TypeError, ValueError):
            numbers[key] = math.nan
        if not math.isfinite(numbers[key]):
            raise OracleError(f"{where} gave the score {score!r}: expected a finite number")
    return numbers

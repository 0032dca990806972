"""What scores answers: a function of the user's, a reward model, or a judge. One class each, in ORACLES.

An oracle's `score` yields scores as they come, so that a run that is cut short keeps those there are.
"""

import inspect
import json
import math
import re
import runpy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmipo.errors import PairsError, UserError
from rmipo.files import read_lines
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import check_cost, complete, judge_endpoint, open_client, shown
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
        file, _, name = settings["function"].rpartition(":")
        # The user's own file: nothing of a model's repository is run.
        self.function, self.name = runpy.run_path(file)[name], settings["function"]
        columns = list(inspect.signature(self.function).parameters.values())[2:]
        self.columns = [column.name for column in columns]
        self.required = [column.name for column in columns if column.default is column.empty]
        # Scores of a function that was changed since are scores of another oracle.
        self.identity = {**settings, "fingerprint": text_fingerprint(Path(file).read_bytes())}

    def score(self, prompts: list[Prompt]) -> Scored:
        for prompt in prompts:
            columns = {name: prompt.columns[name] for name in self.columns if name in prompt.columns}
            try:
                scores = self.function(prompt.messages, list(prompt.answers.values()), **columns)
                yield {key: float(score) for key, score in zip(prompt.answers, scores, strict=True)}
            except Exception as error:
                raise OracleError(
                    f"oracle {self.name}, prompt {prompt.key}: {type(error).__name__}: {error}"
                ) from error


class RewardModelOracle:
    """Any sequence classifier with one output and a chat template: hub id or folder. No code of its repository is run."""

    defaults = {"reward_model": None, "dtype": "bfloat16"}
    required = ()

    def __init__(self, settings: dict):
        self.settings = self.identity = settings
        self.name = settings["reward_model"]

    def score(self, prompts: list[Prompt]) -> Scored:
        # Loaded here: the policy, which answers first, has the GPU for itself.
        tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        options = {"dtype": self.settings["dtype"], "use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForSequenceClassification.from_pretrained(self.name, **options)
        # A classifier's first class would be taken for a reward.
        if model.config.num_labels != 1:
            raise OracleError(f"reward model {self.name} has {model.config.num_labels} outputs, expected 1")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        # transformers takes the reward at the last token that isn't the pad token. That can be the EOS token, which ends a
        # dialogue; without any it is the last one.
        model.config.get_text_config().pad_token_id = None
        window = getattr(model.config, "max_position_embeddings", math.inf)
        # One at a time: in a batch the rounding depends on the other dialogues, and the same answer of two methods would be
        # a win for one of them. Dialogues of a thousand tokens fill a GPU.
        for prompt in prompts:
            for key, text in prompt.answers.items():
                dialogue = [*prompt.messages, {"role": "assistant", "content": text}]
                ids = tokenizer.apply_chat_template(dialogue, return_dict=True)["input_ids"]
                if len(ids) > window:
                    raise OracleError(f"{self.name}: answer {key} ends at token {len(ids)}, the context at {window}")
                with torch.no_grad():
                    yield {key: model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0].item()}


class JudgeOracle:
    """A chat model behind any OpenAI-compatible endpoint, which rates each answer from 1 to 10."""

    defaults = {"judge": None, "price": [10.0, 30.0], "max_cost": 20.0, "concurrency": 5, "max_tokens": 512}
    required = ()

    def __init__(self, settings: dict):
        self.settings = settings
        self.client = open_client(judge_endpoint())
        self.identity = {"judge": settings["judge"], "endpoint": shown(judge_endpoint())}

    def score(self, prompts: list[Prompt]) -> Scored:
        keys, questions = [], []
        for prompt in prompts:
            conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
            for key, text in prompt.answers.items():
                keys.append(key)
                questions.append(QUESTION.format(conversation=conversation, answer=text))
        tokens = self.settings["max_tokens"] * len(questions)
        check_cost("judge", len(questions), sum(map(len, questions)), tokens, self.settings)
        with ThreadPoolExecutor(self.settings["concurrency"]) as pool:
            yield from pool.map(self.rate, keys, questions)

    def rate(self, key: str, question: str) -> dict[str, float]:
        for temperature in TEMPERATURES:
            options = {"temperature": temperature, "max_tokens": self.settings["max_tokens"]}
            text = complete(self.client, self.settings["judge"], question, **options)
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


def keep_scores(path: Path, header: dict, prompts: list[Prompt], score: Callable, description: str) -> dict[str, float]:
    """Scores by answer key, kept in `path`; those that are there are not asked for again.

    Raises PairsError if the file holds scores of other answers or another oracle, OracleError for a score that is no
    finite number.
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
            if not all(map(math.isfinite, some.values())):  # a NaN would be neither best nor worst
                raise OracleError(f"{description}: {some} is no finite number")
            file.write(json.dumps(some) + "\n")
            file.flush()
            scores |= some
            progress.update(len(some))
    return scores

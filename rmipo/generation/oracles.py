"""What scores answers: a function of the user's, a reward model, a judge, as in ORACLES; or the likelihood under a model.

All of them yield scores as they come, so that a run that is cut short keeps those there are.
"""

import inspect
import json
import math
import re
import runpy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmipo.data.chat import ChatFormat, Messages
from rmipo.errors import UserError
from rmipo.fingerprints import text_fingerprint
from rmipo.generation.judge import check_cost, complete, judge_endpoint, open_client, shown
from rmipo.generation.prompts import Prompt, kept_lines
from rmipo.recipe.files import merge_settings
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import load_model, load_tokenizer
from rmipo.training.packing import pack
from rmipo.training.scoring import Scorer, by_tokens

QUESTION = """Rate the response to the user's last message for its helpfulness, relevance, accuracy, depth and clarity. \
Be objective. End with the rating from 1 to 10 in double brackets, such as: Rating: [[5]].

[Conversation]
{conversation}

[Response]
{answer}
[End of response]"""

TEMPERATURES = (0, 1, 1)  # of the attempts at one rating: a reply without any would be given again at 0
MAX_TOKENS = 512  # of a judge's reply


class OracleError(UserError, ValueError):
    """An oracle that can't be used, or whose scores can't."""


Scored = Iterator[dict[str, float]]  # by key of the answer, some at a time


@dataclass(frozen=True)
class Oracle:
    identity: dict  # what tells its scores from another's
    score: Callable[[list[Prompt]], Scored]
    required: tuple[str, ...] = ()  # columns that every prompt's row needs


def function_oracle(settings: dict) -> Oracle:
    """`file.py:name`: name(messages, answers) -> one score per answer, higher is better; called once for each prompt.

    A function with further arguments gets the columns of those names from the prompt's row. Those without a default are
    required.
    """
    file, _, name = settings["function"].rpartition(":")
    function = runpy.run_path(file)[name]  # the user's own file: nothing of a model's repository is run
    parameters = inspect.signature(function).parameters.values()
    columns = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)][2:]

    def score(prompts: list[Prompt]) -> Scored:
        for prompt in prompts:
            own = {column.name: prompt.columns[column.name] for column in columns if column.name in prompt.columns}
            try:
                scores = function(prompt.messages, list(prompt.answers.values()), **own)
                yield {key: float(score) for key, score in zip(prompt.answers, scores, strict=True)}
            except Exception as error:
                where = f"oracle {settings['function']}, prompt {prompt.key}"
                raise OracleError(f"{where}: {type(error).__name__}: {error}") from error

    # Scores of a function that was changed since are scores of another oracle.
    identity = {**settings, "fingerprint": text_fingerprint(Path(file).read_bytes())}
    return Oracle(identity, score, tuple(column.name for column in columns if column.default is column.empty))


def reward_model_oracle(settings: dict) -> Oracle:
    """Any sequence classifier with one output and a chat template: hub id or folder. No code of its repository is run."""
    name = settings["reward_model"]

    def score(prompts: list[Prompt]) -> Scored:
        # Loaded here: the policy, which answers first, has the GPU for itself.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        options = {"dtype": settings["dtype"], "use_safetensors": True, "trust_remote_code": False}
        model = AutoModelForSequenceClassification.from_pretrained(name, **options)
        # A classifier's first class would be taken for a reward.
        if model.config.num_labels != 1:
            raise OracleError(f"reward model {name} has {model.config.num_labels} outputs, expected 1")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        # transformers takes the reward at the last token that isn't the pad token. That can be the EOS token, which ends a
        # dialogue; without any it is the last one.
        model.config.get_text_config().pad_token_id = None
        window = getattr(model.config, "max_position_embeddings", math.inf)
        # One at a time: in a batch the rounding depends on the other dialogues, and the same answer of two methods would be
        # a win for one of them. Dialogues of a thousand tokens fill a GPU.
        for prompt, key, answer in each_answer(prompts):
            dialogue = [*prompt.messages, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(dialogue, return_dict=True)["input_ids"]
            if len(ids) > window:
                raise OracleError(f"{name}: answer {key} ends at token {len(ids)}, the context at {window}")
            with torch.no_grad():
                yield {key: model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0].item()}

    return Oracle(settings, score)


def judge_oracle(settings: dict) -> Oracle:
    """A chat model behind any OpenAI-compatible endpoint, which rates each answer from 1 to 10."""
    client = open_client(judge_endpoint())

    def rate(asked: tuple[str, str]) -> dict[str, float]:
        key, question = asked
        for temperature in TEMPERATURES:
            options = {"temperature": temperature, "max_tokens": MAX_TOKENS}
            text = complete(client, settings["judge"], question, **options)
            rating = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
            if rating and 1 <= float(rating[1]) <= 10:
                return {key: float(rating[1])}
        raise OracleError(f"the judge rated answer {key} in none of {len(TEMPERATURES)} replies: {text[-200:]!r}")

    def score(prompts: list[Prompt]) -> Scored:
        questions = {}
        for prompt, key, answer in each_answer(prompts):
            conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
            questions[key] = QUESTION.format(conversation=conversation, answer=answer)
        check_cost("judge", len(questions), sum(map(len, questions.values())), MAX_TOKENS * len(questions), settings)
        with ThreadPoolExecutor(settings["concurrency"]) as pool:
            yield from pool.map(rate, questions.items())

    return Oracle({"judge": settings["judge"], "endpoint": shown(judge_endpoint())}, score)


def each_answer(prompts: list[Prompt]) -> Iterator[tuple[Prompt, str, str]]:
    """(prompt, key, text) of every answer."""
    return ((prompt, key, text) for prompt in prompts for key, text in prompt.answers.items())


# With the keys of its block and their defaults.
ORACLES = {
    "function": (function_oracle, {"function": None}),
    "reward_model": (reward_model_oracle, {"reward_model": None, "dtype": "bfloat16"}),
    "judge": (judge_oracle, {"judge": None, "price": [10.0, 30.0], "max_cost": 20.0, "concurrency": 5}),
}


def make_oracle(settings: dict) -> Oracle:
    """The oracle that a block such as `{function: my.py:score}` or `{judge: gpt-4, max_cost: 5}` names.

    Raises OracleError, before anything is scored, for a block that names none or several, and for wrong settings.
    """
    named = [name for name in ORACLES if settings.get(name)]
    # Of two oracles one would be left out without a word.
    if len(named) != 1:
        raise OracleError(f"oracle is {settings!r}: expected exactly one of {', '.join(ORACLES)}")
    make, defaults = ORACLES[named[0]]
    return make(merge_settings(f"oracle {named[0]}", defaults, settings))


def keep_scores(path: Path, header: dict, prompts: list[Prompt], score: Callable, description: str) -> dict[str, float]:
    """Scores by answer key, kept in `path`; those that are there are not asked for again.

    Raises EvaluationError if the file holds scores of other answers or another oracle, OracleError for a score that is no
    finite number.
    """
    scores = {key: value for line in kept_lines(path, header) for key, value in line.items()}
    rest = [{key: text for key, text in p.answers.items() if key not in scores} for p in prompts]
    missing = [replace(p, answers=answers) for p, answers in zip(prompts, rest, strict=True) if answers]
    with path.open("a") as file, tqdm(total=sum(map(len, rest)), desc=description, unit="answer") as progress:
        for some in score(missing) if missing else ():
            if not all(map(math.isfinite, some.values())):  # a NaN would be neither best nor worst
                raise OracleError(f"{description}: {some} is no finite number")
            print(json.dumps(some), file=file, flush=True)
            scores |= some
            progress.update(len(some))
    return scores


class Likelihood:
    """log pi(y|x) and log pi(y) of answers under the model in `model_dir`, without gradients: what PMI is made of."""

    def __init__(self, model_dir: str | Path, dtype: str):
        source = ModelConfig(model_name_or_path=str(model_dir), dtype=dtype)
        self.chat = ChatFormat.probe(load_tokenizer(source))
        self.prior_context = self.chat.prior_context("header")
        self.scorer = Scorer(load_model(source).to("cuda" if torch.cuda.is_available() else "cpu"))
        self.window = self.scorer.model.config.max_position_embeddings

    def ids(self, messages: Messages, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of its answer, end token included."""
        response = [{"role": "assistant", "content": answer}]
        prompt, ids, _ = self.chat.pair_ids(messages, response, response)
        return prompt, ids

    def sums(self, context: list[int], responses: list[list[int]]) -> list[float]:
        """Summed log-probability of each of `responses` (token ids) after `context`, whose own forward they share."""
        with self.scorer as scorer:
            return [value for group in by_tokens(responses) for value in scorer.sums(pack([(context, group)])).tolist()]

    def scores(self, prompt: Prompt) -> dict[str, tuple[float, float]]:
        """log pi(y|x) and log pi(y|x) - log pi(y) of each of the prompt's answers, by its key; both per token, in nats."""
        pairs = [self.ids(prompt.messages, answer) for answer in prompt.answers.values()]
        context, responses = pairs[0][0], [ids for _, ids in pairs]
        given, prior = self.sums(context, responses), self.sums(self.prior_context, responses)
        values = [(a / len(ids), (a - b) / len(ids)) for a, b, ids in zip(given, prior, responses, strict=True)]
        return dict(zip(prompt.answers, values, strict=True))

    def pmi(self, prompts: list[Prompt]) -> Scored:
        """The PMI of each answer of each prompt; called as an oracle is."""
        for prompt in prompts:
            yield {key: pmi for key, (_, pmi) in self.scores(prompt).items()}

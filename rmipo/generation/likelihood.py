"""log pi(y|x) and log pi(y) of answers under a saved model: what PMI selection and two benchmarks are made of."""

from collections.abc import Iterator
from pathlib import Path

import torch

from rmipo.data.chat import ChatFormat, Messages
from rmipo.generation.prompts import Prompt
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import load_model, load_tokenizer
from rmipo.training.packing import pack
from rmipo.training.scoring import Scorer, by_tokens


class Likelihood:
    """Scores responses with the model in `model_dir`, without gradients."""

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

    def pmi(self, prompts: list[Prompt]) -> Iterator[dict[str, float]]:
        """The PMI of each answer of each prompt; called as an oracle is."""
        for prompt in prompts:
            yield {key: pmi for key, (_, pmi) in self.scores(prompt).items()}

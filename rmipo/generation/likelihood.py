"""log pi(y|x) and log pi(y) of answers under a saved model: what PMI selection and the specificity benchmark are made of."""

from collections.abc import Iterator
from pathlib import Path

import torch

from rmipo.data.chat import ChatFormat, Messages
from rmipo.recipe.schema import ModelConfig
from rmipo.training import attention, scoring
from rmipo.training.loading import load_model, load_tokenizer
from rmipo.training.packing import pack

TOKENS = 2048  # of one packed forward, about


class Likelihood:
    """Scores responses with the model in `model_dir`, without gradients."""

    def __init__(self, model_dir: str | Path, dtype: str):
        source = ModelConfig(model_name_or_path=str(model_dir), dtype=dtype)
        self.chat = ChatFormat.probe(load_tokenizer(source))
        self.prior_context = self.chat.prior_context("header")
        self.model = load_model(source).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.kind = attention.resolve_kind("auto", self.model.device)
        attention.attach(self.model, self.kind)
        self.window = self.model.config.max_position_embeddings

    def ids(self, messages: Messages, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of its answer, end token included."""
        response = [{"role": "assistant", "content": answer}]
        prompt, ids, _ = self.chat.pair_ids(messages, response, response)
        return prompt, ids

    @torch.no_grad()
    def sums(self, context: list[int], responses: list[list[int]]) -> list[float]:
        """Summed log-probability of each of `responses` (token ids) after `context`, whose own forward they share."""
        values = []
        for group in by_tokens(responses):
            packed = pack([(context, group)]).to(self.model.device)
            values += scoring.response_logps(self.model, packed, self.kind, self.model.config).tolist()
        return values

    def pmi(self, messages: Messages, answers: list[str]) -> list[float]:
        """log pi(y|x) - log pi(y) per token of each answer to one prompt, in nats."""
        pairs = [self.ids(messages, answer) for answer in answers]
        prompt, responses = pairs[0][0], [ids for _, ids in pairs]
        given, prior = self.sums(prompt, responses), self.sums(self.prior_context, responses)
        return [(a - b) / len(ids) for a, b, ids in zip(given, prior, responses, strict=True)]


def by_tokens(responses: list[list[int]]) -> Iterator[list[list[int]]]:
    """`responses` in order, cut into groups of about TOKENS tokens."""
    group: list[list[int]] = []
    for response in responses:
        if group and sum(map(len, group)) + len(response) > TOKENS:
            yield group
            group = []
        group.append(response)
    yield group

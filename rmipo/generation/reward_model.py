"""Scores of a reward model: any sequence classifier with one output and a chat template."""

from collections.abc import Iterator

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rmipo.data.chat import Messages
from rmipo.errors import UserError


class RewardModelError(UserError, ValueError):
    """A reward model that isn't one, or can't score these dialogues."""


class RewardModel:
    """Args: name: hub id or folder, of safetensors; no code of theirs is run. dtype: as in recipes."""

    def __init__(self, name: str, dtype: str = "bfloat16", batch_size: int = 16):
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        if model.config.num_labels != 1:
            raise RewardModelError(f"reward model {name} has {model.config.num_labels} outputs, expected 1")
        self.name, self.batch_size = name, batch_size
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def score(self, dialogues: list[Messages]) -> Iterator[tuple[int, float]]:
        """(number of the dialogue, its reward), the shortest dialogues first.

        Raises RewardModelError, before anything is scored, for dialogues longer than the model's context.
        """
        encoded = [
            self.tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=True)["input_ids"]
            for dialogue in dialogues
        ]
        window = getattr(self.model.config, "max_position_embeddings", None)
        if window and (longest := max(map(len, encoded), default=0)) > window:
            raise RewardModelError(f"{self.name}: a dialogue has {longest} tokens, its context is {window}")
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            yield from zip(numbers, self.batch([encoded[i] for i in numbers]), strict=True)

    @torch.no_grad()
    def batch(self, sequences: list[list[int]]) -> list[float]:
        # transformers takes the reward at the last token that isn't the pad token. Where that is the EOS token, or is not
        # set at all, it would look in the wrong place: any token that occurs in none of the sequences will do.
        pad = next(token for token in range(self.model.config.vocab_size) if not any(token in ids for ids in sequences))
        self.model.config.get_text_config().pad_token_id = pad
        width = max(map(len, sequences))
        ids = torch.tensor([s + [pad] * (width - len(s)) for s in sequences], device=self.model.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=self.model.device)
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

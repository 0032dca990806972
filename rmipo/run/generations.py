"""Sample answers during training, in `generations.jsonl`."""

import math
import os
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteriaList, TrainerCallback

from rmipo.files import write_lines
from rmipo.record import GENERATIONS_FILE, read_generations
from rmipo.run.stop import StopOnSignal
from rmipo.run.trackers import log_answers
from rmipo.training import attention
from rmipo.training.loading import positions_of


def default_tokens(world_size: int) -> int:
    """Of an answer. Under ZeRO-3 each token gathers all weights; between machines that takes longer than the training."""
    return 128 if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size else 32


class SampleGenerations(TrainerCallback):
    """At each evaluation: answers to a few held-out prompts (token ids), in `generations.jsonl`.

    `max_new_tokens`: of an answer, `default_tokens` if None; fewer where the model has no positions for more. `stop`: the run's
    `StopOnSignal`; a signal ends the answers too, which are then not kept.
    """

    def __init__(self, tokenizer, prompts: list[list[int]], trainer, max_new_tokens: int | None, stop: StopOnSignal):
        self.tokenizer, self.prompts, self.trainer = tokenizer, prompts, trainer
        self.max_new_tokens, self.stop = max_new_tokens or default_tokens(trainer.args.world_size), stop

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self.prompts:
            return
        texts = self.generate()
        if not state.is_world_process_zero or self.stop.requested:
            return
        answers = [
            {"step": state.global_step, "prompt": self.tokenizer.decode(prompt), "answer": text}
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        # A resumed run evaluates this step again: its answers take the place of those before the kill.
        lines = [line for line in read_generations(args.output_dir) if line["step"] < state.global_step]
        write_lines(Path(args.output_dir) / GENERATIONS_FILE, lines + answers)
        log_answers(self.trainer.callback_handler.callbacks, answers, state.global_step)

    def generate(self) -> list[str]:
        """Greedy answers; every process takes part, as each forward gathers its weights layer by layer under ZeRO-3.

        All weights at once would not fit beside a large model's states. In eval mode nothing is checkpointed, so the
        setting of activation checkpointing stays as it is.
        """
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
        # Packed attention has no cache of keys, which generation needs.
        attention.attach(model, "plain")
        # One batch: under ZeRO-3 and FSDP2 every forward gathers all weights, for one row or for many.
        pad_id, device = self.tokenizer.pad_token_id or 0, trainer.args.device
        rows = [torch.tensor(prompt, device=device) for prompt in self.prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        longest = ids.shape[1]
        positions = positions_of(model.config.get_text_config()) or math.inf
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=min(self.max_new_tokens, positions - longest),
            pad_token_id=pad_id,
            # All processes go on until the last one has ended, so a signal to some of them hangs nobody.
            synced_gpus=trainer.args.world_size > 1,
            stopping_criteria=StoppingCriteriaList([self.stopped]),
        )
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        attention.attach(model, trainer.attention_kind)
        return [self.tokenizer.decode(until(row, ends)) for row in output[:, longest:].tolist()]

    def stopped(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """As transformers asks after each token, of every row."""
        return torch.full((len(input_ids),), self.stop.requested, device=input_ids.device)


def until(ids: list[int], ends: set[int]) -> list[int]:
    """`ids` up to the first of `ends`, which is kept; behind it is padding."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))]

"""Sample answers during training, in `generations.jsonl`."""

import math

import torch
from transformers import TrainerCallback

from rmipo.record import read_generations, write_generations
from rmipo.training import attention
from rmipo.training.loading import positions_of


class SampleGenerations(TrainerCallback):
    """At each evaluation: answers to a few held-out prompts, in `generations.jsonl`.

    Args:
        tokenizer: decodes, and gives end and padding tokens.
        prompts: lists of prompt token ids.
        trainer: the `PreferenceTrainer`, for the wrapped model.
        max_new_tokens: per answer; fewer where the model has no positions for more.
    """

    def __init__(self, tokenizer, prompts: list[list[int]], trainer, max_new_tokens: int):
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.trainer = trainer
        self.max_new_tokens = max_new_tokens

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        texts = self.generate()
        if not state.is_world_process_zero:
            return
        lines = [line for line in read_generations(args.output_dir) if line["step"] < state.global_step]
        for prompt, text in zip(self.prompts, texts, strict=True):
            lines.append({"step": state.global_step, "prompt": self.tokenizer.decode(prompt), "answer": text})
        write_generations(args.output_dir, lines)

    def generate(self) -> list[str]:
        """Greedy answers; every process takes part, as each forward gathers its weights layer by layer under ZeRO-3.

        All weights at once would not fit beside a large model's states. In eval mode nothing is checkpointed, so the
        setting of activation checkpointing stays as it is.
        """
        trainer, answers = self.trainer, []
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped).eval()
        attention.attach(model, "plain")
        positions = positions_of(model.config.get_text_config()) or math.inf
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=trainer.args.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=min(self.max_new_tokens, positions - len(prompt)),
                pad_token_id=self.tokenizer.pad_token_id,
                synced_gpus=trainer.args.world_size > 1,
            )
            answers.append(self.tokenizer.decode(output[0, len(prompt) :]))
        attention.attach(model, trainer.attention_kind)
        return answers

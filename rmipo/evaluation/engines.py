"""The two programs that answer prompts: transformers where there is no GPU, vLLM where there is one.

Both take token ids and a seed for each prompt, so that an answer doesn't depend on the prompts beside it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, TopPLogitsWarper


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer. `temperature` 0 is greedy decoding."""

    ids: list[int]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """Token ids of an answer without its end token; `finish` is "stop" or "length"."""

    ids: list[int]
    finish: str


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with one random stream per row.

    The argmax of logits / temperature + Gumbel noise is a sample of the softmax. `generate(do_sample=True)` draws the
    whole batch from one stream, so that an answer would change with its neighbours.
    """

    def __init__(self, temperatures: list[float], top_p: float, seeds: list[int]):
        self.temperatures = temperatures
        self.top_p = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        for row, (temperature, stream) in enumerate(zip(self.temperatures, self.streams, strict=True)):
            if temperature == 0:
                continue
            logits = scores[row : row + 1] / temperature
            if self.top_p is not None:
                logits = self.top_p(input_ids[row : row + 1], logits)
            noise = -torch.empty(logits.shape).exponential_(generator=stream).log()
            scores[row] = (logits + noise.to(logits.device))[0]
        return scores


class TransformersEngine:
    package = "transformers"

    def __init__(self, model_dir: Path, settings: dict, stop_ids: list[int]):
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=settings["dtype"]).eval()
        # generate() takes what a call leaves open from the checkpoint's generation_config (temperature, penalties).
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
        )
        self.context = self.model.config.max_position_embeddings
        self.top_p, self.max_new_tokens, self.stop_ids = settings["top_p"], settings["max_new_tokens"], stop_ids

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt]) -> list[Answer]:
        width = max(len(prompt.ids) for prompt in prompts)
        padding = [[self.stop_ids[0]] * (width - len(prompt.ids)) for prompt in prompts]
        sampling = SeededSampling(
            [prompt.temperature for prompt in prompts], self.top_p, [prompt.seed for prompt in prompts]
        )
        output = self.model.generate(
            input_ids=torch.tensor([pad + prompt.ids for pad, prompt in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor(
                [[0] * len(pad) + [1] * len(prompt.ids) for pad, prompt in zip(padding, prompts, strict=True)]
            ),
            max_new_tokens=min(self.max_new_tokens, self.context - width),
            logits_processor=[sampling],
        )
        return [self.until_stop(row) for row in output[:, width:].tolist()]

    def until_stop(self, ids: list[int]) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        return Answer(ids, "length") if end is None else Answer(ids[:end], "stop")


class VllmEngine:
    """Written from vLLM's documentation and never run: there was no machine for it."""

    package = "vllm"

    def __init__(self, model_dir: Path, settings: dict, stop_ids: list[int]):
        from vllm import LLM

        self.model = LLM(model=str(model_dir), dtype=settings["dtype"], seed=settings["seed"])
        self.top_p, self.max_new_tokens, self.stop_ids = settings["top_p"], settings["max_new_tokens"], stop_ids

    def __call__(self, prompts: list[Prompt]) -> list[Answer]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=prompt.temperature,
                top_p=self.top_p,
                max_tokens=self.max_new_tokens,
                seed=prompt.seed,
                stop_token_ids=self.stop_ids,
            )
            for prompt in prompts
        ]
        inputs = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        outputs = [output.outputs[0] for output in self.model.generate(inputs, parameters, use_tqdm=False)]
        return [
            Answer([token for token in output.token_ids if token not in self.stop_ids], output.finish_reason)
            for output in outputs
        ]


ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine}

"""The two programs that answer prompts: transformers where there is no GPU, vLLM where there is one.

Both take token ids and a seed for each prompt, so that an answer doesn't depend on the prompts beside it.
"""

import gc
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from rmipo.errors import EvaluationError
from rmipo.recipe.schema import ModelConfig
from rmipo.training.loading import load_model


@dataclass(frozen=True)
class TokenPrompt:
    """One prompt to answer. `temperature` 0 is greedy decoding."""

    ids: list[int]
    temperature: float
    seed: int


Answer = tuple[list[int], str]  # token ids without the end token, and "stop" or "length"


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with one random stream per prompt."""

    # `generate(do_sample=True)` draws the whole batch from one stream, so that an answer would change with its neighbours.
    # The argmax of logits / temperature + Gumbel noise is a sample of the softmax.
    def __init__(self, temperatures: list[float], top_p: float, seeds: list[int], top_k: int = 0):
        self.temperatures = temperatures
        self.warpers = ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        for row, (temperature, stream) in enumerate(zip(self.temperatures, self.streams, strict=True)):
            if temperature == 0:
                continue
            logits = scores[row : row + 1] / temperature
            for warper in self.warpers:
                logits = warper(input_ids[row : row + 1], logits)
            noise = -torch.empty(logits.shape).exponential_(generator=stream).log()
            scores[row] = (logits + noise.to(logits.device))[0]
        return scores


class TransformersEngine:
    """On the GPU where there is one; batches of `batch_size` prompts."""

    def __init__(self, model_dir: Path, settings: dict, stop_ids: list[int]):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(ModelConfig(model_name_or_path=str(model_dir), dtype=settings["dtype"]))
        self.model = model.to(self.device).eval()
        # generate() takes what a call leaves open from the checkpoint's generation_config (temperature, penalties).
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
        )
        self.context = self.model.config.max_position_embeddings
        self.settings, self.stop_ids = settings, stop_ids

    def answers(self, prompts: list[TokenPrompt], wanted: list[int]) -> Iterator[tuple[int, Answer]]:
        """(number of a prompt, its answer) for each number in `wanted`, in order."""
        # Batches are cut from all prompts, whatever is wanted of them: the padding beside an answer, and with it the last
        # bits of its logits, are the same in a run that goes on from an interrupted one.
        size = self.settings["batch_size"]
        for start in range(0, len(prompts), size):
            numbers = range(start, min(start + size, len(prompts)))
            if not set(numbers).isdisjoint(wanted):
                answers = self.batch(prompts[start : start + size])
                yield from ((n, answer) for n, answer in zip(numbers, answers, strict=True) if n in wanted)

    @torch.no_grad()
    def batch(self, prompts: list[TokenPrompt]) -> list[Answer]:
        width = max(len(prompt.ids) for prompt in prompts)
        ids = [[self.stop_ids[0]] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
        mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        temperatures, seeds = [prompt.temperature for prompt in prompts], [prompt.seed for prompt in prompts]
        # What is left of the context belongs to each prompt: its neighbours may have more of it, or less.
        room = [min(self.settings["max_new_tokens"], self.context - len(prompt.ids)) for prompt in prompts]
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=max(room),
            logits_processor=[SeededSampling(temperatures, self.settings["top_p"], seeds, self.settings["top_k"])],
        )
        answers = []
        for row, own in zip(output[:, width:].tolist(), room, strict=True):
            ids = list(itertools.takewhile(lambda token: token not in self.stop_ids, row[:own]))
            answers.append((ids, "length" if len(ids) == own else "stop"))
        return answers

    def close(self) -> None:
        del self.model
        release_memory()


class VllmEngine:
    """Run with vLLM 0.30.0 on a CPU, where greedy answers in float32 are those of transformers; never on a GPU."""

    def __init__(self, model_dir: Path, settings: dict, stop_ids: list[int]):
        from vllm import LLM

        release_memory()  # vLLM doesn't start where less than its share of the GPU is free
        # generation_config: as above, nothing is taken from the checkpoint's.
        self.model = LLM(
            model=str(model_dir), dtype=vllm_dtype(model_dir, settings["dtype"]), seed=settings["seed"],
            generation_config="vllm", trust_remote_code=False, load_format="safetensors",
        )  # fmt: skip
        self.settings, self.stop_ids = settings, stop_ids

    def answers(self, prompts: list[TokenPrompt], wanted: list[int]) -> Iterator[tuple[int, Answer]]:
        """(number of a prompt, its answer) for each number in `wanted`, as they are finished."""
        # All are handed over at once and yielded one by one: the engine is never drained for the sake of a batch.
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.model.llm_engine
        options = {"stop_token_ids": self.stop_ids, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        options |= {key: self.settings[key] for key in ("top_p", "top_k")}
        options["max_tokens"] = self.settings["max_new_tokens"]  # vLLM ends an answer where its context ends
        for number in wanted:
            prompt = {"type": "token", "prompt_token_ids": prompts[number].ids}
            parameters = SamplingParams(temperature=prompts[number].temperature, seed=prompts[number].seed, **options)
            engine.add_request(str(number), prompt, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                ids = [token for token in output.outputs[0].token_ids if token not in self.stop_ids]
                yield int(output.request_id), (ids, output.outputs[0].finish_reason)

    def close(self) -> None:
        self.model.llm_engine.engine_core.shutdown()  # vLLM holds the GPU in a process of its own
        del self.model
        release_memory()


def release_memory() -> None:
    """Give the GPU memory of models that are no longer used back to other processes."""
    gc.collect()  # models refer to themselves; torch would keep what is freed for this process
    torch.cuda.empty_cache()


def vllm_dtype(model_dir: str | Path, dtype: str) -> str | torch.dtype:
    """`dtype`, with "auto" the weights' own, as for transformers."""
    if dtype != "auto":
        return dtype
    # vLLM's own "auto" makes bfloat16 of float32: answers would differ from those of transformers.
    return AutoConfig.from_pretrained(model_dir, trust_remote_code=False).dtype or dtype


ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine}


def choose_engine(name: str) -> str:
    """The engine that "auto" stands for on this machine, or `name` itself. Raises EvaluationError if it isn't here."""
    if name == "auto":
        name = "vllm" if torch.cuda.is_available() else "transformers"
    if name not in ENGINES or (name == "vllm" and importlib.util.find_spec("vllm") is None):
        fix = "make install EXTRAS=eval,vllm, or --set generation.engine=transformers"
        raise EvaluationError(f"no engine {name}: {fix}")
    return name

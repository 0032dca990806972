"""One run of a comparison: train, with the clock running, and measure."""

import contextlib
import resource
import tempfile
import time
from dataclasses import fields
from typing import Any

import psutil
import torch
from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rmipo.compare.study import Study
from rmipo.compare.trial import FLOOR, INITIAL, Trial
from rmipo.data.chat import ChatFormat
from rmipo.recipe.load import Recipe
from rmipo.run.frame import TrainingRun, training_run
from rmipo.tiny import judge
from rmipo.training import attention
from rmipo.training.loading import load_tokenizer
from rmipo.training.metrics import NonFiniteLossError
from rmipo.training.parts import TokenizedPairs, policy
from rmipo.training.trainer import PreferenceTrainer

CURVE_STEPS = 10  # optimizer steps between two points of a curve
CURVE_PAIRS = 100


class Meter:
    """Time and memory of a training on `device`.

    On a CPU: the process's CPU time, on which other processes have no influence, and its memory beyond that at the start.
    On a GPU: the clock's time, and the peak of what this process allocates there, weights included.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.before, self.start = psutil.Process().memory_info().rss, self.seconds()

    def seconds(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cpu":  # ru_maxrss: of this process, which has trained nothing else
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before
        return torch.cuda.max_memory_allocated(self.device)


class HeldOutCurve(TrainerCallback):
    """Preference accuracy and margin on held-out pairs every few steps; `seconds` is the time that this took."""

    def __init__(self, pairs: Dataset, meter: Meter, kind: str):
        self.pairs, self.meter, self.kind = pairs, meter, kind  # kind: the attention that the model trains with
        self.points: list[dict] = []
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % CURVE_STEPS == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, model)

    def _measure(self, step: int, model) -> None:
        start = self.meter.seconds()
        self.points.append({"step": step, **judge.preference_metrics(model, self.pairs)})
        # Scoring has left it attached to ordinary sequences.
        attention.attach(model, self.kind)
        self.seconds += self.meter.seconds() - start


def execute(study: Study, run: Trial) -> dict[str, Any]:
    """Train and measure one run in this process; returns what its line has about the result."""
    # CPU seconds then measure the work, and runs beside each other don't disturb one another.
    torch.set_num_threads(1)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        recipe = study.recipe(run, folder)
        args, data_config, model_config = recipe.parse(world_size=1)
        with training_run(recipe, args, model_config, keep=False) as frame:
            tokenizer = load_tokenizer(model_config, data_config.chat_template)
            model = policy(model_config).to(args.device)
            held_out = TokenizedPairs({"test": study.task.held_out_pairs(recipe, run)}, tokenizer, args, model)
            chat, test = held_out.chat, held_out.splits["test"]
            chat.set_end_of_turn(model.generation_config)
            result = {"curve": [], "seconds_per_step": None, "peak_memory_mib": None}
            if run.method != INITIAL:
                train = study.task.train_pairs(recipe, run)
                if run.method == FLOOR:
                    trainer = sft_trainer(recipe, model, tokenizer, chat, train)
                else:
                    trainer = PreferenceTrainer(model, args, train, processing_class=tokenizer)
                try:
                    result |= train_and_time(frame, trainer, test.select(range(min(CURVE_PAIRS, len(test)))))
                # A result of this learning rate, and no reason to end the others' runs.
                except NonFiniteLossError:
                    return {**result, "metrics": {"diverged": True}}
                if isinstance(trainer, PreferenceTrainer) and "gamma" in trainer.window.columns[0]:
                    # Nothing was logged, so the window holds every pair that was trained.
                    result["gamma_mean"] = torch.cat([pairs["gamma"] for pairs in trainer.window.columns]).mean().item()
            with precision(args):
                metrics = judge.preference_metrics(model, test) | study.task.measure(model, chat, run)
    return {**result, "metrics": metrics}


def precision(args: TrainingArguments) -> contextlib.AbstractContextManager:
    """bfloat16 arithmetic where the recipe trains with it."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)


def sft_trainer(recipe: Recipe, model, tokenizer, chat: ChatFormat, train: Dataset) -> SFTTrainer:
    """TRL's trainer on the chosen responses, with the preference recipe's optimisation."""
    known = {field.name for field in fields(SFTConfig)}
    values = {key: value for key, value in recipe.resolved().items() if key in known}
    tokenizer.eos_token_id = chat.end_id
    return SFTTrainer(
        model,
        args=SFTConfig(**values, gradient_accumulation_steps=recipe.batch(1)[1]),
        train_dataset=Dataset.from_dict({"prompt": train["prompt"], "completion": train["chosen"]}),
        processing_class=tokenizer,
    )


def train_and_time(frame: TrainingRun, trainer: Trainer, held_out: Dataset) -> dict:
    """Train. Time includes a reference's scoring."""
    meter = Meter(trainer.args.device)
    curve = HeldOutCurve(held_out, meter, getattr(trainer, "attention_kind", "plain"))
    frame.train(trainer, [curve])
    return {
        "curve": curve.points,
        "seconds_per_step": (meter.seconds() - meter.start - curve.seconds) / trainer.state.global_step,
        "peak_memory_mib": meter.peak() / 2**20,
    }

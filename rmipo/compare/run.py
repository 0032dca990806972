"""One run of a comparison: train, with the clock running, and measure."""

import copy
import resource
import tempfile
import time
from dataclasses import fields
from typing import Any

import psutil
import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from rmipo.compare.study import FLOOR, INITIAL, Run, Study, held_out, train_pairs
from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import tokenize_pairs
from rmipo.objectives import build_objective
from rmipo.recipe.load import Recipe
from rmipo.tiny import judge
from rmipo.training import attention
from rmipo.training.finite import NonFiniteLossError
from rmipo.training.loading import load_model, load_tokenizer
from rmipo.training.trainer import PreferenceTrainer

CURVE_STEPS = 10  # optimizer steps between two points of a curve
CURVE_PAIRS = 100
SAMPLES_PER_QUESTION = 4


class HeldOutCurve(TrainerCallback):
    """Preference accuracy and margin on held-out pairs every few steps; `seconds` is the time that this took."""

    def __init__(self, pairs: Dataset, kind: str):
        self.pairs, self.kind = pairs, kind
        self.points: list[dict] = []
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._measure(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % CURVE_STEPS == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, model)

    def _measure(self, step: int, model) -> None:
        start = time.process_time()
        self.points.append({"step": step, **judge.preference_metrics(model, self.pairs)})
        attention.attach(model, self.kind)
        self.seconds += time.process_time() - start


def execute(study: Study, run: Run) -> dict[str, Any]:
    """Train and measure one run in this process; returns what its line has about the result."""
    torch.set_num_threads(1)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        recipe = study.recipe(run, folder)
        args, data_config, model_config = recipe.parse(world_size=1)
        set_seed(args.seed)
        tokenizer = load_tokenizer(model_config)
        model = load_model(model_config, use_cache=False)
        objective = build_objective(args.objective)
        chat = ChatFormat.probe(tokenizer, header_in_response=objective.header_in_response)
        chat.set_end_of_turn(model.generation_config)
        limits = {name: getattr(args, name) for name in ("max_length", "max_prompt_length")}
        limits |= {name: getattr(data_config, name) for name in ("max_dropped_fraction", "max_truncated_fraction")}
        questions, pairs = held_out(study, recipe, run)
        test, _ = tokenize_pairs(pairs, chat, **limits)
        result = {"curve": [], "seconds_per_step": None, "peak_memory_mib": None}
        if run.method != INITIAL:
            train = train_pairs(study, recipe, run)
            curve_pairs = test.select(range(min(CURVE_PAIRS, len(test))))
            if run.method == FLOOR:
                curve = HeldOutCurve(curve_pairs, "plain")
                trainer = sft_trainer(recipe, model, tokenizer, chat, train, curve)
            else:
                curve = HeldOutCurve(curve_pairs, attention.resolve_kind(args.attention, args.device))
                tokenized, _ = tokenize_pairs(train, chat, **limits)
                trainer = preference_trainer(args, objective, model, tokenizer, chat, tokenized, curve)
            try:
                result |= train_and_time(trainer, curve)
            except NonFiniteLossError:
                return {**result, "metrics": {"diverged": True}}
        metrics = judge.preference_metrics(model, test)
        if questions:
            asked = copy.copy(study.world)
            asked.held_out_questions = questions
            samples = SAMPLES_PER_QUESTION if run.purpose == "report" else 1
            metrics |= judge.evaluate(model, tokenizer, asked, samples_per_question=samples, seed=run.seed)
            metrics.pop("samples")
    return {**result, "metrics": metrics}


def preference_trainer(args, objective, model, tokenizer, chat, train: Dataset, curve) -> PreferenceTrainer:
    needs_logits = "reference_logits" in objective.needs
    return PreferenceTrainer(
        model,
        args,
        objective,
        train_dataset=train,
        processing_class=tokenizer,
        prior_context=chat.prior_context(objective.prior_context) if "prior" in objective.needs else None,
        reference_model=copy.deepcopy(model) if needs_logits else None,
        callbacks=[curve],
    )


def sft_trainer(recipe: Recipe, model, tokenizer, chat, train: Dataset, curve) -> SFTTrainer:
    """TRL's trainer on the chosen responses, with the preference recipe's optimisation."""
    known = {field.name for field in fields(SFTConfig)}
    values = {key: value for key, value in recipe.resolved().items() if key in known}
    tokenizer.eos_token_id = chat.end_id
    return SFTTrainer(
        model,
        args=SFTConfig(**values, gradient_accumulation_steps=recipe.batch(1)[1]),
        train_dataset=Dataset.from_dict({"prompt": train["prompt"], "completion": train["chosen"]}),
        processing_class=tokenizer,
        callbacks=[curve],
    )


def train_and_time(trainer, curve: HeldOutCurve) -> dict:
    """Train. Time is the CPU's, on which other processes have no influence, and includes a reference's scoring."""
    before, start = psutil.Process().memory_info().rss, time.process_time()
    trainer.train()
    seconds = time.process_time() - start - curve.seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process: it has trained nothing else
    return {
        "curve": curve.points,
        "seconds_per_step": seconds / trainer.state.global_step,
        "peak_memory_mib": (peak - before) / 2**20,
    }

"""One run of a comparison: train, with the clock running, and measure."""

import resource
import tempfile
import time
from typing import Any

import psutil
import torch
from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from rmipo.compare.study import FLOOR, INITIAL, Study, Trial
from rmipo.recipe.schema import of_recipe
from rmipo.run.frame import TrainingRun, training_run
from rmipo.tiny import judge
from rmipo.training import attention
from rmipo.training.loading import load_tokenizer
from rmipo.training.metrics import NonFiniteLossError
from rmipo.training.parts import TokenizedPairs, policy
from rmipo.training.trainer import PreferenceTrainer

CURVE_STEPS = 10  # optimizer steps between two points of a curve
CURVE_PAIRS = 100


def seconds(device: torch.device) -> float:
    """On a CPU this process's own time, on which others have no influence; on a GPU the clock's."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class HeldOutCurve(TrainerCallback):
    """Preference accuracy and margin on held-out pairs every few steps; `seconds` is the time that this took."""

    def __init__(self, pairs: Dataset, kind: str):
        self.pairs, self.kind = pairs, kind  # kind: the attention that the model trains with
        self.points, self.seconds = [], 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % CURVE_STEPS == 0 or state.global_step == state.max_steps:
            start = seconds(args.device)
            self.points.append({"step": state.global_step, **judge.preference_metrics(model, self.pairs)})
            # Scoring has left it attached to ordinary sequences.
            attention.attach(model, self.kind)
            self.seconds += seconds(args.device) - start

    on_train_begin = on_step_end  # step 0


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
            held_out = TokenizedPairs({"test": study.task.held_out_pairs(run)}, tokenizer, args, model)
            chat, test = held_out.chat, held_out.splits["test"]
            chat.set_end_of_turn(model.generation_config)
            result = {"curve": [], "seconds_per_step": None, "peak_memory_mib": None}
            if run.method != INITIAL:
                train = study.task.train_pairs(run)
                if run.method == FLOOR:
                    # The preference recipe's optimisation, on the chosen responses.
                    values = recipe.resolved() | {"gradient_accumulation_steps": recipe.batch(1)[1]}
                    rows = Dataset.from_dict({"prompt": train["prompt"], "completion": train["chosen"]})
                    tokenizer.eos_token_id = chat.end_id
                    trainer = SFTTrainer(
                        model, of_recipe(SFTConfig, values), train_dataset=rows, processing_class=tokenizer
                    )
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
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                metrics = judge.preference_metrics(model, test) | study.task.measure(model, chat, run)
    return {**result, "metrics": metrics}


def train_and_time(frame: TrainingRun, trainer: Trainer, held_out: Dataset) -> dict:
    """Train. Time includes a reference's scoring; memory is beyond that at the start, on a GPU all that is allocated."""
    curve, device = HeldOutCurve(held_out, getattr(trainer, "attention_kind", "plain")), trainer.args.device
    before, start = psutil.Process().memory_info().rss, seconds(device)
    frame.train(trainer, [curve])
    took = seconds(device) - start - curve.seconds
    # ru_maxrss, in KiB: of this process, which has trained nothing else.
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    peak = on_cpu if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    per_step = took / trainer.state.global_step
    return {"curve": curve.points, "seconds_per_step": per_step, "peak_memory_mib": peak / 2**20}

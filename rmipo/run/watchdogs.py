"""Early warnings of a run that goes wrong: once per kind until it recovers, with what to look at.

The limits are recipe values (`warn_*`, `ddp_timeout`). Warnings change nothing; a loss that is not finite ends the run.
"""

import faulthandler
import math
import statistics
import sys
from collections.abc import Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rmipo.errors import UserError
from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.record import read_generations, read_metrics

HISTORY = 50  # log lines whose median a gradient norm is compared with
SETTLED = 10  # log lines before which there is no such comparison
NGRAM = 4  # tokens
SILENCE = 1 / 3  # of ddp_timeout, after which a step that doesn't end is reported

ADVICE = {
    "chosen_logp_drop": "chosen responses have become {value:.2f} nats per token less likely since the start. If the answers "
    "in generations.jsonl fall apart, train into another output_dir with a lower learning_rate or objective.beta",
    "grad_norm_ratio": "the gradient norm is {value:.0f} times its median. If the loss keeps jumping, train into another "
    "output_dir with a lower learning_rate or max_grad_norm, or longer warmup_steps",
    "repetition": "{value:.0%} of the 4-grams of the sample generations are repeats. If the answers in generations.jsonl loop "
    "or don't end, lower learning_rate, and check that responses end with the template's end token",
}


class NonFiniteStepError(UserError, RuntimeError):
    """A logged loss or gradient norm is NaN or infinite."""


class StepWatchdog(TrainerCallback):
    """Adds `watchdog/*` to the metrics of every training line, and warns where one passes its limit.

    What it compares with is read from the run's files, so a resumed run goes on as an undisturbed one.
    """

    def __init__(self, args: PreferenceRunConfig, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.limits = {kind: getattr(args, f"warn_{kind}") for kind in ADVICE}
        self.warned: set[str] = set()
        self.lines: list[dict] | None = None  # of training, before this one

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not {"common/chosen_avg_logp", "grad_norm"} <= logs.keys():
            return
        if self.lines is None:  # not on_train_begin: the lines of a resumed run are cut to its checkpoint there
            self.lines = [line for line in read_metrics(args.output_dir) if "grad_norm" in line]
        start = (self.lines or [logs])[0]["common/chosen_avg_logp"]
        found = {"chosen_logp_drop": start - logs["common/chosen_avg_logp"]}
        norms = [line["grad_norm"] for line in self.lines[-HISTORY:]]
        self.lines.append(dict(logs))
        if len(norms) >= SETTLED and (median := statistics.median(norms)) > 0:
            found["grad_norm_ratio"] = logs["grad_norm"] / median
        if answers := self._last_answers(args.output_dir, state.global_step):
            found["repetition"] = repeated_share(answers)
        for kind, value in found.items():
            if value > self.limits[kind] and kind not in self.warned:
                self.warned.add(kind)
                limit = f" (limit {self.limits[kind]:g}, warn_{kind})"
                tqdm.write(f"warning, step {state.global_step}: {ADVICE[kind].format(value=value)}{limit}")
            elif value <= self.limits[kind]:
                self.warned.discard(kind)
        logs.update({f"watchdog/{kind}": value for kind, value in found.items()})

    def _last_answers(self, output_dir: str, step: int) -> list[list[int]]:
        """Token ids of the sample generations before `step`; those of the step itself are not there yet."""
        lines = [line for line in read_generations(output_dir) if line["step"] < step]
        last = [line["answer"] for line in lines if line["step"] == lines[-1]["step"]]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in last]


class FiniteWatchdog(TrainerCallback):
    """Stops a run whose loss or gradient norm is NaN or infinite, before the step can be saved."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = ("loss",) if args.fp16 else ("loss", "grad_norm")  # float16's loss scaling skips steps that overflow
        found = {name: logs[name] for name in names if not math.isfinite(logs.get(name, 0.0))}
        if found:
            what = ", ".join(f"{name} is {value}" for name, value in found.items())
            fix = "Lower learning_rate or max_grad_norm, or look for a broken row; train into another output_dir"
            raise NonFiniteStepError(f"step {state.global_step}: {what}. The last checkpoint is from before. {fix}")


class SilenceWatchdog(TrainerCallback):
    """When nothing ends for a third of `ddp_timeout`, each process prints where it waits, on standard error."""

    def _heard(self, args, state, control, **kwargs):
        # Each call starts the time anew. The stream of the process: tests and notebooks put others in its place.
        faulthandler.dump_traceback_later(args.ddp_timeout * SILENCE, repeat=False, file=sys.__stderr__)

    on_train_begin = on_step_end = on_prediction_step = on_evaluate = on_save = _heard

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def end(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def repeated_share(sequences: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """Share of n-grams that occurred before in the same sequence, over all n-grams; 0 where there is none."""
    total = repeated = 0
    for ids in sequences:
        ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / total if total else 0.0

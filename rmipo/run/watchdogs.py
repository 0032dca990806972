"""Early warnings of a run that goes wrong: once per kind until it recovers, with what to look at.

The limits are recipe values (`warn_*`, `ddp_timeout`). Warnings change nothing; a loss that is not finite, and a
process that stays silent, end the run.
"""

import contextlib
import math
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence

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
    "chosen_logp_drop": "chosen responses have become {value:.2f} nats per token less likely since the start (limit "
    "{limit:g}, warn_chosen_logp_drop). Look at generations.jsonl: if the answers fall apart, stop, and train "
    "into another output_dir with a lower learning_rate or objective.beta",
    "grad_norm_ratio": "the gradient norm is {value:.0f} times its median (limit {limit:g}, warn_grad_norm_ratio). Look "
    "at the loss of this step; if it keeps jumping, another run with a lower learning_rate or max_grad_norm, or longer "
    "warmup_steps, is due",
    "repetition": "{value:.0%} of the sample generations' 4-grams are repeats (limit {limit:.0%}, warn_repetition). "
    "Look at generations.jsonl: if answers loop or don't end, lower learning_rate, and check that responses end with "
    "the template's end token",
}


class SilentRankError(UserError, RuntimeError):
    """Another process did not answer within `ddp_timeout`."""


class NonFiniteStepError(UserError, RuntimeError):
    """A logged loss or gradient norm is NaN or infinite."""


class Alarm:
    """Prints a kind's advice when its value passes `limit`, and again only after the value came back below."""

    def __init__(self, kind: str, limit: float):
        self.kind = kind
        self.limit = limit
        self.on = False

    def check(self, value: float, step: int) -> None:
        before, self.on = self.on, value > self.limit
        if self.on and not before:
            tqdm.write(f"warning, step {step}: {ADVICE[self.kind].format(value=value, limit=self.limit)}")
        elif before and not self.on:
            tqdm.write(f"step {step}: {self.kind} is back at {value:.2g} (limit {self.limit:g})")


class GenerationWatchdog(TrainerCallback):
    """Repetition in the sample generations of each evaluation; comes after the callback that writes them."""

    def __init__(self, args: PreferenceRunConfig, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.alarm = Alarm("repetition", args.warn_repetition)
        self.repetition: float | None = None  # at the last evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        self._read(args.output_dir, state.global_step)  # a resumed run goes on from its last evaluation

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._read(args.output_dir, state.global_step)
            if self.repetition is not None:
                self.alarm.check(self.repetition, state.global_step)

    def _read(self, output_dir: str, step: int) -> None:
        lines = [line for line in read_generations(output_dir) if line["step"] <= step]
        last = [line["answer"] for line in lines if line["step"] == lines[-1]["step"]]
        answers = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in last]
        self.repetition = repeated_share(answers) if answers else None


class StepWatchdog(TrainerCallback):
    """Adds `watchdog/*` to the metrics of every training line; comes before the trackers, which log what it adds.

    What it remembers is in the metrics file, so a resumed run goes on as an undisturbed one.
    """

    def __init__(self, args: PreferenceRunConfig, generations: GenerationWatchdog):
        self.generations = generations
        self.drop_alarm = Alarm("chosen_logp_drop", args.warn_chosen_logp_drop)
        self.norm_alarm = Alarm("grad_norm_ratio", args.warn_grad_norm_ratio)
        self.start: float | None = None  # chosen log-probability per token in the run's first line
        self.norms: deque[float] | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not {"common/chosen_avg_logp", "grad_norm"} <= logs.keys():
            return
        if self.norms is None:
            self._recall(args.output_dir)
        if self.start is None:
            self.start = logs["common/chosen_avg_logp"]
        found = {"chosen_logp_drop": self.start - logs["common/chosen_avg_logp"]}
        self.drop_alarm.check(found["chosen_logp_drop"], state.global_step)
        if len(self.norms) >= SETTLED and (median := statistics.median(self.norms)) > 0:
            found["grad_norm_ratio"] = logs["grad_norm"] / median
            self.norm_alarm.check(found["grad_norm_ratio"], state.global_step)
        self.norms.append(logs["grad_norm"])
        if self.generations.repetition is not None:
            found["repetition"] = self.generations.repetition
        logs.update({f"watchdog/{name}": value for name, value in found.items()})

    def _recall(self, output_dir: str) -> None:
        lines = [line for line in read_metrics(output_dir) if "grad_norm" in line]
        self.norms = deque((line["grad_norm"] for line in lines), HISTORY)
        self.start = lines[0]["common/chosen_avg_logp"] if lines else None


class FiniteWatchdog(TrainerCallback):
    """Stops a run whose loss or gradient norm is NaN or infinite, before the step can be saved."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = ("loss",) if args.fp16 else ("loss", "grad_norm")  # float16's loss scaling skips steps that overflow
        found = {name: logs[name] for name in names if not math.isfinite(logs.get(name, 0.0))}
        if found:
            raise NonFiniteStepError(
                f"step {state.global_step}: {', '.join(f'{name} is {value}' for name, value in found.items())}. The last "
                "checkpoint is from before. Lower learning_rate or max_grad_norm, or look for a broken row among those "
                "since the last log line, and train into another output_dir"
            )


class SilenceWatchdog(TrainerCallback):
    """When no step ends for a third of `ddp_timeout`, each process says where it waits; then the timeout ends the run."""

    def __init__(self):
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.last = 0.0, 0  # when something came, after which step

    def on_train_begin(self, args, state, control, **kwargs):
        self._heard(args, state, control)
        self.thread = threading.Thread(target=self._watch, args=(args.ddp_timeout * SILENCE, args), daemon=True)
        self.thread.start()

    def _heard(self, args, state, control, **kwargs):
        self.last = time.monotonic(), state.global_step

    on_step_end = on_prediction_step = on_evaluate = on_save = _heard

    def on_train_end(self, args, state, control, **kwargs):
        self.end()

    def end(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def _watch(self, limit: float, args) -> None:
        told = None
        while not self.ended.wait(min(1.0, limit / 4)):
            moment, step = self.last
            if time.monotonic() - moment > limit and told != moment:
                told = moment
                self._tell(limit, args, step)

    def _tell(self, limit: float, args, step: int) -> None:
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        print(
            f"warning, rank {args.process_index} of {args.world_size}: nothing has come after step {step} for "
            f"{limit:.0f} s. Processes that wait in a collective (all_reduce, all_gather, barrier, ...) wait for one that "
            f"doesn't: compare their stacks, and look for a process that is gone (its log, nvidia-smi, dmesg). The run "
            f"ends after ddp_timeout: {args.ddp_timeout} s. This process is in:\n{''.join(stack[-4:])}",
            file=sys.stderr,
            flush=True,
        )


def repeated_share(sequences: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """Share of n-grams that occurred before in the same sequence, over all n-grams; 0 where there is none."""
    total = repeated = 0
    for ids in sequences:
        ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / total if total else 0.0


@contextlib.contextmanager
def explained_silence(timeout: float) -> Iterator[None]:
    """Turn a collective's timeout, or a connection that another process closed, into a SilentRankError."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("Timed out", "timed out", "Timeout", "Connection closed by peer")):
            raise
        raise SilentRankError(
            f"another process did not answer: {str(error).strip().splitlines()[0]}. Look at the logs of the other "
            "processes for the first error (memory of GPU or machine full, a node gone). If a step may take longer than "
            f"{timeout:g} s, raise ddp_timeout. The same command goes on from the last checkpoint."
        ) from error

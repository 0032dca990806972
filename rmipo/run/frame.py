"""What every training run has around it: the checks before it, where it goes on from, its folder and record, how it ends."""

import contextlib
import datetime
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import ModelConfig

from rmipo.data.chat import freeze_date
from rmipo.errors import CheckpointError, ConfigError, UserError
from rmipo.files import LOCK_FILE, TEMPORARY, locked
from rmipo.fingerprints import has_weights, model_fingerprint
from rmipo.objectives import build_objective
from rmipo.plan.preflight import check_run
from rmipo.recipe.load import Recipe
from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.record import differences, new_record, recorded_run, run_identity, write_record
from rmipo.run import export
from rmipo.run.callbacks import (
    EXIT_STOPPED,
    FiniteWatchdog,
    Recorder,
    SilenceWatchdog,
    StopOnSignal,
    close_wandb,
    open_wandb,
    set_callbacks,
)
from rmipo.training.checkpoints import MARKER, complete_checkpoints, delete, marked, numbered_checkpoints
from rmipo.training.distributed import on_main_process
from rmipo.training.metrics import check_logged, evaluation_metrics


@contextlib.contextmanager
def training_run(
    recipe: Recipe, args: TrainingArguments, model_config: ModelConfig, keep: bool = True
) -> Iterator["TrainingRun"]:
    """Check that the run can work, lock its folder, seed; afterwards end what it started, in order.

    `args` and `model_config` are what `recipe.parse` returns. `keep`: False for a run that leaves nothing but its
    measurements: no lock, record, checkpoint or export.

    Raises UserError: what can't work, before a model is loaded; a full disk, a loss that isn't finite.
    """
    run = TrainingRun(recipe, args, model_config)
    for notice in recipe.notices:
        run.say(notice)
    with contextlib.ExitStack() as stack:
        if args.deepspeed_plugin is not None:  # args.deepspeed is None where accelerate launch has the configuration
            import deepspeed  # seconds, and only sharded runs need it

            deepspeed.init_distributed()  # transformers leaves that out on CPUs, and models are sharded as they load
        if keep:
            check_run(recipe, args)
            check_best_metric(args)
            on_main_process(lambda: stack.enter_context(locked(run.folder)))
            stack.enter_context(run.stop)
        # With the kind of an error, so that W&B shows the run as failed.
        stack.push(lambda kind, *_: close_wandb(kind))
        stack.callback(run.silence.on_train_end)
        # New adapters and dropout are drawn from here on.
        set_seed(args.seed)
        yield run


def check_best_metric(args: TrainingArguments) -> None:
    """Raises ConfigError where preference training would not log `metric_for_best_model` at its first evaluation."""
    if args.metric_for_best_model is not None and isinstance(args, PreferenceRunConfig):
        try:
            check_logged(args.metric_for_best_model, evaluation_metrics(build_objective(args.objective)))
        except ValueError as error:
            raise ConfigError(f"metric_for_best_model: {error}") from error


class TrainingRun:
    """One start of a run. Made by `training_run`.

    Attributes:
        checkpoint: what this start goes on from; None at the beginning. Known after `start`.
        record: run.json; None until `start`, and for runs that are not kept.
    """

    def __init__(self, recipe: Recipe, args: TrainingArguments, model_config: ModelConfig):
        self.recipe, self.args, self.model_config = recipe, args, model_config
        self.folder = Path(args.output_dir)
        self.state = PartialState()
        self.say = self.state.print
        self.stop, self.silence = StopOnSignal(), SilenceWatchdog()
        self.checkpoint: str | None = None
        self.record: dict | None = None
        self.date: str | None = None

    def freeze_date(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the day of the run's first start in place of the clock that a chat template reads.

        The tokenizer is saved so: the run's prompts are the same on every later day, in a resume and in an evaluation.
        """
        self.date = on_main_process(lambda: (recorded_run(self.folder) or {}).get("date", str(datetime.date.today())))
        if freeze_date(tokenizer, datetime.date.fromisoformat(self.date)):
            self.say(f"the chat template reads the clock: it says {self.date} from now on, and is saved so")

    def start(self, fingerprints: dict[str, str], **facts) -> None:
        """Find where to go on from, and open what records the run. Ends the program if the run is finished.

        `fingerprints`: of all that decides the training rows. `facts`: what run.json says besides.

        Raises CheckpointError: the folder holds another run, or something else.
        """
        model = self.model_config
        initial = on_main_process(lambda: model_fingerprint(model.model_name_or_path, model.model_revision))
        identity = run_identity(self.recipe.resolved(), fingerprints | {"model": initial}, self.args.world_size)
        self.checkpoint = on_main_process(lambda: resume_point(self.folder, identity))
        if on_main_process(lambda: (recorded_run(self.folder) or {}).get("finished") and has_weights(self.folder)):
            self.say(f"{self.folder} holds this run, already finished. To train it again, name another --output_dir")
            if self.args.push_to_hub and self.state.is_main_process:
                self.say(f"uploaded: {export.push(self.args)}")
            sys.exit()
        self.began = time.time()
        self.record = new_record(self.folder, identity, date=self.date, **facts)
        if "wandb" in self.args.report_to:
            on_main_process(lambda: open_wandb(self.args.run_name, self.record["wandb_run_id"]))
        self.say(f"resuming from {self.checkpoint}" if self.checkpoint else f"starting in {self.folder}")

    def train(self, trainer: Trainer, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Train to the end, or to the checkpoint that a signal asks for: then the program ends with EXIT_STOPPED."""
        kept = []
        if self.record is not None:
            trainer.marks |= {key: self.record[key] for key in ("recipe", "fingerprints", "world_size")}
            kept = [self.stop, Recorder()]
        # Once, where an undisturbed run has it.
        trainer.args.eval_on_start &= self.checkpoint is None and trainer.args.eval_strategy != "no"
        trainer.args.logging_nan_inf_filter = False  # it would log an average in place of a NaN
        set_callbacks(trainer, [FiniteWatchdog(), self.silence, *callbacks, *kept])
        with explained_full_disk(self.folder):
            if self.record is not None and self.state.is_main_process:
                delete_torn(self.folder)
                write_record(self.folder, self.record)
            trainer.train(resume_from_checkpoint=self.checkpoint)
        if self.stop.stopped:
            step = trainer.state.global_step
            self.say(f"stopped by a signal at step {step} and saved; the same command goes on from there")
            sys.exit(EXIT_STOPPED)

    def save(self, trainer: Trainer, **results) -> None:
        """Export the model and verify it, complete run.json, write the card, upload if asked to."""
        with explained_full_disk(self.folder):
            export.save(trainer)
            if self.state.is_main_process:
                self.record |= {"seconds": round(time.time() - self.began, 1), "results": results}
                write_record(self.folder, self.record)
                export.write_model_card(self.folder)
                # Last of what is needed: a kill before it makes the next start finish the run.
                self.record["finished"] = True
                write_record(self.folder, self.record)
                self.say(f"model: {self.folder}")
                if self.args.push_to_hub:
                    self.say(f"uploaded: {export.push(self.args)}")


FULL_BYTES = 2**20  # less is a full disk: a failed write may have left some blocks free


class FullDiskError(UserError, RuntimeError):
    """No room for a checkpoint; the message names the last good one."""


def resume_point(output_dir: str | Path, identity: dict) -> str | None:
    """The last complete checkpoint of this very run in `output_dir`; None if there is none.

    Raises CheckpointError: the folder holds another run, or something else.
    """
    output_dir = Path(output_dir)
    run, complete = recorded_run(output_dir), complete_checkpoints(output_dir)
    names = {path.name for path in output_dir.glob("*") if path.suffix != TEMPORARY}
    # Results that no run of ours wrote may lie here.
    if run is None and (foreign := sorted(names - {LOCK_FILE} - {folder.name for folder in complete})):
        found = f"{output_dir} is not empty and has no run.json of a run. Found: {', '.join(foreign[:5])}"
        raise CheckpointError(f"output_dir: {found}. Nothing is overwritten: name another --output_dir")
    if complete and identity["recipe"].get("save_only_model"):
        raise CheckpointError(
            f"{complete[-1]} holds the model alone (save_only_model: true): a run can't go on from it"
        )
    # All of them, as any may be the one that a user goes back to.
    for folder, found in [(output_dir, run)] * (run is not None) + [(folder, marked(folder)) for folder in complete]:
        if lines := differences({key: found.get(key) for key in identity}, identity):
            said = f"{folder} belongs to another run. Name another --output_dir, or remove it. Different there:"
            raise CheckpointError("\n  ".join([said, *lines]))
    return str(complete[-1]) if complete else None


def delete_torn(output_dir: Path) -> None:
    for folder in numbered_checkpoints(output_dir):
        if not (folder / MARKER).exists():
            delete(folder)
            print(f"{folder} is incomplete: deleted")


@contextlib.contextmanager
def explained_full_disk(output_dir: str | Path) -> Iterator[None]:
    """Turn whatever a full disk raises while saving into a FullDiskError that names the last good checkpoint."""
    try:
        yield
    except Exception as error:
        # torch.save says only that its writer failed, with the place in its file.
        torn = "inline_container" in str(error) and shutil.disk_usage(Path(output_dir)).free < FULL_BYTES
        if not torn and not any(text in str(error) for text in ("No space left on device", "Disk quota exceeded")):
            raise
        last = ["none", *(path.name for path in complete_checkpoints(output_dir))][-1]
        said = f"the disk of {output_dir} is full; the last good checkpoint: {last}. Free some space"
        raise FullDiskError(f"{said}: the same command goes on from there") from error

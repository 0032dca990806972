"""What two processes do together, each result written to FOLDER/rank*.pt for the tests to look at.

`launch(["tests/helpers/two_processes_worker.py", FOLDER], processes=2)`
"""

import copy
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback, TrainerControl

from rmipo.recipe.load import load_recipe
from rmipo.run import export, frame
from rmipo.run.callbacks import StopOnSignal
from rmipo.training import checkpoints
from rmipo.training.distributed import gather, gather_columns, on_main_process
from rmipo.training.metrics import NonFiniteLossError
from tests.helpers.small_models import make_model, make_pairs, make_trainer

WITH_STATISTICS = ("alpha-dpo", "beta-dpo", "epsilon-dpo")
DEALT = ("kto", "cpo", "alpha-dpo", "simpo")
PAIRS = make_pairs(13, seed=4, prompt_lengths=(1, 30))


class Exchanges(TrainerCallback):
    count = 0

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.trainer.model_wrapped.register_comm_hook(None, self.exchange)

    def exchange(self, group, bucket):
        self.count += 1
        return allreduce_hook(group, bucket)


def gradients(output: Path, max_tokens: int | None) -> tuple[dict[str, torch.Tensor], list[int], float]:
    """Gradients by parameter of one step over all pairs, the pairs in each of this process's micro-batches, the loss.

    The step is the rest of an epoch, smaller than a global batch. One SGD step with a learning rate of 1: the change of
    the weights is the gradient. Processes exchange it once.
    """
    trainer = make_trainer(
        output, PAIRS, global_batch_size=16, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        max_tokens_per_micro_batch=max_tokens,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    (step,) = trainer.get_train_dataloader().batch_sampler
    exchanges = Exchanges(trainer)
    trainer.add_callback(exchanges)
    loss = trainer.train().training_loss
    assert exchanges.count == int(trainer.args.world_size > 1), f"of {len(step)} micro-batches"
    after = trainer.model.named_parameters()
    changes = {name: before[name] - parameter.detach() for name, parameter in after}
    return changes, [batch.real for batch in step], loss


def reference_columns(output: Path, model_folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """DPO's first loss, log 2 if its reference's scores lie beside their pairs, and those scores."""
    model = make_model().from_pretrained(model_folder)
    trainer = make_trainer(
        output, PAIRS, {"name": "dpo", "beta": 1.0}, model=model, max_steps=1, reference_cache_dir=str(output / "cache")
    )
    return trainer.train().training_loss, trainer.train_dataset.scores


def running_statistics(output: Path, name: str) -> dict[str, float]:
    """The objective's state after a step of global micro-batches of four pairs."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = make_model()
    reference_model = copy.deepcopy(model) if name == "epsilon-dpo" else None
    for parameter in model.parameters():
        parameter.data *= 1.1
    trainer = make_trainer(
        output, PAIRS, {"name": name, "beta": 0.1}, model=model, ref_model=reference_model,
        global_batch_size=13, per_device_train_batch_size=4 // processes,
    )  # fmt: skip
    trainer.train_dataset.scores = {f"ref_{side}_logps": -torch.arange(13.0) for side in ("chosen", "rejected")}
    (step,) = trainer.get_train_dataloader()
    trainer.training_step(trainer.model, step)
    return {key: value.item() for key, value in trainer.objective_state.items()}


def dealt(output: Path, name: str) -> list:
    """This process's share of a step with pairs dealt by length and as they come: packed positions, loss and gradient."""
    found = []
    for regroups in ("as the objective says", "nothing"):
        trainer = make_trainer(
            output, PAIRS, {"name": name, "beta": 0.1}, model=make_model(),
            global_batch_size=13, per_device_train_batch_size=2 if name == "cpo" else 3,
        )  # fmt: skip
        if "reference" in trainer.objective.needs:
            kinds = ("ref_", "ref_mismatched_") if name == "kto" else ("ref_",)
            keys = [f"{kind}{side}_logps" for kind in kinds for side in ("chosen", "rejected")]
            trainer.train_dataset.scores = dict.fromkeys(keys, -torch.arange(13.0))
        loader = trainer.get_train_dataloader()
        if regroups == "nothing":
            loader.batch_sampler.regroups = regroups
        (step,) = loader
        loss = trainer.training_step(trainer.model, step)
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        for value in (loss, gradient):
            torch.distributed.all_reduce(value)
            value /= 2
        found.append(([micro_batch.pairs.length for micro_batch in step], loss.item(), gradient))
    return found


def bad_loss_of_one_process(output: Path) -> tuple[str, list[int]]:
    """One pair has a token without a finite embedding: what each process says, and its own rows with a bad loss."""
    model = make_model()
    model.model.embed_tokens.weight.data[60] = float("nan")
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [
        {side: [token % 60 for token in pair[side]] for side in sides} | {"row": 100 + pair["row"]} for pair in PAIRS
    ]
    pairs[12]["prompt_ids"][0] = 60  # behind the pairs of the parity check
    trainer = make_trainer(output, pairs, model=model, global_batch_size=13)
    try:
        trainer.train()
    except NonFiniteLossError as error:
        report = json.loads((output / f"non_finite_rank{trainer.args.process_index}.json").read_text())
        return str(error), [pair["row"] for pair in report["pairs"] if pair["loss"] == "nan"]
    return "trained", []


def tokens(output: Path) -> tuple[int, float]:
    """Positions with a gradient in this process's share of a step, and tokens per second over 100 seconds."""
    trainer = make_trainer(output, PAIRS, global_batch_size=13)
    (step,) = trainer.get_train_dataloader()
    trainer.training_step(trainer.model, step)
    own = trainer.window.tokens
    trainer.window.start = time.perf_counter() - 100
    line = {"loss": 1.0}
    trainer.log(line)
    return own, line["tokens_per_second"]


def stop_of_one_process(output: Path) -> list[bool]:
    args = make_trainer(output, PAIRS).args
    stop, control = StopOnSignal(), TrainerControl()
    stop.requested = args.process_index == 1
    stop.on_step_end(args, None, control)
    return [stop.stopped, control.should_save, control.should_training_stop]


def gathered() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Values of which process 0 has two and process 1 three, and columns of two micro-batches, named in another order."""
    rank = PartialState().process_index
    values = torch.arange(2 + rank, dtype=torch.float64)[:, None] / 3 + rank
    names = ["a", "b"] if rank == 0 else ["b", "a"]
    batches = [{name: torch.full((size,), rank + ord(name)) for name in names} for size in (1, 2)]
    return [gather(values), gather(values > 1)], gather_columns(batches)


def told_by_the_main_process() -> list:
    """What functions return on process 0, and the errors they raise there."""
    rank = PartialState().process_index
    found = [on_main_process(lambda: f"process {rank}")]
    for error in (OSError(f"no space for process {rank}"), ValueError(f"bad file of process {rank}")):

        def fail(error=error):
            raise error

        try:
            on_main_process(fail)
        except Exception as raised:
            found.append(repr(raised))
    return found


def marker_of_a_late_process(output: Path) -> list[bool]:
    """Whether what process 1 writes last was there when process 0 completed the checkpoint."""
    trainer = make_trainer(output, PAIRS)
    trainer.state.global_step, trainer.decisive = 3, {}
    (output / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    if trainer.args.process_index == 1:
        time.sleep(0.3)
        (output / "share").touch()
    found, write = [], checkpoints.write_atomically
    checkpoints.write_atomically = lambda path, text: found.append((output / "share").exists())
    trainer.complete_checkpoint()
    checkpoints.write_atomically = write
    return found


def start_of_both(output: Path, model_folder: Path) -> dict:
    """A start and its end where process 1 sees another folder, model and day than process 0; and who did what."""
    flags = {"model_name_or_path": model_folder, "output_dir": output, "report_to": "wandb", "use_cpu": "true"}
    flags |= {"bf16": "false", "dtype": "float32", "push_to_hub": "true", "hub_model_id": "me/a", "seed": 5}
    overrides = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    recipe = load_recipe("recipes/tiny/rmipo.yaml", overrides=overrides)
    args, _, model_config = recipe.parse()
    done = []

    def does(name, result=None):
        return lambda *arguments, **options: done.append(name) or result

    frame.set_callbacks = export.save = lambda *arguments: None
    frame.open_wandb, export.push, export.write_model_card = does("W&B"), does("upload", "URL"), does("card")
    frame.write_record = lambda folder, record: done.append("finish" if record["finished"] else "record")
    if args.process_index == 1:
        frame.resume_point, frame.model_fingerprint = (lambda *arguments: "of process 1",) * 2
        frame.recorded_run = lambda folder: {"date": "2020-02-03", "finished": True}
        frame.has_weights = lambda folder: True
    tokenizer = SimpleNamespace(chat_template=None)
    trainer = SimpleNamespace(
        args=SimpleNamespace(eval_on_start=False, eval_strategy="no"),
        train=lambda resume_from_checkpoint: None,
        marks={},
    )
    with frame.training_run(recipe, args, model_config) as run:
        run.freeze_date(tokenizer)
        run.start({"train": "a"})
        seen = [run.date, run.checkpoint, run.record["fingerprints"]]
        run.train(trainer)
        run.save(trainer)
    frame.resume_point = lambda *arguments: None
    frame.recorded_run = lambda folder: {"finished": args.process_index == 0}
    frame.has_weights = lambda folder: True
    ended = "went on"
    try:
        with frame.training_run(recipe, args, model_config) as run:
            run.start({"train": "a"})
    except SystemExit as end:
        ended = end.code
    return {"seen": seen, "done": done, "ended": ended}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {
        "gradients": gradients(folder / "gradients", 90),
        "reference": reference_columns(folder / "reference", folder / "model"),
        "statistics": {name: running_statistics(folder / name, name) for name in WITH_STATISTICS},
        "dealt": {name: dealt(folder / f"dealt-{name}", name) for name in DEALT},
        "tokens": tokens(folder / "tokens"),
        "stop": stop_of_one_process(folder / "stop"),
        "gathered": gathered(),
        "told": told_by_the_main_process(),
    }
    results["marker"] = marker_of_a_late_process(folder / "marker")
    results["bad loss"], results["bad pairs"] = bad_loss_of_one_process(folder / "bad")
    results["start"] = start_of_both(folder / "run", folder / "model")
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()

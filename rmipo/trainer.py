"""Preference training, one optimizer step at a time: batch -> scores -> objective -> metrics (paper, Algorithm 1)."""

import contextlib
import json
import time
from pathlib import Path

import psutil
import torch
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from . import attention, scoring
from .batching import MicroBatch, MicroBatchRows, StepSampler
from .config import PreferenceConfig
from .metrics import columns_of, step_metrics
from .objectives import PairScores
from .packing import PackedRow, concatenate, pack_pairs, pack_priors


OBJECTIVE_STATE = "objective_state.json"


class NonFiniteLossError(RuntimeError):
    """The loss of some pair is NaN or infinite; the message names the file with the row numbers."""


class Ranks:
    """What objectives with batch statistics need to know of the other processes."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Concatenate `values` of all ranks along dim 0, in rank order; the ranks' lengths may differ."""
        if self.world_size == 1:
            return values
        sizes = self.accelerator.gather(torch.tensor([len(values)], device=values.device)).tolist()
        padded = values.new_zeros((max(sizes), *values.shape[1:]))
        padded[: len(values)] = values
        parts = self.accelerator.gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class PreferenceTrainer(Trainer):
    """Trains a causal LM on tokenised preference pairs with any objective of `rmipo.objectives`.

    An item of the training dataloader is one optimizer step: this rank's share of the global batch, cut into packed
    micro-batches. The loss is the mean over the global batch's pairs, whatever the cut.

    Args:
        model: freshly loaded; its attention implementation is switched to `args.attention`.
        args: `PreferenceConfig`.
        objective: from `build_objective`.
        train_dataset, eval_dataset: from `data.tokenize_pairs`; with `ref_chosen_logps` and `ref_rejected_logps` where
            the objective needs a reference.
        processing_class: the tokenizer, saved with the model.
        prior_context: token ids in front of a response when log pi(y) is scored; see `ChatFormat.prior_context`.

    Raises:
        ValueError: an architecture that packed rows can't serve.
        ParityError: at start, if packed scores differ from unpacked ones.
        NonFiniteLossError: in training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PreferenceConfig,
        objective,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        prior_context: list[int] | None = None,
        callbacks: list | None = None,
    ):
        self.objective = objective
        self.objective_state = objective.init_state()
        self.prior_context = prior_context
        self.attention_kind = attention.resolve_kind(args.attention, args.device)
        attention.attach(model, self.attention_kind)
        args.gradient_accumulation_steps = 1  # micro-batches are accumulated inside `training_step`
        args.logging_nan_inf_filter = False
        super().__init__(
            model,
            args,
            data_collator=self.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.ranks = Ranks(self.accelerator)
        self.parity: float | None = None
        self._start_window()

    # ------------------------------------------------------------------ data

    def _loader(self, dataset: Dataset, *, pairs_per_item: int, micro_batch_size: int, seed: int | None) -> DataLoader:
        sampler = StepSampler(
            len(dataset),
            global_batch_size=pairs_per_item,
            micro_batch_size=micro_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=seed,
        )
        return DataLoader(
            MicroBatchRows(dataset),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_train_dataloader(self) -> DataLoader:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self._loader(
            self.train_dataset,
            pairs_per_item=self.args.global_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=seed,
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        size = self.args.per_device_eval_batch_size
        return self._loader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            pairs_per_item=size * self.args.world_size,
            micro_batch_size=size,
            seed=None,
        )

    def get_total_train_batch_size(self, args: PreferenceConfig) -> int:
        return args.global_batch_size

    def collate(self, step: list[tuple[list[dict], MicroBatch]]) -> list[dict]:
        """Pack the micro-batches of one optimizer step."""
        batches = []
        for pairs, micro_batch in step:
            batch = {
                "pairs": pack_pairs(pairs),
                "rows": [pair["row"] for pair in pairs],
                "real": micro_batch.real,
                "step_pairs": micro_batch.step_pairs,
            }
            if "prior" in self.objective.needs:
                batch["prior"] = pack_priors(pairs, self.prior_context)
            if "reference" in self.objective.needs:
                for name in ("ref_chosen_logps", "ref_rejected_logps"):
                    batch[name] = torch.tensor([pair[name] for pair in pairs], dtype=torch.float32)
            batches.append(batch)
        return batches

    # ------------------------------------------------------------------ one step

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> torch.Tensor:
        """Algorithm 1, lines 3 to 13, without the optimizer's update: gradients of the mean loss of the global batch."""
        batches = send_to_device(inputs, self.args.device)
        priors = self._score_priors(model, batches)
        model.train()
        losses = []
        for number, (batch, prior) in enumerate(zip(batches, priors, strict=True)):
            last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with self._gradient_sync(model, last), self.compute_loss_context_manager():
                pair_losses = self._pair_losses(model, batch, prior, training=True)
                # Gradients are averaged over ranks, so this sums to the mean over the step's pairs.
                loss = pair_losses.sum() * self.args.world_size / batch["step_pairs"]
                self.accelerator.backward(loss, **self._backward_kwargs)
            losses.append(pair_losses.detach())
        self._raise_if_not_finite(losses, batches)
        if self.objective_state:
            self.objective_state = self.objective.end_step(self.objective_state, self._gathered(self._step_columns))
        self._step_columns = []
        return torch.cat(losses).sum() * self.args.world_size / batches[0]["step_pairs"]

    def _pair_losses(self, model, batch: dict, prior: dict, training: bool) -> torch.Tensor:
        """Score a micro-batch, apply the objective, keep what is logged; `(real pairs,)` losses."""
        row = batch["pairs"]
        logps = scoring.token_logps(model, row, self.attention_kind, self.model.config)
        chosen, rejected = scoring.split_pairs(scoring.sum_by_sequence(logps, row))
        chosen_lengths, rejected_lengths = scoring.split_pairs(scoring.sequence_lengths(row))
        reference = {name: value for name, value in batch.items() if name.startswith("ref_")}
        scores = PairScores(chosen, rejected, chosen_lengths, rejected_lengths, **prior, **reference)
        real = batch["real"]
        if training and self.objective_state:
            counted = PairScores(**{name: value[:real] for name, value in vars(scores).items() if value is not None})
            self.objective_state = self.objective.observe(self.objective_state, counted, self.ranks)
        output = self.objective(scores, self.objective_state or None)
        self._step_columns.append({name: value[:real] for name, value in columns_of(scores, output).items()})
        self._window_columns.append(self._step_columns[-1])
        self._window_tokens += row["input_ids"].shape[1]
        return output.losses[:real]

    def _score_priors(self, model, batches: list[dict]) -> list[dict[str, torch.Tensor]]:
        """log pi(y) of every response of the step, in one forward: the weights don't change within a step."""
        if "prior" not in self.objective.needs:
            return [{} for _ in batches]
        row = concatenate([batch["prior"] for batch in batches])
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            logps = scoring.token_logps(model, row, self.attention_kind, self.model.config)
        sums = scoring.sum_by_sequence(logps, row).split([batch["prior"]["num_sequences"] for batch in batches])
        names = ("prior_chosen_logps", "prior_rejected_logps")
        return [dict(zip(names, scoring.split_pairs(part), strict=True)) for part in sums]

    def _gradient_sync(self, model, last: bool) -> contextlib.AbstractContextManager:
        if last or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    @property
    def _backward_kwargs(self) -> dict:
        # The loss is already a share of the mean, so DeepSpeed must not divide by its own accumulation steps.
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    def _raise_if_not_finite(self, losses: list[torch.Tensor], batches: list[dict]) -> None:
        # One synchronisation per optimizer step. All ranks stop together, so that none waits for another.
        finite = torch.stack([loss.isfinite().all() for loss in losses]).all()
        if self.accelerator.reduce(finite.float(), reduction="sum").item() == self.args.world_size:
            return
        bad = [
            {"row": row, "loss": str(value)}
            for batch, loss in zip(batches, losses, strict=True)
            for row, value in zip(batch["rows"], loss.tolist(), strict=True)
            if not torch.isfinite(torch.tensor(value))
        ]
        path = Path(self.args.output_dir) / f"non_finite_rank{self.args.process_index}.json"
        step = self.state.global_step + 1
        path.write_text(json.dumps({"step": step, "pairs": bad, "rows": [b["rows"] for b in batches]}, indent=1))
        raise NonFiniteLossError(
            f"the loss of step {step} is not finite; the rows of its pairs are in {path}. Look at those rows, lower "
            "learning_rate, or start from the last checkpoint."
        )

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Score the evaluation pairs with the current weights; statistics of the objective stay as they are."""
        model = self.model_wrapped
        model.eval()
        training_columns = self._step_columns, self._window_columns, self._window_tokens
        self._step_columns, self._window_columns = [], []
        for inputs in dataloader:
            batches = send_to_device(inputs, self.args.device)
            priors = self._score_priors(model, batches)
            for batch, prior in zip(batches, priors, strict=True):
                with torch.no_grad(), self.compute_loss_context_manager():
                    self._pair_losses(model, batch, prior, training=False)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        columns = self._gathered(self._step_columns)
        self._step_columns, self._window_columns, self._window_tokens = training_columns
        self.eval_columns = columns
        metrics = {"loss": columns["losses"].mean().item(), **step_metrics(columns, self.objective)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(columns["losses"]))

    # ------------------------------------------------------------------ start, logging, checkpoints

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        first_pair = self.collate([MicroBatchRows(self.train_dataset)[MicroBatch((0,), real=1, step_pairs=1)]])
        row = send_to_device(first_pair[0]["pairs"], self.args.device)
        self.model_wrapped.eval()
        with self.compute_loss_context_manager():
            self.parity = scoring.check_parity(self.model_wrapped, self.model, row, self.attention_kind)
        if resume_from_checkpoint is not None:
            saved = json.loads((Path(resume_from_checkpoint) / OBJECTIVE_STATE).read_text())
            self.objective_state = {name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()}
        self._start_window()
        return prepared

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            state = {k: v.tolist() for k, v in self.objective_state.items() if not k.startswith("batch_")}
            (folder / OBJECTIVE_STATE).write_text(json.dumps(state))
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log line to a training line."""
        if "loss" in logs and self._window_columns:
            seconds = time.perf_counter() - self._window_start
            tokens = self.ranks.gather(torch.tensor([self._window_tokens], device=self.args.device)).sum().item()
            logs |= step_metrics(self._gathered(self._window_columns), self.objective)
            logs |= {"tokens_per_second": tokens / seconds, "peak_memory_gib": _peak_memory_gib(self.args.device)}
            self._start_window()
        super().log(logs, start_time)

    def _start_window(self) -> None:
        self._step_columns: list[dict[str, torch.Tensor]] = []
        self._window_columns: list[dict[str, torch.Tensor]] = []
        self._window_tokens = 0
        self._window_start = time.perf_counter()

    def _gathered(self, columns: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Per-pair columns of all micro-batches and ranks: `{name: (pairs,)}` on the CPU."""
        names = sorted(columns[0])
        table = torch.cat([torch.stack([batch[name] for name in names], dim=1) for batch in columns])
        return dict(zip(names, self.ranks.gather(table).cpu().unbind(1), strict=True))

    def floating_point_ops(self, inputs: list[dict]) -> int:
        """Multiply-adds of matrix products: 6 per weight and token with gradients, 2 for the prior pass."""
        weights = self.model.num_parameters(exclude_embeddings=True)
        tokens = {name: sum(batch[name]["input_ids"].numel() for batch in inputs if name in batch) for name in ("pairs", "prior")}
        return weights * (6 * tokens["pairs"] + 2 * tokens["prior"])


def _peak_memory_gib(device: torch.device) -> float:
    """Largest allocation on the GPU so far; on the CPU, the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30

"""Preference training, one optimizer step at a time: batch -> scores -> objective -> metrics (paper, Algorithm 1)."""

import contextlib
import time

import torch
from accelerate.utils import DistributedType, send_to_device
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from rmipo.objectives import PairScores
from rmipo.recipe.schema import PreferenceConfig
from rmipo.training import attention, scoring
from rmipo.training.batching import HOISTED_MICRO_BATCHES, MicroBatch, MicroBatchRows, StepSampler, packed_lengths
from rmipo.training.distributed import Ranks
from rmipo.training.finite import raise_if_not_finite
from rmipo.training.metrics import columns_of, matrix_weights, peak_memory_gib, step_metrics
from rmipo.training.packing import concatenate, pack_pairs, pack_priors
from rmipo.training.reference import Reference
from rmipo.training.state import load_objective_state


class PreferenceTrainer(Trainer):
    """Trains a causal LM on tokenised preference pairs with any objective of `rmipo.objectives`.

    An item of the training dataloader is one optimizer step: this rank's share of the global batch, cut into packed
    micro-batches. The loss is the mean over the global batch's pairs, whatever the cut.

    Args:
        model: freshly loaded; its attention implementation is switched to `args.attention`.
        args: `PreferenceConfig`.
        objective: from `build_objective`.
        train_dataset, eval_dataset: from `data.tokenize_pairs`.
        processing_class: the tokenizer, saved with the model.
        prior_context: token ids in front of a response when log pi(y) is scored; see `ChatFormat.prior_context`.
        reference_model: the frozen initial policy, for objectives that need its logits; with adapters none is needed.

    Raises:
        ValueError: an architecture that packed rows can't serve.
        ParityError: at start, if packed scores differ from unpacked ones.
        NonFiniteLossError: in training.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PreferenceConfig,
        objective,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        prior_context: list[int] | None = None,
        reference_model: PreTrainedModel | None = None,
        callbacks: list | None = None,
    ):
        self.objective = objective
        self.objective_state = objective.init_state()
        self.prior_context = prior_context
        self.attention_kind = attention.resolve_kind(args.attention, args.device)
        attention.attach(model, self.attention_kind)
        mismatched = "mismatched" in objective.needs
        self.rows = {id(data): MicroBatchRows(data, mismatched) for data in (train_dataset, eval_dataset)}
        args.gradient_accumulation_steps = 1  # micro-batches are accumulated inside `training_step`
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
        self.reference = Reference(self, reference_model)
        self.matrix_weights = matrix_weights(model)
        self.parity: float | None = None
        self._start_window()

    # ------------------------------------------------------------------ data

    def _loader(
        self,
        dataset: Dataset,
        *,
        pairs_per_item: int,
        micro_batch_size: int,
        seed: int | None,
        max_tokens: int | None = None,
    ) -> DataLoader:
        sampler = StepSampler(
            len(dataset),
            global_batch_size=pairs_per_item,
            micro_batch_size=micro_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=seed,
            max_tokens=max_tokens,
            pair_tokens=() if max_tokens is None else packed_lengths(dataset),
        )
        return DataLoader(
            self.rows[id(dataset)],
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(
            self.train_dataset,
            pairs_per_item=self.args.global_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            max_tokens=self.args.max_tokens_per_micro_batch,
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
        for rows, micro_batch in step:
            batch = {"pairs": pack_pairs(rows), "rows": [row["row"] for row in rows], "micro_batch": micro_batch}
            if "prior" in self.objective.needs:
                batch["prior"] = pack_priors(rows, self.prior_context)
            if "mismatched" in self.objective.needs:
                batch["mismatched"] = pack_pairs(rows, "mismatched_chosen_ids", "mismatched_rejected_ids")
            for name in (name for name in rows[0] if name.startswith("ref_")):
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
            batches.append(batch)
        return batches

    # ------------------------------------------------------------------ one step

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> torch.Tensor:
        """Algorithm 1, lines 3 to 13, up to the optimizer's update: gradients of the global batch's mean loss."""
        batches = send_to_device(inputs, self.args.device)
        hoisted = self._score_hoisted(model, batches)
        model.train()
        losses = []
        for number, (batch, known) in enumerate(zip(batches, hoisted, strict=True)):
            last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with self._gradient_sync(model, last), self.compute_loss_context_manager():
                pair_losses = self._pair_losses(model, batch, known, training=True)
                # Gradients are averaged over ranks, so this sums to the mean over the step's pairs.
                loss = pair_losses.sum() * self.args.world_size / batch["micro_batch"].step_pairs
                self.accelerator.backward(loss, **self._backward_kwargs)
            losses.append(pair_losses.detach())
        raise_if_not_finite(losses, batches, self.ranks, self.args.output_dir, self.state.global_step + 1)
        if self.objective_state:
            columns = self.ranks.gather_columns(self._step_columns)
            self.objective_state = self.objective.end_step(self.objective_state, columns)
        self._step_columns = []
        return torch.cat(losses).sum() * self.args.world_size / batches[0]["micro_batch"].step_pairs

    def _pair_losses(self, model, batch: dict, known: dict[str, torch.Tensor], training: bool) -> torch.Tensor:
        """Score a micro-batch, apply the objective, keep what is logged; `(real pairs,)` losses."""
        row = batch["pairs"]
        scored = {**known, **{name: value for name, value in batch.items() if name.startswith("ref_")}}
        if "reference_logits" in self.objective.needs:
            logits = scoring.response_logits(model, row, self.attention_kind, self.model.config)
            logps = scoring.logits_to_logps(logits, row)
            plus, minus = scoring.perturbed_logratios(logits, self.reference.logits(row), row, self.objective.epsilon)
            scored |= {"plus_logratios": plus, "minus_logratios": minus}
        else:
            logps = scoring.token_logps(model, row, self.attention_kind, self.model.config)
        sums, lengths = scoring.sum_by_sequence(logps, row), scoring.sequence_lengths(row)
        scored["chosen_logps"], scored["rejected_logps"] = scoring.split_pairs(sums)
        scored["chosen_lengths"], scored["rejected_lengths"] = scoring.split_pairs(lengths)
        # Of a repeated pair without weight nothing is real: its gradient is zero, yet this rank ran its forward.
        scores = PairScores(**{name: value[: batch["micro_batch"].real] for name, value in scored.items()})
        if training:
            self.objective_state = self.objective.observe(
                self.objective_state, scores, self.ranks.gather, self.ranks.rank
            )
        output = self.objective(scores, self.objective_state or None)
        self._step_columns.append(columns_of(scores, output))
        self._window_columns.append(self._step_columns[-1])
        self._window_tokens += row["input_ids"].shape[1]
        return output.losses

    def _score_hoisted(self, model, batches: list[dict]) -> list[dict[str, torch.Tensor]]:
        """What needs no gradient, several micro-batches per forward: the weights don't change within a step.

        log pi(y) of every response (Algorithm 1, line 5) or, for KTO, the responses under mismatched prompts.
        """
        known: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        model.eval()
        for kind in ("prior", "mismatched"):
            for start in range(0, len(batches) if kind in batches[0] else 0, HOISTED_MICRO_BATCHES):
                group = slice(start, start + HOISTED_MICRO_BATCHES)
                rows = [batch[kind] for batch in batches[group]]
                row = concatenate(rows)
                with torch.no_grad(), self.compute_loss_context_manager():
                    logps = scoring.token_logps(model, row, self.attention_kind, self.model.config)
                sums = scoring.sum_by_sequence(logps, row).split([part["num_sequences"] for part in rows])
                for batch_known, part in zip(known[group], sums, strict=True):
                    chosen, rejected = scoring.split_pairs(part)
                    batch_known |= {f"{kind}_chosen_logps": chosen, f"{kind}_rejected_logps": rejected}
        return known

    def _gradient_sync(self, model, last: bool) -> contextlib.AbstractContextManager:
        if last or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    @property
    def _backward_kwargs(self) -> dict:
        # The loss is already a share of the mean, so DeepSpeed must not divide by its own accumulation steps.
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Score the evaluation pairs with the current weights; statistics of the objective stay as they are.

        The per-pair columns stay in `self.eval_columns`, in the dataset's order.
        """
        model = self.model_wrapped
        model.eval()
        training_window = self._step_columns, self._window_columns, self._window_tokens
        self._step_columns, self._window_columns = [], []
        for inputs in dataloader:
            batches = send_to_device(inputs, self.args.device)
            for batch, known in zip(batches, self._score_hoisted(model, batches), strict=True):
                with torch.no_grad(), self.compute_loss_context_manager():
                    self._pair_losses(model, batch, known, training=False)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        columns = self.ranks.gather_columns(self._step_columns)
        self._step_columns, self._window_columns, self._window_tokens = training_window
        self.eval_columns = columns
        metrics = {"loss": columns["losses"].mean().item(), **step_metrics(columns, self.objective)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(columns["losses"]))

    # ------------------------------------------------------------------ start, logging, checkpoints

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        first_pair = self.collate([self.rows[id(self.train_dataset)][MicroBatch((0,), real=1, step_pairs=1)]])
        row = send_to_device(first_pair[0]["pairs"], self.args.device)
        self.model_wrapped.eval()
        with self.compute_loss_context_manager():
            self.parity = scoring.check_parity(self.model_wrapped, self.model, row, self.attention_kind)
        if "reference" in self.objective.needs:
            for dataset in (self.train_dataset, self.eval_dataset):
                if dataset is not None:
                    self.reference.add_columns(dataset, resuming=resume_from_checkpoint is not None)
        if resume_from_checkpoint is not None:
            self.objective_state = load_objective_state(resume_from_checkpoint)
        self._start_window()
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log line to a training line."""
        if "loss" in logs and self._window_columns:
            seconds = time.perf_counter() - self._window_start
            tokens = self.ranks.gather(torch.tensor([self._window_tokens], device=self.args.device)).sum().item()
            logs |= step_metrics(self.ranks.gather_columns(self._window_columns), self.objective)
            logs |= {"tokens_per_second": tokens / seconds, "peak_memory_gib": peak_memory_gib(self.args.device)}
            self._start_window()
        super().log(logs, start_time)

    def _start_window(self) -> None:
        self._step_columns: list[dict[str, torch.Tensor]] = []
        self._window_columns: list[dict[str, torch.Tensor]] = []
        self._window_tokens = 0
        self._window_start = time.perf_counter()

    def floating_point_ops(self, inputs: list[dict]) -> int:
        """Of the matrix products: 6 per weight and token with gradients, 2 without."""
        tokens = {kind: sum(b[kind]["input_ids"].numel() for b in inputs if kind in b) for kind in ("pairs", "prior")}
        return self.matrix_weights * (6 * tokens["pairs"] + 2 * tokens["prior"])

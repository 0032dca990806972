"""RMiPO's training step (the paper's Algorithm 1) and what a `transformers.Trainer` needs around it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from rmipo.objectives import Objective, PairScores
from rmipo.recipe.schema import PreferenceConfig
from rmipo.training import attention, scoring
from rmipo.training.batching import (
    HOISTED_MICRO_BATCHES,
    MicroBatch,
    PackedMicroBatch,
    PairDataset,
    StepSampler,
    pack_micro_batch,
    packed_lengths,
)
from rmipo.training.distributed import Processes
from rmipo.training.finite import raise_if_not_finite
from rmipo.training.metrics import LogWindow, columns_of, num_non_embedding_parameters, peak_memory_gib, step_metrics
from rmipo.training.packing import concatenate, split_pairs
from rmipo.training.parity import MAX_PAIRS, check_parity
from rmipo.training.reference import Reference
from rmipo.training.resuming import EndsWithItsLastStep
from rmipo.training.state import load_objective_state


class PreferenceTrainer(EndsWithItsLastStep):
    """Trains a causal LM on tokenised preference pairs with any objective of `rmipo.objectives`.

    An item of the training dataloader is one optimizer step: this process's share of the global batch, cut into packed
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
        ArchitectureError: an architecture that packed pairs can't serve.
        ParityError: at start, if packed scores differ from plain ones.
        NonFiniteLossError: in training.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PreferenceConfig,
        objective: Objective,
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
        args.gradient_accumulation_steps = 1  # micro-batches are accumulated inside `training_step`
        super().__init__(
            model,
            args,
            data_collator=self.collate,
            train_dataset=PairDataset(train_dataset, mismatched),
            eval_dataset=None if eval_dataset is None else PairDataset(eval_dataset, mismatched),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if self.accelerator.is_fsdp2:
            # accelerate has FSDP2 cast what the model returns to the compute dtype: log-probs stay in float32.
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:  # None in float32
                plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        self.processes = Processes(self.accelerator)
        self.reference = Reference(self, reference_model)
        self.num_non_embedding_parameters = num_non_embedding_parameters(model)
        self.parity: float | None = None
        self.eval_columns: dict[str, torch.Tensor] | None = None  # per pair, of the last evaluation
        self.window = LogWindow()

    # ------------------------------------------------------------------ Algorithm 1
    # Line 1 is loading the model, lines 2 and 14 are the loop in `Trainer.train`, which calls `training_step`.

    def training_step(self, model, inputs: list[PackedMicroBatch], num_items_in_batch=None) -> torch.Tensor:
        """Lines 3 to 13 up to the optimizer's update: the gradient of the global batch's mean loss. Returns that loss.

        The gradients of the micro-batches add up, as each has its share of the mean.
        """
        # Line 3: a batch of preference pairs.
        micro_batches = [micro_batch.to(self.args.device) for micro_batch in inputs]
        # Line 5, without gradient: log pi(y_w), log pi(y_l).
        hoisted = self.score_without_gradient(model, micro_batches)
        model.train()
        losses, columns = [], []
        for number, (micro_batch, known) in enumerate(zip(micro_batches, hoisted, strict=True), start=1):
            last = number == len(micro_batches)
            with self._accumulation(model, last):
                # Line 5, with gradient: log pi(y_w|x), log pi(y_l|x).
                scores = self.score(model, micro_batch, known)
                processes = self.processes
                self.objective_state = self.objective.observe(
                    self.objective_state, scores, processes.gather, processes.rank
                )
                # Lines 6 to 12: delta_pmi, the reward difference, the margin gamma, the loss of each pair (Eq. 8).
                output = self.objective(scores, self.objective_state)
                # Line 13: the gradient. It is averaged over processes, so this sums to the mean over the step's pairs.
                loss = output.losses.sum() * processes.count / micro_batch.cut.step_pairs
                self.accelerator.backward(loss, **self._backward_kwargs)
            losses.append(output.losses.detach())
            columns.append(columns_of(scores, output))
            self.window.add(columns[-1], tokens=micro_batch.pairs.length)
        raise_if_not_finite(losses, micro_batches, processes, self.args.output_dir, self.state.global_step + 1)
        if self.objective_state:
            self.objective_state = self.objective.end_step(self.objective_state, processes.gather_columns(columns))
        return torch.cat(losses).sum() * processes.count / micro_batches[0].cut.step_pairs

    def score(self, model, micro_batch: PackedMicroBatch, known: dict[str, torch.Tensor]) -> PairScores:
        """Log-probabilities of both responses given their prompt, beside what is `known`: tensors over the real pairs."""
        pairs = micro_batch.pairs
        scored = micro_batch.scores | known
        if "reference_logits" in self.objective.needs:
            logits = scoring.response_logits(model, pairs, self.attention_kind, self.model.config)
            logps = pairs.sum_by_response(scoring.label_logps(logits, pairs.labels))
            plus, minus = scoring.perturbed_logratios(
                logits, self.reference.logits(pairs), pairs, self.objective.epsilon
            )
            scored |= {"plus_logratios": plus, "minus_logratios": minus}
        else:
            logps = scoring.response_logps(model, pairs, self.attention_kind, self.model.config)
        scored["chosen_logps"], scored["rejected_logps"] = split_pairs(logps)
        scored["chosen_lengths"], scored["rejected_lengths"] = split_pairs(pairs.response_lengths)
        # Of a repeated pair without weight nothing is real: its gradient is zero, yet this process ran its forward.
        return PairScores(**{name: value[: micro_batch.cut.real] for name, value in scored.items()})

    def score_without_gradient(self, model, micro_batches: list[PackedMicroBatch]) -> list[dict[str, torch.Tensor]]:
        """log pi(y) of every response or, for KTO, the responses under mismatched prompts; per micro-batch.

        Several micro-batches share a forward: the weights don't change within a step.
        """
        known: list[dict[str, torch.Tensor]] = [{} for _ in micro_batches]
        model.eval()
        for kind in ("prior", "mismatched"):
            packed = [part for micro_batch in micro_batches if (part := getattr(micro_batch, kind)) is not None]
            for start in range(0, len(packed), HOISTED_MICRO_BATCHES):
                group = packed[start : start + HOISTED_MICRO_BATCHES]
                with torch.no_grad():
                    logps = scoring.response_logps(model, concatenate(group), self.attention_kind, self.model.config)
                for scored, part in zip(known[start:], logps.split([p.num_responses for p in group]), strict=False):
                    chosen, rejected = split_pairs(part)
                    scored |= {f"{kind}_chosen_logps": chosen, f"{kind}_rejected_logps": rejected}
        return known

    @contextlib.contextmanager
    def _accumulation(self, model, last: bool) -> Iterator[None]:
        """Processes exchange gradients with the last micro-batch of a step, or with each where none keeps them whole."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        each = deepspeed or self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        with contextlib.nullcontext() if last or each else self.accelerator.no_sync(model):
            yield

    @property
    def _backward_kwargs(self) -> dict:
        # The loss is already a share of the mean, so DeepSpeed must not divide by its own accumulation steps.
        return {"scale_wrt_gas": False} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {}

    # ------------------------------------------------------------------ data

    def collate(self, step: list[tuple[list[dict], MicroBatch]]) -> list[PackedMicroBatch]:
        """Pack the micro-batches of one optimizer step."""
        return [pack_micro_batch(rows, cut, self.objective.needs, self.prior_context) for rows, cut in step]

    def get_train_dataloader(self) -> DataLoader:
        max_tokens = self.args.max_tokens_per_micro_batch
        return self._loader(
            self.train_dataset,
            global_batch_size=self.args.global_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            max_tokens=max_tokens,
            pair_tokens=() if max_tokens is None else packed_lengths(self.train_dataset.tokenized),
        )

    def get_eval_dataloader(self, eval_dataset: PairDataset | None = None) -> DataLoader:
        size = self.args.per_device_eval_batch_size
        return self._loader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            global_batch_size=size * self.args.world_size,
            micro_batch_size=size,
            seed=None,
        )

    def _loader(self, dataset: PairDataset, **cut) -> DataLoader:
        sampler = StepSampler(len(dataset), rank=self.args.process_index, world_size=self.args.world_size, **cut)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_total_train_batch_size(self, args: PreferenceConfig) -> int:
        return args.global_batch_size

    # ------------------------------------------------------------------ start, evaluation, logging

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.args.get_warmup_steps(max_steps) >= max_steps and self.is_world_process_zero():
            print(
                f"warning: all {max_steps} optimizer step(s) are warm-up, and the first has a learning rate of 0. "
                "Set warmup_steps: 0, or train on more pairs"
            )
        first = self.train_dataset.tokenized.select(range(min(MAX_PAIRS, len(self.train_dataset)))).to_list()
        if self.is_deepspeed_enabled:
            attention.register_fused_head(self.model)
        self.model_wrapped.eval()
        self.parity = check_parity(self.model_wrapped, self.model, first, self.attention_kind)
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                self.reference.add_scores(dataset, resuming=resume_from_checkpoint is not None)
        if resume_from_checkpoint is not None:
            self.objective_state = load_objective_state(resume_from_checkpoint)
        self.window = LogWindow()
        return prepared

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Score the evaluation pairs with the current weights; statistics of the objective stay as they are.

        `self.eval_columns` keeps the per-pair columns of all processes.
        """
        model = self.model_wrapped
        columns = []
        for inputs in dataloader:
            micro_batches = [micro_batch.to(self.args.device) for micro_batch in inputs]
            hoisted = self.score_without_gradient(model, micro_batches)
            for micro_batch, known in zip(micro_batches, hoisted, strict=True):
                with torch.no_grad():
                    scores = self.score(model, micro_batch, known)
                    columns.append(columns_of(scores, self.objective(scores, self.objective_state)))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.is_deepspeed_enabled:
            model.empty_partition_cache()  # ZeRO-3 prefetches beyond the last forward; saving fails on what is in flight
        self.eval_columns = self.processes.gather_columns(columns)
        losses = self.eval_columns["losses"]
        metrics = {"loss": losses.mean().item(), **step_metrics(self.eval_columns, self.objective)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(losses))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log line to a training line."""
        if "loss" in logs and self.window.columns:
            seconds = time.perf_counter() - self.window.start
            tokens = self.processes.gather(torch.tensor([self.window.tokens], device=self.args.device)).sum().item()
            logs |= step_metrics(self.processes.gather_columns(self.window.columns), self.objective)
            logs |= {"tokens_per_second": tokens / seconds, "peak_memory_gib": peak_memory_gib(self.args.device)}
            self.window = LogWindow()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[PackedMicroBatch]) -> int:
        """Of the matrix products: 6 per parameter and token with gradients, 2 without."""
        with_gradient = sum(micro_batch.pairs.length for micro_batch in inputs)
        others = [packed for micro_batch in inputs for packed in (micro_batch.prior, micro_batch.mismatched) if packed]
        return self.num_non_embedding_parameters * (6 * with_gradient + 2 * sum(packed.length for packed in others))

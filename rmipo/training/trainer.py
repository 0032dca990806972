"""RMiPO's training step (the paper's Algorithm 1) and what a `transformers.Trainer` needs around it."""

import contextlib
import copy
import dataclasses
import functools
import time
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import generate_model_card

from rmipo.errors import ConfigError
from rmipo.objectives import PRIORS, PairScores, build_objective
from rmipo.objectives.papers import PAPERS
from rmipo.recipe.schema import ModelConfig, PairConfig, RMiPOConfig
from rmipo.training import attention, batching, checkpoints, metrics, parts, scoring
from rmipo.training.batching import PackedMicroBatch, PairDataset
from rmipo.training.distributed import gather, gather_columns
from rmipo.training.loading import require_masters
from rmipo.training.packing import concatenate, split_pairs
from rmipo.training.reference import Reference
from rmipo.training.scoring import check_parity


class PreferenceTrainer(checkpoints.ResumableTrainer):
    """Trains a causal LM on preference pairs with any objective of `rmipo.objectives`.

    An item of the training dataloader is one optimizer step: this process's share of the global batch, cut into packed
    micro-batches. The loss is the mean over the global batch's pairs, whatever the cut.

    Args:
        model: a folder or hub id, TRL's `ModelConfig` (for a dtype, a revision, quantization), or a loaded model.
        args: `PreferenceConfig` or `RMiPOConfig`; the objective is theirs. The trainer works on a copy.
        train_dataset: pairs in any format that docs/DATA.md lists, or tokenised: `prompt_ids`, `chosen_ids`,
            `rejected_ids`. Under a tokenizer without a chat template texts stay plain text.
        eval_dataset: likewise; one, or a dict of several.
        processing_class: the tokenizer; that of `model` if None. It is saved with the model.
        peft_config: new adapters to train. The reference of a model with adapters is the model without them.
        ref_model: the initial policy, for epsilon-DPO, which needs its logits; a copy of `model` if None.
        prior_context: token ids in front of a response when log pi(y) is scored; None: as the objective says.

    Raises:
        ConfigError, DataError, LoadingError: before the model is loaded where it is named.
        ArchitectureError: an architecture that packed pairs can't serve.
        ParityError: at start, if packed scores differ from plain ones.
        NonFiniteLossError: in training.
    """

    def __init__(
        self,
        model: parts.Named | parts.Loaded,
        args: PairConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: PreTrainedModel | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        prior_context: list[int] | None = None,
    ):
        set_seed(args.seed)  # new adapters are random
        model = parts.source_of(model)
        self.objective = build_objective(args.objective)
        self.objective_state = self.objective.init_state()
        self.global_batch_size = args.pairs_per_step()
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1  # micro-batches are accumulated inside `training_step`

        # Token ids and prior context, before the model is loaded.
        several = isinstance(eval_dataset, dict)
        evaluated = {f"eval_{name}": rows for name, rows in eval_dataset.items()} if several else {"test": eval_dataset}
        rows = {split: given for split, given in {"train": train_dataset, **evaluated}.items() if given is not None}
        reads_prior = bool(self.objective.needs & PRIORS) and prior_context is None
        if processing_class is None and (reads_prior or not rows or not all(map(parts.is_tokenized, rows.values()))):
            processing_class = parts.tokenizer_of(model)
        self.pairs = parts.TokenizedPairs(rows, processing_class, args, model)
        self.prior_context = self.pairs.prior_context() if reads_prior else prior_context
        needs_logits = "reference_logits" in self.objective.needs
        datasets = {split: self._dataset(tokenized) for split, tokenized in self.pairs.splits.items()}
        self.datasets = [*datasets.values()]

        # Model, adapters, and a frozen copy where the reference's logits are needed.
        self.named = isinstance(model, ModelConfig)  # a model in memory may have been trained since, in this process
        self.initial_weights = parts.weights_fingerprint(model)
        policy = parts.policy(model, peft_config)
        if ref_model is not None and not needs_logits:
            raise ConfigError(f"ref_model is given, but {self.objective.name} keeps no second model. Leave it out")
        if needs_logits and ref_model is None and not isinstance(policy, PeftModel):
            ref_model = copy.deepcopy(policy) if isinstance(model, PreTrainedModel) else parts.policy(model, None)
        if self.pairs.chat is not None:
            self.pairs.chat.set_end_of_turn(policy.generation_config)
        self.attention_kind = attention.resolve_kind(args.attention, args.device)
        attention.attach(policy, self.attention_kind)
        super().__init__(
            policy,
            args,
            data_collator=list,
            train_dataset=datasets.pop("train", None),
            eval_dataset={name: datasets[f"eval_{name}"] for name in eval_dataset} if several else datasets.get("test"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.accelerator.is_fsdp2:
            # accelerate has FSDP2 cast what the model returns to the compute dtype: log-probs stay in float32.
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:  # None in float32
                plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
        self.reference = Reference(self, ref_model)
        self.parity: float | None = None
        self.eval_columns: dict[str, torch.Tensor] | None = None  # per pair, of the last evaluation
        self.window = metrics.LogWindow()

    # ------------------------------------------------------------------ Algorithm 1
    # Line 1 is loading the model, lines 2 and 14 are the loop in `Trainer.train`, which calls `training_step`.

    def training_step(self, model, inputs: list[PackedMicroBatch], num_items_in_batch=None) -> torch.Tensor:
        """Lines 3 to 13 up to the optimizer's update: the gradient of the global batch's mean loss. Returns that loss."""
        # Line 3: a batch of preference pairs.
        micro_batches = send_to_device(inputs, self.args.device)
        # Once per step: delta_pmi needs no gradient (App. B), and the weights don't change within a step.
        # Line 5, without gradient: log pi(y_w), log pi(y_l).
        hoisted = self.score_without_gradient(model, micro_batches)
        model.train()
        losses, columns, count = [], [], self.args.world_size
        for number, (micro_batch, known) in enumerate(zip(micro_batches, hoisted, strict=True), start=1):
            last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            # Gradients are exchanged with the last micro-batch, or with each where no process shall keep them whole.
            exchanged = last or self.is_deepspeed_enabled or self.accelerator.is_fsdp2
            with contextlib.nullcontext() if exchanged else self.accelerator.no_sync(model):
                # Line 5, with gradient: log pi(y_w|x), log pi(y_l|x).
                scores = self.score(model, micro_batch, known)
                self.objective_state = self.objective.observe(
                    self.objective_state, scores, gather, self.args.process_index
                )
                # Lines 6 to 12: delta_pmi, the reward difference, the margin gamma, the loss of each pair (Eq. 8).
                output = self.objective(scores, self.objective_state)
                # Line 13: the gradient. It is averaged over processes, so this sums to the mean over the step's pairs.
                loss = output.losses.sum() * count / micro_batch.cut.step_pairs
                # It is already a share of the mean: DeepSpeed must not divide by its own accumulation steps.
                deepspeed = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(loss, **deepspeed)
            losses.append(output.losses.detach())
            columns.append(metrics.columns_of(scores, output))
            self.window.columns.append(columns[-1])
            self.window.tokens += micro_batch.pairs.length
        # Before the optimizer: a NaN would be in every weight after its step.
        metrics.raise_if_not_finite(losses, micro_batches, self.args.output_dir, self.state.global_step + 1)
        if self.objective_state:
            self.objective_state = self.objective.end_step(self.objective_state, gather_columns(columns))
        return torch.cat(losses).sum() * count / micro_batches[0].cut.step_pairs

    def score(self, model, micro_batch: PackedMicroBatch, known: dict[str, torch.Tensor]) -> PairScores:
        """Log-probabilities of both responses given their prompt, beside what is `known`: tensors over the real pairs."""
        pairs = micro_batch.pairs
        scored = micro_batch.scores | known
        if "reference_logits" in self.objective.needs:
            logits = scoring.response_logits(model, pairs, self.model.config)
            logps = pairs.sum_by_response(scoring.label_logps(logits, pairs.labels))
            plus, minus = scoring.perturbed_logratios(
                logits, self.reference.logits(pairs), pairs, self.objective.epsilon
            )
            scored |= {"plus_logratios": plus, "minus_logratios": minus}
        else:
            logps = scoring.response_logps(model, pairs, self.model.config)
        scored["chosen_logps"], scored["rejected_logps"] = split_pairs(logps)
        scored["chosen_lengths"], scored["rejected_lengths"] = split_pairs(pairs.response_lengths)
        # A process with no pairs left runs a forward for ZeRO-3, on a repeated pair; `real` is then 0 and no score counts.
        return PairScores(**{name: value[: micro_batch.cut.real] for name, value in scored.items()})

    def score_without_gradient(self, model, micro_batches: list[PackedMicroBatch]) -> list[dict[str, torch.Tensor]]:
        """log pi(y) of every response or, for KTO, the responses under mismatched prompts; per micro-batch.

        Several micro-batches share a forward: the weights don't change within a step.
        """
        known: list[dict[str, torch.Tensor]] = [{} for _ in micro_batches]
        model.eval()
        for kind in ("prior", "mismatched"):
            packed = [part for micro_batch in micro_batches if (part := getattr(micro_batch, kind)) is not None]
            for start in range(0, len(packed), batching.HOISTED_MICRO_BATCHES):
                group = packed[start : start + batching.HOISTED_MICRO_BATCHES]
                with torch.no_grad():
                    logps = scoring.response_logps(model, concatenate(group), self.model.config)
                for scored, part in zip(known[start:], logps.split([p.num_responses for p in group]), strict=False):
                    chosen, rejected = split_pairs(part)
                    scored |= {f"{kind}_chosen_logps": chosen, f"{kind}_rejected_logps": rejected}
        return known

    # ------------------------------------------------------------------ data

    def _dataset(self, tokenized: Dataset) -> PairDataset:
        return PairDataset(tokenized, self.objective.needs, self.prior_context)

    def get_train_dataloader(self) -> DataLoader:
        max_tokens, several = self.args.max_tokens_per_micro_batch, self.args.world_size > 1
        return self._loader(
            self.train_dataset,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            max_tokens=max_tokens,
            pair_tokens=batching.packed_lengths(self.train_dataset.tokenized) if max_tokens or several else (),
            regroups=self.objective.regroups if several else "nothing",
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | PairDataset | None = None) -> DataLoader:
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        elif isinstance(eval_dataset, str):  # the name of one of several
            eval_dataset = self.eval_dataset[eval_dataset]
        elif not isinstance(eval_dataset, PairDataset):
            eval_dataset = self._dataset(self.pairs.add(eval_dataset, "test"))
        size = self.args.per_device_eval_batch_size
        return self._loader(
            eval_dataset, global_batch_size=size * self.args.world_size, micro_batch_size=size, seed=None
        )

    def _loader(self, dataset: PairDataset | None, **cut) -> DataLoader:
        if dataset is None:
            raise ConfigError("there are no pairs for this: give the trainer train_dataset, or eval_dataset")
        sampler = batching.StepSampler(
            len(dataset), rank=self.args.process_index, world_size=self.args.world_size, **cut
        )
        # Not prepared by accelerate: the sampler gives each process its own share already.
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def get_total_train_batch_size(self, args: PairConfig) -> int:
        # The Trainer would multiply by its own accumulation, which is 1 here.
        return self.global_batch_size

    # ------------------------------------------------------------------ start, checkpoints, evaluation, logging

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs):
        """As `Trainer.train`; True goes on from the last complete checkpoint in `output_dir`, or starts if there is none."""
        if resume_from_checkpoint and self.args.save_only_model:
            raise ConfigError("save_only_model: its checkpoints have no optimizer state to go on from")
        if resume_from_checkpoint is True:
            complete = checkpoints.complete_checkpoints(self.args.output_dir)
            resume_from_checkpoint = str(complete[-1]) if complete else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        require_masters(self.model, self.accelerator)
        # By all processes together, as one of them reads the initial weights.
        self.decisive = checkpoints.decisive(self)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # Parity first: scoring the reference takes minutes to hours, and would use the same kernels.
        self._check_parity(self.train_dataset)
        for dataset in self.datasets:
            self.reference.add_scores(dataset, resuming=resume_from_checkpoint is not None)
        if resume_from_checkpoint is not None:
            self.objective_state = checkpoints.objective_state(resume_from_checkpoint, self.decisive)
        # Loading and scoring are no part of the first line's tokens per second.
        self.window = metrics.LogWindow()
        return prepared

    def _check_parity(self, dataset: PairDataset) -> None:
        if self.is_deepspeed_enabled:
            attention.register_fused_head(self.model)
        self.model_wrapped.eval()
        self.parity = check_parity(self.model_wrapped, self.model, dataset.tokenized, self.attention_kind)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; under FSDP2 the whole model, but for checkpoints."""
        if output_dir is None or not _internal_call:
            checkpoints.gather_at_the_end(self)
        super().save_model(output_dir, _internal_call)

    def complete_checkpoint(self) -> None:
        state = {name: value.tolist() for name, value in self.objective_state.items()}
        self.marks |= {"state": state, "training": self.decisive}
        super().complete_checkpoint()

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Score the evaluation pairs with the current weights; statistics of the objective stay as they are.

        `self.eval_columns` keeps the per-pair columns of all processes.
        """
        # What training does before its first step, where an evaluation comes first.
        if not self.accelerator._models:
            if self.is_deepspeed_enabled:
                deepspeed_init(self, num_training_steps=0, inference=True)
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.model_wrapped = (self.accelerator.prepare if sharded else prepare)(self.model)
        if self.parity is None:
            self._check_parity(dataloader.dataset)
        if not dataloader.dataset.scores:
            self.reference.add_scores(dataloader.dataset, resuming=self.state.global_step > 0)
        model, columns = self.model_wrapped, []
        for inputs in dataloader:
            micro_batches = send_to_device(inputs, self.args.device)
            hoisted = self.score_without_gradient(model, micro_batches)
            for micro_batch, known in zip(micro_batches, hoisted, strict=True):
                with torch.no_grad():  # and no `observe`: running statistics are those of training
                    scores = self.score(model, micro_batch, known)
                    columns.append(metrics.columns_of(scores, self.objective(scores, self.objective_state)))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.is_deepspeed_enabled:
            model.empty_partition_cache()  # ZeRO-3 prefetches beyond the last forward; saving fails on what is in flight
        self.eval_columns = gather_columns(columns)
        losses = self.eval_columns["losses"]
        means = {"loss": losses.mean().item(), **metrics.step_metrics(self.eval_columns, self.objective)}
        logged = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=logged, num_samples=len(losses))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the pairs since the last log line to a training line."""
        if "loss" in logs and self.window.columns:
            seconds = time.perf_counter() - self.window.start
            tokens = gather(torch.tensor([self.window.tokens], device=self.args.device)).sum().item()
            logs |= metrics.step_metrics(gather_columns(self.window.columns), self.objective)
            logs["tokens_per_second"] = tokens / seconds
            logs["peak_memory_gib"] = metrics.peak_memory_gib(self.args.device)
            self.window = metrics.LogWindow()  # the next line is about the pairs after this one
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[PackedMicroBatch]) -> int:
        return 0  # the Trainer would count those of another kind of batch

    def create_model_card(self, model_name=None, dataset_name=None, tags=()) -> None:
        """README.md of the output folder in TRL's form, on the main process; it names method and paper."""
        if not self.is_world_process_zero():
            return
        base, paper = self.model.config._name_or_path, PAPERS.get(self.objective.name)  # none for a loss of one's own
        card = generate_model_card(
            base_model=None if Path(base).is_dir() else base,
            model_name=model_name or Path(self.args.output_dir).name,
            hub_model_id=self.hub_model_id,
            dataset_name=dataset_name,
            tags=["rmipo", self.objective.name, *([tags] if isinstance(tags, str) else tags or ())],
            wandb_url=None,
            trackio_url=None,
            trainer_name=paper.name if paper else self.objective.name,
            trainer_citation=paper and paper.citation,
            paper_title=paper and paper.title,
            paper_id=paper and paper.arxiv,
        )
        card.save(Path(self.args.output_dir) / "README.md")


class RMiPOTrainer(PreferenceTrainer):
    """`PreferenceTrainer` of the paper's method; `args` defaults to its hyperparameters."""

    def __init__(self, model: parts.Named | parts.Loaded, args: RMiPOConfig | None = None, **kwargs):
        if args is None:
            args = RMiPOConfig(output_dir=f"{Path(parts.name_of(parts.source_of(model))).name}-RMiPO")
        if not isinstance(args, RMiPOConfig):
            raise ConfigError(f"args is {type(args).__name__}: expected RMiPOConfig; other methods: PreferenceTrainer")
        super().__init__(model, args, **kwargs)

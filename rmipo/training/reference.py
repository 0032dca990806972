"""Log-probabilities under the initial policy, scored once before the first update and cached by content.

So methods with a reference train with a single model in memory; only an objective that needs the reference's logits
keeps a second one. With adapters the initial policy is the base model without them.
"""

import contextlib
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from rmipo.errors import CheckpointError
from rmipo.files import replacing
from rmipo.fingerprints import json_fingerprint, rows_fingerprint
from rmipo.training import attention, scoring
from rmipo.training.batching import PairDataset
from rmipo.training.distributed import gather_columns, on_main_process
from rmipo.training.packing import PackedSequence, split_pairs

# What is scored beforehand: need of the objective -> part of a micro-batch, prefix of its columns in PairScores.
BEFOREHAND = {
    "reference": ("pairs", "ref_"),
    "mismatched": ("mismatched", "ref_mismatched_"),
    "initial_prior": ("prior", "prior_"),
}


class Reference:
    """The frozen initial policy of a `PreferenceTrainer`.

    `model` is a second copy of it; None where there are adapters to switch off, or where sums of log-probs are enough.
    """

    def __init__(self, trainer, model: PreTrainedModel | None = None):
        self.trainer = trainer
        self.model = model
        self.parts = dict(part for need, part in BEFOREHAND.items() if need in trainer.objective.needs)
        if model is not None:
            attention.attach(model.requires_grad_(False).eval(), trainer.attention_kind)
            if trainer.is_deepspeed_enabled:
                self.model = prepare_deepspeed(model, trainer.accelerator)
            else:
                self.model = trainer.accelerator.prepare_model(model, evaluation_mode=True)

    def logits(self, packed: PackedSequence) -> torch.Tensor:
        """The reference's logits at the response positions, `(R, vocabulary)`."""
        trainer = self.trainer
        model = trainer.model_wrapped if self.model is None else self.model
        with torch.no_grad(), self._adapters_off():
            return scoring.response_logits(model, packed, trainer.model.config)

    def add_scores(self, dataset: PairDataset, resuming: bool) -> None:
        """Give `dataset` what its objective needs of the initial policy: from the cache, or scored now.

        Raises:
            CheckpointError: the weights are no longer the initial ones, and the cache is gone.
        """
        trainer = self.trainer
        if not self.parts:
            return
        path = self.cache(dataset)
        if not on_main_process(path.exists):
            # With adapters off the base model is still the initial one; other weights have moved.
            if resuming and not isinstance(trainer.model, PeftModel):
                raise CheckpointError(
                    f"resuming {trainer.objective.name} needs the log-probabilities of the initial policy, but "
                    f"{path} is gone: restore it, or start the run again from its beginning"
                )
            scores = self._score(dataset)
            if trainer.is_world_process_zero():
                with replacing(path) as temporary:
                    save_file(scores, temporary)
        dataset.scores = on_main_process(lambda: load_file(path))

    def cache(self, dataset: PairDataset) -> Path:
        """The file of the scores of `dataset`, named after what they are: model, precision, data, columns."""
        args, model = self.trainer.args, self.trainer.model
        # Precision too: bfloat16 moves the sum over a long response by nats.
        content = [self.trainer.initial_weights, model.dtype, args.bf16, args.fp16, rows_fingerprint(dataset.tokenized)]
        content += [getattr(model.config, "quantization_config", None), *self.parts]
        if "prior" in self.parts:
            content.append(self.trainer.prior_context)
        folder = args.reference_cache_dir or Path(args.output_dir) / "reference"
        return Path(folder) / f"{json_fingerprint(content)}.safetensors"

    def _score(self, dataset: PairDataset) -> dict[str, torch.Tensor]:
        trainer, args, scored = self.trainer, self.trainer.args, []
        trainer.model_wrapped.eval()
        # Every process takes its share, as in training.
        cuts = trainer.get_eval_dataloader(dataset).batch_sampler
        description = "log-probabilities of the initial policy"
        for (cut,) in tqdm(cuts, description, disable=not trainer.is_local_process_zero()):
            batch = send_to_device(dataset.pack(cut, self.parts), args.device)
            values = {"index": torch.tensor(cut.indices, device=args.device)}
            for part, prefix in self.parts.items():
                with torch.no_grad(), self._adapters_off():
                    logps = scoring.response_logps(trainer.model_wrapped, getattr(batch, part), trainer.model.config)
                values[f"{prefix}chosen_logps"], values[f"{prefix}rejected_logps"] = split_pairs(logps)
            # The index travels in the same table, and float32 counts exactly only to 16 million.
            scored.append({name: value[: cut.real].double() for name, value in values.items()})
        columns = gather_columns(scored)
        # Processes scored every n-th pair: back in the order of the dataset.
        order = columns.pop("index").argsort()
        return {name: values[order].float() for name, values in columns.items()}

    def _adapters_off(self) -> contextlib.AbstractContextManager:
        model = self.trainer.model
        return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()

"""Reference log-probabilities, scored once before the first update and cached by content.

The reference is the initial policy, so methods with one train with a single model in memory; only an objective that
needs the reference's logits keeps a second one. With adapters the reference is the base model without them.
"""

import contextlib
import functools
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from rmipo.errors import CheckpointError
from rmipo.files import replacing
from rmipo.fingerprints import model_fingerprint, rows_fingerprint, text_fingerprint
from rmipo.training import attention, scoring
from rmipo.training.batching import PairDataset
from rmipo.training.distributed import on_main_process
from rmipo.training.packing import PackedSequence, split_pairs

PAIR_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
MISMATCHED_COLUMNS = ("ref_mismatched_chosen_logps", "ref_mismatched_rejected_logps")


class ReferenceCache:
    """Columns of reference sums for one tokenised dataset, in a file of `folder` named after their content.

    Args:
        folder: recipe key `reference_cache_dir`.
        model_key: from `model_fingerprint`.
        data_key: from `rows_fingerprint` of the tokenised dataset.
        columns: names of the columns.
    """

    def __init__(self, folder: str | Path, model_key: str, data_key: str, columns: tuple[str, ...]):
        self.columns = columns
        self.content = f"model {model_key}, data {data_key}, {' '.join(columns)}"
        self.path = Path(folder) / f"{text_fingerprint(self.content)}.safetensors"

    def load(self, num_pairs: int) -> dict[str, torch.Tensor] | None:
        """The columns, `(num_pairs,)` each; None, said aloud, where the file is not what its name promises."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                content = (file.metadata() or {}).get("content")
        except SafetensorError as error:
            print(f"reference cache {self.path} can't be read ({error}): scored anew")
            return None
        if content != self.content or any(len(values) != num_pairs for values in columns.values()):
            print(f"reference cache {self.path} holds {content}, expected {self.content}: scored anew")
            return None
        return columns

    def save(self, columns: dict[str, torch.Tensor]) -> None:
        with replacing(self.path) as temporary:
            save_file(columns, temporary, metadata={"content": self.content})


class Reference:
    """The frozen initial policy of a `PreferenceTrainer`.

    Args:
        trainer: gives the wrapped model, the data and the other processes.
        model: a second copy of the initial policy, for objectives that need its logits; None where there are adapters
            to switch off or where sums are enough.
    """

    def __init__(self, trainer, model: PreTrainedModel | None = None):
        self.trainer = trainer
        self.model = model
        if model is not None:
            attention.attach(model.requires_grad_(False).eval(), trainer.attention_kind)
            if trainer.is_deepspeed_enabled:
                self.model = prepare_deepspeed(model, trainer.accelerator)
            else:
                self.model = trainer.accelerator.prepare_model(model, evaluation_mode=True)

    @functools.cached_property
    def model_key(self) -> str:
        """Fingerprint of the initial weights, as they were loaded."""
        config = self.trainer.model.config
        assert config._name_or_path, "the reference cache needs a model that was loaded from somewhere"
        return on_main_process(lambda: model_fingerprint(config._name_or_path, getattr(config, "_commit_hash", None)))

    def logits(self, packed: PackedSequence) -> torch.Tensor:
        """The reference's logits at the response positions, `(R, vocabulary)`."""
        trainer = self.trainer
        model = trainer.model_wrapped if self.model is None else self.model
        with torch.no_grad(), self._adapters_off():
            return scoring.response_logits(model, packed, trainer.attention_kind, trainer.model.config)

    def add_scores(self, dataset: PairDataset, resuming: bool) -> None:
        """Give `dataset` what its objective needs of the initial policy: from the cache, or scored now.

        Raises:
            CheckpointError: the weights are no longer the initial ones, and the cache is gone.
        """
        trainer = self.trainer
        if "reference" not in trainer.objective.needs:
            return
        names = PAIR_COLUMNS + (MISMATCHED_COLUMNS if dataset.mismatched else ())
        keys = self.model_key, rows_fingerprint(dataset.tokenized)
        cache = ReferenceCache(trainer.args.reference_cache_dir, *keys, names)
        scores = cache.load(len(dataset))
        if scores is None:
            if resuming and not isinstance(trainer.model, PeftModel):
                raise CheckpointError(
                    f"resuming {trainer.objective.name} needs the reference log-probabilities of the initial policy, "
                    f"but {cache.path} is gone: restore it, or start the run again from its beginning"
                )
            scores = self._score(dataset, names)
            if trainer.is_world_process_zero():
                cache.save(scores)
        dataset.scores = scores

    def _score(self, dataset: PairDataset, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        trainer, scored = self.trainer, []
        trainer.model_wrapped.eval()
        loader = trainer.get_eval_dataloader(dataset)
        for inputs in tqdm(loader, "reference log-probabilities", disable=not trainer.is_local_process_zero()):
            (batch,) = (micro_batch.to(trainer.args.device) for micro_batch in inputs)
            sums = []
            for packed in (batch.pairs, batch.mismatched):
                if packed is not None:
                    with torch.no_grad(), trainer.compute_loss_context_manager(), self._adapters_off():
                        logps = scoring.response_logps(
                            trainer.model_wrapped, packed, trainer.attention_kind, trainer.model.config
                        )
                    sums += split_pairs(logps)
            index = torch.tensor(batch.cut.indices, device=trainer.args.device)
            values = {"index": index, **dict(zip(names, sums, strict=True))}
            scored.append({name: value[: batch.cut.real].double() for name, value in values.items()})
        columns = trainer.processes.gather_columns(scored)
        order = columns.pop("index").argsort()
        return {name: values[order].float() for name, values in columns.items()}

    def _adapters_off(self) -> contextlib.AbstractContextManager:
        model = self.trainer.model
        return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()

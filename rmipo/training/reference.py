"""Reference log-probabilities, scored once before the first update and cached by content.

The reference is the initial policy, so methods with one train with a single model in memory; only an objective that
needs the reference's logits keeps a second one. With adapters the reference is the base model without them.
"""

import contextlib
import hashlib
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from rmipo.data.pairs import fingerprint
from rmipo.errors import CheckpointError
from rmipo.fingerprints import model_fingerprint
from rmipo.training import attention, scoring
from rmipo.training.packing import PackedRow

PAIR_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
MISMATCHED_COLUMNS = ("ref_mismatched_chosen_logps", "ref_mismatched_rejected_logps")


def loaded_fingerprint(model: PreTrainedModel) -> str:
    """`model_fingerprint` of a model that was loaded from somewhere."""
    name = model.config._name_or_path
    assert name, "the reference cache needs a model that was loaded from somewhere"
    return model_fingerprint(name, None if Path(name).is_dir() else model.config._commit_hash)


class ReferenceCache:
    """Columns of reference sums for one tokenised dataset, in a file of `folder` named after their content.

    Args:
        folder: recipe key `reference_cache_dir`.
        model_key: from `model_fingerprint`.
        data_key: from `data.fingerprint` of the tokenised dataset.
        columns: names of the columns.
    """

    def __init__(self, folder: str | Path, model_key: str, data_key: str, columns: tuple[str, ...]):
        self.columns = columns
        self.content = f"model {model_key}, data {data_key}, {' '.join(columns)}"
        self.path = Path(folder) / f"{hashlib.sha256(self.content.encode()).hexdigest()[:24]}.safetensors"

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        save_file(columns, temporary, metadata={"content": self.content})
        temporary.replace(self.path)


class Reference:
    """The frozen policy of a `PreferenceTrainer`.

    Args:
        trainer: gives the wrapped model, the data and the other ranks.
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

    def logits(self, row: PackedRow) -> torch.Tensor:
        """The reference's logits at the response positions of a packed row, `(R, vocabulary)`."""
        trainer = self.trainer
        model = trainer.model_wrapped if self.model is None else self.model
        with torch.no_grad(), self._adapters_off():
            return scoring.response_logits(model, row, trainer.attention_kind, trainer.model.config)

    def add_columns(self, dataset: Dataset, resuming: bool) -> None:
        """Give the rows of `dataset` their reference sums: from the cache, or scored now with the initial weights.

        Raises:
            CheckpointError: the weights are no longer the initial ones, and the cache is gone.
        """
        trainer = self.trainer
        rows = trainer.rows[id(dataset)]
        names = PAIR_COLUMNS + (MISMATCHED_COLUMNS if rows.mismatched else ())
        keys = loaded_fingerprint(trainer.model), fingerprint(dataset)
        cache = ReferenceCache(trainer.args.reference_cache_dir, *keys, names)
        columns = cache.load(len(rows))
        if columns is None:
            if resuming and not isinstance(trainer.model, PeftModel):
                raise CheckpointError(
                    f"resuming {trainer.objective.name} needs the reference log-probabilities of the initial policy, "
                    f"but {cache.path} is gone: restore it, or start the run again from its beginning"
                )
            columns = self._score(dataset, names)
            if trainer.is_world_process_zero():
                cache.save(columns)
        rows.columns = columns

    def _score(self, dataset: Dataset, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        trainer, scored = self.trainer, []
        trainer.model_wrapped.eval()
        loader = trainer.get_eval_dataloader(dataset)
        for inputs in tqdm(loader, "reference log-probabilities", disable=not trainer.is_local_process_zero()):
            (batch,) = send_to_device(inputs, trainer.args.device)
            sums = []
            for kind in ("pairs", "mismatched"):
                if kind in batch:
                    with torch.no_grad(), trainer.compute_loss_context_manager(), self._adapters_off():
                        logps = scoring.token_logps(
                            trainer.model_wrapped, batch[kind], trainer.attention_kind, trainer.model.config
                        )
                    sums += scoring.split_pairs(scoring.sum_by_sequence(logps, batch[kind]))
            micro_batch = batch["micro_batch"]
            index = torch.tensor(micro_batch.indices, device=trainer.args.device)
            values = {"index": index, **dict(zip(names, sums, strict=True))}
            scored.append({name: value[: micro_batch.real].double() for name, value in values.items()})
        columns = trainer.ranks.gather_columns(scored)
        order = columns.pop("index").argsort()
        return {name: values[order].float() for name, values in columns.items()}

    def _adapters_off(self) -> contextlib.AbstractContextManager:
        model = self.trainer.model
        return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()

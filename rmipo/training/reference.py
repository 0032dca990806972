"""Log-probabilities under the initial policy, scored once before the first update and cached by content.

So methods with a reference train with a single model in memory; only an objective that needs the reference's logits
keeps a second one. With adapters the initial policy is the base model without them.
"""

import contextlib
import functools
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from rmipo.errors import CheckpointError
from rmipo.files import replacing
from rmipo.fingerprints import code_fingerprint, rows_fingerprint, text_fingerprint
from rmipo.training import attention, scoring
from rmipo.training.batching import PairDataset, StepSampler, pack_micro_batch
from rmipo.training.distributed import gather_columns, on_main_process
from rmipo.training.packing import PackedSequence, split_pairs

# What is scored beforehand: need of the objective -> part of a micro-batch, prefix of its columns in PairScores.
BEFOREHAND = {
    "reference": ("pairs", "ref_"),
    "mismatched": ("mismatched", "ref_mismatched_"),
    "initial_prior": ("prior", "prior_"),
}
SCORING = ("torch", "transformers")  # libraries that scores depend on


@functools.cache
def code_digest() -> str:
    """Of what scores: this package's code, and its libraries."""
    return code_fingerprint(Path(__file__).parent, SCORING)


def load_scores(path: Path, resuming: bool = False) -> dict[str, torch.Tensor] | None:
    """The columns in a file of `Reference.cache`, `(pairs,)` each; None, with a notice, where they are scored anew.

    The file says which code scored them: a run that begins has them scored by the code that is there, one that goes on
    keeps its own.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            code = (file.metadata() or {}).get("code")
    except SafetensorError as error:
        print(f"reference cache {path} can't be read ({error}): scored anew")
        return None
    # A resumed run keeps its scores: half of its steps were trained against them.
    if not resuming and code != code_digest():
        print(f"reference cache {path} was made by another version of this code or its libraries: scored anew")
        return None
    return columns


def save_scores(path: Path, columns: dict[str, torch.Tensor]) -> None:
    with replacing(path) as temporary:
        save_file(columns, temporary, metadata={"code": code_digest()})


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
            return scoring.response_logits(model, packed, trainer.attention_kind, trainer.model.config)

    def add_scores(self, dataset: PairDataset, resuming: bool) -> None:
        """Give `dataset` what its objective needs of the initial policy: from the cache, or scored now.

        Raises:
            CheckpointError: the weights are no longer the initial ones, and the cache is gone.
        """
        trainer = self.trainer
        if not self.parts:
            return
        path = self.cache(dataset)
        scores = on_main_process(lambda: load_scores(path, resuming))
        if scores is None:
            # With adapters off the base model is still the initial one; other weights have moved.
            if resuming and not isinstance(trainer.model, PeftModel):
                raise CheckpointError(
                    f"resuming {trainer.objective.name} needs the log-probabilities of the initial policy, but "
                    f"{path} is gone: restore it, or start the run again from its beginning"
                )
            scores = self._score(dataset)
            if trainer.is_world_process_zero():
                save_scores(path, scores)
        dataset.scores = scores

    def cache(self, dataset: PairDataset) -> Path:
        """The file of the scores of `dataset`, named after what they are: model, precision, data, columns."""
        args, model, parts = self.trainer.args, self.trainer.model, self.parts
        # Precision too: bfloat16 moves the sum over a long response by nats.
        content = f"model {self.trainer.initial_weights()} in {model.dtype}, bf16 {args.bf16}, fp16 {args.fp16}, "
        if quantization := getattr(model.config, "quantization_config", None):
            content += f"quantized by {quantization}, "
        content += f"data {rows_fingerprint(dataset.tokenized)}, {' '.join(parts)}"
        if "prior" in parts:
            content += f" after {self.trainer.prior_context}"
        folder = args.reference_cache_dir or Path(args.output_dir) / "reference"
        return Path(folder) / f"{text_fingerprint(content)}.safetensors"

    def _score(self, dataset: PairDataset) -> dict[str, torch.Tensor]:
        trainer, args, parts, scored = self.trainer, self.trainer.args, self.parts, []
        trainer.model_wrapped.eval()
        size = args.per_device_eval_batch_size
        # Every process takes its share, as in training.
        cuts = StepSampler(
            len(dataset), global_batch_size=size * args.world_size, micro_batch_size=size, rank=args.process_index,
            world_size=args.world_size, seed=None,
        )  # fmt: skip
        for (cut,) in tqdm(
            cuts, "log-probabilities of the initial policy", disable=not trainer.is_local_process_zero()
        ):
            batch = send_to_device(pack_micro_batch(*dataset[cut], parts.keys(), trainer.prior_context), args.device)
            values = {"index": torch.tensor(cut.indices, device=args.device)}
            for part, prefix in parts.items():
                with torch.no_grad(), self._adapters_off():
                    logps = scoring.response_logps(
                        trainer.model_wrapped, getattr(batch, part), trainer.attention_kind, trainer.model.config
                    )
                chosen, rejected = split_pairs(logps)
                values |= {f"{prefix}chosen_logps": chosen, f"{prefix}rejected_logps": rejected}
            # The index travels in the same table, and float32 counts exactly only to 16 million.
            scored.append({name: value[: cut.real].double() for name, value in values.items()})
        columns = gather_columns(scored)
        # Processes scored every n-th pair: back in the order of the dataset.
        order = columns.pop("index").argsort()
        return {name: values[order].float() for name, values in columns.items()}

    def _adapters_off(self) -> contextlib.AbstractContextManager:
        model = self.trainer.model
        return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()

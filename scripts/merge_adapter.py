"""Fold a trained adapter into its base model: a plain model folder that needs no PEFT.

    .venv/bin/python scripts/merge_adapter.py outputs/llama3-8b-instruct/rmipo-lora [--output FOLDER]

The base is loaded in the recipe's `dtype`, unquantized: after QLoRA the merged weights are not those that training saw,
since rounding them to 4 bits again would cost more. They are merged in float32 (4 bytes per weight of memory) and saved
in `dtype`. Before it is saved, the merged model has to give the adapter's log-probabilities. The run's run.json and
metrics.jsonl go with it.
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel

from rmipo import cli
from rmipo.fingerprints import model_fingerprint
from rmipo.recipe.load import ConfigError
from rmipo.recipe.schema import ModelConfig
from rmipo.record import recorded_run
from rmipo.training.loading import load_model, load_tokenizer

# Nats that log-probabilities of merged and adapter model may differ by in float32. It is the order of the additions
# that differs; in bfloat16 that alone makes tenths of a nat where logits are about 20, and hides a wrong merge.
TOLERANCE = 1e-3
PROBE = "The adapter and the merged model have to agree on every token of this sentence."


@torch.no_grad()
def logps(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, `(1, T, vocabulary)` float32."""
    return model(input_ids=ids).logits.float().log_softmax(-1)


def merge(folder: Path, output: Path) -> float:
    """Write the merged model of the run in `folder` to `output`; returns the largest difference of log-probabilities."""
    run = recorded_run(folder)
    if run is None or not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds no trained adapter: expected run.json and adapter_config.json")
    if output.exists():
        raise ConfigError(f"{output} exists: remove it, or name another folder with --output")
    recipe = run["recipe"]
    names = ("model_name_or_path", "model_revision", "dtype")
    base_config = ModelConfig(**{name: recipe[name] for name in names if name in recipe})
    base = load_model(base_config)  # first: where there is none, this says so
    trained_on = run["fingerprints"]["model"]
    found = model_fingerprint(base_config.model_name_or_path, base_config.model_revision)
    if found != trained_on:
        now = f"{base_config.model_name_or_path} now has fingerprint {found}"
        raise ConfigError(f"{folder}: {now}, and the adapter was trained on one with {trained_on}. Restore that model")
    dtype = base.dtype
    model = PeftModel.from_pretrained(base.float(), folder).eval()
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(folder)))
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]])
    wanted = logps(model, ids)
    merged = model.merge_and_unload()
    difference = (logps(merged, ids) - wanted).abs().max().item()
    if not difference <= TOLERANCE:
        raise ConfigError(f"{folder}: merged and adapter model differ by {difference:.1e} nats, more than {TOLERANCE}")
    merged.to(dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(folder / name, output)
    return difference


@cli.main
def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder, with adapter_config.json")
    parser.add_argument("--output", type=Path, help="default: the run's folder with -merged at its end")
    args = parser.parse_args()
    output = args.output or args.folder.with_name(f"{args.folder.name}-merged")
    print(f"model: {output} (log-probabilities differ by at most {merge(args.folder, output):.1e} from the adapter's)")

"""Fold a trained adapter into its base model: a plain model folder that needs no PEFT.

    .venv/bin/python scripts/merge_adapter.py outputs/llama3-8b-instruct/rmipo-lora [--output FOLDER]

The base is loaded in the recipe's `dtype`, unquantized: after QLoRA the merged weights are not those that training saw,
since rounding them to 4 bits again would cost more. They are merged in float32 (4 bytes per weight of memory) and saved
in `dtype`. The run's run.json goes with it; its metrics.jsonl stays, or figures of logged metrics would count the run twice.
"""

import shutil
from pathlib import Path

from peft import PeftModel

from rmipo import cli
from rmipo.fingerprints import model_fingerprint
from rmipo.recipe.load import ConfigError
from rmipo.recipe.schema import ModelConfig
from rmipo.record import RUN_FILE, recorded_run
from rmipo.training.loading import load_model, load_tokenizer


@cli.main
def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument("folder", type=Path, help="the run's folder, with adapter_config.json")
    parser.add_argument("--output", type=Path, help="default: the run's folder with -merged at its end")
    args = parser.parse_args()
    folder, output = args.folder, args.output or args.folder.with_name(f"{args.folder.name}-merged")
    run = recorded_run(folder)
    if run is None:
        raise ConfigError(f"{folder} holds no trained adapter: there is no run.json")
    if output.exists():
        raise ConfigError(f"{output} exists: remove it, or name another folder with --output")
    names = ("model_name_or_path", "model_revision", "dtype")
    config = ModelConfig(**{name: run["recipe"][name] for name in names if name in run["recipe"]})
    base = load_model(config)  # first: where there is none, this says so
    found = model_fingerprint(config.model_name_or_path, config.model_revision)
    if found != (trained_on := run["fingerprints"]["model"]):
        raise ConfigError(
            f"{folder} was trained on a model with fingerprint {trained_on}, which has changed to {found}"
        )
    dtype = base.dtype
    merged = PeftModel.from_pretrained(base.float(), folder).merge_and_unload()
    merged.to(dtype).save_pretrained(output)
    load_tokenizer(ModelConfig(model_name_or_path=str(folder))).save_pretrained(output)
    shutil.copy(folder / RUN_FILE, output)
    print(f"model: {output}")

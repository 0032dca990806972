"""RMiPO on any preference data, in the style of TRL's scripts.

Every field of `RMiPOConfig` and of TRL's `ModelConfig` is an option.

    python examples/train.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir smollm2-rmipo --learning_rate 1e-5

    accelerate launch --config_file configs/accelerate/zero3.yaml examples/train.py ...
"""

from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from rmipo import RMiPOConfig, RMiPOTrainer


def main() -> None:
    script, args, model = TrlParser((ScriptArguments, RMiPOConfig, ModelConfig)).parse_args_and_config()
    if Path(script.dataset_name).is_file():
        rows = load_dataset("json", data_files=script.dataset_name)
    else:
        rows = load_dataset(script.dataset_name, script.dataset_config)
    trainer = RMiPOTrainer(
        model=model,
        args=args,
        train_dataset=rows[script.dataset_train_split],
        eval_dataset=rows.get(script.dataset_test_split),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=True)  # the same command goes on after a kill
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()

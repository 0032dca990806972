"""Supervised fine-tuning, the stage before preference training in the Base settings. The trainer is TRL's.

    python scripts/sft.py --config recipes/tiny/sft.yaml [--learning_rate 1e-3]

`make train MODEL=... STAGE=sft` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from rmipo.config import load_recipe, parse_command_line  # noqa: E402


def main() -> None:
    ###################
    # Recipe
    ###################
    recipe = load_recipe(*parse_command_line(__doc__))
    args, data_config, model_config = recipe.parse()

    import deepspeed
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, set_seed
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    from rmipo import data, tracking

    state = PartialState()
    say = state.print
    for notice in recipe.notices:
        say(notice)
    set_seed(args.seed)
    if args.deepspeed:
        deepspeed.init_distributed()  # transformers leaves that out on CPUs, and models are sharded as they load

    ###################
    # Data
    ###################
    tokenizer = AutoTokenizer.from_pretrained(model_config.model_name_or_path, revision=model_config.model_revision)
    if data_config.chat_template is not None:
        tokenizer.chat_template = data_config.chat_template
    chat = data.ChatFormat.probe(tokenizer)
    tokenizer.eos_token_id = chat.end_id  # generation stops where the template ends a turn
    with state.main_process_first():
        datasets = {split: data.load_messages(data_config, split) for split in ("train", "test")}

    ###################
    # Model
    ###################
    model = AutoModelForCausalLM.from_pretrained(
        model_config.model_name_or_path,
        revision=model_config.model_revision,
        dtype=model_config.dtype,
        use_cache=False,
        quantization_config=get_quantization_config(model_config),
    )
    chat.set_end_of_turn(model.generation_config)

    ###################
    # Train, evaluate, save
    ###################
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=datasets["train"].select_columns(["messages"]),
        eval_dataset=datasets["test"].select_columns(["messages"]),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[tracking.MetricsFile()],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(tracking.Progress())
    run = tracking.RunRecord(args.output_dir, recipe.resolved(), world_size=args.world_size)
    if trainer.is_world_process_zero():
        run.write()
    say(f"SFT of {model_config.model_name_or_path}: {len(datasets['train'])} dialogues")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        run.finish(**metrics)
        say(f"model: {args.output_dir}")


if __name__ == "__main__":
    main()

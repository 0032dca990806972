"""Supervised fine-tuning, the stage before preference training in the Base settings. The trainer is TRL's.

    python scripts/sft.py --config recipes/tiny/sft.yaml [--learning_rate 1e-3]

`make train MODEL=... STAGE=sft` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rmipo.config import load_recipe, parse_command_line


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

    from rmipo import checkpoints, data, tracking

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

    fingerprints = {split: data.fingerprint(dataset) for split, dataset in datasets.items()}
    identity = checkpoints.run_identity(recipe.resolved(), fingerprints, args.world_size)
    checkpoint = checkpoints.resume_point(args.output_dir, identity)
    run = tracking.RunRecord(args.output_dir, identity)
    stop = checkpoints.StopOnSignal()
    say(f"resuming from {checkpoint}" if checkpoint else f"starting in {args.output_dir}")

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
        callbacks=[tracking.MetricsFile(), stop, checkpoints.Checkpoints(identity)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(tracking.Progress())
    if state.is_main_process:
        run.start()
    say(f"SFT of {model_config.model_name_or_path}: {len(datasets['train'])} dialogues")
    with checkpoints.explained_full_disk(args.output_dir):
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        say(f"stopped by a signal at step {trainer.state.global_step} and saved; the same command goes on from there")
        sys.exit(checkpoints.EXIT_STOPPED)
    metrics = trainer.evaluate()
    with checkpoints.explained_full_disk(args.output_dir):
        trainer.save_model()
    if state.is_main_process:
        run.finish(**metrics)
        say(f"model: {args.output_dir}")


if __name__ == "__main__":
    main()

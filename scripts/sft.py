"""Supervised fine-tuning, the stage before preference training in the Base settings. The trainer is TRL's.

    python scripts/sft.py --config recipes/tiny/sft.yaml [--learning_rate 1e-3]

`make train MODEL=... STAGE=sft` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

import sys

from rmipo import cli as console
from rmipo.recipe.load import load_recipe, parse_command_line


@console.program()
def main() -> None:
    ###################
    # Recipe
    ###################
    recipe = load_recipe(*parse_command_line(__doc__)).require_stage("sft")
    args, data_config, model_config = recipe.parse()

    import deepspeed
    from accelerate import PartialState
    from transformers import set_seed
    from trl import SFTTrainer, get_peft_config

    from rmipo.data import pairs as data
    from rmipo.data.chat import PROBES
    from rmipo.plan import preflight
    from rmipo.record import RunRecord
    from rmipo.run import checkpoints, export, tracking, watchdogs
    from rmipo.training.loading import initial_fingerprint, load_model, load_tokenizer

    preflight.check_run(recipe, args)
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
    tokenizer = load_tokenizer(model_config, data_config.chat_template)
    chat = data.ChatFormat.probe(tokenizer)
    tokenizer.eos_token_id = chat.end_id  # generation stops where the template ends a turn
    with state.main_process_first():
        datasets = data.load_splits(data.load_messages, data_config, evaluating=args.eval_strategy != "no")

    fingerprints = {split: data.fingerprint(dataset) for split, dataset in datasets.items()}
    fingerprints["model"] = initial_fingerprint(model_config)
    fingerprints["template"] = data.text_fingerprint(tokenizer.chat_template)  # rows are tokenised later, by TRL
    identity = checkpoints.run_identity(recipe.resolved(), fingerprints, args.world_size)
    checkpoint = checkpoints.resume_point(args.output_dir, identity)
    prompt_probe = [chat.prompt_ids(messages) for messages in PROBES]
    run = RunRecord(args.output_dir, identity, prompt_probe=prompt_probe)
    checkpoints.refuse_pickled_code()
    stop = checkpoints.StopOnSignal()
    say(f"resuming from {checkpoint}" if checkpoint else f"starting in {args.output_dir}")

    ###################
    # Model
    ###################
    model = load_model(model_config, attn_implementation=model_config.attn_implementation)
    chat.set_end_of_turn(model.generation_config)

    ###################
    # Train, evaluate, save
    ###################
    messages = {split: dataset.select_columns(["messages"]) for split, dataset in datasets.items()}
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=messages["train"],
        eval_dataset=messages.get("test"),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[tracking.MetricsFile(), stop, checkpoints.Checkpoints(identity)],
    )
    tracking.use_own_callbacks(trainer)
    watchdogs.watch_progress(trainer)
    if state.is_main_process:
        run.start()
    say(f"SFT of {model_config.model_name_or_path}: {len(datasets['train'])} dialogues")
    with checkpoints.explained_full_disk(args.output_dir), watchdogs.explained_silence(args.ddp_timeout):
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        say(f"stopped by a signal at step {trainer.state.global_step} and saved; the same command goes on from there")
        sys.exit(checkpoints.EXIT_STOPPED)
    metrics = trainer.evaluate() if "test" in datasets else {}
    with checkpoints.explained_full_disk(args.output_dir):
        export.save(trainer)
    if state.is_main_process:
        run.results(**metrics)
        export.write_model_card(args.output_dir)
        say(f"model: {args.output_dir}")
        if args.push_to_hub:
            say(f"uploaded: {export.push(trainer)}")
        run.finish()


if __name__ == "__main__":
    main()

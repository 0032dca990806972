"""Train a model on preference pairs with any method of the paper's Table 4.

    python scripts/preference.py --config recipes/tiny/rmipo.yaml [--overlay recipes/methods/dpo.yaml] [--learning_rate 2e-4]

`make train MODEL=...` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

import sys
from pathlib import Path

from rmipo import cli as console
from rmipo.recipe.load import load_recipe, parse_command_line


@console.program()
def main() -> None:
    ###################
    # Recipe
    ###################
    recipe = load_recipe(*parse_command_line(__doc__)).require_stage("preference")
    args, data_config, model_config = recipe.parse()

    # Heavy imports come after the recipe has been checked, so that its errors come at once.
    import deepspeed
    from accelerate import PartialState
    from peft import get_peft_model
    from transformers import set_seed
    from trl import get_peft_config

    from rmipo.data import pairs as data
    from rmipo.data.chat import PROBES
    from rmipo.objectives import build_objective
    from rmipo.plan import preflight
    from rmipo.record import RunRecord
    from rmipo.run import checkpoints, curves, export, tracking, watchdogs
    from rmipo.training.loading import initial_fingerprint, load_model, load_tokenizer
    from rmipo.training.trainer import PreferenceTrainer

    preflight.check_run(recipe, args)
    state = PartialState()
    say = state.print
    for notice in recipe.notices:
        say(notice)
    set_seed(args.seed)
    if args.deepspeed:
        deepspeed.init_distributed()  # transformers leaves that out on CPUs, and models are sharded as they load
    objective = build_objective(args.objective)

    ###################
    # Data
    ###################
    tokenizer = load_tokenizer(model_config, data_config.chat_template)
    chat = data.ChatFormat.probe(tokenizer, header_in_response=objective.header_in_response)
    prior_context = chat.prior_context(objective.prior_context) if "prior" in objective.needs else None

    datasets, reports = {}, {}
    with state.main_process_first():
        loaded = data.load_splits(data.load_pairs, data_config, evaluating=args.eval_strategy != "no")
        for split, pairs in loaded.items():
            datasets[split], reports[split] = data.tokenize_pairs(
                pairs,
                chat,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                max_dropped_fraction=data_config.max_dropped_fraction,
                max_truncated_fraction=data_config.max_truncated_fraction,
                num_proc=data_config.dataset_num_proc,
            )
            for line in reports[split].lines():
                say(f"{split}: {line}")

    fingerprints = {split: data.fingerprint(dataset) for split, dataset in datasets.items()}
    fingerprints["model"] = initial_fingerprint(model_config)
    identity = checkpoints.run_identity(recipe.resolved(), fingerprints, args.world_size)
    checkpoint = checkpoints.resume_point(args.output_dir, identity)
    run = RunRecord(
        args.output_dir,
        identity,
        objective=vars(objective) | {"name": objective.name},
        prompt_probe=[chat.prompt_ids(messages) for messages in PROBES],
        data={split: report.as_dict() for split, report in reports.items()},
    )
    checkpoints.refuse_pickled_code()
    stop = checkpoints.StopOnSignal()
    say(f"resuming from {checkpoint}" if checkpoint else f"starting in {args.output_dir}")

    ###################
    # Model
    ###################
    model, reference_model = load_model(model_config), None
    chat.set_end_of_turn(model.generation_config)
    if model_config.use_peft:
        model = get_peft_model(model, get_peft_config(model_config))
    elif "reference_logits" in objective.needs:
        reference_model = load_model(model_config)

    ###################
    # Train
    ###################
    trainer = PreferenceTrainer(
        model,
        args,
        objective,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("test"),
        processing_class=tokenizer,
        prior_context=prior_context,
        reference_model=reference_model,
        callbacks=[tracking.MetricsFile(), stop],
    )
    tracking.use_own_callbacks(trainer)
    if "test" in datasets:
        prompts = datasets["test"]["prompt_ids"][: args.generation_samples]
        trainer.add_callback(tracking.SampleGenerations(tokenizer, prompts, trainer, args.generation_max_new_tokens))
    watchdogs.watch(trainer, tokenizer)
    trainer.add_callback(checkpoints.Checkpoints(identity, lambda: trainer.objective_state))
    if state.is_main_process:
        run.start()
    say(f"{objective} on {model_config.model_name_or_path}: {len(datasets['train'])} pairs")
    with checkpoints.explained_full_disk(args.output_dir), watchdogs.explained_silence(args.ddp_timeout):
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        say(f"stopped by a signal at step {trainer.state.global_step} and saved; the same command goes on from there")
        sys.exit(checkpoints.EXIT_STOPPED)

    ###################
    # Evaluate and save
    ###################
    metrics = trainer.evaluate() if "test" in datasets else {}
    with checkpoints.explained_full_disk(args.output_dir):
        export.save(trainer)
    if state.is_main_process:
        say(f"curves: {curves.plot_curves(args.output_dir)}")
        if "test" in datasets and "gamma" in trainer.eval_columns and objective.name == "rmipo":
            bounds = (objective.gamma_min, objective.gamma_max)
            path = Path(args.output_dir) / "gamma.png"
            say(f"gamma: {curves.plot_gamma_histogram(trainer.eval_columns['gamma'], bounds, path)}")
        run.results(**metrics, parity=trainer.parity)
        export.write_model_card(args.output_dir)
        say(f"model: {args.output_dir}")
        if args.push_to_hub:
            say(f"uploaded: {export.push(trainer)}")
        run.finish()


if __name__ == "__main__":
    main()

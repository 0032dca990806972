"""Train a model on preference pairs with any method of the paper's Table 4.

    .venv/bin/python scripts/preference.py --config recipes/tiny/rmipo.yaml --learning_rate 2e-4

`make train MODEL=...` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

from rmipo import cli
from rmipo.recipe.load import load_recipe, parse_command_line


def main() -> None:
    recipe = load_recipe(*parse_command_line(__doc__)).require_stage("preference")
    args, data_config, model_config = recipe.parse()

    # Heavy imports come after the recipe has been checked, so that its errors come at once.
    from peft import get_peft_model
    from trl import get_peft_config

    from rmipo.data.chat import PROBES, ChatFormat
    from rmipo.data.convert import load_splits
    from rmipo.data.pairs import load_pairs, tokenize_pairs
    from rmipo.data.report import of_split
    from rmipo.fingerprints import rows_fingerprint
    from rmipo.objectives import PRIORS, build_objective
    from rmipo.run.curves import plot_run
    from rmipo.run.frame import training_run
    from rmipo.run.generations import SampleGenerations
    from rmipo.run.watchdogs import GenerationWatchdog, StepWatchdog
    from rmipo.training.loading import check_limits, load_model, load_policy, load_tokenizer
    from rmipo.training.trainer import PreferenceTrainer

    with training_run(recipe, args, model_config) as run:
        ###################
        # Data
        ###################
        objective = build_objective(args.objective)
        tokenizer = load_tokenizer(model_config, data_config.chat_template)
        check_limits(tokenizer, model_config, args.max_length)
        run.freeze_date(tokenizer)
        chat = ChatFormat.probe(tokenizer, header_in_response=objective.header_in_response)
        prior_context = chat.prior_context(objective.prior_context) if objective.needs & PRIORS else None
        datasets, reports = {}, {}
        with run.state.main_process_first():
            for split, pairs in load_splits(load_pairs, data_config, evaluating=args.eval_strategy != "no").items():
                with of_split(split):
                    datasets[split], reports[split] = tokenize_pairs(
                        pairs,
                        chat,
                        max_length=args.max_length,
                        max_prompt_length=args.max_prompt_length,
                        max_dropped_fraction=data_config.max_dropped_fraction,
                        max_truncated_fraction=data_config.max_truncated_fraction,
                        num_proc=data_config.dataset_num_proc,
                    )
                for line in reports[split].lines():
                    run.say(f"{split}: {line}")
        run.start(
            {split: rows_fingerprint(dataset) for split, dataset in datasets.items()},
            objective=vars(objective) | {"name": objective.name},
            prompt_probe=[chat.prompt_ids(messages) for messages in PROBES],
            data={split: report.as_dict() for split, report in reports.items()},
        )

        ###################
        # Model
        ###################
        model, reference_model = load_policy(model_config), None
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
        )
        generations = GenerationWatchdog(args, tokenizer)
        callbacks = [generations, StepWatchdog(args, generations)]
        if "test" in datasets:
            prompts = datasets["test"]["prompt_ids"][: args.generation_samples]
            callbacks.append(SampleGenerations(tokenizer, prompts, trainer, args.generation_max_new_tokens))
        run.say(f"{objective} on {model_config.model_name_or_path}: {len(datasets['train'])} pairs")
        run.train(trainer, callbacks, objective_state=lambda: trainer.objective_state)

        ###################
        # Evaluate and save
        ###################
        metrics = trainer.evaluate() if "test" in datasets else {}
        if run.state.is_main_process:
            for name, path in plot_run(args.output_dir, trainer).items():
                run.say(f"{name}: {path}")
        run.save(trainer, **metrics, parity=trainer.parity)


if __name__ == "__main__":
    cli.run(main)

"""Train a model on preference pairs with any method of the paper's Table 4.

    .venv/bin/python scripts/preference.py --config recipes/tiny/rmipo.yaml --learning_rate 2e-4

`make train MODEL=...` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

from rmipo import cli
from rmipo.recipe.load import recipe_of_command_line


@cli.main
def main() -> None:
    recipe = recipe_of_command_line(__doc__, "preference")
    args, data_config, model_config = recipe.parse()

    # Heavy imports come after the recipe has been checked, so that its errors come at once.
    from trl import get_peft_config

    from rmipo.data.pairs import load_pairs
    from rmipo.data.sources import load_splits
    from rmipo.run.callbacks import SampleGenerations
    from rmipo.run.export import plot_run
    from rmipo.run.frame import training_run
    from rmipo.training.loading import load_tokenizer
    from rmipo.training.parts import TokenizedPairs
    from rmipo.training.trainer import PreferenceTrainer

    with training_run(recipe, args, model_config) as run:
        # Tokenised before the model is loaded: a run that is finished, or another, is recognised by its token ids.
        tokenizer = load_tokenizer(model_config, data_config.chat_template)
        run.freeze_date(tokenizer)
        rows = load_splits(load_pairs, data_config, evaluating=args.eval_strategy != "no")
        pairs = TokenizedPairs(rows, tokenizer, args, model_config)
        run.start(pairs.fingerprints(), **pairs.facts())

        trainer = PreferenceTrainer(
            model_config,
            args,
            train_dataset=pairs.splits["train"],
            eval_dataset=pairs.splits.get("test"),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
        )
        callbacks = []
        if "test" in pairs.splits:
            prompts = pairs.splits["test"]["prompt_ids"][: args.generation_samples]
            callbacks.append(SampleGenerations(tokenizer, prompts, trainer, args.generation_max_new_tokens, run.stop))
        run.say(f"{trainer.objective} on {model_config.model_name_or_path}: {len(pairs.splits['train'])} pairs")
        run.train(trainer, callbacks)

        metrics = trainer.evaluate() if "test" in pairs.splits else {}
        if run.state.is_main_process:
            for name, path in plot_run(args.output_dir, trainer).items():
                run.say(f"{name}: {path}")
        run.save(trainer, **metrics, parity=trainer.parity)

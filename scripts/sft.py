"""Supervised fine-tuning, the stage before preference training in the Base settings. The trainer is TRL's.

    .venv/bin/python scripts/sft.py --config recipes/tiny/sft.yaml [--learning_rate 1e-3]

`make train MODEL=... STAGE=sft` prints and runs the full command, with `accelerate launch` in front where there are GPUs.
"""

from rmipo import cli
from rmipo.recipe.load import recipe_of_command_line


@cli.main
def main() -> None:
    recipe = recipe_of_command_line(__doc__, "sft")
    args, data_config, model_config = recipe.parse()

    # Heavy imports come after the recipe has been checked, so that its errors come at once.
    from peft import PeftModel
    from trl import get_peft_config

    from rmipo.data.chat import PROBES, ChatFormat
    from rmipo.data.dialogues import load_dialogues, select_dialogues
    from rmipo.data.formats import of_split
    from rmipo.data.sources import load_splits
    from rmipo.fingerprints import rows_fingerprint, text_fingerprint
    from rmipo.run.frame import training_run
    from rmipo.training.checkpoints import SupervisedTrainer
    from rmipo.training.loading import check_adapters, check_limits, load_model, load_tokenizer

    with training_run(recipe, args, model_config) as run:
        # ------------------ Data
        tokenizer = load_tokenizer(model_config, data_config.chat_template)
        check_limits(tokenizer, model_config, args.max_length)
        run.freeze_date(tokenizer)
        chat = ChatFormat.probe(tokenizer)
        tokenizer.eos_token_id = chat.end_id  # generation stops where the template ends a turn
        datasets, reports = {}, {}
        with run.state.main_process_first():
            loaded = load_splits(load_dialogues, data_config, evaluating=args.eval_strategy != "no")
            for split, dialogues in loaded.items():
                with of_split(split):
                    datasets[split], reports[split] = select_dialogues(dialogues, chat, data_config, args)
                for line in reports[split].lines():
                    run.say(f"{split}: {line}")
        if args.max_length is None:  # dialogues are whole
            longest = max(report.lengths["messages"]["max"] for report in reports.values())
            check_limits(tokenizer, model_config, longest)
        fingerprints = {split: rows_fingerprint(dataset) for split, dataset in datasets.items()}
        fingerprints["template"] = text_fingerprint(tokenizer.chat_template)  # its marks may decide the loss
        run.start(
            fingerprints,
            prompt_probe=[chat.prompt_ids(messages) for messages in PROBES],
            data={split: vars(report) for split, report in reports.items()},
        )

        # ------------------ Model
        model = load_model(model_config, attn_implementation=model_config.attn_implementation)
        chat.set_end_of_turn(model.generation_config)

        # ------------------ Train, evaluate, save
        rows = {split: dataset.remove_columns(["row", "ids"]) for split, dataset in datasets.items()}
        trainer = SupervisedTrainer(
            model,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows.get("test"),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
        )
        if isinstance(trainer.model, PeftModel):
            check_adapters(trainer.model)
        run.say(f"SFT of {model_config.model_name_or_path}: {len(datasets['train'])} dialogues")
        run.train(trainer)
        run.save(trainer, **(trainer.evaluate() if "test" in datasets else {}))

"""The trainers as people who know TRL use them: raw rows, names of models, TRL's batches, resume, evaluate, upload."""

import json
import signal
import time

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import ModelConfig

from rmipo import PreferenceConfig, PreferenceTrainer, RMiPOConfig, RMiPOTrainer
from rmipo.errors import CheckpointError, ConfigError, UserError
from rmipo.recipe import schema
from rmipo.record import environment, read_metrics
from rmipo.run.callbacks import Recorder
from tests.helpers.launched import launch
from tests.helpers.rows import assistant, user
from tests.helpers.tiny_model import write_model

WORDS = [
    (f"w{i} w{i + 1}", " ".join(f"w{(i + j) % 20}" for j in range(1 + i % 4)), " ".join(["w19"] * (1 + i % 3)))
    for i in range(12)
]
TEXTS = [dict(zip(("prompt", "chosen", "rejected"), words, strict=True)) for words in WORDS]
TURNS = [
    {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    for prompt, chosen, rejected in WORDS
]
IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in TURNS]
SAME = {
    "max_length": 64, "max_prompt_length": 32, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False,
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2,
}  # fmt: skip
DPO = {"name": "dpo", "beta": 0.5}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def adapter(modules, **options):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=modules, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return str(folder)


@pytest.fixture
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def make(model, tmp_path):
    def make(objective=None, rows=TURNS, args=(), **keywords):
        options = {"output_dir": str(tmp_path / "out")} | SAME | dict(args)
        if objective is None:
            args = RMiPOConfig(**options)
        else:
            args = PreferenceConfig(objective=objective, **options)
        keywords.setdefault("train_dataset", Dataset.from_list(rows) if isinstance(rows, list) else rows)
        return PreferenceTrainer(keywords.pop("model", model), args, **keywords)

    return make


def ids(trainer):
    rows = trainer.train_dataset.tokenized
    return [[row[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")] for row in rows]


def sums(metrics):
    return {name: value for name, value in metrics.items() if "per_second" not in name and "runtime" not in name}


def test_every_form_of_the_same_pairs_has_the_same_tokens(make, tokenizer):
    def tokens(*words):
        return tokenizer.convert_tokens_to_ids([*words])

    expected = [
        [
            tokens("<s>", "<user>", *prompt.split(), "<assistant>"),
            *(tokens(*text.split(), "</s>") for text in responses),
        ]
        for prompt, *responses in WORDS
    ]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    for rows in (TURNS, TEXTS, IMPLICIT, [dict(zip(names, row, strict=True)) for row in expected]):
        trainer = make(rows=rows)
        assert ids(trainer) == expected
    assert trainer.train_dataset.tokenized["row"] == list(range(12))


def test_without_a_template_texts_stay_texts_and_the_rest_is_refused(make, tokenizer):
    tokenizer.chat_template = None
    trainer = make(rows=TEXTS, processing_class=tokenizer)
    words = [tokenizer.convert_ids_to_tokens(part) for part in ids(trainer)[3]]
    assert words == [["w3", "w4"], [*WORDS[3][1].split(), "</s>"], [*WORDS[3][2].split(), "</s>"]]
    assert trainer.prior_context == [tokenizer.eos_token_id]  # this tokenizer begins no text with a BOS
    assert trainer.processing_class.chat_template is None  # what is saved with the model
    hh = [{"prompt": "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3\n\nAssistant:", "chosen": " w1", "rejected": " w2"}]
    tokenized = make().train_dataset.tokenized
    for rows, named in ((TURNS, "chat template"), (hh, "chat template"), (tokenized, "prior_context")):
        with pytest.raises(UserError, match=named):
            make(rows=rows, processing_class=tokenizer)
    assert make(rows=tokenized, processing_class=tokenizer, prior_context=[0]).prior_context == [0]


def test_batches_are_trls(make, model, tmp_path):
    def pairs_of_a_step(**batch):
        trainer = make(args=batch)
        return [sum(m.real for m in step) for step in trainer.get_train_dataloader().batch_sampler]

    assert pairs_of_a_step(gradient_accumulation_steps=2) == [4, 4, 4]  # and not 128
    assert pairs_of_a_step() == [2] * 6
    assert pairs_of_a_step(global_batch_size=6) == [6, 6]
    assert pairs_of_a_step(global_batch_size=8, per_device_train_batch_size=3) == [8, 4]
    with pytest.raises(ConfigError, match="global_batch_size"):
        make(args={"global_batch_size": 8, "gradient_accumulation_steps": 4})
    args = RMiPOConfig(str(tmp_path), **SAME | {"gradient_accumulation_steps": 3})
    trainer = RMiPOTrainer(model, args, train_dataset=Dataset.from_list(TURNS))
    assert trainer.global_batch_size == 6 and args.gradient_accumulation_steps == 3  # the trainer works on a copy


def test_defaults_are_the_papers(monkeypatch):
    args = RMiPOConfig("x")
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (1e-6, "cosine", 1)
    assert args.activation_checkpointing
    assert RMiPOConfig("x", gradient_checkpointing=False).activation_checkpointing is False
    assert args.objective["beta"] == 2.0 and (args.objective["gamma_min"], args.objective["gamma_max"]) == (0.3, 1.6)
    assert args.bf16 == torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.accelerator.is_available()
    assert not RMiPOConfig("x", fp16=True).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # the launcher's doesn't win over the arguments
    assert RMiPOConfig("x", bf16=False, use_cpu=True).mixed_precision == "no"
    with pytest.raises(TypeError, match="objective"):  # flat fields are all there is
        RMiPOConfig("x", objective=DPO)
    for args in (TrainingArguments("x", use_cpu=True), PreferenceConfig("x", objective={"name": "simpo"})):
        with pytest.raises(ConfigError, match=f"args is {type(args).__name__}"):
            RMiPOTrainer("no/model", args)


@pytest.mark.parametrize(("features", "name"), [({}, "X"), ({"avx512_bf16": True}, "X, bfloat16")])
def test_a_cpus_numbers_are_quoted_with_what_rounds_them(features, name, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "X", **features})
    assert RMiPOConfig(tmp_path, use_cpu=True).bf16 == bool(features)
    assert torch.cuda.is_available() or f"({name})" in environment()["hardware"][0]


@pytest.mark.parametrize(
    ("config", "options", "error"),
    [
        (RMiPOConfig, {"train_sampling_strategy": "sequential"}, ConfigError),
        (PreferenceConfig, {"objective": "simpo"}, ValueError),
        (PreferenceConfig, {"per_device_train_batch_size": 1, "objective": {"name": "kto"}}, ConfigError),
        (PreferenceConfig, {"max_tokens_per_micro_batch": 100, "objective": {"name": "kto"}}, ConfigError),
    ],
)
def test_arguments_that_can_not_be_obeyed_are_named(config, options, error):
    with pytest.raises(error, match=next(iter(options))):
        config("x", **options)


def test_the_prior_context_follows_from_the_objective(make, model, tokenizer):
    header = tokenizer.convert_tokens_to_ids(["<s>", "<assistant>"])
    assert make().prior_context == header
    assert make(args={"prior_context": "bos"}).prior_context == header[:1]
    assert make(DPO).prior_context is None
    tokenized = make().train_dataset.tokenized
    assert make(rows=tokenized).prior_context == header  # by the tokenizer beside the model
    with pytest.raises(UserError, match="processing_class"):  # and not another margin in silence
        in_memory = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(model).config)
        in_memory.config._name_or_path = ""
        make(rows=tokenized, model=in_memory)


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"objective": DPO, "ref_model": AutoModelForCausalLM}, "ref_model"),
        ({"rows": [{"prompt_ids": [0, 5], "chosen_ids": [7] * 63, "rejected_ids": [8]}]}, "65 tokens"),
        ({"rows": [{"question": "w1", "good": "w2", "bad": "w3"}]}, "chosen"),
        ({"args": {"max_length": 2048}}, "128 positions"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"peft_config": adapter(["q_proj", "v_porj"])}, "v_porj"),
        ({"peft_config": adapter(["q_proj"], modules_to_save=["v_porj"])}, "v_porj"),
    ],
)
def test_what_does_not_fit_is_named(make, keywords, named):
    with pytest.raises(UserError, match=named):
        make(**keywords)


def test_names_configurations_and_loaded_models_train_the_same_bits(make, model):
    results = []
    for given in (
        model, ModelConfig(model_name_or_path=model), AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    ):  # fmt: skip
        trainer = make(model=given, args={"max_steps": 2})
        trainer.train()
        results.append(trainer.model.state_dict())
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_the_reference_is_the_model_that_was_passed(make, model, tmp_path):
    """Also one whose weights are no longer those of its folder, under one cache. Epsilon-DPO copies it."""
    changed = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    torch.manual_seed(0)
    for parameter in changed.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for given, name in ((model, "dpo"), (changed, "dpo"), (model, "epsilon-dpo"), (changed, "epsilon-dpo")):
        cache = {"reference_cache_dir": str(tmp_path / "cache"), "max_steps": 1}
        trainer = make(DPO | {"name": name}, model=given, args=cache)
        trainer.train()
        (loss,) = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert loss == pytest.approx(0.6931472, abs=1e-5 if name == "epsilon-dpo" else 1e-6)  # log 2: no difference yet
        assert name == "dpo" or trainer.reference.model is not trainer.model


@pytest.mark.parametrize("objective", [None, DPO])
def test_an_evaluation_needs_no_training(make, objective):
    held_out = Dataset.from_list(TURNS[:5])
    alone = make(objective, train_dataset=None, eval_dataset=held_out)
    metrics = alone.evaluate()
    again = make(objective, train_dataset=None).evaluate(held_out)
    assert sums(again) == sums(metrics)
    several = make(objective, eval_dataset={"a": held_out, "train": Dataset.from_list(TURNS[5:])})
    found = several.evaluate()
    assert found["eval_a_loss"] == metrics["eval_loss"]
    assert found["eval_train_logps/chosen"] != metrics["eval_logps/chosen"]
    assert several.train_dataset is not several.eval_dataset["train"] and len(several.train_dataset) == 12
    if objective == DPO:  # whose reference of new rows is not scored with trained weights
        trainer = make(objective, args={"max_steps": 1})
        trainer.train()
        with pytest.raises(CheckpointError):
            trainer.evaluate(Dataset.from_list(TURNS[:4]))


def test_a_recipe_and_the_trainer_give_the_same_bits(model, tmp_path):
    data = tmp_path / "pairs"
    data.mkdir()
    for split, rows in (("train", TURNS), ("test", TURNS[:4])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SAME | {"num_train_epochs": 2, "eval_strategy": "epoch", "global_batch_size": 4, "seed": 3}
    objective = {"name": "alpha-dpo", "beta": 1.0}
    recipe = {"model_name_or_path": model, "dtype": "float32", "dataset_name": str(data), "objective": objective}
    recipe |= settings | {"output_dir": str(tmp_path / "recipe"), "generation_samples": 0}
    recipe |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "activation_checkpointing": True}
    (tmp_path / "setting").mkdir()
    (tmp_path / "setting/alpha-dpo.yaml").write_text(json.dumps(recipe))
    run = launch(["scripts/preference.py", "--config", str(tmp_path / "setting/alpha-dpo.yaml")])
    assert run.wait() == 0, run.output[-4000:]

    rows = load_dataset(str(data))
    args = PreferenceConfig(str(tmp_path / "api"), objective=objective, **settings)
    trainer = PreferenceTrainer(model, args, rows["train"], eval_dataset=rows["test"], callbacks=[Recorder()])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()

    def logged(name):
        hardware = ("peak", "total_flos")
        lines = [sums(line) for line in read_metrics(tmp_path / name)]
        return [{key: value for key, value in line.items() if not key.startswith(hardware)} for line in lines]

    assert logged("recipe") == logged("api") and len(logged("api")) > 6
    assert_same_weights(tmp_path / "recipe", tmp_path / "api")


def assert_same_weights(one, other):
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


PROGRAM = """
import json, sys
from datasets import Dataset
from rmipo import PreferenceConfig, PreferenceTrainer
model, output_dir, objective, options, rows = json.loads(sys.argv[1])
args = PreferenceConfig(output_dir, objective=objective, **options)
trainer = PreferenceTrainer(model, args, Dataset.from_list(rows))
trainer.train(resume_from_checkpoint=True)
trainer.save_model()
"""


def program(model, output_dir, objective, processes=1, sharding=None, **options):
    arguments = json.dumps([model, str(output_dir), objective, SAME | options, TURNS])
    more = {"DS_ACCELERATOR": "cpu"} if sharding else {}
    more |= {"ACCELERATE_USE_CPU": "true"} if sharding == "ddp" else {}
    return launch(["-c", PROGRAM, arguments], processes, sharding=sharding, **more)


def test_a_killed_program_goes_on_with_the_same_bits(model, tmp_path):
    options = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    objective = {"name": "alpha-dpo"}  # which has a state of its own
    whole = program(model, tmp_path / "whole", objective, **options)
    assert whole.wait() == 0, whole.output[-3000:]
    out = tmp_path / "killed"
    killed = program(model, out, objective, **options)
    while not (out / "checkpoint-9/complete.json").exists():
        assert killed.poll() is None, killed.output[-3000:]
        time.sleep(0.002)
    killed.send(signal.SIGKILL)
    killed.wait()
    (out / "checkpoint-99").mkdir()  # as left by a kill amid saving: without its last file
    again = program(model, out, objective, **options)
    assert again.wait() == 0, again.output[-3000:]
    assert_same_weights(out, tmp_path / "whole")
    states, histories = [], []
    for checkpoint in (out / "checkpoint-24", tmp_path / "whole/checkpoint-24"):
        states.append(json.loads((checkpoint / "complete.json").read_text()))
        lines = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        histories.append([sums(line) | {"peak_memory_gib": 0} for line in lines])
    assert states[0] == states[1] and histories[0] == histories[1]
    assert [path.name for path in sorted(out.glob("checkpoint-2*"))] == ["checkpoint-24"]  # save_total_limit


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(model, tmp_path, sharding):
    options = {"max_steps": 3, "global_batch_size": 8, "max_grad_norm": 0.0}
    runs = [program(model, tmp_path / "one", {"name": "dpo"}, **options)]
    runs += [program(model, tmp_path / "two", {"name": "dpo"}, 2, sharding, **options)]
    for run in runs:
        assert run.wait() == 0, run.output[-3000:]
    weights, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("two", "one"))
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key], atol=2e-4, rtol=0, msg=key)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_trained_in_float32_or_not_at_all(make, model, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(model, **({"dtype": dtype} if dtype else {}))
    if not dtype:
        assert make(model=loaded).model.dtype == torch.float32
        return
    with pytest.raises(UserError, match=str(dtype)):
        make(model=loaded).train()
    assert make(model=loaded, train_dataset=None, eval_dataset=Dataset.from_list(TURNS))  # nothing is trained
    assert make(model=loaded, peft_config=adapter(["q_proj"], modules_to_save=["v_proj"]))


def test_a_training_does_not_go_on_from_another_ones_checkpoint(make, tmp_path):
    write_model(tmp_path / "another", 1)
    make(args={"max_steps": 1, **SAVING}).train()
    for options, changes, named in (
        ({}, {"rows": TURNS[1:]}, "pairs"),
        ({}, {"model": str(tmp_path / "another")}, "initial model"),
        ({"beta": 3.0}, {}, "objective"),
        *(({name: value}, {}, name) for name, value in (("seed", 1), ("weight_decay", 0.5), ("max_grad_norm", 0.5))),
    ):
        with pytest.raises(CheckpointError, match=named):
            make(args={"max_steps": 1, **SAVING, **options}, **changes).train(resume_from_checkpoint=True)


def test_a_resume_has_the_steps_and_adapters_of_its_checkpoint(make, tmp_path):
    make(args={"max_steps": 2, **SAVING}).train()
    with pytest.raises(CheckpointError, match="max_steps"):
        make(args={"max_steps": 1, **SAVING}).train(resume_from_checkpoint=True)
    adapters = {alpha: adapter(["q_proj"], lora_alpha=alpha) for alpha in (8, 64)}
    out = {"max_steps": 1, **SAVING, "output_dir": str(tmp_path / "adapters")}
    make(args=out, peft_config=adapters[8]).train()
    with pytest.raises(CheckpointError, match="lora_alpha"):
        make(args=out | {"max_steps": 2}, peft_config=adapters[64]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("target", [{"modules": ["lm_head"]}, {"modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_an_adapter_of_tied_embeddings_is_refused(make, model, tokenizer, target):
    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, tie_word_embeddings=True))
    with pytest.raises(UserError, match="lm_head"):
        make(model=tied, processing_class=tokenizer, peft_config=adapter(**target))


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("on_cuda", [False, True])
def test_liger_is_the_default_on_gpus_where_it_is_installed(monkeypatch, installed, on_cuda):
    monkeypatch.setattr(schema, "is_liger_kernel_available", lambda: installed)
    for place in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(place, "is_available", lambda: on_cuda)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would look for the GPU itself
    monkeypatch.setattr(RMiPOConfig, "pairs_per_step", lambda self: 1)
    args = RMiPOConfig("x", bf16=True)
    assert args.use_liger_kernel is bool(args.liger_kernel_config) is (installed and on_cuda)


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(make):
    args = {"max_steps": 1, "save_only_model": True, **SAVING}
    make(args=args).train()
    with pytest.raises(ConfigError, match="save_only_model"):
        make(args=args | {"max_steps": 2}).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_training_does_not_cost_the_newest_one(make, tmp_path):
    for steps in (4, 2):
        make(args={"max_steps": steps, "save_total_limit": 1, **SAVING}).train()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_the_first_pair_and_the_prompts_that_training_has_too_are_printed(make, capsys):
    tokenized = make(rows=TURNS[:8], eval_dataset=Dataset.from_list([*TURNS[6:], TURNS[7]]))
    printed = capsys.readouterr().out
    assert printed.count("3 of 7 pairs of test") == 1 and printed.count(TURNS[0]["chosen"][-1]["content"]) >= 1
    make(rows=tokenized.train_dataset.tokenized, eval_dataset=tokenized.eval_dataset.tokenized)  # as scripts pass them
    assert "pairs of test" not in capsys.readouterr().out


def test_a_model_in_memory_may_have_been_trained_before_it_is_resumed(make, model):
    """As in a notebook, whose model is still the one of the training that was interrupted."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    make(model=loaded, args={"max_steps": 1, **SAVING}).train()
    again = make(model=loaded, args={"max_steps": 2, **SAVING})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2

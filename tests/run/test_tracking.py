"""What a run leaves behind: the W&B file, metrics, the run record, curves, sample answers."""

import json
import subprocess
import types

import pytest
import torch
import trl
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerState

from rmipo import record
from rmipo.files import write_lines
from rmipo.plots import plt
from rmipo.record import (
    GENERATIONS_FILE,
    append_metrics,
    environment,
    new_record,
    read_generations,
    read_metrics,
    run_identity,
    write_record,
)
from rmipo.run import callbacks
from rmipo.run.callbacks import SampleGenerations, StopOnSignal, WandbBySteps, close_wandb, open_wandb, set_callbacks
from rmipo.run.export import plot_curves
from rmipo.training import attention
from tests.helpers.rows import write
from tests.helpers.small_models import greedy, make_pairs, make_trainer
from tests.helpers.twins import changed, make_twin, run
from tests.helpers.wandb_file import read_config, read_history, read_records


def test_wandb_offline_run_holds_what_was_logged(tmp_path, monkeypatch):
    wandb.teardown()  # what an earlier test of this process read from its environment
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    pairs = make_pairs(16, seed=2)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    reports = {"report_to": ["wandb", "tensorboard"], "eval_strategy": "epoch"}
    trainer = make_trainer(tmp_path / "run", pairs, eval_pairs=pairs[:4], **reports)
    trainer.args.run_name = "first"
    tokenizer = types.SimpleNamespace(pad_token_id=0, decode=lambda ids: f"<{' '.join(map(str, list(ids)))}>")
    set_callbacks(trainer, [SampleGenerations(tokenizer, [[5, 6], [7]], trainer, 3, StopOnSignal())])
    open_wandb(trainer.args.run_name, "id-of-run")
    trainer.train()
    close_wandb(None)
    wandb.teardown()  # its process has ended then: before, the file may be incomplete
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history = read_history(file)
    lines = read_metrics(tmp_path / "run")

    assert [(row["_step"], row["train/global_step"]) for row in history] == [(1, 1), (2, 2)]
    for number, line in enumerate(line for line in lines if "loss" in line):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "rmipo/gamma_mean", "common/margin_avg_logp"):
            assert history[number][f"train/{name}"] == pytest.approx(line[name], rel=1e-6), name
    (held_out,) = (line for line in lines if "eval_loss" in line)
    assert "eval/loss" not in history[0] and history[1]["eval/loss"] == pytest.approx(held_out["eval_loss"], rel=1e-6)
    answers = [[*answer.values()] for answer in read_generations(tmp_path / "run")]
    assert [answer[:2] for answer in answers] == [[2, "<5 6>"], [2, "<7>"]] and answers[0][2].startswith("<")
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/generations_*.json")
    assert json.loads(table.read_text())["data"] == answers and history[1]["generations/nrows"] == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for number, (step, prompt, answer) in enumerate(answers):
        (event,) = events.Tensors(f"generations/{number}/text_summary")
        assert event.step == step and event.tensor_proto.string_val[0].decode().strip() == prompt + answer
    config = read_config(file)
    assert config["objective"]["gamma_max"] == 1.6 and config["global_batch_size"] == 8
    records = read_records(file)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == ("id-of-run", "huggingface", "first")
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    summary = {item.key for record in records if record.HasField("summary") for item in record.summary.update}
    assert summary >= {*WandbBySteps.SUMMARY} - {"total_flos"}  # of the whole training: no rows
    assert not {name.removeprefix("train/") for row in history for name in row} & {*WandbBySteps.SUMMARY}


def test_a_wandb_run_is_the_one_that_the_environment_names(monkeypatch):
    """W&B itself can only be asked to, offline."""
    asked = {}
    monkeypatch.setattr(wandb, "init", asked.update)
    for name, value in {"WANDB_PROJECT": "p", "WANDB_RUN_ID": "theirs", "WANDB_RESUME": "must"}.items():
        monkeypatch.setenv(name, value)
    open_wandb("n", "ours")
    assert asked == {"project": "p", "id": "theirs", "resume": "must", "name": "n"}


def test_a_wandb_run_is_sent_what_it_lost_with_a_kill(tmp_path):
    """Of a run that W&B has up to step 4: what its server would be sent."""
    for number, name in ((4, "loss"), (5, "loss"), (5, "eval_loss"), (6, "loss")):
        append_metrics(tmp_path, {"step": number, name: number})
    rows, callback = [], WandbBySteps()
    callback._initialized = True
    run = types.SimpleNamespace(step=5, summary={})
    callback._wandb = types.SimpleNamespace(run=run, log=lambda row, step: rows.append((step, [*row])))
    state = TrainerState(global_step=7, is_world_process_zero=True)
    callback.on_train_begin(types.SimpleNamespace(output_dir=str(tmp_path)), state, None)
    names = (5, "train/loss"), (5, "eval/loss"), (6, "train/loss")
    assert rows == [(number, [name, "train/global_step"]) for number, name in names]


def test_a_record_counts_starts_and_keeps_its_wandb_run(tmp_path):
    identity = run_identity({"learning_rate": 1e-6}, {"train": "abc"}, world_size=1)
    write_record(tmp_path, new_record(tmp_path, identity, data={"rows": 3}, folder=tmp_path))
    started = json.loads((tmp_path / "run.json").read_text())
    assert started.items() > {**identity, "finished": False, "data": {"rows": 3}, "folder": str(tmp_path)}.items()
    assert (started["versions"]["torch"], started["versions"]["trl"]) == (torch.__version__, trl.__version__)
    if not torch.cuda.is_available():
        assert started["hardware"] == environment()["hardware"]
    again = new_record(tmp_path, identity)
    assert again["starts"] == 2 and again["wandb_run_id"] == started["wandb_run_id"]
    assert new_record(tmp_path / "other", identity)["wandb_run_id"] != started["wandb_run_id"]


def test_a_modified_file_is_said_beside_the_commit(tmp_path, monkeypatch):
    def git(*arguments):
        own = ["-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
        return subprocess.run(["git", *own, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    (tmp_path / "notes.txt").write_text("of nobody's concern\n")
    assert environment()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2\n")
    assert environment()["commit"] == git("rev-parse", "HEAD") + "+modified"
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None  # no git


@pytest.fixture
def figures(monkeypatch):
    closed, close = [], plt.close
    monkeypatch.setattr(plt, "close", closed.append)
    yield closed
    for figure in closed:
        close(figure)


def test_curves_show_training_and_held_out_values_by_step(tmp_path, figures):
    key, mean = "rmipo/gamma_mean", "training, mean of 9 lines"
    initial = {"step": 0, "eval_rewards/margins": 0.0}
    training = [{"step": 2, "rewards/margins": 0.1, key: 1.2}, {"step": 4, "rewards/margins": 0.3, key: 1.0}]
    held_out = {"step": 4, "eval_rewards/margins": 0.4, f"eval_{key}": 1.1}
    write(tmp_path / "metrics.jsonl", [initial, *training, held_out, {"step": 4, "grad_norm": 1.0}])
    assert plot_curves(tmp_path) == tmp_path / "curves.png"
    (figure,) = figures
    drawn = {
        axis.get_title(): {line.get_label(): line.get_xydata().round(9).tolist() for line in axis.lines}
        for axis in figure.axes
    }
    assert drawn == {
        "reward margin": {"training": [[2, 0.1], [4, 0.3]], mean: [[2, 0.2], [4, 0.2]], "held out": [[0, 0], [4, 0.4]]},
        "gamma": {"training": [[2, 1.2], [4, 1.0]], mean: [[2, 1.1], [4, 1.1]], "held out": [[4, 1.1]]},
    }


class Trainer:
    class args:
        device, world_size = torch.device("cpu"), 1

    class callback_handler:
        callbacks = ()

    class accelerator:
        @staticmethod
        def unwrap_model(model):
            return model

    def __init__(self, model):
        self.model_wrapped, self.attention_kind = model, "segment"


class Tokenizer:
    pad_token_id = 0

    @staticmethod
    def decode(ids):
        return ids if isinstance(ids, list) else ids.tolist()


def test_answers_are_greedy_and_training_goes_on_as_before(monkeypatch):
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that each token of a prompt counts
    monkeypatch.setattr(callbacks, "positions_of", lambda config: None)  # a model that doesn't say
    model.generation_config.do_sample = True  # as published models say
    model.generation_config.eos_token_id = None
    attention.attach(model, "segment")
    trained_with = model.config._attn_implementation
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    model.train()
    prompts = [[5, 0, 0, 7], [8, 9]]  # the padding token is an ordinary one, too
    answers = SampleGenerations(Tokenizer, prompts, Trainer(model), max_new_tokens=4, stop=StopOnSignal()).generate()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]
    assert model.config._attn_implementation == trained_with != "sdpa"
    attention.attach(model, "plain")
    model.eval()
    assert answers == [greedy(model, prompt, 4) for prompt in prompts]


def test_answers_of_a_step_are_written_once_and_not_at_all_after_a_signal(tmp_path):
    """After a kill, lines of this step and of later ones are there already."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=6, n_embd=32, n_layer=1, n_head=2))
    model.generation_config.eos_token_id = None
    write_lines(tmp_path / GENERATIONS_FILE, [{"step": n, "prompt": "?", "answer": "old"} for n in (2, 4, 4, 6)])
    stop = StopOnSignal()
    samples = SampleGenerations(Tokenizer, [[5, 6, 7]], Trainer(model), max_new_tokens=40, stop=stop)
    arguments = types.SimpleNamespace(output_dir=str(tmp_path), seed=0)
    samples.on_evaluate(arguments, TrainerState(global_step=4, is_world_process_zero=True), None)
    lines = read_generations(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    attention.attach(model.eval(), "plain")  # the model has three more positions
    assert lines[1] == {"step": 4, "prompt": [5, 6, 7], "answer": greedy(model, [5, 6, 7], 3)}
    model.register_forward_hook(lambda *_: setattr(stop, "requested", True))
    assert len(samples.generate()[0]) == 1
    samples.on_evaluate(arguments, TrainerState(global_step=6, is_world_process_zero=True), None)
    assert [line["step"] for line in read_generations(tmp_path)] == [2, 4]


@pytest.mark.slow
def test_answers_under_zero3_are_those_of_one_process(tmp_path):
    """There each forward gathers its layers' weights; one process holds them whole."""
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    more = {"generation_samples": 3, "generation_max_new_tokens": 12}
    overrides = changed(overrides, eval_strategy="steps", eval_steps=1, learning_rate="1e-5", **more)
    answers = []
    for sharding in (None, "zero3"):
        folder = tmp_path / str(sharding)
        run("tiny/rmipo", overrides, folder, sharding)
        answers.append(read_generations(folder))
    alone, sharded = answers
    assert [line["step"] for line in alone] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(line["answer"] for line in alone) and sharded == alone
    held_out = [json.loads(line) for line in (tmp_path / "data/test.jsonl").read_text().splitlines()]
    for line, row in zip(alone[:3], held_out, strict=True):
        assert row["prompt"] in line["prompt"]

"""Early warnings: when they come, once per kind, after recovery again; and that a resumed run remembers."""

import json
import time
import types

import pytest

from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.record import read_metrics
from rmipo.run import watchdogs
from rmipo.run.callbacks import set_callbacks
from tests.helpers.families import make_tokenizer
from tests.helpers.launched import launch
from tests.helpers.small_models import make_pairs
from tests.helpers.trainers import make_trainer
from tests.helpers.twins import make_twin


def test_repeated_share_by_hand():
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4: five 4-grams, the last a repeat of the first.
    assert watchdogs.repeated_share([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert watchdogs.repeated_share([[7] * 10]) == pytest.approx(6 / 7)
    assert watchdogs.repeated_share([[7] * 10, [1, 2, 3, 4, 5, 6]]) == pytest.approx(6 / 10)
    assert watchdogs.repeated_share([[1, 2, 3], []]) == 0


class State:
    is_world_process_zero = True
    global_step = 0


def arguments(tmp_path, **limits):
    return PreferenceRunConfig(
        objective={"name": "rmipo"}, output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **limits
    )


def feed(tmp_path, lines, watchdog):
    """Log lines as a trainer does; returns them with what the watchdog added."""
    state = State()
    for number, line in enumerate(lines):
        state.global_step = number + 1
        watchdog.on_log(arguments(tmp_path), state, None, logs=line)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": state.global_step, **line}) + "\n")
    return lines


def lines_of(logps, norms):
    return [
        {"loss": 1.0, "common/chosen_avg_logp": logp, "grad_norm": norm}
        for logp, norm in zip(logps, norms, strict=True)
    ]


def step_watchdog(tmp_path, **limits):
    args = arguments(tmp_path, **limits)
    return watchdogs.StepWatchdog(args, watchdogs.GenerationWatchdog(args, make_tokenizer("llama3")))


def test_collapse_of_chosen_logps_warns_once_until_it_recovers(tmp_path, capsys):
    logps = [-1.0, -2.1, -2.4, -2.6, -1.5, -2.3, -2.4]
    logged = feed(tmp_path, lines_of(logps, [1.0] * 7), step_watchdog(tmp_path, warn_chosen_logp_drop=1.2))
    drops = [line["watchdog/chosen_logp_drop"] for line in logged]
    assert drops == pytest.approx([0.0, 1.1, 1.4, 1.6, 0.5, 1.3, 1.4])
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output] == ["warning, step 3", "step 5", "warning, step 6"]
    assert output[1] == "step 5: chosen_logp_drop is back at 0.5 (limit 1.2)"
    assert "1.40 nats per token less likely" in output[0] and "warn_chosen_logp_drop" in output[0]
    assert "generations.jsonl" in output[0] and "lower learning_rate" in output[0]


def test_gradient_norms_are_compared_with_their_running_median(tmp_path, capsys):
    norms = [1.0] * 8 + [3.0] * 2 + [25.0, 40.0, 1.0, 15.0]
    logged = feed(tmp_path, lines_of([-1.0] * 14, norms), step_watchdog(tmp_path, warn_grad_norm_ratio=20.0))
    ratios = [line.get("watchdog/grad_norm_ratio") for line in logged]
    assert ratios == [None] * 10 + [25.0, 40.0, 1.0, 15.0]  # not before ten norms are known
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output] == ["warning, step 11", "step 13"]
    assert "25 times its median (limit 20, warn_grad_norm_ratio)" in output[0]


@pytest.mark.parametrize("killed_after", [0, 80])
def test_the_median_is_that_of_the_last_fifty_lines(tmp_path, killed_after):
    norms = [1.0] * 60 + [9.0] * 25 + [10.0]  # before the last line: 25 of the first kind, 25 of the second
    lines = lines_of([-1.0] * 86, norms)
    feed(tmp_path, lines[:killed_after], step_watchdog(tmp_path))
    feed(tmp_path, lines[killed_after:], step_watchdog(tmp_path))
    assert lines[85]["watchdog/grad_norm_ratio"] == 10 / 5
    assert killed_after or lines[60]["watchdog/grad_norm_ratio"] == 9.0


def test_a_gradient_that_was_zero_is_no_measure(tmp_path):
    lines = feed(tmp_path, lines_of([-1.0] * 12, [0.0] * 11 + [1.0]), step_watchdog(tmp_path))
    assert not [line for line in lines if "watchdog/grad_norm_ratio" in line]


def test_lines_that_are_not_of_training_pairs_get_nothing(tmp_path):
    lines = [{"loss": 1.0, "grad_norm": 2.0}, {"common/chosen_avg_logp": -1.0}, {"eval_loss": 1.0}]
    assert feed(tmp_path, [dict(line) for line in lines], step_watchdog(tmp_path)) == lines
    state, (line,) = State(), lines_of([-1.0], [1.0])
    state.is_world_process_zero = False  # only the first process has the file that the watchdog reads
    step_watchdog(tmp_path).on_log(arguments(tmp_path), state, None, logs=line)
    assert line.keys() == {"loss", "common/chosen_avg_logp", "grad_norm"}


def test_a_value_at_its_limit_is_within_it(capsys):
    alarm = watchdogs.Alarm("repetition", 0.5)
    alarm.check(0.5, 1)
    assert capsys.readouterr().out == ""
    alarm.check(0.51, 2)
    assert capsys.readouterr().out.startswith("warning, step 2: 51%")


def test_a_resumed_run_compares_with_the_runs_own_start(tmp_path, capsys):
    lines = lines_of([-1.0] * 5 + [-1.5] * 7, [2.0] * 12)
    whole = feed(tmp_path, [dict(line) for line in lines], step_watchdog(tmp_path))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:6]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    rest = feed(tmp_path, [dict(line) for line in lines[6:]], step_watchdog(tmp_path))
    assert rest == whole[6:] and rest[-1]["watchdog/chosen_logp_drop"] == 0.5


def test_repetition_in_the_generations_of_an_evaluation(tmp_path, capsys):
    args, state, tokenizer = arguments(tmp_path, warn_repetition=0.3), State(), make_tokenizer("llama3")
    whole = "The capital of France is Paris."  # more 4-grams than
    loop = "no no no no no no no no no no no no"
    answers = {2: [whole], 4: [loop, whole], 6: ["Good luck!"]}
    watchdog = watchdogs.GenerationWatchdog(args, tokenizer)
    watchdog.on_evaluate(args, state, None)  # nothing was generated
    assert watchdog.repetition is None
    written = []
    for step, texts in answers.items():
        written += [{"step": step, "prompt": "no no no no no no", "answer": text} for text in texts]
        (tmp_path / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
        state.global_step = step
        watchdog.on_evaluate(args, state, None)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers[4]]
    share = watchdogs.repeated_share(ids)
    assert 0.3 < share < 0.5 < watchdogs.repeated_share(ids[:1])
    output = capsys.readouterr().out.splitlines()
    told = f"{share:.0%} of the sample generations' 4-grams are repeats (limit 30%, warn_repetition)."
    assert len(output) == 2 and output[0].startswith(f"warning, step 4: {told} Look at generations.jsonl")
    assert output[1] == "step 6: repetition is back at 0 (limit 0.3)"

    resumed = watchdogs.GenerationWatchdog(args, tokenizer)
    state.global_step = 5  # the answers of step 6 were written after the checkpoint
    resumed.on_train_begin(args, state, None)
    assert resumed.repetition == share
    steps = watchdogs.StepWatchdog(args, resumed)
    for repetition in (share, 0.0):
        resumed.repetition = repetition
        (line,) = lines_of([-1.0], [1.0])
        steps.on_log(args, state, None, logs=line)
        assert line["watchdog/repetition"] == repetition
    state.is_world_process_zero, state.global_step = False, 4
    other = watchdogs.GenerationWatchdog(args, tokenizer)
    other.on_evaluate(args, state, None)
    assert other.repetition is None and capsys.readouterr().out == ""


def test_a_run_logs_what_the_watchdogs_see(tmp_path):
    pairs = make_pairs(96, seed=3)
    trainer = make_trainer(tmp_path, pairs, logging_steps=1)
    generations = watchdogs.GenerationWatchdog(trainer.args, make_tokenizer("llama3"))
    set_callbacks(trainer, [watchdogs.StepWatchdog(trainer.args, generations), generations])
    trainer.train()
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert len(lines) == 12
    start = lines[0]["common/chosen_avg_logp"]
    for line in lines:
        assert line["watchdog/chosen_logp_drop"] == pytest.approx(start - line["common/chosen_avg_logp"])
    assert [("watchdog/grad_norm_ratio" in line) for line in lines] == [False] * 10 + [True] * 2


def test_silence_is_reported_once_until_something_comes_again(capsys):
    args = types.SimpleNamespace(ddp_timeout=0.3, process_index=1, local_process_index=0, world_size=4)
    silence, state, waits = watchdogs.SilenceWatchdog(), State(), []
    wait = silence.ended.wait
    silence.ended.wait = lambda seconds: waits.append(seconds) or wait(seconds)
    told = ""
    for step, event in enumerate(["train_begin", "step_end", "prediction_step", "evaluate", "save"]):
        state.global_step = step
        getattr(silence, f"on_{event}")(args, state, None)
        deadline = time.monotonic() + 10
        while f"after step {step} for 0 s" not in told and time.monotonic() < deadline:
            time.sleep(0.01)
            told += capsys.readouterr().err
    time.sleep(0.3)
    told += capsys.readouterr().err
    assert told.count("warning, rank 1 of 4: nothing has come after step ") == 5
    assert "ddp_timeout: 0.3 s" in told and "in test_silence_is_reported_once_until_something_comes_again" in told
    assert waits[0] == waits[-1] == pytest.approx(0.025) and silence.thread.daemon
    silence.on_train_end(args, state, None)
    assert not silence.thread.is_alive()


def test_what_is_not_silent_is_not_reported(capsys):
    args = types.SimpleNamespace(ddp_timeout=1800, process_index=0, world_size=2)
    silence, waits = watchdogs.SilenceWatchdog(), []
    silence.end()  # a run that ended before it trained
    silence = watchdogs.SilenceWatchdog()
    wait = silence.ended.wait
    silence.ended.wait = lambda seconds: waits.append(seconds) or wait(0.001)
    silence.on_train_begin(args, State(), None)
    while len(waits) < 3:
        time.sleep(0.001)
    silence.on_train_end(args, State(), None)
    assert waits[0] == 1.0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "said",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation",
        "wait timed out after 6000ms",
        "Timeout waiting for key: default_pg/0/0",
        "\n [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:21",
    ],
)
def test_a_process_that_does_not_answer_is_told_in_one_line(said):
    with pytest.raises(watchdogs.SilentRankError) as raised, watchdogs.explained_silence(6.0):
        raise RuntimeError(f"{said}\nException raised from pair.cc")
    message = str(raised.value)
    assert message.startswith(f"another process did not answer: {said.strip()}. Look at the logs")
    assert "take longer than 6 s, raise ddp_timeout" in message and "Exception raised" not in message


def test_other_errors_stay_what_they_are():
    error = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError) as raised, watchdogs.explained_silence(6.0):
        raise error
    assert raised.value is error


def test_a_silent_rank_is_reported_and_the_timeout_ends_the_run(tmp_path):
    """The recipe's ddp_timeout holds on the CPU too, where transformers leaves it out."""
    command = ["tests/helpers/silent_rank.py", "--ddp_timeout", "6", "--model_name_or_path", "some/model"]
    run = launch(command, processes=2)
    try:
        run.processes[0].join()
    finally:
        run.end()
    errors = run.output
    assert run.processes[0].exitcode == 2, errors[-3000:]
    assert "warning, rank 0 of 2: nothing has come after step 1 for 2 s" in errors
    assert "all_reduce" in errors.partition("This process is in:")[2]
    assert "error: another process did not answer: " in errors and "6 s, raise ddp_timeout" in errors
    assert "Traceback" not in errors


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    state = State()
    state.global_step = 7
    watchdog = watchdogs.FiniteWatchdog()
    watchdog.on_log(arguments(tmp_path), state, None, logs={"loss": 1.0, "grad_norm": 2.0})
    watchdog.on_log(arguments(tmp_path), state, None, logs={"eval_loss": 1.0})
    with pytest.raises(
        watchdogs.NonFiniteStepError, match=r"^step 7: grad_norm is nan\. The last checkpoint is from before"
    ):
        watchdog.on_log(arguments(tmp_path), state, None, logs={"loss": 1.0, "grad_norm": float("nan")})
    with pytest.raises(watchdogs.NonFiniteStepError, match=r"^step 7: loss is -inf, grad_norm is inf\. "):
        logs = {"loss": float("-inf"), "grad_norm": float("inf")}
        watchdog.on_log(arguments(tmp_path), state, None, logs=logs)
    scaled = arguments(tmp_path)
    scaled.fp16 = True  # whose scaler skips such a step
    watchdog.on_log(scaled, state, None, logs={"loss": 1.0, "grad_norm": float("inf")})
    with pytest.raises(watchdogs.NonFiniteStepError, match=r"^step 7: loss is inf"):
        watchdog.on_log(scaled, state, None, logs={"loss": float("inf"), "grad_norm": 1.0})


def test_sft_that_diverges_stops_before_it_is_saved(tmp_path):
    overrides = make_twin(tmp_path, "tiny/sft", "llama3", "ultrachat")
    flags = dict(zip(overrides[::2], overrides[1::2], strict=True))
    flags |= {"--learning_rate": "1e30", "--save_strategy": "steps", "--save_steps": "1", "--max_steps": "4"}
    command = ["scripts/sft.py", "--config", "recipes/tiny/sft.yaml", "--output_dir", str(tmp_path / "out")]
    training = launch([*command, *(text for pair in flags.items() for text in pair)])
    assert training.wait() == 2 and "error: step 2: grad_norm is nan" in training.output, training.output[-3000:]
    assert [path.parent.name for path in (tmp_path / "out").glob("checkpoint-*/complete.json")] == ["checkpoint-1"]

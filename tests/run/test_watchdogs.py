"""Early warnings: when they come, once per kind, after recovery again; and that a resumed run remembers."""

import json

import pytest

from rmipo.recipe.schema import PreferenceRunConfig
from rmipo.run import watchdogs
from tests.helpers.families import make_tokenizer
from tests.helpers.launched import launch
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
    return watchdogs.StepWatchdog(arguments(tmp_path, **limits), make_tokenizer("llama3"))


def test_collapse_of_chosen_logps_warns_once_until_it_recovers(tmp_path, capsys):
    logps = [-1.0, -2.1, -2.4, -2.6, -1.5, -2.3, -2.4]
    logged = feed(tmp_path, lines_of(logps, [1.0] * 7), step_watchdog(tmp_path, warn_chosen_logp_drop=1.2))
    drops = [line["watchdog/chosen_logp_drop"] for line in logged]
    assert drops == pytest.approx([0.0, 1.1, 1.4, 1.6, 0.5, 1.3, 1.4])
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output] == ["warning, step 3", "warning, step 6"]
    assert "1.40 nats" in output[0] and "limit 1.2, warn_chosen_logp_drop" in output[0]


def test_gradient_norms_are_compared_with_their_running_median(tmp_path, capsys):
    norms = [1.0] * 8 + [3.0] * 2 + [25.0, 40.0, 1.0, 15.0]
    logged = feed(tmp_path, lines_of([-1.0] * 14, norms), step_watchdog(tmp_path, warn_grad_norm_ratio=20.0))
    ratios = [line.get("watchdog/grad_norm_ratio") for line in logged]
    assert ratios == [None] * 10 + [25.0, 40.0, 1.0, 15.0]  # not before ten norms are known
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output] == ["warning, step 11"]
    assert "25 times its median" in output[0] and "limit 20, warn_grad_norm_ratio" in output[0]


@pytest.mark.parametrize("killed_after", [0, 80])
def test_the_median_is_that_of_the_last_fifty_lines(tmp_path, killed_after):
    norms = [1.0] * 60 + [9.0] * 25 + [10.0]  # before the last line: 25 of the first kind, 25 of the second
    lines = lines_of([-1.0] * 86, norms)
    feed(tmp_path, lines[:killed_after], step_watchdog(tmp_path))
    feed(tmp_path, lines[killed_after:], step_watchdog(tmp_path))
    assert lines[85]["watchdog/grad_norm_ratio"] == 10 / 5
    assert killed_after or lines[60]["watchdog/grad_norm_ratio"] == 9.0


def test_lines_that_are_not_of_training_pairs_get_nothing(tmp_path):
    lines = [{"loss": 1.0, "grad_norm": 2.0}, {"common/chosen_avg_logp": -1.0}, {"eval_loss": 1.0}]
    assert feed(tmp_path, [dict(line) for line in lines], step_watchdog(tmp_path)) == lines
    state, (line,) = State(), lines_of([-1.0], [1.0])
    state.is_world_process_zero = False  # only the first process has the file that the watchdog reads
    step_watchdog(tmp_path).on_log(arguments(tmp_path), state, None, logs=line)
    assert line.keys() == {"loss", "common/chosen_avg_logp", "grad_norm"}


def test_a_resumed_run_compares_with_the_runs_own_start(tmp_path, capsys):
    lines = lines_of([-1.0] * 5 + [-1.5] * 7, [2.0] * 12)
    whole = feed(tmp_path, [dict(line) for line in lines], step_watchdog(tmp_path))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:6]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    rest = feed(tmp_path, [dict(line) for line in lines[6:]], step_watchdog(tmp_path))
    assert rest == whole[6:] and rest[-1]["watchdog/chosen_logp_drop"] == 0.5


def test_repetition_in_the_last_sample_generations(tmp_path, capsys):
    tokenizer, watchdog = make_tokenizer("llama3"), step_watchdog(tmp_path, warn_repetition=0.3)
    whole, loop = "The capital of France is Paris.", "no no no no no no no no no no no no"
    written = [
        {"step": step, "prompt": "no no no no no no", "answer": text}
        for step, texts in {1: [whole], 3: [loop, whole], 5: ["Good luck!"]}.items()
        for text in texts
    ]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    logged = feed(tmp_path, lines_of([-1.0] * 7, [1.0] * 7), watchdog)
    share = watchdogs.repeated_share([tokenizer(text, add_special_tokens=False)["input_ids"] for text in (loop, whole)])
    # An evaluation comes after its step's line.
    assert [line.get("watchdog/repetition") for line in logged] == [None, 0.0, 0.0, share, share, 0.0, 0.0]
    assert 0.3 < share < 0.5
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output] == ["warning, step 4"] and "warn_repetition" in output[0]


def test_a_silent_rank_makes_the_others_say_where_they_wait_and_the_timeout_ends_the_run(tmp_path):
    """The recipe's ddp_timeout holds on the CPU too, where transformers leaves it out."""
    command = ["tests/helpers/silent_rank.py", "--ddp_timeout", "6", "--model_name_or_path", "some/model"]
    run = launch(command, processes=2)
    try:
        run.processes[0].join()
    finally:
        run.end()
    assert run.processes[0].exitcode == 1, run.output[-3000:]
    told = run.output.partition("Timeout (0:00:02)!")[2]
    assert "all_reduce" in told and "RuntimeError" in told


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    state = State()
    state.global_step = 7
    watchdog = watchdogs.FiniteWatchdog()
    watchdog.on_log(arguments(tmp_path), state, None, logs={"loss": 1.0, "grad_norm": 2.0})
    watchdog.on_log(arguments(tmp_path), state, None, logs={"eval_loss": 1.0})
    with pytest.raises(watchdogs.NonFiniteStepError, match=r"^step 7: grad_norm is nan"):
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

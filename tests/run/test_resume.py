"""Killed with SIGKILL anywhere and started again, a run ends where the undisturbed one does: bit for bit, on the CPU."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer

from rmipo.record import read_metrics
from rmipo.run.callbacks import EXIT_STOPPED
from rmipo.training.checkpoints import MARKER, complete_checkpoints, marked
from tests.helpers.launched import wait_until
from tests.helpers.twins import assert_same_run, changed, finish, kill_when, last_step, make_twin, start
from tests.helpers.wandb_file import read_history, read_records

PROCESSES = [pytest.param(1, id="one process"), pytest.param(2, id="ZeRO-3 on two", marks=pytest.mark.slow)]


@pytest.fixture
def sft_twin(tmp_path):
    """Overrides for 12 steps of SFT over 3 epochs, logged every 5."""
    overrides = make_twin(tmp_path, "tiny/sft", "llama3", "ultrachat")
    return changed(
        overrides, max_steps=-1, num_train_epochs=3, global_batch_size=8, per_device_train_batch_size=4,
        max_train_samples=30, save_strategy="steps", save_steps=2, logging_steps=5,
    )  # fmt: skip


def in_the_middle_of_a_save(output_dir):
    return any(not (folder / MARKER).exists() for folder in output_dir.glob("checkpoint-*"))


def in_the_middle_of_an_evaluation(output_dir):
    def steps(name, sign):
        path = output_dir / name
        lines = path.read_text().splitlines() if path.exists() else []
        return {json.loads(line)["step"] for line in lines if line.endswith("}") and sign in line}

    return steps("metrics.jsonl", "eval_loss") > steps("generations.jsonl", "answer")


@pytest.mark.parametrize("processes", PROCESSES)
def test_killed_in_an_epoch_an_evaluation_and_a_save(tmp_path, twin, whole, processes):
    whole, killed = whole(processes), tmp_path / "killed"
    lines = [line for line in read_metrics(whole) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 16))

    assert kill_when(start(twin, killed, processes), lambda: last_step(killed) >= 3)
    assert kill_when(start(twin, killed, processes), lambda: in_the_middle_of_an_evaluation(killed))
    assert kill_when(start(twin, killed, processes), lambda: last_step(killed) >= 8 and in_the_middle_of_a_save(killed))
    (torn,) = [folder for folder in killed.glob("checkpoint-*") if not (folder / MARKER).exists()]
    output = finish(twin, killed, processes)
    assert "resuming from" in output, output[:4000]
    assert f"{torn} is incomplete: deleted" in output, output[:4000]
    assert_same_run(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", PROCESSES)
def test_killed_at_random_points(tmp_path, twin, whole, processes):
    """After a random step: in the next save, in the next evaluation, or up to 250 ms later, wherever that is."""
    whole = whole(processes)
    random_state = random.Random(processes)
    points = []
    while len(points) < {1: 20, 2: 5}[processes]:
        killed = tmp_path / f"killed-{len(points)}"
        step, wait = random_state.randint(0, 15), random_state.uniform(0, 0.25)
        where = random_state.choice([in_the_middle_of_a_save, in_the_middle_of_an_evaluation, None])
        reached = []

        def due():
            if last_step(killed) >= step and (killed / "run.json").exists():  # noqa: B023
                reached.append(time.monotonic())  # noqa: B023
            if not reached:  # noqa: B023
                return False
            return where(killed) if where else time.monotonic() - reached[0] >= wait  # noqa: B023

        process = start(twin, killed, processes)
        if not kill_when(process, due):
            shutil.rmtree(killed)  # it had ended by then
            continue
        finish(twin, killed, processes)
        assert_same_run(killed, whole)
        points.append(f"step {step}, {where.__name__ if where else f'{wait * 1000:.0f} ms later'}")
        print(f"{len(points)}: {points[-1]}: the same run", flush=True)


def test_sft_is_resumed_exactly_too(tmp_path, sft_twin):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = finish(sft_twin, whole, 1, stage="sft")
    assert all(f"{said} rows used\n" in output for said in ("train: 30 of 30", "test: 3 of 3")), output[-4000:]
    record = json.loads((whole / "run.json").read_text())
    assert record["fingerprints"].keys() == {"train", "test", "template", "model"}
    assert record["data"]["test"]["kept"] == 3 and len(record["prompt_probe"]) == 2
    assert round(record["results"]["eval_samples_per_second"] * record["results"]["eval_runtime"]) == 3
    assert AutoTokenizer.from_pretrained(whole).eos_token == "<|eot_id|>"
    assert kill_when(start(sft_twin, killed, 1, stage="sft"), lambda: last_step(killed) >= 6)
    last = killed / "checkpoint-12"
    assert kill_when(start(sft_twin, killed, 1, stage="sft"), lambda: (last / MARKER).exists())
    assert f"resuming from {last}" in finish(sft_twin, killed, 1, stage="sft")
    assert not (killed / "checkpoint-13").exists()  # nothing is trained beyond the last step
    assert_same_run(killed, whole)
    # A line with each checkpoint, besides every fifth step: none covers steps on both sides of a kill.
    assert [line["step"] for line in read_metrics(whole) if "loss" in line] == [2, 4, 5, 6, 8, 10, 12]


ENDS = {
    "three quarters of an epoch": {"num_train_epochs": "0.75", "save_steps": "4"},
    "whole epochs": {"num_train_epochs": "1", "save_steps": "5", "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_nothing_is_trained_beyond_the_last_step(tmp_path, twin, end):
    """Killed once the last checkpoint is complete: in the last evaluation, or in the export."""
    overrides, whole, killed = changed(twin, **end), tmp_path / "whole", tmp_path / "killed"
    finish(overrides, whole, 1)
    last = complete_checkpoints(whole)[-1].name
    state = json.loads((whole / last / "trainer_state.json").read_text())
    assert any("eval_loss" in line and line["step"] == state["global_step"] for line in state["log_history"])
    assert kill_when(start(overrides, killed, 1), lambda: (killed / last / MARKER).exists())
    assert f"resuming from {killed / last}" in finish(overrides, killed, 1)
    assert [path.name for path in complete_checkpoints(killed)] == [last]
    assert_same_run(killed, whole)
    ours, theirs = (json.loads((run / "run.json").read_text())["results"] for run in (killed, whole))
    measured = {"parity", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}  # at each start anew
    assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours.keys() - measured)


@pytest.mark.parametrize(("stage", "by"), [("sft", signal.SIGINT), ("rmipo", signal.SIGTERM)])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, twin, sft_twin, stage, by):
    """Evaluated by epochs: a stop within one adds no evaluation."""
    if by == signal.SIGINT and signal.getsignal(by) is signal.SIG_IGN:
        pytest.skip("Ctrl-C is ignored by programs in the background, and so by what this test starts")
    overrides = {"sft": sft_twin, "rmipo": twin}[stage]
    overrides = changed(overrides, eval_strategy="epoch", save_steps="100", logging_steps="1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(overrides, whole, 1, stage=stage)
    run = start(overrides, stopped, 1, stage=stage)
    wait_until(lambda: last_step(stopped) >= 1, run)
    os.kill(run.processes[0].pid, by)
    assert run.wait() == EXIT_STOPPED, run.output[-3000:]
    (saved,) = complete_checkpoints(stopped)
    assert f"stopped by a signal at step {saved.name.split('-')[1]} " in run.output
    finish(overrides, stopped, 1, stage=stage)
    assert_same_run(stopped, whole)


def test_a_wandb_run_is_continued_row_by_row(tmp_path, twin, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    killed, tracked = tmp_path / "killed", changed(twin, report_to="wandb")
    assert kill_when(start(tracked, killed, 1), lambda: last_step(killed) >= 7)
    finish(tracked, killed, 1)
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))  # by the time at which they started
    ids = {r.run.run_id for file in (first, second) for r in read_records(file) if r.HasField("run")}
    assert ids == {json.loads((killed / "run.json").read_text())["wandb_run_id"]}
    rows = [{row["_step"]: row for row in read_history(file)} for file in (first, second)]
    # The kill took W&B's own process too, with rows that it had not written: they are in the second file.
    assert list(rows[1]) == list(range(16)) and len(read_history(second)) == 16
    for line in read_metrics(killed):
        ours, theirs = ("eval_", "eval/") if "eval_loss" in line else ("", "train/")
        for name in ("loss", "rewards/margins", "rmipo/gamma_mean"):
            assert rows[1][line["step"]][theirs + name] == pytest.approx(line[ours + name], rel=1e-6)
    for step in (rows[0].keys() & rows[1].keys()) - {0}:
        assert rows[0][step]["train/loss"] == rows[1][step]["train/loss"]


@pytest.mark.parametrize("method", ["alpha-dpo", "epsilon-dpo"])
def test_running_statistics_survive(tmp_path, twin, method):
    overlay = ("--overlay", f"recipes/methods/{method}.yaml", "--reference_cache_dir", str(tmp_path / "cache"))
    finish(twin, tmp_path / "whole", 1, *overlay)
    killed = tmp_path / "killed"
    assert kill_when(start(twin, killed, 1, *overlay), lambda: last_step(killed) >= 5)
    finish(twin, killed, 1, *overlay)
    assert_same_run(killed, tmp_path / "whole")
    saved = [marked(run / "checkpoint-14")["state"] for run in (killed, tmp_path / "whole")]
    assert saved[0] == saved[1] and len(saved[0]) >= 1
    first, *_, last = [line["rewards/margins"] for line in read_metrics(killed) if "rewards/margins" in line]
    if method == "epsilon-dpo":  # whose reference is the initial policy, not the trained one
        assert abs(first) < 1e-4 < 1e-3 < abs(last)


@contextlib.contextmanager
def small_disk(folder, kib):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kib", [1000, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(tmp_path, twin, whole, kib):
    out = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", kib):
        run = start(twin, out, 1)
        assert run.wait() == 2, run.output[-6000:]
        good = sorted(int(marker.parent.name.split("-")[1]) for marker in out.glob(f"checkpoint-*/{MARKER}"))
        said = run.output.partition("error: the disk of ")[2]
        assert f"checkpoint: {f'checkpoint-{good[-1]}' if good else 'none'}." in said, run.output[-3000:]

        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        output = finish(twin, out, 1)
        assert not good or f"resuming from {out}/checkpoint-{good[-1]}" in output
        assert_same_run(out, whole(1))

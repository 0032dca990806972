"""A sharded run as users start it: make, `accelerate launch` with a file of configs/accelerate/, two processes."""

import json
import os
import signal
import subprocess

import psutil
import pytest

from tests.helpers.interrupted_runs import assert_same_run, finish, last_step
from tests.helpers.twins import changed, make_twin

SETTING = "base: ../tiny/rmipo.yaml\noutput_dir: outputs/twin/rmipo\n"


@pytest.mark.slow
def test_a_zero3_run_is_stopped_and_goes_on_by_the_same_command(repository, tmp_path):
    overrides = make_twin(tmp_path, "tiny/rmipo", "llama3", "on_policy_ultrafeedback")
    overrides = changed(overrides, max_steps=12, save_strategy="steps", save_steps=12, global_batch_size=8)
    finish(overrides, tmp_path / "whole", 2)
    (repository / "recipes/twin").mkdir()
    (repository / "recipes/twin/rmipo.yaml").write_text(SETTING)
    out = repository / "outputs/twin/rmipo"
    environment = os.environ | {"PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu"}
    environment |= {"MODEL": "twin", "SHARDING": "zero3", "GPUS": "2", "ARGS": " ".join(overrides)}

    def start():
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["make", "train"], cwd=repository, env=environment, **streams)

    run = start()
    while not last_step(out) >= 3:
        assert run.poll() is None, run.stdout.read()
    (launcher,) = psutil.Process(run.pid).children()
    launcher.send_signal(signal.SIGTERM)
    output, _ = run.communicate()
    assert "--config_file configs/accelerate/zero3.yaml --num_processes 2" in output
    assert "stopped by a signal at step" in output and "rmipo ended with exit code 75" in output, output[-3000:]
    assert not json.loads((out / "run.json").read_text())["finished"]
    run = start()
    output, _ = run.communicate()
    assert run.returncode == 0 and "resuming from" in output, output[-3000:]
    assert json.loads((out / "run.json").read_text())["starts"] == 2
    assert_same_run(out, tmp_path / "whole")

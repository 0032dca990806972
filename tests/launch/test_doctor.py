"""`make doctor`: says what is missing, fails only for what the setting needs, and shows no secret."""

import json

import pytest

from rmipo.launch.pipeline import load_steps
from tests.helpers.paths import ROOT
from tests.helpers.programs import run_here

SECRETS = {"HF_TOKEN": "hf_" + "s3cr3t" * 6, "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567"}


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Runs it without a network; gives (exit code, {check: line})."""
    monkeypatch.delenv("WANDB_MODE")

    def run(**variables):
        ended = run_here("doctor", env=variables)
        return ended.code, {line[6:].split("  ")[0].strip(): line for line in ended.out.splitlines()}

    return run


def test_tiny_needs_no_gpu_network_or_login(doctor):
    code, lines = doctor(MODEL="tiny")
    assert code == 0
    assert not [line for line in lines.values() if line.startswith("FAIL")]
    assert lines["disk rmipo"].startswith("note ")  # the SFT model is not here to compare with


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_an_8b_setting_fails_here_and_every_line_names_its_fix(doctor):
    code, lines = doctor(MODEL="llama3-8b-instruct", HF_HUB_CACHE="/nonexistent")
    assert code == 1
    failed = [line for line in lines.values() if line.startswith("FAIL")]
    assert {"GPU", "model", "dataset", "W&B login"} <= {line[6:].split("  ")[0].strip() for line in failed}
    for line in failed:
        assert "Fix: " in line or "Free some" in line, line
    assert "OfflineModeIsEnabled" in lines["model"]


@pytest.mark.parametrize(
    ("trackers", "status"), [("wandb", "FAIL"), ("'[wandb, tensorboard]'", "FAIL"), ("none", "note")]
)
def test_wandb_is_looked_for_among_several_trackers(doctor, trackers, status):
    _, lines = doctor(MODEL="tiny", STAGE="rmipo", ARGS=f"--report_to {trackers}")
    assert lines["W&B login"].split()[0] == status


def test_what_is_trained_already_needs_no_disk_and_another_run_is_named(doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    env = {"MODEL": "tiny", "STAGE": "rmipo", "ARGS": f"--output_dir {tmp_path / 'run'}"}
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "run.json"
    recipe = load_steps("tiny", ["rmipo"], env)[0].recipe.resolved()
    record.write_text(json.dumps({"finished": True, "recipe": recipe}))
    code, lines = doctor(**env)
    assert code == 0 and lines["disk run"].endswith("/run is trained already")
    record.write_text(json.dumps({"finished": True, "recipe": recipe | {"seed": 7}}))
    code, lines = doctor(**env)
    assert code == 1 and "holds a run of another recipe" in lines["disk run"]


def test_tokens_are_never_shown(doctor):
    _, lines = doctor(MODEL="llama3-8b-instruct", **SECRETS)
    text = "\n".join(lines.values())
    assert not [name for name, value in SECRETS.items() if value[:12] in text]

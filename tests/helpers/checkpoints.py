"""Folders of checkpoints as runs leave them, without weights."""

import json

from rmipo.record import run_identity
from rmipo.training.checkpoints import MARKER, start_checkpoint

IDENTITY = run_identity({"learning_rate": 1e-6, "objective": {"name": "rmipo", "beta": 2.0}}, {"train": "a"}, 2)


def make_checkpoints(folder, complete, torn=(), identity=IDENTITY):
    for step in (*complete, *torn):
        start_checkpoint(folder, step)
        (folder / f"checkpoint-{step}" / "weights").write_text("x")
    for step in complete:
        (folder / f"checkpoint-{step}" / MARKER).write_text(json.dumps({"step": step, **identity}))

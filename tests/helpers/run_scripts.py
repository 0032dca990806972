"""Runs scripts of the repository in turn, each in a fork of this process, which has imported their libraries once.

Standard input: a JSON list of [script, argument, ...]. Ends with status 1 at the first that fails.
"""

import gc
import json
import os
import runpy
import sys

import torch

import rmipo.reporting.figures
import rmipo.training.trainer  # noqa: F401
from rmipo.evaluation import hh  # noqa: F401
from tests.helpers.paths import ROOT

torch.set_num_threads(1)
gc.freeze()
for script, *arguments in json.load(sys.stdin):
    process = os.fork()
    if process == 0:
        sys.argv = [script, *arguments]
        code = 1
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # tearing the libraries down takes two seconds
    _, status = os.waitpid(process, 0)
    if status != 0:
        sys.exit(f"failed: {script} {' '.join(arguments)}")

"""The README's example runs as printed, and its values follow from Eq. 8 by hand."""

import math
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_loss_example_runs_and_is_right():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    expected = []
    for chosen, rejected, prior_chosen, prior_rejected, n, m in (
        (-42, -55, -90, -80, 30, 32),
        (-310, -290, -420, -405, 210, 200),
    ):
        delta_pmi = (chosen - prior_chosen) / n - (rejected - prior_rejected) / m
        gamma = 0.3 + 1.3 * math.exp(-max(0, delta_pmi))
        expected.append((math.log1p(math.exp(-(2 * chosen / n - 2 * rejected / m - gamma))), gamma))
    assert names["losses"].tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert names["gamma"].tolist() == pytest.approx([gamma for _, gamma in expected], rel=1e-5)

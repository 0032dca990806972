"""RMiPO: preference optimisation whose margin follows pointwise mutual information.

The names below are imported when they are first used, so that `import rmipo` takes no time.
"""

import importlib
import os

# OpenMP reads this as torch is imported. Its threads would spin while they wait: on a busy CPU training takes many times
# as long (docs/TRAINING.md).
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_EXPORTS = {
    "rmipo_loss": "rmipo.objectives.rmipo",
    "OBJECTIVES": "rmipo.objectives",
    "build_objective": "rmipo.objectives",
    "PairScores": "rmipo.objectives",
    "PreferenceConfig": "rmipo.recipe.schema",
    "PreferenceTrainer": "rmipo.training.trainer",
    "RMiPOConfig": "rmipo.recipe.schema",
    "RMiPOTrainer": "rmipo.training.trainer",
    "look": "rmipo.page.look",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rmipo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)

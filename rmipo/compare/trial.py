"""One training of a comparison, and the names of what is trained."""

from dataclasses import dataclass

from rmipo.objectives import OBJECTIVES

INITIAL, FLOOR = "initial", "sft-chosen"  # the SFT model itself, and more SFT on the chosen responses
METHODS = ("rmipo", *(name for name in OBJECTIVES if name != "rmipo"), FLOOR)
READINGS = ("fidelity-sequence", "fidelity-release", "initial-prior", "shuffled")  # of RMiPO, beside the default one
SEARCH_SEED = 1000  # pairs and order of the search; no reported run has them


@dataclass(frozen=True)
class Trial:
    """One training: which method, how, on which draw of the pairs; `purpose` is "search" or "report"."""

    purpose: str
    method: str
    learning_rate: float | None
    seed: int
    noise: float  # share of the training pairs whose labels are swapped
    objective: tuple[tuple[str, float], ...] = ()  # hyperparameters in place of the method's own

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f" lr {self.learning_rate:g}"
        own = "".join(f" {name} {value:g}" for name, value in self.objective)
        return f"{self.method}{own}{rate} seed {self.seed} noise {self.noise:g}"

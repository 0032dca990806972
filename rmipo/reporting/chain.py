"""Everything that has to run before a table is complete: trainings, then evaluations, in order."""

from dataclasses import dataclass
from pathlib import Path

from .results import BENCH_OF_METRIC, eval_command, is_trained, load_result, paper_rows, sft_command, train_command
from .tables import Table

PAPER_GPUS = 4  # A800 80 GB


@dataclass(frozen=True)
class Step:
    """One command. `hours`: the paper's wall-clock hours of this training; None where it prints none."""

    command: str
    done: bool
    hours: float | None = None

    @property
    def is_training(self) -> bool:
        return self.command.startswith("make train")


def chain(table: Table, outputs: Path) -> list[Step]:
    """The steps of a table, those that are done marked so: SFT first, then each run with its evaluations."""
    paper_hours = {row["method"]: float(row["hours"]) for row in paper_rows("efficiency")}
    benches: dict[tuple[str, str], dict[str, None]] = {}  # (model, method) -> ordered set
    for cell in (cell for row in table.cells for cell in row):
        benches.setdefault((cell.model, cell.method), {})[BENCH_OF_METRIC[cell.metric]] = None
    models = dict.fromkeys(model for model, _ in benches)
    steps = [Step(command, is_trained(outputs, model, "sft")) for model in models if (command := sft_command(model))]
    for (model, method), needed in benches.items():
        if method != "initial":
            hours = paper_hours.get(base_method(method))
            steps.append(Step(train_command(model, method), is_trained(outputs, model, method), hours))
        for bench in needed:
            done = load_result(outputs, model, method, bench) is not None
            steps.append(Step(eval_command(model, method, bench), done))
    return steps


def base_method(method: str) -> str:
    """The method whose cost an ablation has: Table 5's rows name it, all others are variants of RMiPO."""
    prefix, _, name = method.partition("-")
    if prefix == "table5":
        return name
    return "rmipo" if prefix.startswith("table") else method


def summary(steps: list[Step]) -> str:
    """What is left to do and what it costs, by the paper's own times."""
    left = [step for step in steps if not step.done]
    trainings = [step for step in left if step.is_training]
    known = [step.hours for step in trainings if step.hours is not None]
    text = (
        f"{len(left)} of {len(steps)} steps left: {len(trainings)} trainings, {len(left) - len(trainings)} evaluations."
    )
    if known:
        text += (
            f"\nGPU hours by the paper's Figure 7 ({PAPER_GPUS} A800, model not said): {PAPER_GPUS * sum(known):.0f} "
            f"for {len(known)} of the trainings."
        )
    if len(known) < len(trainings):
        text += f"\nThe paper prints no hours for the other {len(trainings) - len(known)}."
    return text + "\nIt prints none for evaluation; make eval estimates the judge's cost before its first call."

"""Everything that has to run before a table is complete: trainings, then evaluations, in order."""

from dataclasses import dataclass
from pathlib import Path

from rmipo.reporting.costs import (
    PAPER_GPUS,
    estimate_assumptions,
    judge_dollars,
    paper_hours,
    planned_hours,
    verdict_assumptions,
)
from rmipo.reporting.results import eval_command, is_trained, load_result, sft_command, train_command
from rmipo.reporting.tables import Table


@dataclass(frozen=True)
class Step:
    """One command.

    `hours`: wall-clock hours of a training on the paper's GPUs, by the paper, or `estimated`; None for what trains on
    the CPU. `dollars`: what the judge of an evaluation costs, about; None without one, 0 for one that is free.
    """

    command: str
    done: bool
    hours: float | None = None
    estimated: bool = False
    dollars: float | None = None

    @property
    def is_training(self) -> bool:
        return self.command.startswith("make train")

    @property
    def cost(self) -> str:
        if self.hours is not None:
            return f"{self.hours:.3g} h on {PAPER_GPUS} GPUs, " + ("estimated" if self.estimated else "in the paper")
        return f"about ${self.dollars:.0f} for the judge" if self.dollars else ""


def chain(table: Table, outputs: Path) -> list[Step]:
    """The steps of a table, those that are done marked so: SFT first, then each run with its evaluations.

    Raises ValueError where a training's hours have to be estimated and its recipe or model can't be read.
    """
    benches: dict[tuple[str, str], dict[str, None]] = {}  # (model, method) -> ordered set
    for cell in table.cells:
        benches.setdefault((cell.model, cell.method), {})[cell.bench] = None
    models = dict.fromkeys(model for model, _ in benches)
    steps = [training(command, outputs, model, "sft") for model in models if (command := sft_command(model))]
    for (model, method), needed in benches.items():
        if method != "initial":
            steps.append(training(train_command(model, method), outputs, model, method))
        for bench in needed:
            done = load_result(outputs, model, method, bench) is not None
            steps.append(Step(eval_command(model, method, bench), done, dollars=judge_dollars(model, bench)))
    return steps


def training(command: str, outputs: Path, model: str, method: str) -> Step:
    done, hours = is_trained(outputs, model, method), paper_hours(model, method)
    if hours is None and not done:
        return Step(command, done, planned_hours(model, method), estimated=True)
    return Step(command, done, hours)


def summary(steps: list[Step]) -> str:
    """What is left to do and what it costs: the paper's own times, estimates where it has none, the judges."""
    left = [step for step in steps if not step.done]
    trainings = [step for step in left if step.is_training]
    timed = [step.hours for step in trainings if step.hours is not None and not step.estimated]
    estimated = [step.hours for step in trainings if step.hours is not None and step.estimated]
    judged = [step.dollars for step in left if step.dollars]
    lines = [
        f"{len(left)} of {len(steps)} steps left: {len(trainings)} trainings, {len(left) - len(trainings)} evaluations."
    ]
    if timed:
        lines.append(
            f"GPU hours by the paper's Figure 7 ({PAPER_GPUS} A800, model not said): {PAPER_GPUS * sum(timed):.0f} for "
            f"{len(timed)} of the trainings."
        )
    if estimated:
        lines.append(
            f"GPU hours by the estimate of make plan, where the paper prints none: {PAPER_GPUS * sum(estimated):.0f} for "
            f"{len(estimated)} trainings. {estimate_assumptions()}"
        )
    if on_cpu := len(trainings) - len(timed) - len(estimated):
        lines.append(f"{on_cpu} of the trainings run on the CPU.")
    if judged:
        lines.append(f"Judges: about ${sum(judged):.0f} for {len(judged)} evaluations. {verdict_assumptions()}")
    if len(trainings) < len(left):
        lines.append("Not counted: the GPU hours of evaluations, for which the paper has no number.")
    return "\n".join(lines)

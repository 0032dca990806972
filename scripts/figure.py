"""Draw one of the paper's figures from run folders, result files and saved models.

    make figure N=7 MODEL=llama3-8b-instruct
    python scripts/figure.py --number 2 --model tiny --metric eval_common/acc_avg_logp

2 sensitivity to beta and gamma      3 log-likelihood and PMI differences on HH     5 HH win rates
6 density of reward differences      7 cost, margin, win rate                       8 gamma: schedule and density

Writes PNG and PDF to <outputs>/reports/. Figures 6 and 8 score pairs with the trained models; scores are kept.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from rmipo.cli import program
from rmipo.reporting import figures, figures_pairs, figures_runs, sensitivity
from rmipo.reporting.figures import method_label
from rmipo.reporting.results import PAPER_MODELS, ReportError, load_run, model_label, train_command

NUMBERS = (2, 3, 5, 6, 7, 8)
ONE_METHOD = (3, 8)
FIGURE6_METHODS = ("simpo", "simper", "rmipo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=os.environ.get("N") or None, help=f"one of {NUMBERS}")
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="folder below outputs")
    parser.add_argument("--method", default=os.environ.get("METHOD"), help="figure 3: initial; figure 8: rmipo")
    parser.add_argument(
        "--metric", default=os.environ.get("METRIC", "mt_bench"), help="figure 2: evaluation or log key"
    )
    parser.add_argument("--max_pairs", type=int, default=4000, help="figures 6 and 8: pairs scored per model")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    args = parser.parse_args(sys.argv[1:] or shlex.split(os.environ.get("ARGS", "")))

    if args.number not in NUMBERS:
        raise ReportError(f"there is no figure {args.number} to draw; say N=..., one of {NUMBERS}")
    if not args.model:
        raise ReportError(f"of which model? Say MODEL=..., e.g. {', '.join(PAPER_MODELS)} or tiny")
    if args.method and args.number not in ONE_METHOD:
        raise ReportError(
            f"figure {args.number} compares methods; METHOD={args.method} is for figures {ONE_METHOD}: leave it out"
        )
    figure = draw(args)
    name = "-".join([f"figure{args.number}", args.model, *([args.method.replace("/", "-")] if args.method else [])])
    for file in figures.save(figure, args.outputs / "reports" / f"{name}.png"):
        print(f"Written to {file}")


def draw(args: argparse.Namespace) -> figures.Figure:
    outputs, model, label = args.outputs, args.model, model_label(args.model)
    if args.number == 2:
        return sensitivity.figure2(outputs, model, args.metric)
    if args.number == 5:
        return figures_runs.figure5(outputs, model)
    if args.number == 7:
        return figures_runs.figure7(outputs, model)

    from rmipo.reporting import pair_scores  # brings in torch and transformers

    if args.number == 3:
        method = args.method or "initial"
        return figures_pairs.figure3(pair_scores.hh_signals(outputs, model, method), f"{label} {method_label(method)}")
    if args.number == 6:
        runs = {method: finished_run(outputs, model, method) for method in FIGURE6_METHODS}
        differences = {
            method: pair_scores.reward_differences(run, "test", args.max_pairs) for method, run in runs.items()
        }
        rows = {method: rows for method, (_, rows) in differences.items()}
        if len({tuple(r) for r in rows.values()}) > 1:
            raise ReportError(
                f"figure 6: the {model} runs of {', '.join(rows)} used different pairs; train them on the same"
            )
        judged = pair_scores.judge_differences(runs["rmipo"], "test", rows["rmipo"])
        return figures_pairs.figure6(judged, {method: values for method, (values, _) in differences.items()}, label)
    method = args.method or "rmipo"
    run = finished_run(outputs, model, method)
    objective = pair_scores.rmipo_objective(run)
    gammas = pair_scores.gamma_readings(run, "train", args.max_pairs)
    pairs = len(next(iter(gammas.values())))
    return figures_pairs.figure8(
        gammas,
        objective.gamma_min,
        objective.gamma_max,
        f"{label} {method_label(method)}: gamma of {pairs} training pairs, final policy",
        objective.schedule,
        objective.span,
        figures_pairs.PAPER_GAMMA_PEAKS.get(model) if method == "rmipo" else None,
    )


def finished_run(outputs: Path, model: str, method: str):
    run = load_run(outputs, model, method)
    if run is None or not run.finished:
        raise ReportError(f"{outputs / model / method} holds no finished run: run `{train_command(model, method)}`")
    return run


if __name__ == "__main__":
    with program():
        main()

"""Draw one of the paper's figures from run folders, result files and saved models.

    make figure N=7 MODEL=llama3-8b-instruct
    make figure N=2 MODEL=tiny METRIC=eval_common/acc_avg_logp
    make figure N=8 MODEL=smollm2-135m-instruct METHOD=initial DATA=<pairs>

2 sensitivity to beta and gamma      3 log-likelihood and PMI differences on HH     5 HH win rates
6 density of reward differences      7 cost, margin, win rate                       8 delta_pmi and gamma, three readings

Writes PNG and PDF to <outputs>/reports/, and for Figure 8 a table (printed, and as CSV). Figures 6 and 8 score pairs with
the trained models. Figure 8 also takes any model (METHOD=initial: the setting's model before training;
or MODEL=<folder or hub id>) and any pairs (DATA).
"""

import argparse
import os
from pathlib import Path

from rmipo import cli
from rmipo.launch.choices import check_names, is_setting
from rmipo.recipe.files import merge
from rmipo.reporting import results
from rmipo.reporting.results import RECIPES, ReportError, RunFolder, method_label, model_label

OPTIONS = {"method": (3, 8), "metric": (2,), "eval_name": (2,), "data": (8,)}  # and the figures that take them
PAPER_GAMMA_PEAKS = {"mistral-7b-instruct": 0.4, "llama3-8b-instruct": 1.4}  # App. D, Figure 8 right


def report_file(args: argparse.Namespace, suffix: str) -> Path:
    """A file of its own for each model, method, metric, evaluation and data."""
    parts = [Path(args.model).name, args.method, args.metric, args.eval_name, args.data and Path(args.data).name]
    name = "-".join([f"figure{args.number}", *(part.replace("/", "-") for part in parts if part)])
    return args.outputs / "reports" / f"{name}{suffix}"


# The imports inside functions are of torch and transformers, which take seconds.


def draw_results(args: argparse.Namespace):
    """Figures 2, 5 and 7, from files alone."""
    from rmipo.reporting import figures_runs as figures

    more = (args.metric or "mt_bench", args.eval_name) if args.number == 2 else ()
    return getattr(figures, f"figure{args.number}")(args.outputs, args.model, *more)


def draw3(args: argparse.Namespace):
    from rmipo.reporting.figures_pairs import figure3

    return figure3(args.outputs, args.model, args.method or "initial")


def draw6(args: argparse.Namespace):
    from rmipo.reporting import figures_pairs as figures

    notes = ["REF: score_chosen minus score_rejected of the same pairs, as their data set has them."]
    values, drawn = {}, {}
    for method in ("simpo", "simper", "rmipo"):
        run = results.finished_run(args.outputs, args.model, method)
        values[method], drawn[method] = figures.reward_differences(run, "test", args.max_pairs)
        notes.append(f"{method_label(method)}: {figures.scored_with(run, 'test')}")
    if any(rows != drawn["rmipo"] for rows in drawn.values()):
        raise ReportError(f"figure 6: the {args.model} runs of {', '.join(drawn)} used different pairs")
    judged = figures.judge_differences(run, "test", drawn["rmipo"])
    return figures.figure6(judged, values, model_label(args.model), notes)


def draw8(args: argparse.Namespace):
    """Draws the readings, prints their table and writes it as CSV."""
    from rmipo.reporting import figures_pairs as figures

    method = args.method or "rmipo"
    run = scored_run(args, method)
    if args.data:
        run.record["recipe"] = merge(run.record["recipe"], {"dataset_name": args.data})
    objective = figures.rmipo_objective(run)
    readings = figures.gamma_readings(run, args.split, args.max_pairs)
    table = figures.summarize(readings, objective.gamma_min, objective.gamma_max)
    print(table.T.to_string(float_format=lambda value: f"{value:z.3f}"))
    report_file(args, ".csv").parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(report_file(args, ".csv"), index_label="reading")
    count = len(next(iter(readings.values())))
    title = f"{model_label(Path(args.model).name)} {method_label(method)}: {count} {args.split} pairs"
    # The paper's peak is that of its own run on its own pairs.
    peak = PAPER_GAMMA_PEAKS.get(args.model) if method == "rmipo" and not args.data else None
    return figures.figure8(readings, objective, title, peak, [figures.scored_with(run, args.split)])


def scored_run(args: argparse.Namespace, method: str) -> RunFolder:
    """What Figure 8 scores with: a finished run; or a model as if the setting's recipe had left it unchanged."""
    from rmipo.evaluation.target import find_target
    from rmipo.recipe.load import load_recipe

    known = is_setting(args.model)
    if known and method != "initial":
        return results.finished_run(args.outputs, args.model, method)
    if not (args.data or known):
        raise ReportError(f"MODEL={args.model} has no recipe that names its pairs: say which, DATA=<folder>")
    folder = find_target(args.model, method if known else args.method or None, args.outputs, []).folder
    recipe = load_recipe(RECIPES / args.model / "rmipo.yaml").values if known else {}
    return RunFolder(folder, {"recipe": recipe, "objective": {"name": "rmipo"} | recipe.get("objective", {})})


FIGURES = {2: draw_results, 3: draw3, 5: draw_results, 6: draw6, 7: draw_results, 8: draw8}


@cli.main
def main() -> None:
    parser = cli.options(__doc__, "MODEL", "METHOD", "METRIC", "EVAL_NAME", "DATA")
    parser.add_argument("--number", type=int, default=os.environ.get("N") or None, help=f"one of {sorted(FIGURES)}")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="figure 8: of these pairs")
    parser.add_argument("--max_pairs", type=int, default=4000, help="figures 6 and 8: pairs scored per model")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    args = parser.read()
    if args.number not in FIGURES or not args.model:
        raise ReportError(f"which figure, of which model? Say MODEL=... and N=..., one of {sorted(FIGURES)}")
    if args.number == 8:
        check_names(args.model, [])
    else:
        results.check_model(args.outputs, args.model)
    if wrong := [option.upper() for option in OPTIONS if getattr(args, option) and args.number not in OPTIONS[option]]:
        raise ReportError(f"figure {args.number} takes no {', '.join(wrong)}: leave it out")
    figure = FIGURES[args.number](args)
    from rmipo.plots import save

    for file in save(figure, report_file(args, ".png")):
        print(f"Written to {file}")

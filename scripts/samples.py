"""Several methods' answers to chosen prompts side by side, as in the paper's Table 6: Markdown and HTML.

    make samples MODEL=mistral-7b-base METHODS="rmipo simper simpo"
    make samples MODEL=path/to/model ARGS='--prompt "What does Ada eat?"'

MODEL is a setting, whose METHODS are compared; or a folder with a model, or the id of one on the hub, shown alone.
Without --prompt, the block `samples` in recipes/<model>/eval.yaml says which: `prompts`, or the first `first_n` (null:
all) of a file `reference`, whose own answers are shown too. Writes <outputs>/reports/.
"""

import textwrap
from pathlib import Path

import pandas as pd

from rmipo import cli
from rmipo.errors import EvaluationError
from rmipo.evaluation.alpaca import load_reference
from rmipo.files import write_atomically
from rmipo.launch.choices import check_names, is_setting

METHODS = ["rmipo", "simper", "simpo"]  # of Table 6; by default those that are trained
STYLE = """<!DOCTYPE html><meta charset="utf-8"><style>body { font-family: sans-serif; margin: 2em; }
th, td { padding: .6em; vertical-align: top; text-align: left; } td { white-space: pre-wrap; }</style>"""


def choose_prompts(given: list[str] | None, settings: dict) -> tuple[list[str], dict[str, list[str]]]:
    """The prompts, and answers to them that are known already, by who gave them. Raises EvaluationError without any."""
    if isinstance(prompts := given or settings.get("prompts"), list):
        return prompts, {}
    if settings.get("reference"):
        rows = load_reference(settings["reference"])[0][: settings.get("first_n")]
        return [row["instruction"] for row in rows], {"reference": [row["output"] for row in rows]}
    raise EvaluationError("no prompts: give one with ARGS='--prompt \"...\"', or set `samples` in the eval.yaml")


@cli.main
def main() -> None:
    parser = cli.options(__doc__, "MODEL", "METHODS", MODEL="setting, folder with a model, or hub id")
    parser.add_argument("--prompt", action="append", help="may be given more than once")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    args = parser.read()
    model, methods = args.model or "tiny", args.methods.replace(",", " ").split()
    check_names(model, methods)
    from rmipo.evaluation.target import find_target  # imports torch and TRL, which takes seconds
    from rmipo.generation.answers import Generator, questions

    if is_setting(model):
        trained = [method for method in METHODS if (args.outputs / model / method / "config.json").is_file()]
        methods = methods or trained or METHODS[:1]
    name = Path(model).name
    targets = {method or name: find_target(model, method, args.outputs, []) for method in methods or [None]}
    settings = next(iter(targets.values())).settings
    prompts, answers = choose_prompts(args.prompt, settings.get("samples", {}))
    for method, target in targets.items():
        with Generator(target.folder, settings.get("generation", {})) as generator:
            answers[method] = generator.ask("samples", questions(prompts))
    table, report = pd.DataFrame({"Prompt": prompts, **answers}), args.outputs / f"reports/samples-{name}"
    # A section for each prompt; answers are indented, so that their own Markdown doesn't break the page.
    sections = table.map(lambda text: textwrap.indent(text or "(empty)", "    ")).to_dict("records")
    texts = [[f"**{column}**\n\n{text}\n" for column, text in section.items()] for section in sections]
    markdown = "\n".join("\n".join([f"# {number}\n", *text]) for number, text in enumerate(texts, start=1))
    write_atomically(report.with_name(f"{report.name}.md"), markdown)
    with pd.option_context("display.max_colwidth", None):  # else long answers are cut
        write_atomically(report.with_name(f"{report.name}.html"), STYLE + table.to_html(index=False))
    print(f"Written to {report}.md and .html")

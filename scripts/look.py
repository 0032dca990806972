"""See what RMiPO's margin does to pairs, before a run is paid for and after it: one HTML page.

    make look MODEL=llama3-8b-base METHOD=initial AFTER=rmipo
    make look MODEL=path/to/model DATA=pairs.jsonl PAIRS=500

MODEL is a setting, a folder with a model, or the id of one on the hub; METHOD and AFTER are folders of outputs/<model>/, AFTER
also a model. DATA are by default the pairs that the setting trains on. Writes OUTPUT, by default
<outputs>/reports/look-<model>.html. docs/LOOK.md explains the page.
"""

from pathlib import Path

from rmipo import cli
from rmipo.errors import ConfigError
from rmipo.launch.choices import check_names, is_setting, whole_number
from rmipo.recipe.files import merge
from rmipo.record import recorded_run


@cli.main
def main() -> None:
    parser = cli.options(
        __doc__, "MODEL", "METHOD", "DATA", "PAIRS", "AFTER", "OUTPUT",
        MODEL="setting, folder with a model, or hub id", METHOD="folder of outputs/<model>/ (default: initial)",
        OUTPUT="HTML file to write",
    )  # fmt: skip
    parser.add_argument("--max_length", type=int, help="tokens of prompt and response (default: the recipe's, or 2048)")
    parser.add_argument("--max_prompt_length", type=int, help="tokens of the prompt (default: the recipe's, or 1800)")
    parser.add_argument("--split", default="train", choices=["train", "test"], help="of the pairs")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where the runs are")
    args = parser.read()
    model, setting = args.model or "tiny", is_setting(args.model or "tiny")
    check_names(model, [args.method] if args.method else [])
    count = whole_number({"PAIRS": args.pairs}, "PAIRS", 200)
    if not (setting or args.data or recorded_run(model)):
        raise ConfigError(f"MODEL={model} has no recipe that names its pairs: say which, DATA=<folder or file>")

    from rmipo import RMiPOConfig, look  # imports torch, which takes seconds
    from rmipo.data.pairs import LIMITS, load_pairs
    from rmipo.evaluation.target import find_target
    from rmipo.launch.pipeline import load_steps
    from rmipo.recipe.schema import DataConfig, ModelConfig, of_recipe

    method = args.method or "initial" if setting else None
    folder = find_target(model, method, args.outputs, []).folder
    after = None
    if args.after:
        own = setting and (args.outputs / model / args.after).is_dir()
        after = find_target(*((model, args.after) if own else (args.after, None)), args.outputs, []).folder
    # The pairs are read and cut as the run did, or as it would.
    recipe = (recorded_run(folder) or {}).get("recipe", {})
    if setting and recipe.get("objective", {}).get("name") != "rmipo":
        recipe = load_steps(model, ["rmipo"], {"DATA": args.data or ""})[0].recipe.values
    recipe = merge(recipe, {"dataset_name": args.data} if args.data else {})
    names = (*LIMITS, "attention", "dataset_num_proc")
    given = {name: value for name in names if (value := getattr(args, name, None))}
    values = recipe | recipe.get("objective", {}) | given
    known = {name: values[name] for name in (*names, *RMiPOConfig.__annotations__) if name in values}
    page = look(
        ModelConfig(model_name_or_path=str(folder), dtype=recipe.get("dtype", "auto")),
        load_pairs(of_recipe(DataConfig, recipe), args.split),
        RMiPOConfig(output_dir=".", report_to="none", **known),
        after=after and ModelConfig(model_name_or_path=str(after), dtype=recipe.get("dtype", "auto")),
        pairs=count,
        output=args.output or args.outputs / "reports" / f"look-{Path(model).name}.html",
    )
    print(f"Written to {page}: open it in a browser")

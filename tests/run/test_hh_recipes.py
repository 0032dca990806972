"""The Anthropic-HH pair of recipes."""

from rmipo.launch.choices import choose_stages
from rmipo.recipe.load import load_recipe

SUBSETS = ("helpful", "harmless")


def setting(subset):
    return f"llama3-8b-instruct-hh-{subset}"


def test_the_two_differ_in_subset_and_folder_alone():
    recipes = {subset: load_recipe(f"recipes/{setting(subset)}/rmipo.yaml").values for subset in SUBSETS}
    differing = {key for key in recipes["helpful"] if recipes["helpful"][key] != recipes["harmless"][key]}
    assert differing == {"datasets", "output_dir"}
    for subset, values in recipes.items():
        (entry,) = values["datasets"]
        assert (entry["path"], entry["data_dir"]) == ("Anthropic/hh-rlhf", f"{subset}-base")
        assert choose_stages({"MODEL": setting(subset)}) == (setting(subset), ["rmipo"])
    base = load_recipe("recipes/llama3-8b-instruct/rmipo.yaml").values
    assert {key for key in base if base[key] != recipes["helpful"].get(key)} == {
        "dataset_name", "dataset_revision", "dataset_train_split", "dataset_test_split", "output_dir",
    }  # fmt: skip

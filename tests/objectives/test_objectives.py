"""Objectives against hand-computed golden values, an independent reference, finite differences and their own rules."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from rmipo.objectives import OBJECTIVES, ObjectiveOutput, PairScores, build_objective
from rmipo.objectives.rmipo import pmi, rmipo_loss, scheduled_margin
from rmipo.plots import METHOD_COLORS
from rmipo.recipe.files import merge, read_layers
from rmipo.reporting.results import METHODS
from tests.helpers.pair_scores import CASES, batch, case_scores, scores_of, settled
from tests.helpers.paths import ROOT

ALPHA = {"name": "alpha-dpo", "beta": 2.5, "gamma_beta_ratio": 0.6, "alpha": 0.2}
SLIC, CPO = {"name": "slic", "delta": 1, "sft_weight": 0.1}, {"name": "cpo", "beta": 0.1}
BETA, EPSILON = {"name": "beta-dpo", "beta": 0.1, "alpha": 0.6}, {"name": "epsilon-dpo", "beta": 0.1, "epsilon": 0.02}
RMIPO = {"name": "rmipo", "beta": 2.0, "gamma_min": 0.3, "gamma_max": 1.6}
PAPER, RELEASE, BY_TOKEN = {"fidelity": "paper"}, {"fidelity": "release"}, {"sft_normalization": "token"}
MEANS, SUMS = {"length_normalization": True}, {"length_normalization": False}
# What the losses of cases A and B are, and the state where there is one.
GOLDEN = {
    "dpo": ({"name": "dpo", "beta": 0.1}, 0.658760, 0.723597),
    "dpo_length_norm": ({"name": "dpo", "beta": 0.1, **MEANS}, 0.678260, 0.703197),
    "slic": (SLIC, 0.720000, 4.400000),
    "slic_nll_mean": (SLIC | BY_TOKEN, 0.640000, 4.100000),
    "slic_all_mean": (SLIC | BY_TOKEN | MEANS, 0.640000, 1.600000),
    "ipo": ({"name": "ipo", "tau": 0.1}, 22.090000, 27.040000),
    "ipo_sum": ({"name": "ipo", "tau": 0.1, **SUMS}, 18.490000, 31.360000),
    "cpo": (CPO, 1.073347, 1.854355),
    "cpo_nll_sum": ({**CPO, "sft_normalization": "sequence"}, 1.873347, 4.854355),
    "kto": ({"name": "kto", "beta": 0.1}, 0.491251, 0.507499),
    "simpo": ({"name": "simpo", "beta": 2, "gamma": 1}, 0.798139, 2.126928),
    "simpo_no_ln": ({"name": "simpo", "beta": 0.1, "gamma": 1, **SUMS}, 1.284178, 1.541008),
    "alpha_dpo": (ALPHA, 1.313262, 2.350207, settled(0.05, 0.25)),
    "alpha_dpo_no_ln": (ALPHA | SUMS, 1.952978, 7.700453, settled(0.05, 0.25)),
    "alpha_dpo_table4": (ALPHA | PAPER, 1.432685, 2.224433, settled(0.1, 0.5)),
    # With one pair the mean gap of the batch is the pair's own, so the batch-level beta is the instance's.
    "beta_dpo_instance": (BETA, 0.648682, 0.708869, settled(0.2, 1.0)),
    "beta_dpo_instance_scaledM": (BETA | PAPER, 0.657747, 0.722115, settled(0.2, 1.0)),
    "epsilon_dpo": (EPSILON, 0.659422, 0.724228),
    "epsilon_dpo_appendixA": (EPSILON | PAPER, 0.659422, 0.724215),
    "simper": ({"name": "simper"}, -0.220991, 0.238651),
    "simper_constant_length": ({"name": "simper", "constant_length": 4}, -0.070498, 0.410921),
    "rmipo": (RMIPO, 1.014616, 2.671645),
    "rmipo_paper_sum_pmi": ({**RMIPO, "pmi_normalization": "sequence"}, 0.682328, 2.671645),
    "rmipo_code": (RMIPO | RELEASE, 2.160332, 4.214884),
    "rmipo_linear": ({**RMIPO, "schedule": "linear"}, 1.083241, 2.671645),
    "rmipo_cosine": ({**RMIPO, "schedule": "cosine"}, 1.149259, 2.671645),
    "rmipo_none": ({**RMIPO, "schedule": "constant"}, 0.770957, 2.083021),
    "rmipo_no_ln": ({**RMIPO, "beta": 0.1, **SUMS}, 1.560193, 2.039387),
    "ablation_GM": ({**RMIPO, "signal": "loglik", "schedule": "linear"}, 0.999163, 2.671645),
    "ablation_MI": ({**RMIPO, "target": "beta", "schedule": "linear"}, 0.559525, 2.703527),
    "ablation_GM_ED": ({**RMIPO, "signal": "loglik"}, 0.896001, 2.671645),
    "ablation_MI_ED": ({**RMIPO, "target": "beta"}, 0.598622, 2.703527),
}


def test_a_method_is_whole():
    """With golden values, a label and colour of its own, and its rows in METHODS."""
    assert OBJECTIVES.keys() == {block["name"] for block, *_ in GOLDEN.values()}
    assert OBJECTIVES.keys() <= METHODS.keys() & METHOD_COLORS.keys()
    text = (ROOT / "docs/METHODS.md").read_text()
    assert [name for name in OBJECTIVES if text.count(f"\n| `{name}` |") < 2] == []


@pytest.mark.parametrize("variant", GOLDEN)
@pytest.mark.parametrize("case", CASES)
def test_golden_values(variant, case):
    block, *expected = GOLDEN[variant]
    state = expected.pop() if len(expected) == 3 else None
    objective = build_objective(block)
    scores = case_scores(case, prior_from=int(block.get("fidelity") == "release" and block["name"] == "rmipo"))
    # Golden values have six decimals: half a unit of the last one, and nothing beyond it.
    assert objective(scores, state).losses.item() == pytest.approx(expected["AB".index(case)], abs=6e-7)


@pytest.mark.parametrize("name", ["slic", "simper", "rmipo"])
def test_a_batch_has_the_losses_of_its_pairs(name):
    """So that golden values of single pairs hold for batches. test_objectives_trl.py has the other methods."""
    pairs, scores = batch()
    objective = build_objective({"name": name})
    torch.testing.assert_close(objective(scores).losses, torch.cat([objective(scores_of([p])).losses for p in pairs]))


def test_rewards_are_the_methods_own_without_the_margin():
    expected = [  # S = -1.2, -1.6; A = -0.4, -0.8; r_S = 0.3, -0.4; r_A = 0.1, -0.2
        ({"name": "dpo", "beta": 0.1}, (0.03, -0.04)),
        ({"name": "dpo", "beta": 0.1, **MEANS}, (0.01, -0.02)),
        ({"name": "slic"}, (-1.2, -1.6)),
        ({"name": "slic", **MEANS}, (-0.4, -0.8)),
        ({"name": "ipo", "tau": 0.1}, (0.01, -0.02)),
        ({"name": "ipo", "tau": 0.1, **SUMS}, (0.03, -0.04)),
        (CPO, (-0.12, -0.16)),
        ({"name": "kto", "beta": 0.1}, (0.03, -0.04)),
        ({"name": "simpo", "beta": 2}, (-0.8, -1.6)),
        ({"name": "simpo", "beta": 0.1, **SUMS}, (-0.12, -0.16)),
        (ALPHA, (2.5 * (-0.4 - 0.2 * 0.1), 2.5 * (-0.8 + 0.2 * 0.2))),
        (ALPHA | SUMS, (2.5 * (-1.2 - 0.2 * 0.3), 2.5 * (-1.6 + 0.2 * 0.4))),
        (BETA, (0.03, -0.04)),
        (EPSILON, (0.03 / 1.02, -0.04 / 1.02)),
        ({"name": "simper"}, (-0.4, -0.8)),
        (RMIPO, (-0.8, -1.6)),
        ({**RMIPO, "beta": 0.1, **SUMS}, (-0.12, -0.16)),
        ({**RMIPO, "target": "beta"}, (-0.8, -1.6)),
    ]
    assert {block["name"] for block, _ in expected} == set(OBJECTIVES)
    for block, value in expected:
        out = build_objective(block)(case_scores("A"), settled(0.05, 0.25) if "alpha" in block else None)
        assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx(value), block


def frozen_loss(block, out: ObjectiveOutput, scores: PairScores) -> torch.Tensor:
    """The loss with everything that must not carry a gradient held at its value in `out`."""
    objective = build_objective(block)
    nls = torch.nn.functional.softplus
    mean_difference = scores.chosen_logps / scores.chosen_lengths - scores.rejected_logps / scores.rejected_lengths
    if block["name"] == "rmipo" and block.get("target") == "beta":
        signal = out.diagnostics["delta_pmi"].clamp(min=0)
        factor = (block["gamma_min"] + (block["gamma_max"] - block["gamma_min"]) * torch.exp(-signal)) / out.gamma
        return nls(-(objective.beta * factor * mean_difference - out.gamma))
    if block["name"] in ("rmipo", "alpha-dpo"):
        margin = out.gamma * (objective.beta if block.get("fidelity") == "release" else 1)
        return nls(-(objective.beta * mean_difference - margin))
    if block["name"] == "beta-dpo":
        gap = scores.chosen_logps - scores.ref_chosen_logps - scores.rejected_logps + scores.ref_rejected_logps
        kept = out.diagnostics["kept"]
        return nls(-out.diagnostics["beta"] * gap) * kept * len(kept) / kept.sum()
    return objective(scores).losses


@pytest.mark.parametrize(
    "block",
    [{"name": name} for name in OBJECTIVES if name != "rmipo"]
    + [
        RMIPO,
        RMIPO | RELEASE,
        {**RMIPO, "target": "beta"},
        {**RMIPO, "signal": "loglik"},
        {"name": "beta-dpo", "fidelity": "paper", "beta": 0.3},
        {"name": "alpha-dpo", "fidelity": "paper"},
        {"name": "simper", "constant_length": 4},
        {"name": "cpo", "sft_normalization": "sequence"},
    ],
    ids=lambda block: "-".join(str(value) for value in block.values()),
)
def test_gradients_are_finite_differences_with_detached_parts_frozen(block):
    pairs, scores = batch(count=4)
    objective = build_objective(block)
    inputs = {f.name: getattr(scores, f.name).clone().requires_grad_() for f in fields(scores) if "logps" in f.name}
    out = objective(replace(scores, **inputs))
    assert not (out.losses == 0).all()
    out.losses.sum().backward()
    for name in ("chosen_logps", "rejected_logps"):
        for i in range(len(pairs)):
            losses = []
            for step in (1e-5, -1e-5):
                moved = getattr(scores, name).clone()
                moved[i] += step
                losses.append(frozen_loss(block, out, replace(scores, **{name: moved})).sum())
            expected = ((losses[0] - losses[1]) / 2e-5).item()
            assert inputs[name].grad[i].item() == pytest.approx(expected, abs=1e-8, rel=1e-6), (name, i)
    for name, value in inputs.items():
        if name.startswith(("prior_", "mismatched_", "ref_mismatched_")):
            assert value.grad is None, name


def gap(scores, per_token):
    chosen, rejected = scores.logratios(per_token)
    return chosen - rejected


def kl_log_ratios(scores):
    chosen = scores.mismatched_chosen_logps - scores.ref_mismatched_chosen_logps
    return chosen, scores.mismatched_rejected_logps - scores.ref_mismatched_rejected_logps


@pytest.mark.parametrize("name", ["alpha-dpo", "beta-dpo", "kto"])
def test_two_ranks_see_the_statistics_of_all_pairs(name):
    """Unequal shares of a batch give the same state and losses as the whole batch on one rank."""
    _, scores = batch(count=6)
    at = 2
    objective = build_objective({"name": name, **({"beta": 0.5} if name != "alpha-dpo" else {})})
    whole = objective.observe(objective.init_state(), scores)
    losses = objective(scores, whole).losses
    kept = whole.get("batch_kept", torch.ones(6)).double()
    shares = (slice(0, at), slice(at, None))
    parts = [PairScores(**{name: values[share] for name, values in vars(scores).items()}) for share in shares]
    if name == "kto":
        rounds = [[torch.cat(kl_log_ratios(part)) for part in parts]]
    else:
        rounds = [[gap(part, per_token=name == "alpha-dpo") for part in parts]]
        rounds += [[torch.full_like(rounds[0][rank], rank) for rank in (0, 1)]] if name == "beta-dpo" else []
    for rank, (part, mine) in enumerate(zip(parts, shares, strict=True)):
        left = iter(rounds)  # ranks run one after the other: what both gather is worked out beforehand

        def gather(tensor, left=left, rank=rank):
            pieces = next(left)
            torch.testing.assert_close(tensor, pieces[rank])
            return torch.cat(pieces)

        state = objective.observe(objective.init_state(), part, gather, rank)
        for key in state.keys() - {"batch_kept"}:
            torch.testing.assert_close(state[key], whole[key])
        # beta-DPO averages over the pairs a rank keeps, as its code does; the same pairs are kept on all ranks.
        rescale = (at if rank == 0 else 6 - at) / kept[mine].sum().clamp(min=1) / (6 / kept.sum())
        torch.testing.assert_close(objective(part, state).losses, losses[mine] * rescale)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_evaluation_before_the_first_step_is_a_first_micro_batch(name):
    """But beta-DPO leaves nothing out; what it adapts carries no gradient there either."""
    _, scores = batch()
    objective = build_objective({"name": name, **({"rho": 0.0} if name == "beta-dpo" else {})})
    gradients = []
    for state in (None, objective.init_state()):
        chosen = scores.chosen_logps.clone().requires_grad_()
        losses = objective(replace(scores, chosen_logps=chosen), state).losses
        losses.sum().backward()
        gradients.append((losses.detach(), chosen.grad))
    torch.testing.assert_close(*gradients)
    if name == "beta-dpo":
        default = build_objective({"name": name})
        assert default(scores, default.init_state()).diagnostics["kept"].tolist() == [1.0] * 5
        assert default(scores).diagnostics["kept"].sum() == 4


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "simper"])  # which has bounded losses
def test_losses_far_on_the_wrong_side_are_finite(name):
    """Differences of thousands of nats, where float32's sigmoid is 0 and its logarithm infinite."""
    _, scores = batch(dtype=torch.float32)
    chosen = (scores.chosen_logps - 1000 * scores.chosen_lengths).requires_grad_()
    block = {"name": name, **({"beta": 2} if hasattr(OBJECTIVES[name], "beta") else {})}
    losses = build_objective(block)(replace(scores, chosen_logps=chosen)).losses
    losses.sum().backward()
    assert losses.isfinite().all() and chosen.grad.isfinite().all()
    assert name == "kto" or (losses.max() > 1 and (chosen.grad != 0).any())


def test_beta_dpo_keeps_by_weight():
    """With all but one pair dropped, pair i is kept with a probability proportional to exp(-z_i^2 / 2)."""
    _, scores = batch(count=5)
    objective = build_objective({"name": "beta-dpo", "rho": 0.8})
    values = gap(scores, per_token=False)
    z = (values - values.mean()) / values.std()
    weights = torch.exp(-(z**2) / 2)
    counts = torch.zeros(5)
    draws = 3000
    for step in range(draws):
        state = objective.init_state() | {"steps": torch.tensor(float(step), dtype=torch.float64)}
        # Running values that leave the statistics at those of this batch, whatever the step.
        weight = 1 - 0.9**step
        state |= {"gap_mean": values.mean() * weight, "gap_std": values.std() * weight}
        kept = objective.observe(state, scores)["batch_kept"]
        assert kept.sum() == 1
        counts += kept
    expected = weights / weights.sum()
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4 * sigma).all()


@pytest.mark.parametrize(("pairs", "rho", "kept"), [(8, 0.2, 6), (8, 0.0, 8), (5, 0.5, 2), (2, 0.9, 1)])
def test_beta_dpo_kept_count_and_loss(pairs, rho, kept):
    _, scores = batch(count=pairs)
    objective = build_objective({"name": "beta-dpo", "rho": rho})
    out = objective(scores)
    chosen = out.diagnostics["kept"].bool()
    assert chosen.sum() == kept and out.diagnostics["kept"].mean().item() == kept / pairs
    values = gap(scores, per_token=False)
    beta = max(1e-3, 0.1 * (1 + 0.6 * (values[chosen].mean() - values.mean()).item()))
    expected = torch.nn.functional.softplus(-beta * values[chosen]).mean()
    torch.testing.assert_close(out.losses.mean(), expected)
    assert (out.losses[~chosen] == 0).all()


def test_epsilon_dpo_follows_the_perturbed_policies():
    _, scores = batch(count=9)
    base = scores.chosen_logps - scores.rejected_logps
    scores = replace(  # k is 0 wherever the policy is not strictly between the perturbed ones, whatever their order
        scores,
        plus_logratios=base + torch.tensor([0.1, -0.1, 0.2, -0.1, 0.0, 0.1, 0.0, -0.1, 0.1], dtype=torch.float64),
        minus_logratios=base + torch.tensor([-0.1, 0.1, 0.1, -0.2, -0.1, 0.0, 0.1, 0.0, 0.2], dtype=torch.float64),
    )
    objective = build_objective({"name": "epsilon-dpo", "beta": 0.1, "epsilon": 0.5})
    out = objective(scores)
    assert out.diagnostics["k"].tolist() == [1, -1, 0, 0, 0, 0, 0, 0, 0]
    beta = torch.tensor([0.1 / 1.5, 0.1 / 0.5, *[0.1] * 7], dtype=torch.float64)
    torch.testing.assert_close(out.chosen_rewards, beta * (scores.chosen_logps - scores.ref_chosen_logps))
    k = torch.tensor([1.0, 1.0, 0.0, -1.0])
    state = objective.end_step(objective.init_state(), {"k": k})
    assert state["beta"].item() == pytest.approx(0.1 / (1 + 0.5 * 0.25))
    assert objective(scores, state).diagnostics["running_beta"][0].item() == pytest.approx(state["beta"].item())


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (
            {"name": "rmipo", "gama_min": 1, "schedule": "step", "beta": -1, "span": "2", "length_normalization": 1},
            ["objective.gama_min", "gamma_min", "objective.schedule is 'step'", "objective.beta is -1",
             "objective.span is '2'", "objective.length_normalization is 1"],
        ),
        ({"name": "rmipo", "gamma_min": 1.7, "gamm": 1}, ["objective.gamma_min is 1.7", "gamma_max", "objective.gamm "]),
        ({"name": "rmipo", "fidelity": "release", "prior_context": "bos"}, ["objective.prior_context is 'bos'"]),
    ],
)  # fmt: skip
def test_errors_name_every_wrong_key_at_once(block, named):
    with pytest.raises(ValueError) as error:
        build_objective(block)
    assert [part for part in named if part not in str(error.value)] == []


def test_objectives_that_need_several_pairs_say_so():
    several = {name for name in OBJECTIVES if build_objective({"name": name}).min_pairs == 2}
    assert several == {"kto", "alpha-dpo", "beta-dpo"}
    shuffled = build_objective({"name": "rmipo", "signal": "shuffled"})
    assert (shuffled.min_pairs, shuffled.regroups) == (2, "nothing")  # sorted by length it would be no shuffle


RECIPES = ROOT / "recipes"


def read_recipe(path: str) -> dict:
    values = {}
    for _, layer in read_layers(RECIPES / path):
        values = merge(values, layer)
    return values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_has_a_sweep_and_every_baseline_an_overlay_whose_points_build(name):
    sweep = read_recipe(f"sweeps/{name}.yaml")
    command = " ".join(sweep["command"])
    assert command == f"${{env}} python ${{program}} --model llama3-8b-instruct --method {name} ${{args}}"
    grid = {key: parameter["values"] for key, parameter in sweep["parameters"].items()}
    assert grid.pop("learning_rate") == [3e-7, 5e-7, 8e-7, 1e-6]
    assert all(key.startswith("objective.") for key in grid)
    for point in itertools.product(*grid.values()):
        build_objective({"name": name, **{key[10:]: value for key, value in zip(grid, point, strict=True)}})
    if name == "rmipo":
        return
    settings = {"mistral-7b-base", "mistral-7b-instruct", "llama3-8b-base", "llama3-8b-instruct", "tiny"}
    for setting, values in read_recipe(f"methods/{name}.yaml")["per_setting"].items():
        settings.remove(setting)
        low, high = (1e-4, 3e-4) if setting == "tiny" else (3e-7, 1e-6)
        assert low <= values["learning_rate"] <= high
    assert not settings


ABLATIONS = {
    "table3-row1": {"signal": "loglik", "schedule": "linear"},
    "table3-row2": {"target": "beta", "schedule": "linear"},
    "table3-row4": {"signal": "loglik"},
    "table3-row5": {"target": "beta"},
    "table7-linear": {"schedule": "linear"},
    "table7-cosine": {"schedule": "cosine"},
    "table7-constant": {"schedule": "constant"},
    "table8-0-2": {"gamma_min": 0, "gamma_max": 2},
    "table8-0.5-1.4": {"gamma_min": 0.5, "gamma_max": 1.4},
    "table8-1-1.2": {"gamma_min": 1.0, "gamma_max": 1.2},
    "fidelity-release": RELEASE,
}


def test_ablations_are_the_papers_variants_and_none_is_left_untested():
    for name, variant in ABLATIONS.items():
        overlay = read_recipe(f"ablations/{name}.yaml")
        assert build_objective(RMIPO | overlay["objective"]) == build_objective(RMIPO | variant), name
    without_length_normalization = {f"table5-{name}" for name in ("rmipo", "simpo", "alpha-dpo", "simper")}
    files = {path.stem for path in (RECIPES / "ablations").glob("*.yaml")}
    assert files == ABLATIONS.keys() | without_length_normalization | {"fidelity-sequence", "initial-prior", "shuffled"}
    for name in without_length_normalization - {"table5-simper"}:
        assert read_recipe(f"ablations/{name}.yaml")["objective"]["length_normalization"] is False


def test_alpha_dpo_keeps_its_margin_without_length_normalization():
    """Table 5 changes the reward only: the margin's level and its spread over pairs stay as they were."""
    _, scores = batch(count=6)
    for setting in ("mistral-7b-instruct", "llama3-8b-instruct"):
        margins = []
        for overlay in map(read_recipe, ("methods/alpha-dpo.yaml", "ablations/table5-alpha-dpo.yaml")):
            block = overlay["objective"] | overlay["per_setting"][setting]["objective"]
            margins.append(build_objective(block)(scores).gamma)
        torch.testing.assert_close(margins[0].mean(), margins[1].mean())
        torch.testing.assert_close(margins[0].std(), margins[1].std())


def test_the_loglik_signal_is_per_token_where_rewards_are_sums():
    _, scores = batch()
    means, sums = (build_objective({"name": "rmipo", "signal": "loglik", **reward}) for reward in (MEANS, SUMS))
    torch.testing.assert_close(means(scores).gamma, sums(scores).gamma)


def test_shuffled_margins_are_those_of_other_pairs():
    _, scores = batch(count=6)
    own, shuffled = (build_objective({"name": "rmipo", "signal": signal})(scores) for signal in ("pmi", "shuffled"))
    assert shuffled.gamma.tolist() == [own.gamma[-1].item(), *own.gamma[:-1].tolist()]
    assert len(set(own.gamma.tolist())) == 3
    rewards = shuffled.chosen_rewards - shuffled.rejected_rewards
    torch.testing.assert_close(shuffled.losses, -torch.nn.functional.logsigmoid(rewards - shuffled.gamma))


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_summary_of_rmipo_by_hand():
    objective = build_objective({"name": "rmipo", "gamma_max": 1.4})
    # The share at the upper bound is as float32 rounds it; the lower one is only approached.
    gamma = torch.tensor([1.4, 1.4, 1.3999, 1.3, 0.32, 0.309, 0.305, 0.3])
    assert gamma[0].double() < 1.4
    summary = objective.summarize({"gamma": gamma})
    assert (summary["rmipo/gamma_at_max"], summary["rmipo/gamma_at_min"]) == (2 / 8, 3 / 8)
    # A correlation with equal values on either side would be NaN in every log line of such a batch: it is left out.
    columns = {"gamma": t(1, 1, 1), "delta_pmi": t(0.1, 0.2, 0.4), "pmi_chosen": t(1, 1, 1), "pmi_rejected": t(1, 1, 1)}
    columns |= {"chosen_lengths": t(3, 4, 5), "rejected_lengths": t(1, 2, 3)}
    objective = build_objective({"name": "rmipo"})
    assert "rmipo/corr_delta_pmi_length" not in objective.summarize(columns)
    columns["rejected_lengths"] = t(1, 2, 2)
    assert objective.summarize(columns)["rmipo/corr_delta_pmi_length"] == pytest.approx(0.944911)
    columns["delta_pmi"] = t(0.2, 0.2, 0.2)
    assert "rmipo/corr_delta_pmi_length" not in objective.summarize(columns)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_columns_are_detached_and_of_one_type(name):
    """The trainer stacks all columns of a micro-batch into one table and gathers that."""
    _, scores = batch(dtype=torch.float32)
    columns = {key: None if v is None else v.clone().requires_grad_("logps" in key) for key, v in vars(scores).items()}
    objective = build_objective({"name": name})
    state = objective.observe(objective.init_state(), PairScores(**columns))
    output = objective(PairScores(**columns), state or None)
    assert output.losses.requires_grad and output.losses.shape == (5,)
    found = {"chosen": output.chosen_rewards, "rejected": output.rejected_rewards, **output.diagnostics}
    found |= {} if output.gamma is None else {"gamma": output.gamma}
    for key, column in found.items():
        assert (column.shape, column.dtype, column.requires_grad) == ((5,), torch.float32, False), key


def gaps(*values):
    zeros = torch.zeros(len(values), dtype=torch.float64)
    ones = zeros + 1
    return PairScores(t(*values), zeros, ones, ones, ref_chosen_logps=zeros, ref_rejected_logps=zeros)


@pytest.mark.parametrize("name", ["alpha-dpo", "beta-dpo"])
def test_running_statistics(name):
    """The deviation is the unbiased one of each micro-batch, at least a millionth, and 0 of one pair: an epoch's rest."""
    objective = build_objective({"name": name})

    def statistics(pairs, state):
        columns = objective(pairs, {k: v for k, v in state.items() if not k.startswith("batch_")}).diagnostics
        return columns["gap_mean"][0].item(), columns["gap_std"][0].item()

    start = objective.init_state()  # an evaluation before the first step takes the statistics of its own pairs
    assert statistics(gaps(1, 3), start) == pytest.approx((2, 2**0.5))
    assert statistics(gaps(0, 1e-4), start)[1] == pytest.approx(1e-4 / 2**0.5)
    assert statistics(gaps(3, 3), start)[1] == pytest.approx(1e-6)
    state = objective.observe(start, gaps(1, 3))
    assert objective(gaps(1, 3), state).losses.equal(objective(gaps(1, 3)).losses)
    two = objective.observe(state, gaps(0, 6, 0, 6))  # deviations of sqrt(2) and sqrt(12)
    deviation = (0.9 * 0.1 * 2**0.5 + 0.1 * 12**0.5) / 0.19
    assert statistics(gaps(1, 2), two) == pytest.approx(((0.9 * 0.1 * 2 + 0.1 * 3) / 0.19, deviation))
    rest = objective.observe(state, gaps(7))
    assert rest["gap_mean"].item() == pytest.approx(0.9 * 0.1 * 2 + 0.1 * 7)
    assert rest["gap_std"].item() == pytest.approx(0.9 * 0.1 * 2**0.5)


def test_beta_dpo_selects_by_statistics_that_count_the_batch_itself():
    """Running mean 0 and deviation 1e-6 before it, 1 and 0.2 with it: the pair at 1 is the nearest, not the one at 0."""
    scores = gaps(0, 1, *[10.2, 10.4] * 24)
    objective = build_objective({"name": "beta-dpo", "rho": 0.98})
    for step in range(100):
        state = objective.observe(settled(0, 1e-6) | {"steps": t(1e6 + step)[0]}, scores)
        assert state["batch_kept"].nonzero().tolist() == [[1]]
    for gap, beta in ((-100, 1e-3), (100, 0.1 * (1 + 0.6 * 100))):
        output = build_objective({"name": "beta-dpo"})(gaps(gap, gap), settled(0, 1))
        assert output.diagnostics["beta"].tolist() == pytest.approx([beta] * 2)


def test_responses_and_shares_that_are_empty_give_no_nan():
    state = settled(0, 1) | {"batch_kept": torch.zeros(2, dtype=torch.bool), "batch_center": t(0.5)[0]}
    assert build_objective({"name": "beta-dpo"})(gaps(1, 2), state).losses.tolist() == [0, 0]
    scores = PairScores(t(0, -2), t(-2, 0), t(0, 4), t(4, 0))
    assert [value.tolist() for value in scores.logps(per_token=True)] == [[0, -0.5], [-0.5, 0]]
    scores = PairScores(t(0, 0), t(-2, -1), t(0, 0), t(4, 3))
    assert build_objective({"name": "cpo"})(scores).diagnostics["nll"].tolist() == [0, 0]
    torch.testing.assert_close(pmi(t(-0.5, 0.0), t(0.0, 0.0), t(1, 0), t(0, 0)), t(-0.5, 0.0))


def test_losses_with_label_smoothing_and_sft_by_hand():
    # beta 2: reward differences 2 and -2; gamma 0.3 + 1.3 / 2 = 0.95 and 1.6, so margins of 1.05 and -3.6.
    plain, flipped = -logsigmoid(t(1.05, -3.6)), -logsigmoid(t(-1.05, 3.6))
    losses, gamma = rmipo_loss(**PAIRS)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gamma, t(0.95, 1.6))
    torch.testing.assert_close(rmipo_loss(**PAIRS, label_smoothing=0.1)[0], 0.9 * plain + 0.1 * flipped)
    # 10 nats over the batch's 6 chosen tokens, of which 2 and 8 are the pairs'.
    torch.testing.assert_close(rmipo_loss(**PAIRS, sft_weight=0.5)[0], plain + 0.5 * t(2, 8) * 2 / 6)


@pytest.mark.parametrize(
    ("schedule", "span", "expected"),  # the kept share of the range at d = -1, 0, 0.5, 1, 2, 3
    [
        ("exponential", {}, [1, 1, math.exp(-0.5), math.exp(-1), math.exp(-2), math.exp(-3)]),
        ("linear", {}, [1, 1, 0.75, 0.5, 0, 0]),
        ("linear", {"span": 1.0}, [1, 1, 0.5, 0, 0, 0]),
        ("cosine", {}, [1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0]),
        ("cosine", {"span": 1.0}, [1, 1, 0.5, 0, 0, 0]),
        ("constant", {}, [0.5] * 6),
    ],
)
def test_schedules(schedule, span, expected):
    """With the default span, 2, the three decays keep the same area: Table 7 compares shapes, not mean margins."""
    gamma = scheduled_margin(t(-1, 0, 0.5, 1, 2, 3), 0.3, 1.6, schedule, **span)
    torch.testing.assert_close(gamma, 0.3 + 1.3 * t(*expected))


# Two pairs by hand: A_w = -1, -2; A_l = -2, -1; the first has delta_pmi ln 2, the second -1, with lengths 2, 4 and 3, 5.
PAIRS = {
    "chosen_logps": t(-2, -8),
    "rejected_logps": t(-6, -5),
    "prior_chosen_logps": t(-2 - 2 * math.log(2), -8),
    "prior_rejected_logps": t(-6, -10),
    "chosen_lengths": t(2, 4),
    "rejected_lengths": t(3, 5),
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma_min": 2.0}, {"beta": -1.0}, {"schedule": "exp"}, {"pmi_normalization": "tokens"}, {"fidelity": "Release"},
        {"signal": "loglikelihood"}, {"target": "Beta"}, {"label_smoothing": 0.7}, {"prior_chosen_logps": None},
    ],
)  # fmt: skip
def test_what_would_be_another_loss_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        rmipo_loss(**PAIRS | wrong)


def test_the_objective_of_a_recipe_calls_the_function_and_simpo_takes_both_too():
    names = ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    scores = PairScores(**{name: PAIRS[name] for name in names})
    block = {"name": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2, "sft_weight": 3.0}
    objective = build_objective(block)
    plain, flipped = -logsigmoid(t(1.5, -2.5)), -logsigmoid(t(-1.5, 2.5))
    torch.testing.assert_close(objective(scores).losses, 0.8 * plain + 0.2 * flipped + 3 * t(2, 8) * 2 / 6)
    assert objective.micro_batch_matters and not build_objective({"name": "simpo"}).micro_batch_matters
    assert build_objective({"name": "rmipo", "sft_weight": 1e-3}).micro_batch_matters
    scores = PairScores(**PAIRS)
    options = {"schedule": "cosine", "span": 1.0, "label_smoothing": 0.1, "sft_weight": 0.5}
    losses, gamma = rmipo_loss(**PAIRS, **options)
    output = build_objective({"name": "rmipo", **options})(scores)
    assert torch.equal(output.losses, losses) and torch.equal(output.gamma, gamma)
    without_priors = PAIRS | {"prior_chosen_logps": None, "prior_rejected_logps": None}
    torch.testing.assert_close(rmipo_loss(**without_priors, schedule="constant")[1], t(0.95, 0.95))

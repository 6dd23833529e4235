"""Rank rules by loops and by hand, the skipping of layers, and a budget against trying all ranks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtrain.core import (
    Alignment,
    BudgetRanks,
    Cost,
    EnergyRanks,
    EvbmfRanks,
    ExplicitRanks,
    Factorization,
    Kernel,
    PerFactorization,
    SingularValueRanks,
    analyse_weight,
    chain_error,
    evbmf,
    natural_factorization,
    plan_layers,
    toolbox_rule,
    truncate_weight,
)

SVD, TUCKER2 = Factorization.SVD, Factorization.TUCKER2


def kernel(name, shape, seed=0, stride=None, positions=1):
    rng = np.random.RandomState(seed)
    decay = [np.linalg.qr(rng.randn(n, n))[0] * 0.8 ** np.arange(n) for n in shape[:2]]
    weight = np.einsum("ab,cd,bd...->ac...", decay[0], decay[1], rng.randn(*shape))
    analysis = analyse_weight(weight, natural_factorization(shape))
    return Kernel(name, analysis, stride or (1,) * (len(shape) - 2), positions)


def with_values(values):
    return Kernel("l", analyse_weight(np.diag(np.array(values, dtype=np.float64)), SVD), ())


@pytest.mark.parametrize("rank, full, expected", [
    (0, 64, 16), (15, 64, 16), (16, 64, 16), (23, 64, 16), (24, 64, 24), (64, 64, 64), (5, 6, 6), (1, 20, 8), (3, 8, 8),
    (8, 40, 8), (7, 100, 24)])
def test_alignment_of_tucker_ranks(rank, full, expected):
    assert Alignment(8, 0.25).rank(rank, full, TUCKER2) == expected


def test_the_minimal_ratio_is_tuckers_only():
    assert Alignment(4, 0.5).rank(5, 64, SVD) == 4
    assert Alignment(4, 0.5).rank(5, 64, TUCKER2) == 32
    assert Alignment(1, 0.0).rank(5, 64, TUCKER2) == 5


@given(values=st.lists(st.floats(0.01, 10), min_size=1, max_size=12), share=st.floats(0, 1))
def test_shares_by_loops(values, share):
    values = sorted(values, reverse=True)
    for rule, power in ((EnergyRanks(share), 2), (SingularValueRanks(share), 1)):
        count, total, wanted = 0, 0.0, share * sum(v**power for v in values)
        while count == 0 or total < wanted * (1 - 1e-9):
            total, count = total + values[count] ** power, count + 1
        assert rule.rank(np.array(values), 12, 12) == count


def test_evbmf_ranks_of_both_unfoldings():
    rng = np.random.RandomState(0)
    weight = np.einsum("or,rshw,si->oihw", rng.randn(32, 5), rng.randn(5, 3, 3, 3), rng.randn(3, 24))
    weight = weight + 0.1 * rng.randn(*weight.shape)
    found = EvbmfRanks().choose([Kernel("c", analyse_weight(weight, TUCKER2), (1, 1))], Alignment(1, 0.0))
    assert found == {"c": (5, 3)}
    unfolded = np.linalg.svd(weight.reshape(32, -1), compute_uv=False)
    assert evbmf(unfolded, 32, 24 * 9).rank == 5


def test_the_toolbox_rule_takes_half_of_the_singular_values():
    found = toolbox_rule(0.5).choose([with_values([4, 3, 2, 1])], Alignment(1))
    assert found == {"l": (2,)}


def test_zero_weights_keep_one_rank():
    zeros = Kernel("z", analyse_weight(np.zeros((20, 30)), SVD), ())
    for rule in (EnergyRanks(0.5), toolbox_rule()):
        assert rule.choose([zeros], Alignment(1)) == {"z": (1,)}


def test_layers_that_would_not_save_are_skipped_and_say_why():
    kernels = [kernel("fat", (64, 64, 3, 3)), kernel("thin", (64, 8, 3, 3)), kernel("flat", (64, 64, 1, 1)),
               kernel("head", (10, 64))]
    plans = {plan.name: plan for plan in plan_layers(kernels, EnergyRanks(1.0), Alignment(8))}
    assert plans["flat"].ranks == ()
    assert "would take 4096 multiply-adds per output position instead of 4096" in plans["flat"].reason
    assert plans["fat"].ranks == (56, 56)  # 35392 weights instead of 36864
    assert plans["fat"].parameters == (36864, 2 * 56 * 64 + 9 * 56 * 56)
    assert "more than align_channels = 8" in plans["thin"].reason
    plans = {plan.name: plan for plan in plan_layers(kernels, SingularValueRanks(0.3), Alignment(8))}
    assert plans["flat"].ranks == (8,) and plans["flat"].reason == ""
    assert plans["flat"].parameters == plans["flat"].multiply_adds == (4096, 1024)
    assert plans["head"].ranks == (8,) and plans["head"].parameters == (640, 8 * 74)


def test_a_stride_counts_against_the_first_factor():
    for stride, factorized in (((1, 1), True), ((4, 4), False)):
        plan, = plan_layers([kernel("c", (32, 64, 3, 3), stride=stride)], ExplicitRanks({"c": (16, 32)}), Alignment())
        assert bool(plan.ranks) is factorized


def test_positions_multiply():
    plan, = plan_layers([kernel("c", (32, 64, 3, 3), positions=100)], ExplicitRanks({"c": (8, 8)}), Alignment())
    assert plan.multiply_adds == (100 * 32 * 64 * 9, 100 * (8 * 64 + 8 * 8 * 9 + 32 * 8))


def test_explicit_ranks_are_taken_as_they_are_and_others_left():
    kernels = [kernel("a", (20, 30)), kernel("b", (20, 30))]
    first, second = plan_layers(kernels, ExplicitRanks({"b": (5,)}), Alignment(8))
    assert (first.ranks, second.ranks) == ((), (5,))
    assert first.reason == "the rank rule leaves it as it is"


@pytest.mark.parametrize("ranks, message", [({"x": (3,)}, "those are 'a'"), ({"a": (21,)}, r"1..\(20,\)"),
                                            ({"a": (2, 2)}, "'a'"), ({"a": (0,)}, "'a'")])
def test_impossible_explicit_ranks_are_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        plan_layers([kernel("a", (20, 30))], ExplicitRanks(ranks), Alignment(8))


def test_rules_can_differ_by_factorization():
    rule = PerFactorization({SVD: ExplicitRanks({"l": (3,)}), TUCKER2: EnergyRanks(0.5)})
    found = rule.choose([kernel("l", (20, 30)), kernel("c", (20, 30, 3, 3))], Alignment(1, 0.0))
    assert found["l"] == (3,) and len(found["c"]) == 2


KERNELS = [kernel("conv", (24, 20, 3, 3), 1, positions=16), kernel("point", (32, 24, 1, 1), 2, positions=16),
           kernel("head", (16, 40), 3)]


def cost_of(plans, cost):
    return sum((plan.parameters if cost is Cost.PARAMETERS else plan.multiply_adds)[1] for plan in plans)


def squared_errors(kernels, ranks):
    return sum(chain_error(k.analysis.weight, truncate_weight(k.analysis, ranks[k.name], 0)) ** 2
               for k in kernels if ranks.get(k.name))


@pytest.mark.parametrize("cost", list(Cost))
@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.9])
def test_a_budget_is_met_and_used(cost, share):
    plans = plan_layers(KERNELS, BudgetRanks(share, cost), Alignment(4, 0.0))
    before = sum((p.parameters if cost is Cost.PARAMETERS else p.multiply_adds)[0] for p in plans)
    assert 0.8 * share * before < cost_of(plans, cost) <= share * before


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_budget_is_shared_out_nearly_as_well_as_by_trying_everything(share):
    align = Alignment(4, 0.0)
    found = {plan.name: plan.ranks for plan in plan_layers(KERNELS, BudgetRanks(share), align)}
    total = sum(k.analysis.weight.size for k in KERNELS)
    choices = []
    for k in KERNELS:
        ranks = itertools.product(*[range(4, full + 1, 4) for full in k.full])
        plans = [plan_layers([k], ExplicitRanks({k.name: r}), align)[0] for r in ranks]
        kept = {plan.ranks: plan.parameters[1] for plan in plans}
        kept[()] = k.analysis.weight.size
        choices.append([(cost, squared_errors([k], {k.name: r})) for r, cost in kept.items()])
    best = min(sum(error for _, error in combination) for combination in itertools.product(*choices)
               if sum(cost for cost, _ in combination) <= share * total)
    assert squared_errors(KERNELS, found) <= 1.6 * best + 1e-3


def test_a_whole_budget_leaves_the_model_as_it_is():
    assert not any(plan.ranks for plan in plan_layers(KERNELS, BudgetRanks(1.0), Alignment(4, 0.0)))


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(ValueError, match=r"the least ranks .* need 0\.\d+"):
        plan_layers(KERNELS, BudgetRanks(0.01), Alignment(8))


@pytest.mark.parametrize("make", [lambda: Alignment(0), lambda: Alignment(8, 1.5), lambda: EnergyRanks(-0.1),
                                  lambda: SingularValueRanks(1.1), lambda: BudgetRanks(0.0)])
def test_bad_arguments_are_refused_at_construction(make):
    with pytest.raises(ValueError, match="must"):
        make()

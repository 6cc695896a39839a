"""Votes against a plain count, and the plans that follow from them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex import BARE, votes
from molex.adapter import new_adapter
from molex.config import VoteConfig
from molex.native import votes as native_votes
from molex.packing import Packed
from molex.routing import Choice, Router, flat_route
from molex.votes import Ballots, load_balance
from tests.molex.native.kernels import needs_kernels
from tests.tiny import HIDDEN, LAYERS, adapter_config, molex_config, random_adapter

CPU = torch.device("cpu")
MODE, MEAN = VoteConfig("mode"), VoteConfig("mean")
SIGMOID = VoteConfig("mean", "sigmoid")


def elect_all(elect, requests, vote, top_k=1):
    """Hold the votes of several requests, given as lists of rows of logits."""
    lengths = torch.tensor([len(rows) for rows in requests])
    owners = torch.arange(len(requests)).repeat_interleave(lengths)
    logits = torch.tensor([row for rows in requests for row in rows], dtype=torch.float64)
    return elect(Ballots(logits, owners, len(requests)), vote, top_k)


ELECTIONS = [votes.elect, pytest.param(native_votes.elect, marks=needs_kernels, id="natively")]


def tokens(num_layers, values):
    row = st.lists(values, min_size=num_layers, max_size=num_layers)
    return st.lists(row, min_size=1, max_size=6)


# Few different values, so that ties are common.
FEW_VALUES = st.sampled_from([-1.0, 0.0, 1.0, 2.0])


def ballots(values=FEW_VALUES):
    return st.integers(2, 5).flatmap(lambda n: st.lists(tokens(n, values), min_size=1, max_size=5))


@pytest.mark.parametrize("elect", ELECTIONS)
@given(ballots(), st.sampled_from([1, 2]))
def test_mode_counts_each_tokens_first_choice(elect, requests, top_k):
    election = elect_all(elect, requests, MODE, top_k)
    for rows, layers in zip(requests, election.layers.tolist(), strict=True):
        votes = Counter(row.index(max(row)) for row in rows)
        ranking = sorted(range(len(rows[0])), key=lambda layer: (-votes[layer], layer))
        assert layers == ranking[:top_k]


@pytest.mark.parametrize("elect", ELECTIONS)
@given(ballots(st.floats(-5, 5)), st.sampled_from([MEAN, SIGMOID]), st.sampled_from([1, 2]))
def test_mean_takes_the_largest_average_score(elect, requests, vote, top_k):
    election = elect_all(elect, requests, vote, top_k)
    for rows, layers in zip(requests, election.layers.tolist(), strict=True):
        logits = torch.tensor(rows, dtype=torch.float64)
        scores = (logits.softmax(dim=1) if vote is MEAN else logits.sigmoid()).mean(dim=0)
        rest = [s for layer, s in enumerate(scores.tolist()) if layer not in layers]
        chosen = [scores[layer].item() for layer in layers]
        assert chosen == sorted(chosen, reverse=True)
        assert min(chosen) >= max(rest, default=0.0) - 1e-6


@pytest.mark.parametrize("elect", ELECTIONS)
@pytest.mark.parametrize("vote", [MODE, MEAN, SIGMOID])
def test_ties_go_to_the_smallest_index(elect, vote):
    assert elect_all(elect, [[[1.0, 1.0, 1.0]]], vote, 2).layers.tolist() == [[0, 1]]
    assert elect_all(elect, [[[0.0, 2.0, 2.0], [0.0, 2.0, 2.0]]], vote).layers.tolist() == [[1]]


@pytest.mark.parametrize("elect", ELECTIONS)
@given(ballots(st.floats(-5, 5)), st.sampled_from([MODE, MEAN, SIGMOID]), st.sampled_from([1, 2]))
def test_weights_are_the_mean_probabilities_renormalised(elect, requests, vote, top_k):
    election = elect_all(elect, requests, vote, top_k)
    for rows, layers, weights in zip(
        requests, election.layers.tolist(), election.weights.tolist(), strict=True
    ):
        mean = torch.tensor(rows, dtype=torch.float64).softmax(dim=1).mean(dim=0).tolist()
        total = sum(mean[layer] for layer in layers)
        assert weights == pytest.approx([mean[layer] / total for layer in layers], rel=1e-5)
        assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("elect", ELECTIONS)
@given(ballots(), st.sampled_from([MODE, MEAN, SIGMOID]), st.sampled_from([1, 2]))
def test_a_vote_is_the_same_alone_and_in_company(elect, requests, vote, top_k):
    together = elect_all(elect, requests, vote, top_k)
    alone = [elect_all(elect, [rows], vote, top_k) for rows in requests]
    assert together.layers.tolist() == [one.layers[0].tolist() for one in alone]


@pytest.mark.parametrize("elect", ELECTIONS)
@pytest.mark.parametrize("vote", [MODE, MEAN, SIGMOID])
def test_logits_that_are_not_finite_still_choose_layers_that_there_are(elect, vote):
    spoilt, sound = [[float("nan")] * 3, [float("inf")] * 3], [[0.0, 2.0, 1.0]]
    election = elect_all(elect, [spoilt, sound], vote, 2)
    assert all(0 <= layer < 3 for layer in election.layers[0])
    assert election.layers[1].tolist() == ([1, 0] if vote is MODE else [1, 2])


@pytest.mark.parametrize("elect", ELECTIONS)
def test_the_only_layer_has_weight_one_even_if_its_probability_underflows(elect):
    logits = torch.tensor([[30.0, 200.0]])  # both sigmoids are 1 in float32, so the smaller index wins
    election = elect(Ballots(logits, torch.tensor([0]), 1), SIGMOID, 1)
    assert election.layers.tolist() == [[0]]
    assert election.weights.tolist() == [[1.0]]


def ballots_of(probabilities, owners):
    """Tokens whose gate gives these probabilities."""
    logits = torch.tensor(probabilities, dtype=torch.float64).clamp_min(1e-300).log()
    return Ballots(logits, torch.tensor(owners), max(owners) + 1)


def test_load_balance_is_one_where_choices_are_even_and_t_where_they_collapse():
    even = ballots_of([[0.7, 0.1, 0.1, 0.1][-n:] + [0.7, 0.1, 0.1, 0.1][:-n] for n in range(4)], [0, 0, 1, 1])
    assert load_balance(even).item() == pytest.approx(1)
    collapsed = ballots_of([[0.0, 0.0, 1.0, 0.0]] * 3, [0, 0, 1])
    assert load_balance(collapsed).item() == pytest.approx(4)


def test_load_balance_is_the_formula():
    ballots = ballots_of([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3], [0.2, 0.7, 0.1]], [0, 0, 1])
    # Two of three tokens choose layer 0; the requests' mean probabilities are (.5, .3, .2) and (.2, .7, .1).
    expected = 3 * (2 / 3 * 0.35 + 1 / 3 * 0.5 + 0 * 0.15)
    assert load_balance(ballots).item() == pytest.approx(expected)


def test_flat_route_lists_layers_or_pairs():
    assert flat_route((Choice((3,), (1.0,)), Choice((0,), (1.0,)))) == [3, 0]
    assert flat_route((Choice((3, 1), (0.7, 0.3)),)) == [(3, 1)]
    assert flat_route(()) == []


def router(adapters, members, lengths, voters=None, pinned=None):
    packed = Packed(lengths, [0] * len(lengths), members, causal=False, device=CPU)
    return Router(adapters, packed, voters or lengths, pinned or [None] * len(lengths))


def hidden_for(lengths, seed=0):
    return torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 4), min_size=4, max_size=9))
@torch.no_grad()
def test_every_request_gets_its_pair_of_weights_in_full(spec_of, seed, lengths):
    spec = spec_of("roberta")
    mixing = [
        random_adapter(spec, seed=seed, molex=molex_config()),
        random_adapter(spec, seed=seed + 1, molex=molex_config([1, 2], vote={"rule": "mean"}, top_k=2)),
    ]
    adapters = [BARE, *mixing, random_adapter(spec, seed=3)]
    members = sorted(n % 4 for n in range(len(lengths)))
    routes = router(adapters, members, lengths)
    for depth in range(LAYERS):
        plan = routes.plan(depth, hidden_for(lengths, seed + depth))
        total = plan.own.clone()
        layers = [layer for layer, _, _ in plan.groups]
        assert depth not in layers  # the own layer runs once
        assert layers == sorted(set(layers))
        total.index_add_(0, torch.from_numpy(plan.requests), plan.weights)
        torch.testing.assert_close(total, torch.ones(len(lengths)))
        mixes = [depth in adapters[member].gates for member in members]
        assert plan.requests.tolist() == [i for _, requests, _ in plan.groups for i in requests]
        routed = set(plan.requests.tolist())
        assert routed <= {request for request, mixed in enumerate(mixes) if mixed}
        assert all(plan.own[i] == 1 for i, mixed in enumerate(mixes) if not mixed)
    expected_lengths = {0: 0, 1: LAYERS, 2: 2, 3: 0}
    assert [len(route) for route in routes.routes] == [expected_lengths[member] for member in members]


def test_nothing_is_weighted_where_nothing_mixes(spec_of):
    adapter = random_adapter(spec_of("roberta"), seed=1, molex=molex_config([1]))
    routes = router([adapter], [0], [3])
    plan = routes.plan(0, hidden_for([3]))
    assert plan.own is None
    assert plan.groups == []
    assert routes.plan(1, hidden_for([3])) is not None


def pinned_plan(spec, layer, depth, **config):
    adapter = random_adapter(spec, seed=1, mix=(0.7, 0.2), molex=molex_config([depth], **config))
    route = (
        Choice((layer,) if type(layer) is int else layer, (1.0,) if type(layer) is int else (0.75, 0.25)),
    )
    routes = router([adapter], [0], [3], pinned=[route])
    plan = routes.plan(depth, hidden_for([3]))
    assert routes.routes == [route]
    return plan


def visits_of(plan):
    """(layer, request, choice) of every visit."""
    return list(zip(plan.layers.tolist(), plan.requests.tolist(), plan.choices.tolist(), strict=True))


def test_a_pinned_route_is_followed(spec_of):
    plan = pinned_plan(spec_of("roberta"), 4, depth=2)
    assert plan.own.tolist() == pytest.approx([0.7])
    assert visits_of(plan) == [(4, 0, 1)]
    assert plan.weights.tolist() == pytest.approx([0.2])


def test_a_routed_layer_that_is_the_own_one_adds_its_weight_to_it(spec_of):
    plan = pinned_plan(spec_of("roberta"), 2, depth=2)
    assert plan.own.tolist() == pytest.approx([0.9])
    assert plan.groups == []


def test_top_2_shares_the_routed_weight(spec_of):
    plan = pinned_plan(spec_of("roberta"), (4, 2), depth=2, top_k=2)
    assert plan.own.tolist() == pytest.approx([0.7 + 0.2 * 0.25])
    assert visits_of(plan) == [(4, 0, 1)]
    assert plan.weights.tolist() == pytest.approx([0.2 * 0.75])
    plan = pinned_plan(spec_of("roberta"), (4, 1), depth=2, top_k=2)
    assert visits_of(plan) == [(1, 0, 2), (4, 0, 1)]


def test_only_the_voters_vote(spec_of):
    adapter = random_adapter(spec_of("roberta"), seed=1, molex=molex_config([0]))
    hidden = hidden_for([6])
    changed = torch.cat([hidden[:2], torch.randn(4, HIDDEN) * 9])
    plans = []
    for states in (hidden, changed):
        routes = router([adapter], [0], [6], voters=[2])
        routes.plan(0, states)
        plans.append(routes.routes)
    assert plans[0] == plans[1]


def trained(spec, gate_gradient):
    config = adapter_config(spec, molex=molex_config([0], gate_gradient=gate_gradient))
    return new_adapter(spec, config, num_labels=2, mix=(0.6, 0.4), seed=1)


def routed_weights(plan):
    return torch.cat([plan.own, plan.weights])


def test_straight_through_is_one_in_value_and_trains_the_gate(spec_of):
    spec, hidden = spec_of("roberta"), hidden_for([3, 3])
    straight, plain = trained(spec, "straight_through"), trained(spec, "none")
    weights = routed_weights(router([straight], [0, 0], [3, 3]).plan(0, hidden))
    torch.testing.assert_close(
        weights.detach(), routed_weights(router([plain], [0, 0], [3, 3]).plan(0, hidden)).detach()
    )
    weights.sum().backward()
    assert straight.parameters()["molex.gate.weight"].grad.abs().sum() > 0


def test_straight_through_gradient_is_that_of_the_log_probability(spec_of):
    adapter, hidden = trained(spec_of("roberta"), "straight_through"), hidden_for([3])
    routes = router([adapter], [0], [3])
    routed_weights(routes.plan(0, hidden)).sum().backward()
    gate = adapter.parameters()["molex.gate.weight"]
    (layer,) = routes.routes[0][0].layers
    probability = adapter.gates[0].logits(hidden, [3]).softmax(dim=1).mean(dim=0)[layer]
    (expected,) = torch.autograd.grad(0.4 * probability.log(), gate)
    torch.testing.assert_close(gate.grad, expected)


def test_without_straight_through_only_the_balance_loss_trains_the_gate(spec_of):
    adapter = trained(spec_of("roberta"), "none")
    routes = router([adapter], [0, 0], [3, 3])
    assert not routed_weights(routes.plan(0, hidden_for([3, 3]))).requires_grad
    (loss,) = routes.balance_losses
    loss.backward()
    assert adapter.parameters()["molex.gate.weight"].grad.abs().sum() > 0


def test_no_balance_loss_without_gradients_or_votes(spec_of):
    adapter = trained(spec_of("roberta"), "none")
    pinned = router([adapter], [0], [3], pinned=[(Choice((1,), (1.0,)),)])
    pinned.plan(0, hidden_for([3]))
    assert pinned.balance_losses == []
    with torch.no_grad():
        serving = router([adapter], [0], [3])
        serving.plan(0, hidden_for([3]))
    assert serving.balance_losses == []

"""Multipliers against a loop of plain numbers, states that come back bit for bit, and targets that cannot be."""
import json
import math
import random

import pytest
import torch

from rvpo_nb.advantage import advantages
from rvpo_nb.bandit import Sentences, train
from rvpo_nb.guard import Guard, make_guard
from rvpo_nb.softmin import InputError

NAMES = ['correct', 'format', 'length']


def by_hand(batches, targets, share, lr, past):
    "One reward at a time, one number at a time; batches hold pairs of pass rate and share of dead groups, None = unknown."
    out = []
    for j in range(len(batches[0])):
        rate, best, weight, column = None, 0.0, 1.0, []
        for now, dead in (b[j] for b in batches):
            if now is not None:
                rate = now if rate is None else past * rate + (1 - past) * now
                best = max(best, rate)
                step = lr * ((share * best if targets[j] is None else targets[j]) - rate)
                if step < 0 or dead < 1: weight = max(1.0 if targets[j] is None else 0.0, weight + step)
            column.append(weight)
        out.append(column)
    return torch.tensor(out, dtype=torch.float64).T


def some_batches(n, rewards, seed=0):
    chance = random.Random(seed)
    rate = lambda: chance.choice([None, 0.0, 1.0, chance.random(), chance.random(), chance.random()])
    return [[(rate(), chance.choice([1.0, chance.random()])) for _ in range(rewards)] for _ in range(n)]


def feed(guard, batches):
    nan = lambda v: math.nan if v is None else v
    return torch.stack([guard.update([nan(r) for r, _ in b], [nan(d) for _, d in b]) for b in batches])


@pytest.mark.parametrize('targets, share', [([None] * 4, 0.8), ([0.9, None, 0.3, None], 0.6), ([0.9, None, 0.3, None], 0.0)])
def test_equals_the_loop(targets, share):
    batches = some_batches(60, 4)
    weights = feed(Guard(targets, share, lr=2.0), batches)
    torch.testing.assert_close(weights, by_hand(batches, targets, share, 2.0, 0.5), rtol=1e-12, atol=1e-12)
    assert weights.max() > 1.5 and (weights >= torch.tensor([0.0 if t else 1.0 for t in targets])).all()
    if targets[0]: assert weights[:, 2].min() == 0, 'a constraint that is met with room to spare falls silent'


def test_leading_dimensions_are_separate_runs():
    runs = [some_batches(20, 3, seed) for seed in range(4)]
    alone = torch.stack([feed(Guard(share=0.8), batches) for batches in runs], 1)
    nan = lambda v: math.nan if v is None else v
    together, guard = [], Guard(share=0.8)
    for t in range(20):
        rates, dead = (torch.tensor([[nan(pair[i]) for pair in batches[t]] for batches in runs], dtype=torch.float64).view(2, 2, 3) for i in (0, 1))
        together.append(guard.update(rates, dead))
    assert torch.equal(torch.stack(together).view(20, 4, 3), alone)


def test_a_state_goes_through_json_and_comes_back_bit_for_bit():
    batches = some_batches(40, 3)
    batches[0][1] = (None, 0.5)  # not seen at first
    whole, first, second = (Guard([None, None, 0.7], 0.8) for _ in range(3))
    expected = feed(whole, batches)
    feed(first, batches[:17])
    text = json.dumps(first.state(), allow_nan=False)
    second.load(json.loads(text))
    assert torch.equal(feed(second, batches[17:]), expected[17:]) and second.state() == whole.state()
    fresh = Guard(share=0.8)
    fresh.load(json.loads(json.dumps(Guard(share=0.8).state())))
    assert fresh.weigh([1.0, 2.0]) == [1.0, 2.0] and fresh.weigh(None) is None and torch.equal(feed(fresh, batches), feed(Guard(share=0.8), batches))


def test_a_dead_reward_does_not_wind_up_but_may_come_down():
    guard = Guard(share=0.8, lr=10.0)
    guard.update([0.9], [0.0])
    risen = guard.update([0.1], [0.5]).item()
    assert risen > 1 and guard.update([0.0], [1.0]).item() == risen
    assert [guard.update([1.0], [1.0]).item() for _ in range(10)][-1] == 1


def test_a_dying_reward_is_named_once():
    guard, named = Guard(share=0.8), []
    for rate in [0.9] * 3 + [0.2, 0.1] + [0.01] * 9 + [0.9] * 5 + [0.0] * 9:
        guard.update([rate, 1.0, 0.0], [float(rate < 0.05), 1.0, 1.0])
        named.append(guard.dying().tolist())
    assert [sum(x) for x in zip(*named)] == [1, 0, 0], 'one that always passes, or never did, is not dying'
    assert 5 < named.index([True, False, False]) < 14


def test_constrained_grpo_is_advantage_combination_with_the_multipliers():
    "A = z(reward) - sum lambda z(indicator cost), arXiv 2602.05863, from the costs, with numbers alone."
    gen = torch.Generator().manual_seed(0)
    reward, cost = torch.rand(5, 8, generator=gen).double(), (torch.rand(5, 8, 2, generator=gen) < 0.4).double()
    lam = [0.7, 2.5]
    z = lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    expected = z(reward) - lam[0] * z(cost[..., 0]) - lam[1] * z(cost[..., 1])
    a = advantages(torch.cat([reward[..., None], 1 - cost], -1), 'ac', weights=[1.0, *lam])
    torch.testing.assert_close(a * (1 + sum(lam)), expected)


@pytest.mark.parametrize('change, message', [
    (dict(targets={'forma': 0.9}), "'forma', which is not a reward; the rewards: correct, format, length"),
    (dict(targets={'length': 0.9}), "'length' has a target but says not when it passes"),
    (dict(targets={'format': 1.5}), "target of 'format' must be a pass rate above 0 and at most 1, got 1.5"),
    (dict(targets={'format': 0}), "target of 'format'"),
    (dict(targets={'format': 0.9}, weights=[1.0, 0.0, 1.0]), "'format' has a target and weight 0"),
    (dict(targets={'format': 0.9, 'correct': 0.9}, weights=[1.0, 1.0, 0.0]), 'names every reward'),
    (dict(share=0.0), 'guard must be above 0'), (dict(share=1.1), 'guard must be'), (dict(share=math.nan), 'guard must be'),
    (dict(share=0.8, lr=0.0), 'reward_weights_lr must be positive, got 0'), (dict(share=0.8, lr=math.inf), 'reward_weights_lr'),
    (dict(share=0.8, known=[False] * 3), 'no reward that has a weight says when it passes'),
    (dict(share=0.8, weights=[0.0, 0.0, 1.0]), 'no reward that has a weight'),
])
def test_what_cannot_be_a_target_is_named(change, message):
    with pytest.raises(InputError, match=message): make_guard(NAMES, **dict(known=[True, True, False]) | change)


def test_nothing_asked_for_is_no_guard():
    assert make_guard(NAMES, [True] * 3) is None
    guard = make_guard(NAMES, [True, True, False], None, {'format': 0.9}, 0.8, 2.0)
    assert guard.targets == [None, 0.9, None] and (guard.share, guard.lr) == (0.8, 2.0)


def test_a_guard_keeps_a_limit_that_averaging_gives_up():
    bandit, settings = Sentences(10), dict(steps=150, lr=0.5, seeds=2)
    plain, guarded = train(bandit, 'gdpo', **settings), train(bandit, 'gdpo', guard=Guard(share=0.8), **settings)
    assert plain.reward[-20:, :, -1].mean(0).max() < 0.05 and guarded.reward[-20:, :, -1].mean(0).min() > 0.8
    assert (plain.weight == 1).all() and guarded.weight[..., -1].amax(0).min() > 2 and (guarded.weight >= 1).all()


def test_a_guard_that_has_nothing_to_do_changes_nothing():
    bandit, settings = Sentences(22), dict(steps=20, seeds=2)  # a limit that cannot be broken
    idle = train(bandit, guard=Guard([None] * 8 + [1.0], share=0.01), **settings)
    assert (idle.weight == 1).all()
    torch.testing.assert_close(idle.logits, train(bandit, **settings).logits)

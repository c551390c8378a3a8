"""The exact drift of two arms against brute force and long samples, and what a first batch is advised."""
import itertools
import math

import pytest
import torch

from rvpo_nb.advantage import advantages, dry_run, recommend_k, rvpo, scores
from rvpo_nb.bandit import gradient, needed_pass_rate, train
from rvpo_nb.regime import GRID, Passes, drift, ends, follow, gap, passes_of_others, push_table, read, spread, trade
from rvpo_nb.softmin import InputError

MIXED = torch.tensor([[1.0, 0.3, 0.8, 0.5], [0.0, 0.6, 0.9, 0.45]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slow_gap(rates, keepers, k, group, weights):
    "Enumerate every table of verdicts of a group whose first `keepers` rollouts keep; plain floats, nothing of the library."
    m, total = len(weights), 0.0
    rates = rates.tolist()
    for bits in itertools.product((0, 1), repeat=group * m):
        table = [bits[i * m:(i + 1) * m] for i in range(group)]
        chance = math.prod(q if bit else 1 - q for i, row in enumerate(table) for q, bit in zip(rates[i >= keepers], row))
        live = [j for j in range(m) if 0 < sum(row[j] for row in table) < group]
        if not chance or not live: continue
        value = []
        for row in table:
            z = []
            for j in live:
                p = sum(r[j] for r in table) / group
                z.append((row[j] - p) / math.sqrt(p * (1 - p)))
            w = [weights[j] / sum(weights[i] for i in live) for j in live]
            value.append(sum(a * b for a, b in zip(w, z)) if k == 0 else -math.log(sum(a * math.exp(-k * b) for a, b in zip(w, z))) / k)
        total += chance * (sum(value[:keepers]) / keepers - sum(value[keepers:]) / (group - keepers))
    return total


@pytest.mark.parametrize('k', [0.0, 0.3, 2.0, 9.0])
@pytest.mark.parametrize('weights', [[1.0, 1.0, 1.0], [4.0, 1.0, 0.5]])
def test_gap_is_the_sum_over_all_verdicts(k, weights):
    rates = torch.tensor([[0.9, 0.3, 0.8], [0.1, 0.6, 0.7]], dtype=torch.float64)
    fast = gap(rates, k, 3, weights)
    for keepers in (1, 2): assert fast[keepers - 1].item() == pytest.approx(slow_gap(rates, keepers, k, 3, weights), abs=2e-8)


@pytest.mark.parametrize('k', [0.0, 1.0, 5.0])
def test_drift_is_the_mean_of_the_sampled_gradient(k):
    bandit, p, group = Passes(MIXED), 0.35, 8
    gen = torch.Generator().manual_seed(0)
    choice = (torch.rand(40_000, group, 1, generator=gen, dtype=torch.float64) > p).long()
    r = bandit.rewards(choice, bandit.draw(gen, 40_000, group))
    a, pi = rvpo(scores(r), k), torch.tensor([[p, 1 - p]], dtype=torch.float64)
    push = (a * (choice[..., 0] == 0)).mean(-1)
    assert torch.allclose(gradient(a, choice, pi)[0, 0], push.mean())
    assert abs(drift(gap(MIXED, k, group), torch.tensor([p]).double()).item() - push.mean().item()) < 4.5 * push.std().item() / 200


def test_the_mean_is_the_limit_of_small_k():
    assert torch.allclose(gap(MIXED, 1e-4, 6), gap(MIXED, 0.0, 6), atol=1e-3)
    assert torch.allclose(gap(MIXED, 0.0, 6, [3.0, 1, 1, 1]), gap(MIXED, 1e-4, 6, [3.0, 1, 1, 1]), atol=1e-3)


@pytest.mark.parametrize('k', [0.0, 2.0])
def test_gap_of_settings_side_by_side_and_scaled_weights(k):
    rates = trade(rewards=4, conflict=torch.tensor([0.1, 0.4]), noise=0.05)
    together = gap(rates, k, 8)
    assert torch.allclose(together, torch.stack([gap(x, k, 8) for x in rates]), atol=1e-8)
    assert torch.allclose(gap(rates, k, 8, [0.2] * 4), together, atol=1e-7)


@pytest.mark.parametrize('group', [2, 3, 16, 48])
def test_passes_of_others_is_the_sum_of_two_binomials(group):
    from scipy.stats import binom
    law = passes_of_others(MIXED, group)
    for j, m in ((1, 0), (1, group // 2), (2, group - 1)):
        two = [torch.tensor(binom.pmf(range(n + 1), n, q)) for n, q in ((m, MIXED[0, j].item()), (group - 1 - m, MIXED[1, j].item()))]
        want = torch.zeros(group, dtype=torch.float64)
        for a, x in enumerate(two[0]): want[a:a + len(two[1])] += x * two[1]
        assert torch.allclose(law[j, m], want, atol=1e-12)


def test_full_conflict_in_large_groups_has_the_border_of_the_equation():
    for k in (1.0, 2.0, 5.0):
        p = needed_pass_rate(k, 6)
        sides = drift(gap(trade(rewards=6, conflict=1.0, level=0.5), k, 100), torch.tensor([p - 0.015, p + 0.015]).double())
        assert sides[0] < 0 < sides[1]


def test_ends_follow_the_sign():
    gen = torch.Generator().manual_seed(0)
    d = torch.randn(20, 30, generator=gen, dtype=torch.float64)
    grid = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    for row, end in zip(d, ends(d, grid)):
        for i in range(30):
            j = i
            if row[i] > 0:
                while j < 29 and row[j] > 0: j += 1
            else:
                while j > 0 and row[j] <= 0: j -= 1
            assert end[i] == grid[j]


def test_read_is_exact_at_the_nodes_and_linear_between():
    table = torch.randn(2, 3, len(GRID), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = GRID[[40, 200]].logit()
    assert torch.allclose(read(table, torch.tensor([1.0, 0.0]).double(), x), table[[0, 1], [1, 0], [40, 200]])
    assert torch.allclose(read(table, torch.tensor([0.5, 1.5]).double(), x), (table[[0, 1], [0, 1], [40, 200]] + table[[0, 1], [1, 2], [40, 200]]) / 2)
    p = torch.tensor([0.3, 0.6], dtype=torch.float64)
    assert torch.allclose(follow(torch.ones_like(table), p, lambda t, x: x * 0, steps=4, lr=0.5), (p.logit() + 2).sigmoid())


def test_the_flow_keeps_the_pace_of_sampled_runs():
    rates, p = trade(conflict=0.3), torch.tensor([0.9, 0.6], dtype=torch.float64)
    table = push_table(rates, [dict(k=2.0), dict(k=2.0)]).expand(2, -1, -1)
    start = torch.stack([p, 1 - p], -1).log()[:, None, None, :].expand(2, 4, 1, 2)
    runs = train(Passes(rates.expand(2, -1, -1)), k=2.0, steps=12, seeds=4, start=start).logits[-1, ..., 0, :].softmax(-1)[..., 0]
    after = follow(table, p, lambda t, x: x * 0, steps=12)
    assert after[0] > 0.93 and after[1] < 0.57 and (runs.mean(-1) - after).abs().max() < 0.03


def test_spread_is_what_advantages_divide_by():
    gen, bandit = torch.Generator().manual_seed(5), Passes(MIXED)
    choice = (torch.rand(3000, 8, 1, generator=gen, dtype=torch.float64) > 0.4).long()
    r = bandit.rewards(choice, bandit.draw(gen, 3000, 8))
    raw, white = rvpo(scores(r), 2.0), advantages(r, k=2.0)
    assert spread(MIXED, torch.tensor([0.4]).double(), 2.0, 8, 1000).item() == pytest.approx((raw.norm() / white.norm()).item(), rel=0.04)


def test_settings_of_passes_run_side_by_side_as_they_run_alone():
    rates = trade(rewards=3, conflict=torch.tensor([0.0, 0.5]))
    both, alone = (train(Passes(x), steps=4, seeds=2) for x in (rates, rates[1]))
    assert torch.equal(both.logits[:, 1], alone.logits)
    assert set(both.reward.mul(256).frac().flatten().tolist()) == {0.0}  # every reward is 0 or 1


@pytest.mark.parametrize('bad', [dict(level=0.9, conflict=0.3), dict(level=0.1, conflict=-0.3)])
def test_trade_wants_pass_rates(bad):
    with pytest.raises(InputError, match='pass rates'): trade(**bad)


def batch(conflict=0.3, p=0.7, prompts=64, group=16, seed=0, **knobs):
    gen, bandit = torch.Generator().manual_seed(seed), Passes(trade(conflict=conflict, **knobs))
    choice = (torch.rand(prompts, group, 1, generator=gen, dtype=torch.float64) > p).long()
    return bandit.rewards(choice, bandit.draw(gen, prompts, group))


def test_push_is_a_correlation_inside_the_groups():
    r = batch()
    a = advantages(r, k=1.0)
    c = r - r.mean(1, keepdim=True)
    want = [torch.corrcoef(torch.stack([a.flatten(), c[..., j].flatten()]))[0, 1] for j in range(9)]
    assert torch.allclose(dry_run(r, r, [1.0])[0], torch.stack(want))
    rho = scores(r).z.flatten(0, 1)
    assert torch.equal((rho.T @ rho).sum(0).sign(), dry_run(r, r, [0.0])[0].sign())  # 1 + the sum of the correlations


def test_advice():
    assert recommend_k(batch(0.3, 0.9), protect=[0]).verdict == 'protect' and recommend_k(batch(0.3, 0.9), protect=[0]).k > 0
    assert recommend_k(batch(-0.1, 0.5), protect=[0])[:2] == (0.0, 'mean')
    assert recommend_k(batch(0.5, 0.2), protect=[0]).verdict == 'warm up'
    assert recommend_k(batch(0.08, 0.2), protect=[0])[:2] == (0.0, 'mean')  # a larger one would lose what the mean keeps


def test_advice_forgets_units_order_and_thresholds_that_say_the_same():
    r, order = batch(), [3, 0, 8, 1, 2, 4, 5, 6, 7]
    plain, unit = recommend_k(r, protect=[0]), torch.tensor([10.0, *[1.0] * 7, 100.0]).double()
    before = r.clone()
    scaled = recommend_k(r * unit - 3, unit / 2 - 3, protect=[0])
    moved = recommend_k(r[..., order], protect=[1])
    assert torch.equal(r, before) and scaled[:2] == moved[:2] == plain[:2]
    assert torch.allclose(scaled.push, plain.push) and torch.allclose(moved.push, plain.push[:, order]) and torch.equal(scaled.rates, plain.rates)


def test_advice_with_missing_and_dead_rewards():
    r = batch()
    r[:, :, 4] = torch.nan  # applies to nothing
    r[:5, :8, 2] = torch.nan
    r[..., 3] = 1
    advice = recommend_k(r, protect=[0])
    assert advice.rates[4].isnan() and advice.rates[3] == 1 and advice.push.isfinite().all() and (advice.push[:, 3:5] == 0).all()
    keep = [0, 1, 2, 5, 6, 7, 8]
    assert torch.allclose(advice.push[:, keep], recommend_k(r[..., keep], protect=[0]).push)
    assert recommend_k(r, protect=[3]).verdict == 'mean'  # it always passes: nothing to protect it from


@pytest.mark.parametrize('kwargs, says', [(dict(protect=[9]), 'from 0 to 8'), (dict(protect=[]), 'protect'), (dict(thresholds=[0.5] * 3), 'threshold'), (dict(candidates=(-1.0,)), 'k must be')])
def test_advice_refuses(kwargs, says):
    with pytest.raises(InputError, match=says): recommend_k(batch(prompts=2), **kwargs)


def test_advice_wants_one_batch():
    with pytest.raises(InputError): recommend_k(batch()[0])
    with pytest.raises(InputError): recommend_k(batch()[None])


def test_what_always_passes_does_not_decide():
    r = torch.ones(8, 16, 3)
    assert recommend_k(r)[:2] == (0.0, 'mean')
    r[..., 1] = (torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    assert recommend_k(r)[:2] == (0.0, 'mean'), 'one reward that varies and has nothing against it'
    r[..., 2] = 0
    assert recommend_k(r).verdict == 'warm up', 'what never passes cannot be pushed'

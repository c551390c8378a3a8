"""SA-MRPO, GD2PO and Tchebycheff beside obvious loops, beside each other, and at their edges."""
import math

import numpy as np
import pytest
import torch

from rvpo_nb import neighbours
from rvpo_nb.advantage import METHODS, TINY, WHITENED, advantages, scores
from rvpo_nb.softmin import InputError

NAMES = ['sa_mrpo', 'gd2po', 'tchebycheff']
WEIGHTS = [0.0, 1.0, 2.0, 0.25, 1.5]


# --- the oracle: one number at a time, written from the definitions alone

def std(v, sample): return math.sqrt(sum((x - np.mean(v)) ** 2 for x in v) / max(1, len(v) - sample)) if v else 0.0


def columns(g, weights):
    "The rewards of one group (rollouts, rewards) that vary and have a weight: the values of those rollouts that have them."
    out = {j: [x for x in g[:, j] if not np.isnan(x)] for j in range(g.shape[1]) if weights[j] > 0}
    return {j: v for j, v in out.items() if len(v) > 1 and max(v) > min(v)}


def group_mean(v):
    v = [x for x in v if not np.isnan(x)]
    return sum(v) / len(v) if v else 0.0


def one_group(g, method, weights, seen, sample=False, eps=0.0, total=1.0):
    "Values per rollout before whitening; NaN where nothing applies. `seen`: saturation of each reward."
    live, out = columns(g, weights), np.full(len(g), np.nan)
    kept = np.zeros(len(g), dtype=bool)
    for i in range(len(g)):
        js = [j for j in live if not np.isnan(g[i, j])]
        if not js: continue
        w = {j: weights[j] / sum(weights[l] for l in js) for j in js}
        z = {j: (g[i, j] - np.mean(live[j])) / (std(live[j], sample) + eps) for j in js}
        if method == 'tchebycheff':
            out[i] = -max(weights[j] / max(weights[l] for l in js) * (max(live[j]) - g[i, j]) for j in js)
        else:
            out[i] = total * sum(w[j] * z[j] * (math.sqrt(1 - seen[j]) if method == 'sa_mrpo' else 1) for j in js)
        kept[i] = abs(sum(w[j] * z[j] for j in js)) >= 0.8 * sum(w[j] * abs(z[j]) for j in js)
    if method == 'sa_mrpo' and sample: return out  # the published form centres in the batch alone
    on = ~np.isnan(out)
    out = out - out[on].mean() if on.any() else out
    if method == 'tchebycheff': return out / (std(list(out[on]), False) or 1.0)
    return out if method == 'sa_mrpo' else np.where(on & ~kept, 0.0, out * (kept & on).sum() / max(1, on.sum()))


def oracle(x, method, weights=None, published=False):
    x = x.double().numpy()
    weights = [1.0] * x.shape[-1] if weights is None else weights
    seen = [float(np.mean([group_mean(g[:, j]) for g in x])) for j in range(x.shape[-1])]
    how = dict(sample=True, eps=1e-4, total=sum(weights)) if published else {}
    a = np.stack([one_group(g, method, weights, seen, **how) for g in x])
    if method != 'tchebycheff':
        flat = list(a[~np.isnan(a)])
        a = (a - np.mean(flat)) / (std(flat, True) + 1e-4) if published else a / (std([*flat, *(-v for v in flat)], False) or 1.0)  # around 0
    return np.nan_to_num(a)


@pytest.fixture(scope='module')
def rewards():
    "(40, 8, 5) within [0, 1]: binary and graded; NaN, dead rewards, rollouts and groups with nothing live."
    gen = torch.Generator().manual_seed(0)
    r = torch.rand(40, 8, 5, generator=gen)
    r[..., :3] = (r[..., :3] < torch.tensor([0.3, 0.6, 0.9])).float()
    r[torch.rand(r.shape, generator=gen) < 0.1] = torch.nan
    r[::5, 3] = torch.nan       # a rollout to which nothing applies
    r[1] = torch.rand(5, generator=gen)  # a dead group
    r[2, :, 4] = 1              # a dead reward at its ceiling
    r[3, :, 1] = torch.nan      # a reward that a group lacks
    return r


@pytest.mark.parametrize('weights', [None, WEIGHTS], ids=['equal', 'weights'])
@pytest.mark.parametrize('method', NAMES)
def test_equals_the_loop(rewards, method, weights):
    fast = advantages(rewards, method, weights=weights)
    np.testing.assert_allclose(fast.numpy(), oracle(rewards, method, weights), rtol=1e-5, atol=1e-6)
    assert (fast[::5, 3] == 0).all() and (fast[1] == 0).all() and fast.abs().amax(-1).gt(0).sum() > 5


def test_published_sa_mrpo_is_the_formula():
    r = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(advantages(r, 'sa_mrpo', weights=[1, 2, 0.5], published=True).numpy(), oracle(r, 'sa_mrpo', [1, 2, 0.5], True), rtol=1e-5, atol=1e-6)


# --- identities

def test_registered():
    assert all(METHODS[m] is getattr(neighbours, m) for m in NAMES)
    assert {'sa_mrpo', 'gd2po'} <= WHITENED and 'tchebycheff' not in WHITENED


def test_both_ends_are_gdpo(rewards):
    s = scores(rewards, WEIGHTS)
    gdpo = METHODS['gdpo'](s, 0)
    torch.testing.assert_close(neighbours.sa_mrpo(s, 0, gamma=0), gdpo)
    assert torch.equal(neighbours.gd2po(s, 0, tau=0), gdpo)


def test_threshold_one_is_the_hard_rule(rewards):
    s = scores(rewards)
    clash = (s.z > 1e-8).any(-1) & (s.z < -1e-8).any(-1)
    hard = neighbours.gd2po(s, 0, tau=1)
    assert 0.5 < clash.double().mean() < 0.9 and (hard[clash] == 0).all() and (hard[~clash & (s.z != 0).any(-1)] != 0).all()


def test_saturated_everywhere_is_silent():
    "A reward at its ceiling in all groups but one loses its voice as the batch grows."
    def ratio(n):
        r = torch.zeros(n, 4, 2)
        r[..., 1], r[:, :2, 0] = 1, 1
        r[0, 3, 1] = 0
        s = scores(r)
        assert neighbours.saturation(s)[1].item() == pytest.approx(1 - 1 / (4 * n))
        return neighbours.sa_mrpo(s, 0)[0, 2:].diff().abs().item()  # what the format adds, between two wrong rollouts
    assert ratio(1) == pytest.approx(2 * ratio(4)) == pytest.approx(4 * ratio(16))


def test_one_reward_is_grpo():
    r = torch.rand(1, 8, 1, generator=torch.Generator().manual_seed(1))
    for m in NAMES: torch.testing.assert_close(advantages(r, m), advantages(r, 'grpo'))


@pytest.mark.parametrize('method', NAMES)
def test_order_and_dtype(rewards, method):
    gen = torch.Generator().manual_seed(2)
    p, g, m = (torch.randperm(n, generator=gen) for n in rewards.shape)
    a = advantages(rewards, method, weights=WEIGHTS)
    moved = advantages(rewards[p][:, g][..., m], method, weights=[WEIGHTS[j] for j in m])
    torch.testing.assert_close(moved, a[p][:, g], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(rewards, method, weights=[100 * w for w in WEIGHTS]), a)
    assert advantages(rewards.double(), method).dtype == torch.float64


@pytest.mark.parametrize('method', ['gd2po', 'tchebycheff'])
def test_batches_side_by_side_do_not_meet(rewards, method):
    many = rewards.view(4, 10, 8, 5)
    torch.testing.assert_close(advantages(many, method), torch.stack([advantages(x, method) for x in many]))


@pytest.mark.parametrize('method', NAMES)
def test_flat_batches_are_exactly_zero(method):
    r = torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(4)).expand(3, 8, 4)
    assert (advantages(r, method) == 0).all()
    assert (advantages(torch.full((2, 8, 4), torch.nan), method) == 0).all()


def test_tchebycheff_is_blind_where_nobody_passes_everything():
    r = torch.eye(4)[None].repeat(2, 1, 1)
    assert (advantages(r, 'tchebycheff') == 0).all()
    r[0, 0] = 1
    a = advantages(r, 'tchebycheff')
    assert a[0, 0] > 0 and (a[0, 1:] == a[0, 1]).all() and (a[1] == 0).all()
    heavy = advantages(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]), 'tchebycheff', weights=[2, 1])
    assert heavy[0, 0] > heavy[0, 1] == heavy[0, 2]  # missing the heavy reward costs 2, the light one 1


# --- edges

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_a_live_reward_near_its_ceiling_is_heard(dtype):
    r = torch.ones(1, 4, 1, dtype=torch.float64)
    r[0, 0, 0] -= 70 * torch.finfo(dtype).eps
    for m in NAMES: torch.testing.assert_close(advantages(r.to(dtype), m), advantages(r.to(dtype), 'gdpo'))


def test_bounds_of_sa_mrpo(rewards):
    for bad in (1.5, -0.5):
        r = rewards.clone()
        r[4, 0, 3] = bad
        with pytest.raises(InputError, match='reward 3'): advantages(r, 'sa_mrpo')
        advantages(r, 'sa_mrpo', weights=[1, 1, 1, 0, 1])  # only logged: any scale will do
    dead = rewards.clone()
    dead[5, :, 2] = 3.0  # dead in its group, live elsewhere
    with pytest.raises(InputError, match='reward 2 .* 3'): advantages(dead, 'sa_mrpo')
    rounded = rewards.clone()
    rounded[rounded == 1] = 1 + 1e-7
    assert advantages(rounded, 'sa_mrpo').isfinite().all()
    with pytest.raises(InputError, match='reward 2'): advantages(TINY, 'sa_mrpo')


def test_gd2po_has_no_published_form():
    with pytest.raises(InputError, match='published'): advantages(TINY, 'gd2po', published=True)


@pytest.mark.parametrize('method', NAMES)
def test_input_is_not_changed(rewards, method):
    before = rewards.clone()
    assert not advantages(rewards.clone().requires_grad_(), method).requires_grad
    advantages(rewards, method)
    assert torch.equal(before.nan_to_num(-1), rewards.nan_to_num(-1))


def test_saturation_is_of_its_own_batch():
    "Several batches in one call, and one of more rewards than a block holds, give what each gives alone."
    r = torch.rand(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(r, 'sa_mrpo'), torch.stack([advantages(x, 'sa_mrpo') for x in r]))
    many = torch.rand(9000, 4, 2, generator=torch.Generator().manual_seed(1))
    many[:4500] = many[:4500] * 0.1
    from rvpo_nb.advantage import METHODS, scores, whiten
    s = scores(many)
    torch.testing.assert_close(advantages(many, 'sa_mrpo'), whiten(METHODS['sa_mrpo'](s, 2.0), s.counts).float())

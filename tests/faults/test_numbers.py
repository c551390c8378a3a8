"""Advantages and losses of numbers of any size, in any float type, with anything missing: finite, and the same in any order and unit."""
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import rvpo_nb.neighbours  # noqa: F401, adds its methods
from rvpo_nb.advantage import METHODS, Heard, advantages, attention, n_effective, solve_k
from rvpo_nb.guard import Guard
from rvpo_nb.loss import KL_ESTIMATORS, LEVELS, LOSS_TYPES, piece_logits, policy_loss, token_logps
from rvpo_nb.softmin import InputError, softmin, softmin_weights

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
KS = [0, 1e-12, 1e-3, 0.5, 2.0, 10.0, 1e3, 1e30, math.inf]
SIZES = [1, 2, 3, 4, 5, 8, 17, 33, 64]
ANY_UNIT = ['ac', 'gdpo', 'rvpo', 'rvpo_explicit', 'hardmin', 'gd2po']  # made of z-scores alone: the unit and zero of each reward are free
ONE_UNIT = ['grpo', 'dvao', 'tchebycheff']  # rewards are added, or weighed by their spread: free only all together
BOUNDED = ['sa_mrpo']  # the place within [0, 1] counts
CENTRED = ['grpo', 'gdpo', 'rvpo', 'rvpo_explicit', 'hardmin', 'sa_mrpo', 'tchebycheff']  # always; ac and dvao where nothing is missing; gd2po drops rollouts


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def fuzz(pytestconfig):
    "Return a function that runs a check on as many examples as the short or the long form asks for."
    many = 12 if pytestconfig.getoption('markexpr') == 'faults' else 1
    def run(short, strategy, check):
        checks = HealthCheck.too_slow, HealthCheck.data_too_large
        settings(max_examples=short * many, derandomize=True, deadline=None, database=None, suppress_health_check=checks)(given(strategy)(check))()
    return run


def holes(r, gen, kind):
    "Make entries, rollouts, rewards, groups, or the ends of groups missing, or dead."
    p, n, m = r.shape
    roll = lambda: torch.rand((), generator=gen).item()
    if 'some' in kind: r[torch.rand(r.shape, generator=gen) < 0.3] = torch.nan
    if 'most' in kind: r[torch.rand(r.shape, generator=gen) < 0.9] = torch.nan
    if 'reward' in kind: r[..., int(roll() * m)] = torch.nan
    if 'group' in kind: r[int(roll() * p)] = torch.nan
    if 'ragged' in kind:
        for i in range(p): r[i, 1 + int(roll() * n):] = torch.nan
    if 'dead' in kind: r[int(roll() * p)], r[..., int(roll() * m)] = r[0, :1].clone(), 0.5
    return r


HOLES = st.sets(st.sampled_from(['some', 'most', 'reward', 'group', 'ragged', 'dead']), max_size=3)


@st.composite
def tables(draw, scales=('one', 'each reward', 'each number'), dtypes=DTYPES):
    "Draw rewards (1-16 prompts, 1-64 rollouts, 1-64 rewards): binary and graded ones, of sizes from 1e-30 to 1e30 (float16: 1e-6 to 1e4)."
    p, n, m, dtype, scale = (draw(st.sampled_from(x)) for x in (range(1, 17), SIZES, SIZES, dtypes, scales))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    r = torch.rand(p, n, m, generator=gen, dtype=torch.float64)
    binary = torch.rand(m, generator=gen) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    r = torch.where(binary, (r < torch.rand(m, generator=gen)).double(), r)
    low, high = (-6, 4) if dtype == torch.float16 else (-30, 30)
    shape = {'one': (), 'each reward': (m,), 'each number': (p, n, m), 'unit': ()}[scale]
    if scale != 'unit': r = r * 10 ** (low + (high - low) * torch.rand(shape, generator=gen, dtype=torch.float64))
    if draw(st.booleans()) and scale != 'unit': r = r - draw(st.sampled_from([0.5, 1.0, 30.0])) * r.amax((0, 1))
    largest = torch.finfo(dtype).max
    return holes(r.clamp(-largest, largest), gen, draw(HOLES)).to(dtype).to(draw(st.sampled_from(DEVICES)))


def weights_for(m, seed):
    "Draw weights over many orders of magnitude, some of them 0, or none at all."
    gen = torch.Generator().manual_seed(seed)
    if seed % 3 == 0: return None
    w = 10 ** (torch.rand(m, generator=gen) * (4 if seed % 3 == 1 else 40) - 4)
    w[torch.rand(m, generator=gen) < 0.2] = 0
    w[int(torch.randint(m, (), generator=gen))] = 1
    return w.double().tolist()


def fit(r, method):
    "Squeeze rewards into [0, 1] where a method asks for that."
    return (r.double() / r.double().abs().nan_to_num(0).amax().clamp(min=1e-300)).abs().to(r.dtype) if method in BOUNDED else r


def calls(k, published=(False, True)):
    "List all ways to call `advantages` with this k."
    return [(m, 2.0 if m == 'rvpo_explicit' and math.isinf(k) else k, p) for m in METHODS for p in published if not (p and m == 'gd2po')]


def close(a, b, dtype, factor=8): return (a.double() - b.double()).abs().max() <= factor * max(torch.finfo(dtype).eps, 1e-6) * (1 + b.double().abs().max())


def test_advantages_are_finite_whatever_the_rewards(fuzz, fault_row):
    counted = []
    def check(case):
        r, k, seed = case
        nothing, weights = r.isnan().all(-1), weights_for(r.shape[-1], seed)
        for method, k, published in calls(k):
            w = None if published and r.dtype == torch.float16 else weights  # the papers' sums carry the weights' unit
            a = advantages(fit(r, method), method, k=k, weights=w, published=published)
            assert a.dtype == r.dtype and a.device == r.device and a.shape == r.shape[:2] and not a.requires_grad
            assert a.isfinite().all() and (a[nothing] == 0).all(), (method, published)
            if method in CENTRED and not published: assert close(a.double().mean(1), torch.zeros(len(a), device=a.device), r.dtype, 4 + a.abs().max().item()), method
            counted.append(method)
    fuzz(60, st.tuples(tables(), st.sampled_from(KS), st.integers(0, 10 ** 6)), check)
    assert set(counted) == set(METHODS)
    fault_row('numbers', 'rewards from 1e-30 to 1e30 within one batch, missing and dead in all patterns, float16 to float64', len(counted), len(counted),
              'finite advantages; 0 where no reward applies', 'Nothing.', 'Nothing to do.')


def test_advantages_do_not_depend_on_order(fuzz, fault_row):
    counted = []
    def check(case):
        r, k, seed = case
        gen = torch.Generator().manual_seed(seed)
        p, g, m = (torch.randperm(n, generator=gen) for n in r.shape)
        w = weights_for(r.shape[-1], seed)
        for method, k, published in calls(k):
            if published and r.double().abs().nan_to_num(0).max() > 1e3: continue  # with dead rewards and no test for rounding, sums of large numbers are noise
            x, v = fit(r, method), None if published else w
            a = advantages(x, method, k=k, weights=v, published=published)
            moved = advantages(x[p][:, g][..., m], method, k=k, weights=v and [v[j] for j in m.tolist()], published=published)
            assert close(moved, a[p][:, g], r.dtype), (method, published, k)
            counted.append(method)
    fuzz(60, st.tuples(tables(), st.sampled_from(KS), st.integers(0, 10 ** 6)), check)
    assert set(counted) == set(METHODS)
    fault_row('numbers', 'rollouts, prompts and rewards in another order', len(counted), len(counted), 'the same advantages in that order', 'Nothing.', 'Nothing to do.')


def test_the_unit_of_a_reward_is_free_where_that_is_promised(fuzz, fault_row):
    counted = []
    def check(case):
        r, k, seed = case
        gen = torch.Generator().manual_seed(seed)
        m = r.shape[-1]
        draw = lambda: torch.rand(m, generator=gen, dtype=torch.float64).to(r.device)
        w = weights_for(m, seed)
        high = 8 if r.dtype == torch.float16 else 90  # powers of 2 are exact in every type
        exact = r * (2.0 ** (high * (2 * draw() - 1)).round()).to(r.dtype)
        wide = r.double()
        scale = 10 ** (60 * draw() - 30)
        general = wide * scale + scale * (20 * draw() - 10)
        for method in ANY_UNIT:
            kk = min(k, 10.0) if method == 'rvpo_explicit' else k
            assert close(advantages(exact, method, k=kk, weights=w), advantages(r, method, k=kk, weights=w), r.dtype), method
            assert close(advantages(general, method, k=kk, weights=w), advantages(wide, method, k=kk, weights=w), torch.float64), method
            counted.append(method)
        for method in ONE_UNIT:
            all_at_once = wide * scale[0] + scale[0] * (20 * draw() - 10 if not wide.isnan().any() else 0)
            assert close(advantages(all_at_once, method, weights=w), advantages(wide, method, weights=w), torch.float64), method
            counted.append(method)
    fuzz(40, st.tuples(tables(('unit',)), st.sampled_from(KS), st.integers(0, 10 ** 6)), check)
    fault_row('numbers', 'a reward in another unit, by factors from 1e-30 to 1e30, and from another zero', len(counted), len(counted),
              'the same advantages from the methods made of z-scores: ' + ', '.join(ANY_UNIT), 'Nothing.',
              'With grpo, dvao, tchebycheff and sa_mrpo, and in every published form, the unit decides who is heard: choose it.')


@pytest.mark.parametrize('method', [*ONE_UNIT, *BOUNDED])
def test_the_unit_counts_elsewhere(method):
    assert set(ANY_UNIT + ONE_UNIT + BOUNDED) == set(METHODS), 'every method says which it is'
    r = torch.rand(8, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = r * torch.tensor([0.01, 1.0, 1.0])
    if method in BOUNDED: other[..., 0] = 0.1 * r[..., 0] + 0.9  # within [0, 1], and nearly saturated
    assert not torch.allclose(advantages(other, method), advantages(r, method), atol=0.02)


@pytest.mark.parametrize('method', [m for m in METHODS if m not in ('gd2po', *BOUNDED)])
def test_the_published_epsilon_has_a_unit(method):
    r = torch.rand(8, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    published = [advantages(x, method, published=True) for x in (r, r + 5, 1e-5 * r)]
    torch.testing.assert_close(published[1], published[0], rtol=1e-9, atol=1e-9)
    if method in ('gdpo', 'rvpo', 'rvpo_explicit', 'hardmin'): assert not torch.allclose(published[2], published[0], rtol=1e-3)  # whitened again, and still not the same
    else: assert published[2].abs().max() < 0.3 * published[0].abs().max()


def test_a_rollout_on_the_threshold_of_gd2po_is_kept_in_any_unit():
    "Weights 9 to 1 against each other agree to 0.8 up to rounding, which is the threshold."
    r = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    for x in torch.rand(200, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        assert (advantages(r * x + x.flip(-1) / 3, 'gd2po', weights=[9, 1]).abs() == 1).all()


# --- who is heard

def test_who_is_heard_is_known_whatever_the_rewards(fuzz, fault_row):
    counted, ends = [], []
    def check(case):
        r, k, n, seed = case
        w = weights_for(r.shape[-1], seed)
        q, eps, m = attention(r, k, w), max(1e-6, torch.finfo(r.dtype).eps), r.shape[-1]
        total = q.double().sum(-1)
        assert q.dtype == r.dtype and (q >= 0).all() and (((total - 1).abs() < m * eps) | (total == 0)).all() and (q[r.isnan()] == 0).all()
        heard = n_effective(attention(r.double(), k, w)).nan_to_num(1)
        assert (heard > 1 - 1e-9).all() and (heard < m + 1e-9 * m).all()
        found, count = solve_k(r, n, w), Heard(r[None], w)
        assert found.dtype == torch.float64 and found >= 0
        number = lambda k: count.at(torch.full((1,), k, dtype=torch.float64, device=r.device))[0].item()
        if found == 0: assert number(0.0) <= n * (1 + 1e-8)
        elif found == math.inf: assert number(math.inf) >= n * (1 - 1e-8)
        else: assert number(found.item()) == pytest.approx(n, rel=1e-6)
        counted.append(1), ends.append('0' if found == 0 else 'inf' if found == math.inf else 'between')
    fuzz(150, st.tuples(tables(), st.sampled_from(KS), st.floats(1, 20), st.integers(0, 10 ** 6)), check)
    assert set(ends) == {'0', 'inf', 'between'}
    fault_row('numbers', 'attention and the k of n_effective, on the same rewards', len(counted), len(counted),
              'shares that sum to 1, and a k at which that many rewards are heard (0 or inf where there is none)', 'Nothing.', 'Nothing to do.')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_rewards_that_tie_by_rounding_ask_for_an_infinite_k(dtype):
    one = torch.rand(6, 8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for factor, offset in ((3.0, 0.0), (1 / 7, 1.0), (1e20, 3e20), (1e-20, 0.0)):
        r = torch.cat([one, factor * one + offset], -1).to(dtype)
        assert (r[..., 0].sub(r[..., 0].mean(1, keepdim=True)) != 0).all() and solve_k(r, 1.5) == math.inf
        assert advantages(r, n_effective=1.5).isfinite().all()
    near = torch.cat([one, one + 1e-5 * torch.rand(one.shape, generator=torch.Generator().manual_seed(1))], -1)
    assert 8200 < solve_k(near, 1.5) < math.inf, 'what differs by more than rounding is told apart by some k'


def test_softmin_of_mixed_scales(fuzz, fault_row):
    counted = []
    def check(case):
        r, k, seed = case
        z, w = r.double().nan_to_num(0).to(r.dtype).flatten(0, 1).requires_grad_(), weights_for(r.shape[-1], seed)
        out = softmin(z, k, weights=w)
        grad, q = torch.autograd.grad(out.double().sum(), z)[0], softmin_weights(z.detach(), k, weights=w)
        on = torch.tensor([1.0] * r.shape[-1] if w is None else w) > 0
        size = z.double()[:, on].abs().amax(-1).clamp(min=1e-300)
        eps = 1e-6 if r.dtype in DTYPES[2:] else torch.finfo(r.dtype).eps
        assert out.isfinite().all() and grad.isfinite().all() and (grad >= 0).all() and out.dtype == z.dtype
        assert ((grad.double().sum(-1) - 1).abs() < r.shape[-1] * eps).all() and (grad - q).abs().max() <= 2 * eps
        tiny = torch.finfo(r.dtype).smallest_normal
        assert (out.double() >= z.double()[:, on].amin(-1) - 2 * eps * size - tiny).all() and (out.double() <= z.double()[:, on].amax(-1) + 2 * eps * size + tiny).all()
        counted.append(1)
    fuzz(60, st.tuples(tables().map(lambda r: r.cpu()), st.sampled_from(KS), st.integers(0, 10 ** 6)), check)
    fault_row('numbers', 'SoftMin of numbers from 1e-30 to 1e30 side by side, k from 0 to inf, with gradients', len(counted), len(counted),
              'a value between the least and the largest, and a gradient that sums to 1', 'Nothing.', 'Nothing to do.')


def test_a_guard_stays_in_bounds(fuzz, fault_row):
    counted = []
    def check(case):
        m, steps, lr, seed = case
        gen = torch.Generator().manual_seed(seed)
        rates, dead = (torch.rand(steps, m, generator=gen, dtype=torch.float64) for _ in range(2))
        rates[torch.rand(rates.shape, generator=gen) < 0.3], dead[torch.rand(dead.shape, generator=gen) < 0.3] = torch.nan, torch.nan
        dead[torch.rand(dead.shape, generator=gen) < 0.3] = 1
        targets = [0.9 if x < 0.3 and j else None for j, x in enumerate(torch.rand(m, generator=gen).tolist())]
        order = torch.randperm(m, generator=gen)
        guard, other = Guard(targets, 0.8, lr), Guard([targets[j] for j in order.tolist()], 0.8, lr)
        floor = torch.tensor([1.0 if t is None else 0.0 for t in targets])
        for t in range(steps):
            w = guard.update(rates[t], dead[t])
            assert w.isfinite().all() and (w >= floor).all() and (w <= 1 + lr * (t + 1)).all()
            assert torch.equal(other.update(rates[t][order], dead[t][order]), w[order])
        r = torch.rand(3, 4, m, generator=gen)
        assert advantages(r, weights=guard.weigh(None)).isfinite().all()
        counted.append(1)
    fuzz(40, st.tuples(st.sampled_from(SIZES), st.integers(1, 60), st.floats(1e-6, 1e6), st.integers(0, 10 ** 6)), check)
    fault_row('numbers', 'pass rates that come and go, in a guard with steps from 1e-6 to 1e6', len(counted), len(counted), 'weights that are finite and not below their floor', 'Nothing.', 'Nothing to do.')


# --- what cannot be computed is said

def test_what_leaves_the_range_is_named(fault_row):
    r = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    cases = [(dict(rewards=r.half(), method='ac', weights=[1e6, 1, 1], published=True), 'an advantage of ac leaves the range of torch.float16'),
             (dict(rewards=r, method='ac', weights=[1e39, 1, 1], published=True), 'an advantage of ac leaves the range of torch.float32'),
             (dict(rewards=1e90 * r.double(), method='grpo', weights=[1e90, 1, 1], published=True), r'weight 0 is 1e\+90'),
             (dict(rewards=r, method='rvpo_explicit', k=1e200), 'rvpo_explicit needs a finite k, up to 1e100')]
    said = []
    for case, message in cases:
        with pytest.raises(InputError, match=message) as e: advantages(**case)
        said.append(str(e.value))
    fault_row('numbers', 'weights or a k with which the result leaves its float type', len(cases), len(said), said[0], 'The call, before a step is taken.', 'Scale the weights down, or keep rewards in float32.')


# --- losses

@st.composite
def batches(draw):
    "Draw log-probs (1-64 rollouts, 1-24 tokens), those of the sampler and of the reference, advantages and a mask: distances or advantages over many scales, not both."
    n, t, dtype = draw(st.sampled_from(SIZES)), draw(st.integers(1, 24)), draw(st.sampled_from(DTYPES))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    if dtype == torch.float16: size, move = 10 ** draw(st.floats(-6, 2)), 10 ** draw(st.floats(-6, 0))  # gradients must fit too
    elif draw(st.booleans()): size, move = 10 ** draw(st.floats(-30, 30)), 10 ** draw(st.floats(-30, 0))
    else: size, move = 10 ** draw(st.floats(-2, 2)), 10 ** draw(st.floats(-30, 4))
    new = -normal(n, t).abs() * 10 ** draw(st.floats(-6, 1))
    old, ref = new - move * normal(n, t), new - move * normal(n, t)
    advantage = size * normal(n) * (torch.rand(n, generator=gen) < 0.7)
    mask = torch.arange(t) < torch.randint(0, t + 1, (n, 1), generator=gen)
    return [x.to(dtype) for x in (new, old, advantage)], mask.long(), ref.to(dtype)


def test_losses_are_finite_whatever_the_ratios(fuzz, fault_row):
    counted = []
    def check(case):
        (new, old, advantage), mask, ref = case
        order = torch.randperm(len(new), generator=torch.Generator().manual_seed(len(new)))
        for loss_type in LOSS_TYPES:
            for level in LEVELS:
                for estimator in KL_ESTIMATORS:
                    results = []
                    for rows in (slice(None), order):
                        x = new[rows].clone().requires_grad_()
                        loss, stats = policy_loss(x, old[rows], advantage[rows], mask[rows], loss_type=loss_type, importance_sampling_level=level, epsilon_high=5.0, beta=0.04,
                                                  ref_logps=ref[rows], kl_estimator=estimator, max_completion_length=24)
                        grad, = torch.autograd.grad(loss, x)
                        assert loss.isfinite() and all(v.isfinite() for v in stats.values()) and grad.isfinite().all(), (loss_type, level, estimator)
                        assert grad.dtype == x.dtype and not grad[mask[rows] == 0].any() and loss.dtype == torch.promote_types(x.dtype, torch.float32)
                        results.append((loss, grad))
                    (loss, grad), (other, moved) = results
                    size = grad.double().abs().max().item()
                    assert (moved.double() - grad[order].double()).abs().max() <= max(1e-5, 2 * torch.finfo(new.dtype).eps) * size
                    counted.append(loss_type)
    fuzz(25, batches(), check)
    assert set(counted) == set(LOSS_TYPES)
    fault_row('numbers', 'importance ratios from e^-10000 to e^10000, advantages from 1e-30 to 1e30, in five losses, three KL estimates, four float types', len(counted), len(counted),
              'finite losses and gradients; log-ratios are cut off at 40', 'The gradient of a token whose log-ratio is beyond 40.', 'Nothing to do; `sampler_error` and `ratio` in the log show it.')


@pytest.mark.parametrize('loss_type', LOSS_TYPES)
def test_an_overflowing_ratio_where_nothing_is_to_be_learned(loss_type):
    "Advantage 0, or already clipped: infinity times 0 would be NaN in every weight."
    old = torch.full((2, 3), -200.0)
    x = torch.full((2, 3), -1.0, requires_grad=True)
    loss, stats = policy_loss(x, old, torch.tensor([0.0, 1.0]), torch.ones(2, 3), loss_type=loss_type, epsilon_high=5.0, max_completion_length=3)
    grad, = torch.autograd.grad(loss, x)
    assert grad.isfinite().all() and stats['ratio_variance'].isfinite() and not grad[0].any()


@st.composite
def heads(draw):
    "Draw hidden states, an output layer, targets, a temperature and a size of piece: logits of up to 1e30 (float16: 1e4), or far from 0."
    tokens, vocabulary, width, dtype = draw(st.integers(1, 40)), draw(st.integers(2, 300)), draw(st.integers(1, 16)), draw(st.sampled_from(DTYPES))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    size = 10 ** draw(st.floats(-4, 2) if dtype == torch.float16 else st.floats(-30, 29))
    hidden, weight, bias = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((tokens, width), (vocabulary, width), (vocabulary,)))
    weight, bias = size * weight, size * bias + draw(st.sampled_from([0.0, 1.0, -100.0, 3e4]))
    targets = torch.randint(vocabulary, (tokens,), generator=gen)
    temperature = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return [x.to(dtype) for x in (hidden, weight, bias)], targets, temperature, draw(st.integers(1, vocabulary))


def test_log_probs_are_finite_whatever_the_logits(fuzz, fault_row):
    counted = []
    def check(case):
        parts, targets, temperature, chunk = case
        x = piece_logits(*parts, temperature)
        exact = x.double().log_softmax(-1)
        entropy = -(exact.exp() * exact).sum(-1)
        for size in (chunk, len(parts[1])):
            leaves = [p.clone().requires_grad_() for p in parts]
            logps, h = token_logps(*leaves, targets, temperature, size)
            grads = torch.autograd.grad(logps.sum(), leaves)
            eps, scale = torch.finfo(x.dtype).eps, 1 + x.double().abs().max().item()
            # the rows of a product may be summed in another order when they are cut, and are rounded to the type of the hidden states
            rounding = 40 * max(eps, torch.finfo(parts[0].dtype).eps) * scale
            assert logps.isfinite().all() and (logps <= 0).all() and (logps.double() - exact.gather(-1, targets[:, None]).squeeze(-1)).abs().max() <= rounding
            assert (h >= -1e-5).all() and (h <= math.log(len(parts[1])) + 1e-5).all()
            if rounding < 0.1: assert (h.double() - entropy).abs().max() <= 2 * rounding * (1 + math.log(len(parts[1])))
            assert all(g.isfinite().all() and g.dtype == p.dtype for g, p in zip(grads, parts))
            assert grads[2].double().sum().abs() <= 4 * max(1e-5, torch.finfo(parts[2].dtype).eps) * len(targets) * len(parts[1]) / temperature, 'probabilities sum to 1'
            counted.append(1)
    fuzz(80, heads(), check)
    fault_row('numbers', 'logits from 1e-30 to 1e30, or far from 0, whole and a piece of the vocabulary at a time, with gradients', len(counted), len(counted),
              'log-probs of at most 0 and entropies between 0 and ln V', 'Nothing.', 'Nothing to do.')

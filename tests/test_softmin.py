"""SoftMin against mpmath, within error <= 1e-6 max(|exact|, 0.01 max|z|), and the properties it must have."""
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rvpo_nb.softmin import InputError, check_k, softmin, softmin_series, softmin_weights

KS = [0, 1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 1, 2, 5, 17.3, 1e2, 1e3, 1e6, math.inf]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
STRICT = dict(derandomize=True, deadline=None, database=None)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def exact(z, k, w):
    "The formula with enough digits; entries of weight 0 are out. Weights become mpf before they are summed."
    # 60 digits do for ordinary input; subnormal scores times subnormal weights times k = 1e-12 need 660 and some more
    plain = all(a == 0 or abs(a) > 1e-6 for a in z) and all(a == 0 or 1e-6 < a for a in w)
    with mpmath.workdps(60 if plain else 750):
        pairs = [(mpmath.mpf(a), mpmath.mpf(b)) for a, b in zip(z, w) if b > 0]
        total = mpmath.fsum(b for _, b in pairs)
        if k == 0: return mpmath.fsum(a * b for a, b in pairs) / total
        low = min(a for a, _ in pairs)
        if math.isinf(k): return low
        k = mpmath.mpf(k)
        return low - mpmath.log(mpmath.fsum(b * mpmath.exp(-k * (a - low)) for a, b in pairs) / total) / k


def allowed(e, z, dtype):
    "What an answer in `dtype` may be off by; the last term is the smallest step the dtype has."
    f = torch.finfo(dtype)
    return max(1e-6, f.eps if f.bits == 16 else 0) * max(abs(e), 0.01 * max(map(abs, z))) + f.smallest_normal * f.eps


def within(out, z, k, w, dtype):
    with mpmath.workdps(60):
        e = exact(z, k, w)
        return abs(mpmath.mpf(out) - e) <= allowed(e, z, dtype)


@st.composite
def problems(draw, dtypes=DTYPES[:2]):
    "Draw (rows, M) scores, weights or None and a mask or None; some rows nearly tied, some spread over many scales."
    rows, m = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(dtypes))
    one = st.one_of(st.floats(-4, 4), st.floats(-1e4, 1e4), st.sampled_from([0.0, 1.0, -1e4, 1e4, 1e-3, 5e-324]))
    base, step = draw(st.tuples(st.floats(-1e3, 1e3), st.sampled_from([1e-9, 1e-4, 1.0])))
    near = st.integers(-3, 3).map(lambda i: base + i * step)
    z = draw(st.lists(st.lists(draw(st.sampled_from([one, near])), min_size=m, max_size=m), min_size=rows, max_size=rows))
    weight = st.one_of(st.floats(0, 10), st.sampled_from([0.0, 1.0, 1e-12, 1e12, 5e-324, 1e300]))
    w = draw(st.none() | st.lists(weight, min_size=m, max_size=m))
    mask = draw(st.none() | st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=rows, max_size=rows))
    return torch.tensor(z, dtype=torch.float64).to(dtype), w, None if mask is None else torch.tensor(mask)


def kept_weights(w, mask, row, m):
    w = [1.0] * m if w is None else w
    return w if mask is None else [a * float(keep) for a, keep in zip(w, mask[row].tolist())]


@settings(max_examples=400, **STRICT)
@given(problems(), st.sampled_from(KS), st.booleans())
def test_value_and_gradient(problem, k, transpose):
    z, w, mask = problem
    kw = dict(weights=w, mask=mask if mask is None or not transpose else mask.T, dim=0 if transpose else -1)
    leaf = (z.T if transpose else z).clone().requires_grad_()
    out, q = softmin(leaf, k, **kw), softmin_weights(leaf.detach(), k, **kw)
    assert out.dtype == q.dtype == z.dtype and out.shape == z.shape[:1] and q.shape == leaf.shape
    out.nansum().backward()
    grad, q = (leaf.grad.T, q.T) if transpose else (leaf.grad, q)
    assert grad.isfinite().all()
    for i, row in enumerate(z.tolist()):
        used = kept_weights(w, mask, i, len(row))
        if not any(used):
            assert out[i].isnan() and q[i].isnan().all()
            continue
        assert within(out[i].item(), row, k, used, z.dtype), (row, k, used, out[i].item())
        tol = 1e-12 if z.dtype == torch.float64 else 1e-6
        assert torch.allclose(grad[i], q[i], rtol=0, atol=tol) and abs(q[i].sum().item() - 1) < tol
        assert (q[i] >= 0).all() and not any(a for a, b in zip(q[i].tolist(), used) if b == 0)


@settings(max_examples=100, **STRICT)
@given(problems(DTYPES[2:]), st.sampled_from(KS))
def test_half_precision(problem, k):
    z, w, mask = problem
    leaf = z.clone().requires_grad_()
    out = softmin(leaf, k, weights=w, mask=mask)
    out.nansum().backward()
    assert out.dtype == z.dtype and leaf.grad.isfinite().all()
    for i, row in enumerate(z.tolist()):
        used = kept_weights(w, mask, i, len(row))
        if any(used): assert within(out[i].item(), row, k, used, z.dtype), (row, k, used, out[i].item())
        else: assert out[i].isnan()


@settings(max_examples=60, **STRICT)
@given(problems(DTYPES[:1]))
def test_monotone(problem):
    z, w, mask = problem
    tol = 1e-13 * (1 + z.abs().amax())
    by_k = torch.stack([softmin(z, k, weights=w, mask=mask) for k in KS])
    assert (by_k.diff(dim=0).nan_to_num(-1) <= tol).all()
    for k in KS:
        for j in range(z.shape[1]):
            up = z.clone()
            up[:, j] += 0.5
            rise = softmin(up, k, weights=w, mask=mask) - softmin(z, k, weights=w, mask=mask)
            assert (rise.nan_to_num(0) >= -tol).all() and (rise.nan_to_num(0) <= 0.5 + tol).all()


@settings(max_examples=60, **STRICT)
@given(problems(DTYPES[:1]), st.sampled_from(KS), st.randoms(use_true_random=False))
def test_symmetries(problem, k, random):
    z, w, mask = problem
    order = list(range(z.shape[1]))
    random.shuffle(order)
    moved = dict(weights=None if w is None else [w[i] for i in order], mask=None if mask is None else mask[:, order])
    same = dict(rtol=1e-12, atol=1e-12 * (1 + z.abs().amax().item()), equal_nan=True)
    plain = softmin(z, k, weights=w, mask=mask)
    assert torch.allclose(softmin(z[:, order], k, **moved), plain, **same)
    q = softmin_weights(z, k, weights=w, mask=mask)
    assert torch.allclose(softmin_weights(z[:, order], k, **moved), q[:, order], rtol=0, atol=1e-12, equal_nan=True)
    assert torch.allclose(softmin(z * 4, k / 4, weights=w, mask=mask), plain * 4, **same)
    if w is not None: assert torch.allclose(softmin(z, k, weights=[a / 2 for a in w], mask=mask), plain, **same) or 5e-324 in w


@pytest.mark.parametrize('dim', [0, 1, 2, -1, -2, -3])
def test_any_dim(dim):
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = z.shape[dim]
    w = torch.arange(1.0, m + 1, dtype=torch.float64)
    mask = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    for k in (0, 2, math.inf):
        out = softmin(z, k, weights=w, mask=mask, dim=dim)
        last = softmin(z.movedim(dim, -1), k, weights=w, mask=mask.movedim(dim, -1))
        assert torch.allclose(out, last, equal_nan=True) and out.shape == last.shape
        q = softmin_weights(z, k, weights=w, dim=dim)
        assert q.shape == z.shape and torch.allclose(q.sum(dim), torch.ones_like(out))
        series = softmin_series(z, 0.5, 3, weights=w, dim=dim)
        assert torch.allclose(series, softmin_series(z.movedim(dim, -1), 0.5, 3, weights=w))


def test_weights_broadcast_like_z():
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    w = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    for dim in (0, 1, 2):
        assert torch.equal(softmin(z, 2, weights=w, dim=dim), softmin(z, 2, weights=w.expand(2, 3, 4), dim=dim))


def test_a_list_of_weights_keeps_its_digits():
    z = torch.tensor([1, 0.5, -1.5], dtype=torch.float64)
    w = [1 / 2, 1 / 3, 1 / 6]
    assert torch.equal(softmin(z, 0.7, weights=w), softmin(z, 0.7, weights=torch.tensor(w, dtype=torch.float64)))


def test_nothing_kept():
    z = torch.tensor([[1.0, 2.0], [3.0, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    for k in (0, 1e-12, 2, math.inf):
        z.grad = None
        out = softmin(z, k, mask=mask)
        out[0].backward()
        assert out[0].isfinite() and out[1].isnan() and z.grad.isfinite().all()
        assert softmin(z.detach(), k, weights=[0, 0]).isnan().all()
        assert softmin_weights(z.detach(), k, mask=mask)[1].isnan().all()
    assert softmin_series(z, 2, mask=mask)[1].isnan()


def test_what_is_left_out_does_not_matter():
    z = torch.tensor([1.0, -5.0, 2.0])
    for hole in (-5.0, torch.nan, torch.inf, -torch.inf):
        z[1] = hole
        for k in (0, 2, math.inf):
            assert torch.equal(softmin(z, k, weights=[1, 0, 1]), softmin(z[[0, 2]], k))
            assert torch.equal(softmin(z, k, mask=[True, False, True]), softmin(z[[0, 2]], k))


def test_a_nan_that_is_kept_shows():
    assert softmin(torch.tensor([1.0, torch.nan]), 2).isnan()


@pytest.mark.parametrize('k', [-1, -1e-300, -math.inf, math.nan, '2', None, 1j, [1.0]], ids=repr)
@pytest.mark.parametrize('f', [softmin, softmin_weights, softmin_series, lambda z, k: check_k(k)],
                         ids=['softmin', 'softmin_weights', 'softmin_series', 'check_k'])
def test_bad_k(f, k):
    with pytest.raises(InputError) as e: f(torch.zeros(2), k)
    assert repr(k) in str(e.value)


@pytest.mark.parametrize('f', [softmin, softmin_weights, softmin_series])
@pytest.mark.parametrize('w', [-0.25, math.nan, math.inf])
def test_bad_weights(f, w):
    with pytest.raises(InputError, match=str(w)): f(torch.zeros(2), 1, weights=[1, w])


@pytest.mark.parametrize('f', [softmin, softmin_weights, softmin_series])
def test_bad_shapes_and_dtypes(f):
    with pytest.raises(InputError, match=r'\(3,\)'): f(torch.zeros(2), 1, weights=[1, 1, 1])
    with pytest.raises(InputError, match=r'\(3,\)'): f(torch.zeros(2), 1, mask=[True] * 3)
    with pytest.raises(InputError, match='int64'): f(torch.tensor([1, 2]), 1)


def test_bad_series():
    with pytest.raises(InputError, match='inf'): softmin_series(torch.zeros(2), math.inf)
    with pytest.raises(InputError, match='order'): softmin_series(torch.zeros(2), 1, 0)


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


@settings(max_examples=50, **STRICT)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 10 ** 6))
def test_series(z, seed):
    z = torch.tensor(z, dtype=torch.float64)
    w = torch.rand(len(z), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    p = w / w.sum()
    mean = (p * z).sum()
    assert torch.allclose(softmin_series(z, 0.7, 1, weights=w), mean, atol=1e-13)
    assert torch.allclose(softmin_series(z, 0.7, 2, weights=w), mean - 0.35 * (p * (z - mean) ** 2).sum(), atol=1e-13)
    k = 0.02  # k times the spread is at most 0.12, so each order leaves an error of the next one
    errors = [abs(softmin_series(z, k, n, weights=w) - softmin(z, k, weights=w)).item() for n in (1, 2, 3, 4, 6)]
    for n, error in zip((1, 2, 3, 4, 6), errors): assert error <= 6 * 0.12 ** n + 1e-13


@pytest.mark.parametrize('z,w', [
    ([0.0, 9.0, 8.0], [1e-9, 1.0, 2.0]),        # the minimum has hardly any weight
    ([0.0, 9.0, 8.0], [5e-324, 1e300, 1e300]),  # or less than float64 can write as a share
    ([1.0, -1.0], [1.7e308, 1.7e308]),          # the sum of the weights overflows
    ([1.0, -1.0], [5e-324, 1e-323]),            # or has one digit
    ([1e280, -2e280], [1.0, 2.0]),
    ([1e-300, 3e-300], [1.0, 2.0]),
])
def test_extremes(z, w):
    leaf = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    for k in (0, 1e-12, 0.5, 3, 1e3, math.inf):
        out, = torch.autograd.grad(softmin(leaf, k, weights=w), leaf)
        assert within(softmin(leaf, k, weights=w).item(), z, k, w, torch.float64), k
        assert torch.allclose(out, softmin_weights(leaf.detach(), k, weights=w), rtol=0, atol=1e-12)


def test_second_derivative():
    for k in (0.3, 2.0):
        z = torch.tensor([1.0, 1.0, -1.7, 0.2], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v: softmin(v, k), z) and torch.autograd.gradgradcheck(lambda v: softmin(v, k), z)
        assert torch.autograd.gradcheck(lambda v: softmin_series(v, k, 4), z)
    z, w = torch.tensor([0.0, 5.0, 4.0], dtype=torch.float64, requires_grad=True), [1e-6, 1, 1]  # by way of the logarithms
    assert torch.autograd.gradcheck(lambda v: softmin(v, 3, weights=w), z) and torch.autograd.gradgradcheck(lambda v: softmin(v, 3, weights=w), z)

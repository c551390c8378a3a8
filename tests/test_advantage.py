"""`advantages` beside an obvious loop, beside TRL's own code, and at its edges."""
import math
import os

import numpy as np
import pytest
import torch

from rvpo_nb import advantage
from rvpo_nb.advantage import TINY, advantages, attention, k_at, n_effective, solve_k
from rvpo_nb.softmin import InputError, softmin

EPS32 = 2.0 ** -23
METHODS = ['grpo', 'ac', 'gdpo', 'rvpo', 'rvpo_explicit', 'hardmin', 'dvao']  # of this chapter: a later one registers others
Z_METHODS = ['ac', 'gdpo', 'rvpo', 'rvpo_explicit', 'hardmin']
WHITENED = ['gdpo', 'rvpo', 'rvpo_explicit', 'hardmin']
WEIGHTS = np.linspace(0, 2, 17) ** 2  # the first is 0


# --- the oracle: one number at a time, written from the definitions alone

def spread(values, sample):
    "Standard deviation of a list; 0 where it is not defined."
    n = len(values) - (1 if sample else 0)
    return math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values) / n) if n > 0 else 0.0


def over(x, std, published):
    return x / (std + 1e-4) if published else (x / std if std > 0 else 0.0)


def one_softmin(z, w, k):
    if k == 0: return sum(a * b for a, b in zip(w, z))
    if math.isinf(k): return min(z)
    low = min(z)
    return low - math.log(sum(b * math.exp(-k * (a - low)) for a, b in zip(z, w))) / k


def combine(method, z, w, k, total):
    "Aggregate the z-scores of one rollout; `w` sums to 1."
    mean = sum(a * b for a, b in zip(w, z))
    if method in ('ac', 'gdpo'): return mean * total
    if method == 'rvpo': return one_softmin(z, w, k)
    if method == 'rvpo_explicit': return mean - k / 2 * sum(b * (a - mean) ** 2 for a, b in zip(z, w))
    return min(z)


def live_columns(x, weights, published):
    "The rewards of one group (rollouts, rewards) that count, each with its mean, its standard deviation and the population's."
    column = {}
    for j in range(x.shape[1]):
        on = [i for i in range(len(x)) if not np.isnan(x[i, j])]
        if weights[j] == 0 or not on: continue
        values = [x[i, j] for i in on]
        if not published and (len(on) < 2 or max(values) - min(values) <= 64 * EPS32 * max(map(abs, values))): continue
        mean = sum(values) / len(values)
        column[j] = mean, spread(values, published), spread(values, False)
    return column


def group_values(x, method, k, weights, published):
    "One group (rollouts, rewards) to one value per rollout, NaN where it counts nowhere; before batch whitening."
    total, column = (sum(weights) if published else 1.0), live_columns(x, weights, published)
    out = np.full(len(x), np.nan)
    for i in range(len(x)):
        js = [j for j in column if not np.isnan(x[i, j])]
        if not js: continue
        w = [weights[j] / sum(weights[l] for l in js) for j in js]
        if method == 'grpo':
            out[i] = total * sum(b * x[i, j] for b, j in zip(w, js))
        elif method == 'dvao':
            above = total * sum(b * (x[i, j] - column[j][0]) for b, j in zip(w, js))
            out[i] = over(above, total * sum(b * column[j][2] for b, j in zip(w, js)), published)
        else:
            out[i] = combine(method, [over(x[i, j] - column[j][0], column[j][1], published) for j in js], w, k, total)
    return out


def oracle(x, method, k=2.0, weights=None, published=False):
    x = np.asarray(x, dtype=np.float64)
    weights = [1.0] * x.shape[-1] if weights is None else list(weights)
    a = [group_values(g, method, k, weights, published) for g in x]
    flat = lambda groups: [v for g in groups for v in g if not np.isnan(v)]
    if method == 'grpo' or (method in WHITENED and not published):
        a = [g - np.mean(flat([g])) if flat([g]) else g for g in a]
    if method == 'grpo':
        a = [np.array([over(v, spread(flat([g]), published), published) for v in g]) for g in a]
    elif method in WHITENED:
        mean, std = (np.mean(flat(a)) if published else 0.0), spread(flat(a), published)
        a = [np.array([over(v - mean, std, published) for v in g]) for g in a]
    return np.nan_to_num(np.stack(a))


@pytest.fixture(scope='module')
def rewards():
    "(64, 16, 17) float32: binary, graded and badly scaled rewards; NaN, dead rewards, all-NaN rollouts, dead groups."
    gen = torch.Generator().manual_seed(0)
    r = torch.rand(64, 16, 17, generator=gen)
    r[..., :8] = (r[..., :8] < 0.7).float()
    r[..., 8] = 1000 * r[..., 8] - 300
    r[..., 9] = r[..., 9] * 1e-3 + 2
    r[torch.rand(r.shape, generator=gen) < 0.1] = torch.nan
    constant = torch.rand(64, 1, 17, generator=gen)
    r = torch.where(torch.rand(64, 1, 17, generator=gen) < 0.2, constant, r)  # dead, nothing missing
    r[:8, ::5] = torch.nan                                                    # rollouts to which nothing applies
    r[10:14] = constant[10:14]                                                # dead groups
    r[14] = torch.nan                                                         # a padded group
    r[15, 1:] = torch.nan                                                     # a group of one
    r[16, 2:, 3] = r[16, 1:, 4] = torch.nan                                   # rewards that apply to one or two rollouts
    return r


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('weights', [None, WEIGHTS], ids=['equal', 'weights'])
@pytest.mark.parametrize('method', METHODS)
def test_equals_the_loop(rewards, method, weights, published):
    for k in (0, 0.5, 2.0, 10.0, math.inf) if method == 'rvpo' else (2.0,):
        fast = advantages(rewards, method, k=k, weights=weights, published=published)
        assert fast.dtype == torch.float32 and fast.shape == (64, 16)
        slow = oracle(rewards.numpy(), method, k, weights, published)
        np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-6, atol=1e-6)
        if not published: assert (fast[10:16] == 0).all() and (fast[:8, ::5] == 0).all()


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_blocks_do_not_show(rewards, monkeypatch, method, published):
    many = rewards.reshape(2, 32, 16, 17)
    whole = advantages(many, method, published=published)
    for block in (1, 3000):  # one group at a time; 11 groups, so that the last block is a short one
        monkeypatch.setattr(advantage, 'BLOCK', block)
        torch.testing.assert_close(advantages(many, method, published=published), whole)


# --- who is heard

def shares_by_autograd(x, k, weights):
    "One group at a time: the oracle's z-scores, and the derivative of the softmin of what is live."
    out, column = np.zeros(x.shape), live_columns(x, weights, False)
    for i in range(len(x)):
        js = [j for j in column if not np.isnan(x[i, j])]
        if not js: continue
        z = torch.tensor([(x[i, j] - column[j][0]) / column[j][1] for j in js], dtype=torch.float64, requires_grad=True)
        softmin(z, k, weights=[weights[j] for j in js]).backward()
        out[i, js] = z.grad
    return out


@pytest.mark.parametrize('weights', [None, WEIGHTS], ids=['equal', 'weights'])
@pytest.mark.parametrize('k', [0, 0.5, 2, 10, math.inf])
def test_attention_is_the_gradient(rewards, k, weights):
    q = attention(rewards, k, weights)
    given = [1.0] * 17 if weights is None else list(weights)
    slow = np.stack([shares_by_autograd(g, k, given) for g in rewards.double().numpy()])
    assert q.dtype == torch.float32 and q.shape == rewards.shape
    np.testing.assert_allclose(q.numpy(), slow, rtol=1e-6, atol=1e-6)
    none = (slow == 0).all(-1)  # rollouts without a reward, groups without a live one
    assert none[:8, ::5].all() and none[10:16].all() and not none[20:].any()
    np.testing.assert_array_equal(n_effective(q).isnan().numpy(), none)
    perplexity = [math.exp(-sum(p * math.log(p) for p in row if p > 0)) for row in slow[~none]]
    np.testing.assert_allclose(n_effective(q).numpy()[~none], perplexity, rtol=1e-5)


def test_attention_at_both_ends(rewards):
    q, live = attention(rewards, 0, WEIGHTS), attention(rewards, 0) > 0
    w = torch.from_numpy(WEIGHTS) * live
    torch.testing.assert_close(q.double(), (w / w.sum(-1, keepdim=True)).nan_to_num(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(n_effective(attention(rewards, 0)).nan_to_num(0), live.sum(-1).float())
    assert (n_effective(attention(rewards[..., 8:10], math.inf)).nan_to_num(1) == 1).all()  # continuous: one minimum each
    assert torch.equal(n_effective(torch.eye(3)), torch.ones(3)) and n_effective(torch.zeros(2)).isnan()


def test_attention_takes_what_advantages_takes():
    q = attention(TINY, 2)
    torch.testing.assert_close(attention(TINY.int().tolist(), 2), q)
    torch.testing.assert_close(attention(torch.stack([TINY, TINY]), 2), torch.stack([q, q]))
    torch.testing.assert_close(attention(TINY * torch.tensor([1, 1e-3, 50]), 2), q)  # z-scores have no unit
    assert attention(TINY.half(), 2).dtype == torch.float16 and not attention(TINY.clone().requires_grad_(), 2).requires_grad
    assert attention(torch.ones(0, 4, 3), 2).shape == (0, 4, 3) and n_effective(torch.ones(0, 4, 3)).shape == (0, 4)
    for args in ((TINY, -1), (TINY[0], 2), (TINY / 0, 2), (TINY, 2, [1, 1]), (TINY, 2, [1, 1, -1])):
        with pytest.raises(InputError): attention(*args)


# --- a number of rewards in place of k

def heard(x, k, weights=None):
    "Mean over the rollouts that count: perplexity of the weights over exp(KL) of the shares from them."
    q, w = (attention(x.double(), v, weights) for v in (k, 0))
    log = torch.where(q > 0, q.log() - w.log(), 0)
    return (n_effective(w) * torch.exp(-(q * log).sum(-1))).nanmean().item()


@pytest.mark.parametrize('weights', [None, WEIGHTS], ids=['equal', 'weights'])
@pytest.mark.parametrize('n', [1.5, 3, 6.5])
def test_k_lets_that_many_rewards_be_heard(rewards, n, weights):
    k = solve_k(rewards.double(), n, weights)  # double: the dead test depends on the dtype
    assert k.shape == () and 0 < k < 100 and heard(rewards, k.item(), weights) == pytest.approx(n, rel=1e-8)
    if weights is None: assert n_effective(attention(rewards.double(), k.item())).nanmean().item() == pytest.approx(n, rel=1e-8)
    torch.testing.assert_close(solve_k(100 * rewards[torch.randperm(64)].double() + 3, n, weights), k, rtol=1e-7, atol=0)


def test_the_number_heard_falls_with_k_for_any_weights():
    gen = torch.Generator().manual_seed(7)
    r, k = torch.rand(20, 8, 5, generator=gen).double(), [0.0, *torch.logspace(-2, 2, 30).tolist(), math.inf]
    for weights in torch.rand(10, 5, generator=gen) ** 4:
        numbers = [heard(r, x, weights) for x in k]
        assert all(a >= b - 1e-9 for a, b in zip(numbers, numbers[1:]))
        for n in (1 + 0.9 * (numbers[0] - 1), 1 + 0.3 * (numbers[0] - 1)): assert heard(r, solve_k(r, n, weights).item(), weights) == pytest.approx(n, rel=1e-8)


def test_k_where_there_is_nothing_to_solve(rewards):
    live = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(8))
    for x, n in ((rewards, 17), (rewards, 1e9), (live[..., :1], 1), (torch.ones(3, 4, 2), 1.5), (live * torch.nan, 2), (live[:0], 2)): assert solve_k(x, n) == 0
    assert solve_k(live, 1) == solve_k(live, 1.0) == math.inf
    torch.testing.assert_close(advantages(live, n_effective=1), advantages(live, 'hardmin'))
    torch.testing.assert_close(advantages(live, n_effective=3), advantages(live, 'gdpo'))
    ties = torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 1]])[None]  # two rollouts hear both rewards at any k
    assert solve_k(ties, 1.4) == math.inf and 0 < solve_k(ties, 1.6) < math.inf
    assert not solve_k(live.clone().requires_grad_(), 2).requires_grad


@pytest.mark.parametrize('published', [False, True])
def test_n_effective_is_the_k_that_it_solves_for(rewards, published):
    k = solve_k(rewards, 4, WEIGHTS, published).item()
    a = advantages(rewards, n_effective=4, weights=WEIGHTS, published=published)
    assert torch.equal(a, advantages(rewards, k=k, weights=WEIGHTS, published=published))
    assert not torch.allclose(a, advantages(rewards, weights=WEIGHTS, published=published), atol=0.1)


@pytest.mark.parametrize('block', [None, 1, 3000])
def test_every_batch_has_its_own_k(rewards, monkeypatch, block):
    if block: monkeypatch.setattr(advantage, 'BLOCK', block)
    many = rewards.reshape(2, 4, 8, 16, 17).clone()
    many[0, 1], many[1, 1] = 1.0, (many[1, 1] > 0.5).float()  # a dead batch, k = 0; a binary one
    k, a = solve_k(many, 2.0), advantages(many, n_effective=2.0)
    assert k.shape == (2, 4) and len(set(k.flatten().tolist())) == 8 and k[0, 1] == 0
    for i in range(2):
        for j in range(4):
            torch.testing.assert_close(solve_k(many[i, j], 2.0), k[i, j], rtol=1e-8, atol=0)
            torch.testing.assert_close(advantages(many[i, j], n_effective=2.0), a[i, j], rtol=1e-5, atol=1e-6)
    edges = torch.stack([many[0, 0], many[0, 1], many[0, 0] * torch.nan])
    torch.testing.assert_close(advantages(edges, n_effective=1)[0], advantages(many[0, 0], k=solve_k(many[0, 0], 1).item()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('change,message', [
    (dict(n_effective=0.5), 'n_effective must be a number from 1 on, got 0.5'),
    (dict(n_effective=math.nan), 'n_effective must be'),
    (dict(n_effective=math.inf), 'n_effective must be'),
    (dict(n_effective='2'), 'n_effective must be'),
    (dict(n_effective=2, method='gdpo'), 'n_effective sets the k of rvpo; gdpo has none'),
])
def test_wrong_n_effective(change, message):
    with pytest.raises(InputError, match=message): advantages(TINY, **change)


# --- TRL's own trainer

@pytest.fixture(scope='module')
def trl_advantages(tmp_path_factory):
    "A function from (prompts, group, rewards) to what TRL's GRPOTrainer computes from the same matrix."
    pytest.importorskip('trl')
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS'):
        os.environ[name] = '1'
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    class Given(GRPOTrainer):
        def _calculate_rewards(self, *args, **kwargs): return self.given

    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(['<pad>', '<eos>', '<unk>', 'a', 'b', 'c'])}, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()

    def run(matrix, aggregation, weights):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>', padding_side='left')
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=64))
        prompts, group, m = matrix.shape
        args = GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp('trl')), per_device_train_batch_size=prompts * group, num_generations=group,
            max_completion_length=2, multi_objective_aggregation=aggregation, reward_weights=weights, report_to='none', bf16=False,
            gradient_checkpointing=False, use_cpu=True, save_strategy='no', disable_tqdm=True, dataloader_pin_memory=False)
        rows = [{'prompt': 'a b'} for _ in range(prompts)]
        trainer = Given(model=model, reward_funcs=[_named(j) for j in range(m)], args=args,
                        train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.given = matrix.reshape(-1, m)
        trainer.model.train()
        batch = [row for row in rows for _ in range(group)]
        return trainer._generate_and_score_completions(batch)['advantages'].reshape(prompts, group)
    return run


def _named(j):
    def reward(completions, **columns): raise AssertionError('the matrix is given')
    reward.__name__ = f'reward_{j}'
    return reward


def trl_reference(r, weights, normalise_first):
    "TRL's convention, in float64: NaN counts 0 in the sum, weights are not renormalised."
    r, w = np.asarray(r, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    nothing = np.isnan(r).all(-1)
    if normalise_first: r = (r - np.nanmean(r, 1, keepdims=True)) / (np.nanstd(r, 1, ddof=1, keepdims=True) + 1e-4)
    s = np.where(nothing, np.nan, np.nansum(r * w, -1))
    axes = None if normalise_first else 1
    a = (s - np.nanmean(s, axes, keepdims=True)) / (np.nanstd(s, axes, ddof=1, keepdims=True) + 1e-4)
    return np.nan_to_num(a)


PAIRS = [('grpo', 'sum_then_normalize', False), ('gdpo', 'normalize_then_sum', True)]


@pytest.fixture(scope='module')
def complete():
    r = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(1))
    r[..., 0] = (r[..., 0] < 0.5).float()
    r[1, :, 1] = 1          # a dead reward
    r[2] = r[2, :1]         # a dead group
    return r


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('method,aggregation,first', PAIRS)
@pytest.mark.parametrize('weights', [[1.0, 1.0, 1.0], [2.0, 0.5, 1.5]])
def test_published_equals_trl(trl_advantages, complete, method, aggregation, first, weights):
    trl = trl_advantages(complete, aggregation, weights)
    ours = advantages(complete, method, weights=weights, published=True)
    torch.testing.assert_close(ours, trl, rtol=2e-6, atol=2e-6)  # TRL computes in float32
    exact = advantages(complete.double(), method, weights=weights, published=True)
    np.testing.assert_allclose(exact.numpy(), trl_reference(complete, weights, first), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('method,aggregation,first', PAIRS)
def test_missing_rewards_differ_from_trl_on_purpose(trl_advantages, complete, method, aggregation, first):
    weights, holed = [2.0, 0.5, 1.5], complete.clone()
    holed[0, 0, 1] = holed[3, 2, 0] = torch.nan
    holed[4, 1] = torch.nan  # nothing applies: here the two agree that it counts nowhere
    trl = trl_advantages(holed, aggregation, weights)
    np.testing.assert_allclose(trl.numpy(), trl_reference(holed, weights, first), rtol=2e-6, atol=2e-6)
    ours = advantages(holed, method, weights=weights, published=True)
    np.testing.assert_allclose(ours.numpy(), oracle(holed.numpy(), method, weights=weights, published=True), rtol=1e-6, atol=1e-6)
    assert ours[4, 1] == trl[4, 1] == 0
    assert (ours - trl)[[0, 3]].abs().max() > 0.05
    if method == 'grpo': torch.testing.assert_close(ours[[1, 2, 4, 5]], trl[[1, 2, 4, 5]], rtol=2e-6, atol=2e-6)


# --- input

@pytest.mark.parametrize('change,message', [
    (dict(method='minimum'), "unknown method 'minimum'; known: grpo, .*hardmin"),
    (dict(k=-1), 'k must be a number from 0 to inf, got -1'),
    (dict(k=math.nan), 'k must be'),
    (dict(method='gdpo', k=-1), 'k must be'),
    (dict(method='rvpo_explicit', k=math.inf), 'hardmin'),
    (dict(weights=[1, 1]), '2 weights for 3 rewards'),
    (dict(weights=[1, -2, 1]), 'weight 1 is -2'),
    (dict(weights=[1, 1, math.nan]), 'weight 2 is nan'),
    (dict(weights=[math.inf, 1, 1]), 'weight 0 is inf'),
    (dict(weights=[0, 0, 0]), 'all weights are 0'),
])
def test_wrong_arguments(change, message):
    with pytest.raises(InputError, match=message): advantages(TINY, **{'method': 'rvpo'} | change)


@pytest.mark.parametrize('value', [math.inf, -math.inf, 1e120])
def test_infinite_reward_is_named(value):
    r = TINY.double()
    r[1, 2, 0] = value
    with pytest.raises(InputError, match='reward 0 of prompt 1, rollout 2 is'): advantages(r)


@pytest.mark.parametrize('shape', [(4,), (4, 3), (2, 0, 3), (2, 4, 0)])
def test_wrong_shape(shape):
    with pytest.raises(InputError, match='shape'): advantages(torch.ones(shape))


def test_no_prompts(): assert advantages(torch.ones(0, 4, 3)).shape == (0, 4)


def test_schedule():
    assert [k_at(t, 4, 0.5, 2) for t in range(4)] == [0.5, 1, 1.5, 2]
    assert k_at(0, 1, 0.5, 2) == 0.5 and k_at(9, 4, 0.5, 2) == 2 and k_at(3, 4, math.inf) == math.inf
    for k, end in ((-1, None), (1, -1), (math.nan, 1), (1, math.inf), (math.inf, 1), ('2', None)):
        with pytest.raises(InputError): k_at(0, 4, k, end)


# --- invariances

@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_order_does_not_matter(rewards, method, published):
    gen = torch.Generator().manual_seed(2)
    p, g, m = (torch.randperm(n, generator=gen) for n in rewards.shape)
    moved = advantages(rewards[p][:, g][..., m], method, weights=WEIGHTS[m], published=published)
    torch.testing.assert_close(moved, advantages(rewards, method, weights=WEIGHTS, published=published)[p][:, g], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_scale_of_the_weights(rewards, method):
    torch.testing.assert_close(advantages(rewards, method, weights=WEIGHTS), advantages(rewards, method, weights=1e3 * WEIGHTS))


@pytest.mark.parametrize('method', Z_METHODS)
@pytest.mark.parametrize('scale', [1e-30, 1e-6, 3.7, 1e30])
def test_unit_of_each_reward(rewards, method, scale):
    r = rewards.double().nan_to_num(0.5)
    changed = r.clone()
    changed[..., 2] = scale * r[..., 2]
    changed[..., 5] = r[..., 5] - 7
    torch.testing.assert_close(advantages(changed, method), advantages(r, method), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('method', METHODS)
def test_padding_changes_nothing(rewards, method):
    padded = torch.cat([rewards, torch.full((64, 3, 17), torch.nan)], 1)
    padded = torch.cat([padded, torch.full((2, 19, 17), torch.nan), torch.ones(2, 19, 17)], 0)
    a = advantages(padded, method)
    torch.testing.assert_close(a[:64, :16], advantages(rewards, method))
    assert (a[:, 16:] == 0).all() and (a[64:] == 0).all()


@pytest.mark.parametrize('method', METHODS)
def test_a_constant_sum(method):
    "r and 1 - r cancel up to rounding, which must not be blown up."
    r = 0.02 * torch.rand(4000, 4, generator=torch.Generator().manual_seed(4)) ** 3
    pair = torch.stack([r, 1 - r], -1)
    assert (pair.double().sum(-1) != 1).any()
    a = advantages(pair, method, k=2)
    if method in ('grpo', 'gdpo'): assert (a == 0).all()
    if method in ('ac', 'dvao'): assert a.abs().max() < 0.05


@pytest.mark.parametrize('method', METHODS)
def test_a_coarse_dtype_is_not_taken_for_rounding(method):
    r = torch.tensor([[0, 1], [0.5, 0.5], [0.5, 0.4375], [1, 0]])[None]
    torch.testing.assert_close(advantages(r.bfloat16(), method), advantages(r, method).bfloat16())


@pytest.mark.parametrize('dtype,last', [(torch.float16, 2.0), (torch.bfloat16, 2.0), (torch.float32, 64.0), (torch.float64, 64.0)])
@pytest.mark.parametrize('size', [1.0, -1024.0])
def test_dead_within_a_few_roundings(dtype, last, size):
    eps = torch.finfo(dtype).eps
    for spread, dead in ((0.0, True), (last, True), (last + 1, False)):
        # both ends are multiples of eps * |size|, so they are exact
        r = size * torch.tensor([1 - spread * eps, 1, 1, 1], dtype=torch.float64).to(dtype)[None, :, None]
        for method in METHODS: assert (advantages(r, method) == 0).all() == dead


@pytest.mark.parametrize('published', [False, True])
def test_identities(rewards, published):
    f = lambda *x, **kw: advantages(rewards.double(), *x, weights=WEIGHTS / WEIGHTS.sum(), published=published, **kw)
    torch.testing.assert_close(f('rvpo', k=0), f('gdpo'))
    torch.testing.assert_close(f('rvpo_explicit', k=0), f('gdpo'))
    torch.testing.assert_close(f('rvpo', k=math.inf), f('hardmin'))
    torch.testing.assert_close(f('rvpo', k=1e-9), f('gdpo'), rtol=1e-6, atol=1e-6)


def test_dvao_is_grpo_times_a_factor_per_prompt():
    r = torch.rand(50, 8, 5, generator=torch.Generator().manual_seed(5)).double()
    a, rc = advantages(r, 'dvao'), advantages(r, 'grpo')
    factor = a / rc
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert (a.abs() <= rc.abs() + 1e-12).all()


# --- shapes, types

@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_leading_dimensions_are_separate_batches(rewards, method, published):
    many = rewards.reshape(2, 4, 8, 16, 17)
    loop = torch.stack([torch.stack([advantages(x, method, published=published) for x in row]) for row in many])
    torch.testing.assert_close(advantages(many, method, published=published), loop)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('method', METHODS)
def test_dtype_is_kept(method, dtype):
    r = (torch.rand(8, 4, 3, generator=torch.Generator().manual_seed(6)) < 0.5).to(dtype)
    a = advantages(r, method)
    assert a.dtype == dtype
    torch.testing.assert_close(a, advantages(r.double(), method).to(dtype))


@pytest.mark.parametrize('method', METHODS)
def test_integers_lists_and_gradients(method):
    whole = TINY.int()
    a = advantages(whole, method)
    assert a.dtype == torch.get_default_dtype()
    torch.testing.assert_close(a, advantages(TINY, method))
    torch.testing.assert_close(a, advantages(whole.tolist(), method))
    assert not advantages(TINY.clone().requires_grad_(), method).requires_grad


def test_input_is_not_changed(rewards):
    before = rewards.clone()
    for method in METHODS: advantages(rewards, method)
    assert torch.equal(before.nan_to_num(-1), rewards.nan_to_num(-1))

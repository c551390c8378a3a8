"""Log-probs beside the obvious way, losses beside TRL's own code, and both at their edges."""
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rvpo_nb.loss import (KL_ESTIMATORS, LEVELS, LOSS_TYPES, check_loss, dual_step, importance_ratio, kl, normalizer_of, policy_loss,
                          token_logps)
from rvpo_nb.softmin import InputError

LONGEST = 16


# --- log-probs

def head(tokens=40, vocabulary=98, width=16, dtype=torch.float64, bias=True):
    "Hidden states, weight, bias, tokens to score, and a gradient to send into each."
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return [draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if bias else None,
            torch.randint(vocabulary, (tokens,), generator=g), torch.randn(tokens, generator=g, dtype=torch.float64)]


def naive(hidden, weight, bias, targets, temperature=1.0, **_):
    "Written without a line of the library."
    x = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log(torch.softmax(x.double() / temperature, -1))
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1).detach()


def results(f, args, **kwargs):
    *args, into = args
    logps, entropy = f(*args, **kwargs)
    wanted = [p for p in args[:3] if p is not None and p.requires_grad]
    return [logps, entropy, *torch.autograd.grad(logps, wanted, into.to(logps), retain_graph=True)]


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('temperature', [1.0, 0.6, 2.0])
@pytest.mark.parametrize('chunk', [1, 7, 49, 97, 98, 1000, None])
@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_logps_equal_the_obvious_way(dtype, tolerance, chunk, temperature, bias):
    args = head(dtype=dtype, bias=bias)
    exact = [x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in args]
    mine_all = results(token_logps, args, temperature=temperature, chunk=chunk)
    for mine, right in zip(mine_all, results(naive, exact, temperature=temperature), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('chunk', [7, None])
@pytest.mark.parametrize('frozen', [(0,), (1,), (2,), (1, 2), (0, 1)])
def test_frozen_parts_get_no_gradient(frozen, chunk):
    args = head()
    for i in frozen: args[i].requires_grad_(False)
    for mine, right in zip(results(token_logps, args, chunk=chunk), results(naive, args), strict=True): torch.testing.assert_close(mine, right)


@pytest.mark.parametrize('chunk', [7, None])
def test_a_second_pass_back_is_the_same(chunk):
    *args, into = head()
    logps, entropy = token_logps(*args, chunk=chunk)
    assert not entropy.requires_grad
    first, second = (torch.autograd.grad(logps, args[:3], into, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad(): assert not token_logps(*args, chunk=chunk)[0].requires_grad


def test_gradcheck():
    hidden, weight, bias, targets, _ = head(5, 11, 3)
    assert torch.autograd.gradcheck(lambda *x: token_logps(*x, targets, temperature=0.8, chunk=4)[0], (hidden, weight, bias))


@pytest.mark.parametrize('chunk', [7, None])
def test_no_tokens(chunk):
    logps, entropy, *grads = results(token_logps, head(tokens=0), chunk=chunk)
    assert logps.shape == entropy.shape == (0,) and all((g == 0).all() for g in grads)


@pytest.mark.parametrize('chunk', [64, None])
@pytest.mark.parametrize('hidden_type', [torch.float32, torch.bfloat16])
def test_autocast(hidden_type, chunk):
    hidden, weight, bias, targets, into = head(500, 98, 32, torch.float32)
    arrived = hidden.detach().to(hidden_type).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): mine = results(token_logps, [arrived, weight, bias, targets, into], chunk=chunk)
    assert [x.dtype for x in mine] == [torch.float32, torch.float32, hidden_type, torch.float32, torch.float32]
    x = torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()).float().log_softmax(-1)
    torch.testing.assert_close(mine[0], x.gather(-1, targets[:, None]).squeeze(-1), rtol=1e-4, atol=1e-4)  # same products, wide softmax
    for x, right in zip(mine, results(naive, [hidden, weight, bias, targets, into])):
        assert (x - right).norm() < 0.02 * right.norm()


def test_bf16_without_autocast():
    *args, into = head(dtype=torch.bfloat16)
    for chunk in (7, None):
        logps, entropy, *grads = results(token_logps, [*args, into], chunk=chunk)
        assert logps.dtype == entropy.dtype == torch.float32 and {g.dtype for g in grads} == {torch.bfloat16}


class Largest(TorchDispatchMode):
    "Remember the largest tensor that any operation makes, backward included."
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor): self.size = max(self.size, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits(dtype):
    *args, into = head(1024, 10_000, 4, torch.float32)
    args[0], sizes = args[0].detach().to(dtype).requires_grad_(), []
    for chunk in (None, 10_000):
        with Largest() as seen: token_logps(*args, chunk=chunk)[0].sum().backward()
        sizes.append(seen.size)
    assert sizes == [2 ** 22 * 4, 1024 * 10_000 * 4]


# --- losses

def batch(seed=0, n=8, t=12, dtype=torch.float32, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(n, t, generator=g, dtype=torch.float64)
    near = lambda s: (old + s * torch.randn(n, t, generator=g, dtype=torch.float64)).to(dtype)
    mask = (torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g)).long()
    return near(spread).requires_grad_(), old.to(dtype), torch.randn(n, generator=g, dtype=torch.float64).to(dtype), mask, near(0.4)


CASES = [  # name, TRL's settings, which are also ours
    ('grpo', dict(loss_type='grpo')),
    ('grpo high', dict(loss_type='grpo', epsilon=0.1, epsilon_high=0.3)),
    ('dapo', dict(loss_type='dapo', epsilon_high=0.28)),
    ('dr_grpo', dict(loss_type='dr_grpo')),
    ('gspo', dict(loss_type='grpo', importance_sampling_level='sequence', epsilon=0.03, epsilon_high=0.04)),
    ('gspo dapo', dict(loss_type='dapo', importance_sampling_level='sequence', epsilon=0.03)),
    ('cispo', dict(loss_type='cispo', epsilon_high=1.2)),
    ('cispo sequence', dict(loss_type='cispo', epsilon_high=1.05, importance_sampling_level='sequence')),
]


@pytest.fixture(scope='module')
def trl_loss(tmp_path_factory):
    "A function from tables of log-probs to the loss of TRL's GRPOTrainer; everything but the model's forward pass is TRL's own."
    pytest.importorskip('trl')
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS'):
        os.environ[name] = '1'
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    class Given(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs): return self.given, torch.zeros_like(self.given), None

    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(['<pad>', '<eos>', '<unk>', 'a'])}, unk_token='<unk>'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='<eos>', unk_token='<unk>')
    folder = str(tmp_path_factory.mktemp('trl'))

    def reward(completions, **columns): raise AssertionError('nothing is sampled')

    def make(parts=1, beta=0.0, **settings):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=64))
        args = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, num_generations=4,
            max_completion_length=LONGEST, report_to='none', bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy='no', disable_tqdm=True,
            dataloader_pin_memory=False, **settings)
        trainer = Given(model=model, reward_funcs=[reward], args=args, processing_class=tokenizer,
                        train_dataset=Dataset.from_list([{'prompt': 'a'}] * 4))
        trainer.model.train()
        trainer.beta = beta  # given to the config, it would load a reference model from a hub; the reference's log-probs are given
        trainer.current_gradient_accumulation_steps = parts  # what the training loop sets
        return trainer

    def run(logps, old, advantages, mask, ref, parts=1, **settings):
        trainer, total = make(parts, **settings), 0
        for rows in torch.arange(len(logps)).chunk(parts):
            trainer.given, ids = logps[rows], torch.full((len(rows), 1), 3)
            total = total + trainer._compute_loss(trainer.model, dict(
                prompt_ids=ids, prompt_mask=torch.ones_like(ids), completion_ids=torch.full_like(mask[rows], 3), completion_mask=mask[rows],
                advantages=advantages[rows], old_per_token_logps=old[rows], ref_per_token_logps=ref[rows], num_items_in_batch=mask.sum()))
        return total, trainer._metrics['train']
    return run


def assert_same_loss(mine, trl, logps):
    torch.testing.assert_close(mine, trl, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps)[0] for x in (mine, trl)), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('extra', [dict(), dict(beta=0.2), dict(beta=0.2, use_bias_correction_kl=False)], ids=['no kl', 'kl', 'plain kl'])
@pytest.mark.parametrize('settings', [c for _, c in CASES], ids=[n for n, _ in CASES])
def test_equals_trl(trl_loss, settings, extra):
    *tables, ref = batch()
    trl, metrics = trl_loss(*tables, ref, **settings, **extra)
    mine, stats = policy_loss(*tables, **settings, **extra, ref_logps=ref if extra else None, max_completion_length=LONGEST)
    assert_same_loss(mine, trl, tables[0])
    tokens = tables[3].sum()
    if extra: assert (stats['kl'] / tokens).item() == pytest.approx(metrics['kl'][0], rel=1e-5)
    if 'importance_sampling_level' in settings: return  # TRL counts sequences there
    cut = metrics.get('clip_ratio/region_mean')
    if cut: assert stats['clip_ratio'] > 0 and (stats['clip_ratio'] / tokens).item() == pytest.approx(cut[0], rel=1e-5)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('settings', [c for _, c in CASES], ids=[n for n, _ in CASES])
def test_parts_equal_trl_with_gradient_accumulation(trl_loss, settings):
    logps, old, a, mask, ref = batch(1)
    trl, _ = trl_loss(logps, old, a, mask, ref, parts=2, beta=0.1, **settings)
    size = normalizer_of(settings['loss_type'], mask, LONGEST)
    halves = slice(0, 4), slice(4, 8)
    mine = sum(policy_loss(logps[i], old[i], a[i], mask[i], ref_logps=ref[i], beta=0.1, normalizer=size, **settings)[0] for i in halves)
    assert_same_loss(mine, trl, logps)


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('loss_type', LOSS_TYPES)
def test_parts_add_up(loss_type, level):
    logps, old, a, mask, ref = batch(2)
    mask[3] = 0  # a rollout that counts nowhere
    settings = dict(loss_type=loss_type, importance_sampling_level=level, epsilon_high=1.1, beta=0.1, max_completion_length=LONGEST)
    whole, stats = policy_loss(logps, old, a, mask, ref_logps=ref, **settings)
    size = normalizer_of(loss_type, mask, LONGEST)
    parts = [policy_loss(*(x[i:i + 3] for x in (logps, old, a, mask)), ref_logps=ref[i:i + 3], normalizer=size, **settings) for i in (0, 3, 6)]
    assert_same_loss(sum(p for p, _ in parts), whole, logps)
    for name, v in stats.items(): torch.testing.assert_close(sum(s[name] for _, s in parts), v, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('level', LEVELS)
@pytest.mark.parametrize('loss_type', LOSS_TYPES)
def test_padding_may_hold_anything(loss_type, level):
    tables = batch(3)
    settings = dict(loss_type=loss_type, importance_sampling_level=level, epsilon_high=1.1, beta=0.1, max_completion_length=LONGEST)
    loss, stats = policy_loss(*tables[:4], ref_logps=tables[4], **settings)
    on = tables[3].bool()
    for garbage in (float('nan'), float('-inf'), -1e4):
        logps, old, ref = (x.detach().masked_fill(~on, garbage) for x in (tables[0], tables[1], tables[4]))
        logps.requires_grad_()
        other, counted = policy_loss(logps, old, tables[2], tables[3], ref_logps=ref, **settings)
        assert torch.equal(other, loss) and all(torch.equal(counted[name], v) for name, v in stats.items())
        assert torch.equal(torch.autograd.grad(other, logps)[0], torch.autograd.grad(loss, tables[0], retain_graph=True)[0])


@pytest.mark.parametrize('loss_type', LOSS_TYPES)
def test_nothing_counts(loss_type):
    logps, old, a, mask, ref = batch(4)
    loss, stats = policy_loss(logps, old, a, 0 * mask, loss_type=loss_type, epsilon_high=5.0, ref_logps=ref, beta=0.1, max_completion_length=LONGEST)
    assert loss == 0 and torch.autograd.grad(loss, logps)[0].abs().max() == 0 and not any(stats.values())


def test_stats_are_sums_over_tokens():
    logps, old, a, mask, ref = batch(5, dtype=torch.float64)
    rho, on = (logps - old).exp().detach(), mask.bool()
    _, stats = policy_loss(logps, old, a, mask, epsilon=0.1, epsilon_high=0.3, ref_logps=ref, use_bias_correction_kl=False)
    assert all(not v.requires_grad and v.shape == () for v in stats.values())
    torch.testing.assert_close(stats['ratio'], rho[on].sum())
    torch.testing.assert_close(stats['ratio_variance'], ((rho[on] - 1) ** 2).sum())
    torch.testing.assert_close(stats['kl'], kl(logps, ref)[on].sum().detach())
    assert stats['clip_ratio'] == (((rho > 1.3) & (a[:, None] > 0) | (rho < 0.9) & (a[:, None] < 0)) & on).sum()
    a[0] = 0  # nothing to cut
    _, capped = policy_loss(logps, old, a, mask, loss_type='cispo', epsilon_high=1.1)
    assert capped['clip_ratio'] == ((rho > 1.1) & on)[1:].sum() < ((rho > 1.1) & on).sum() and capped['kl'] == 0
    _, free = policy_loss(logps, old, a, mask, loss_type='r2vpo')
    assert free['clip_ratio'] == 0
    _, whole = policy_loss(logps, old, a, mask, importance_sampling_level='sequence', epsilon_high=1.2)
    torch.testing.assert_close(whole['ratio'], (importance_ratio(logps, old, mask, 'sequence') * mask).sum().detach())


def test_r2vpo_by_hand():
    logps, old, a, mask, _ = batch(6, dtype=torch.float64)
    loss, _ = policy_loss(logps, old, a, mask, loss_type='r2vpo', ratio_penalty=1.7)
    rho = (logps - old).exp()
    terms = [-rho[i, t] * a[i] + 1.7 * (rho[i, t] - 1) ** 2 for i in range(8) for t in range(12) if mask[i, t]]
    assert_same_loss(loss, sum(terms) / len(terms), logps)


@pytest.mark.parametrize('level', LEVELS)
def test_on_policy_all_agree(level):
    _, old, a, mask, _ = batch(7, dtype=torch.float64)
    x, divisor = old.clone().requires_grad_(), dict(grpo=8 * mask.sum(-1, keepdim=True), dr_grpo=8 * LONGEST)
    for loss_type in LOSS_TYPES:
        loss, stats = policy_loss(x, old, a, mask, loss_type=loss_type, importance_sampling_level=level, epsilon_high=5.0,
                                  max_completion_length=LONGEST)
        expected = -a[:, None] / divisor.get(loss_type, mask.sum()) * mask
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
        assert stats['clip_ratio'] == stats['ratio_variance'] == 0 and stats['ratio'] == mask.sum()


@pytest.mark.parametrize('change,message', [
    (dict(loss_type='ppo'), "unknown loss_type 'ppo'; known: grpo, dapo, dr_grpo, cispo, r2vpo"),
    (dict(importance_sampling_level='word'), "unknown importance_sampling_level 'word'; known: token, sequence"),
    (dict(kl_estimator='k4'), "unknown kl_estimator 'k4'; known: k1, k2, k3"),
    (dict(loss_type='cispo'), 'cispo needs epsilon_high'),
    (dict(beta=0.1), 'beta is 0.1: the KL penalty needs ref_logps'),
    (dict(loss_type='dr_grpo'), 'dr_grpo divides by max_completion_length'),
])
def test_wrong_arguments(change, message):
    with pytest.raises(InputError, match=message): policy_loss(*batch()[:4], **change)
    if not {'beta'} & set(change) and change != dict(loss_type='dr_grpo'):
        with pytest.raises(InputError, match=message): check_loss(**{'loss_type': 'dapo'} | change)


# --- KL, dual step

@pytest.mark.parametrize('name', KL_ESTIMATORS)
def test_kl_by_hand(name):
    p, q = torch.tensor([0.5, 0.2]).double(), torch.tensor([0.25, 0.6]).double()
    expected = dict(k1=torch.log(p / q), k2=torch.log(p / q) ** 2 / 2, k3=q / p - 1 - torch.log(q / p))[name]
    torch.testing.assert_close(kl(p.log(), q.log(), name), expected)
    assert kl(p.log(), p.log(), name).abs().max() == 0


def test_dual_step():
    assert dual_step(0.5, 0.03, 0.01, 10) == pytest.approx(0.7) and dual_step(0.05, 0.0, 0.01, 10) == 0.0
    assert dual_step(0.3, 0.01, 0.01, 10) == 0.3

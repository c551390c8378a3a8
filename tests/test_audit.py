"""The audit on logs with a planted fall, on healthy ones, and on files that no trainer should have written."""
import gzip
import json
import math
from itertools import count
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
import torch

import rvpo_nb.logs
from rvpo_nb.advantage import advantages
from rvpo_nb.audit import audit, draw_pass_rates
from rvpo_nb.inputs import load_tokenizer
from rvpo_nb.logs import read_rollouts
from rvpo_nb.record import write_completions
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY
from rvpo_nb.trainer import GRPOConfig, GRPOTrainer

probit = np.vectorize(NormalDist().inv_cdf)


def make(rates, pull=None, steps=60, groups=8, size=8, seed=0, apply=None, unrest=0.0, drift=0.0, hardness=0.5, sizes=None):
    "Draw a log: `rates` maps a reward to its pass rate at t in [0, 1], `pull` to how a hidden variable of each rollout (its length, say) enters."
    rng, rows = np.random.default_rng(seed), []
    pull, apply, names = pull or {}, apply or {}, list(rates)
    wander = {n: np.cumsum(rng.standard_normal(steps)) * drift for n in names}
    for s in range(steps):
        t = s / max(1, steps - 1)
        shake = {n: unrest * rng.standard_normal() for n in names}
        for g in range(groups):
            m = size if sizes is None else int(rng.choice(sizes))
            x, hard = rng.standard_normal(m), hardness * rng.standard_normal()
            row = dict(step=np.full(m, s + 1), group=np.full(m, g), prompt=[f'prompt {s}.{g}'] * m)
            for n in names:
                a = pull.get(n, 0.0)
                z = a * x + np.sqrt(1 - a * a) * rng.standard_normal(m) + hard + shake[n] + wander[n][s]
                p = np.clip(rates[n](t), 0.003, 0.997)
                row[n] = (z < probit(p) * np.sqrt(1 + hardness ** 2)).astype(float)
                if rng.random() > apply.get(n, 1.0): row[n] = np.full(m, np.nan)
            rows.append(pd.DataFrame(row))
    return pd.concat(rows, ignore_index=True)


flat = lambda p: lambda t: p
ramp = lambda a, b, lo=0.0, hi=1.0: lambda t: a + (b - a) * min(1, max(0, (t - lo) / max(1e-9, hi - lo)))

HEALTHY = {
    'all rise': lambda s: make(dict(a=ramp(.3, .8), b=ramp(.2, .9), c=ramp(.5, .7)), seed=s),
    'flat': lambda s: make(dict(a=flat(.3), b=flat(.7), c=flat(.5)), seed=s),
    'flat and noisy': lambda s: make(dict(a=flat(.3), b=flat(.7), c=flat(.5)), unrest=.3, seed=s),
    'saturating': lambda s: make(dict(a=ramp(.5, .99, 0, .3), b=ramp(.4, .98, 0, .5), c=ramp(.2, .9)), seed=s),
    'one hard from the start': lambda s: make(dict(a=ramp(.3, .9), b=ramp(.4, .8), hard=flat(.02)), seed=s),
    'never passed': lambda s: make(dict(a=ramp(.3, .9), b=ramp(.4, .8)), seed=s).assign(hard=0.0),
    'a dip that recovers': lambda s: make(dict(a=lambda t: .7 - .5 * max(0, 1 - abs(t - .15) / .15), b=ramp(.3, .8), c=ramp(.4, .9)), seed=s),
    'a late dip that recovers': lambda s: make(dict(a=lambda t: .8 - .6 * max(0, 1 - abs(t - .6) / .2), b=ramp(.3, .8)), seed=s),
    'missing rewards': lambda s: make(dict(a=ramp(.3, .8), b=ramp(.5, .7), c=flat(.5)), apply=dict(a=.6, b=.5), seed=s),
    'rarely applicable': lambda s: make(dict(a=ramp(.3, .8), b=ramp(.5, .7), rare=flat(.5)), apply=dict(rare=.03), seed=s),
    'group sizes differ': lambda s: make(dict(a=ramp(.3, .8), b=ramp(.2, .9), c=flat(.4)), sizes=[2, 4, 8, 12], seed=s),
    'groups of four': lambda s: make(dict(a=ramp(.3, .8), b=flat(.7), c=flat(.5)), size=4, groups=4, seed=s),
    'curriculum up and down': lambda s: make(dict(a=lambda t: .6 + .25 * np.sin(6 * t), b=lambda t: .5 + .25 * np.sin(6 * t), c=lambda t: .65 + .25 * np.sin(6 * t)), seed=s),
    'harder and harder': lambda s: make(dict(a=ramp(.9, .4), b=ramp(.8, .3), c=ramp(.85, .5)), seed=s),
    'a stable conflict': lambda s: make(dict(a=flat(.5), b=flat(.5), c=flat(.5)), pull=dict(a=.6, b=-.6), seed=s),
    'a conflict, and both rise': lambda s: make(dict(a=ramp(.4, .6), b=ramp(.4, .6), c=ramp(.2, .9)), pull=dict(a=.6, b=-.6), seed=s),
    'ten steps': lambda s: make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.5)), steps=10, seed=s),
    'one step': lambda s: make(dict(a=flat(.3), b=flat(.6)), steps=1, groups=64, seed=s),
    'wandering': lambda s: make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.5)), drift=.02, seed=s),
    'many rewards': lambda s: make({f'r{i}': flat(.1 + .8 * i / 20) for i in range(20)}, steps=40, seed=s),
    'easy slips a little': lambda s: make(dict(a=ramp(.97, .92), b=ramp(.3, .8), c=ramp(.4, .7)), seed=s),
    'mixed data in blocks': lambda s: make(dict(a=lambda t: .7 if int(10 * t) % 2 else .3, b=lambda t: .3 if int(10 * t) % 2 else .7), seed=s),
    'any scale': lambda s: make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.5)), seed=s).assign(
        a=lambda d: 100 * d.a - 50, b=lambda d: d.b * 1e-3 + np.random.default_rng(s).standard_cauchy(len(d))),
}

TRADE = dict(lost=.6, gain=-.6)
SHAPES = {  # onset as a share of the log, pass rate of the lost reward
    'sudden': (.4, lambda t: .8 if t < .4 else .05),
    'ramp': (.3, ramp(.85, .02, .3, .6)),
    'slow ramp': (.2, ramp(.9, .1, .2, 1)),
    'decay': (.5, lambda t: .8 if t < .5 else .8 * np.exp(-(t - .5) / .1)),
    'from the start': (0, lambda t: .8 * np.exp(-t / .25)),
    'rise, then fall': (.5, lambda t: .3 + 1.1 * t if t < .5 else max(.03, .85 - 3 * (t - .5))),
    'rise, stay, fall': (.7, lambda t: min(.85, .2 + 3 * t) if t < .7 else max(.05, .85 - 5 * (t - .7))),
    'a dip before': (.6, lambda t: .8 - .5 * max(0, 1 - abs(t - .15) / .1) if t < .6 else max(.05, .8 - 4 * (t - .6))),
    'halved': (.5, ramp(.8, .4, .5, .7)),
    'late': (.75, ramp(.9, .1, .75, .9)),
}


def planted(shape, seed=0, **settings):
    onset, lost = SHAPES[shape]
    return onset, make(dict(other=ramp(.4, .6), lost=lost, gain=lambda t: .5 + .45 * (1 - lost(t) / .9), still=flat(.5)), pull=TRADE, seed=seed, **settings)


@pytest.mark.parametrize('kind', HEALTHY)
def test_silent_on_healthy_logs(kind):
    result = audit(HEALTHY[kind](0))
    assert result.neglected == [] and 'No reward is neglected' in result.summary()
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize('shape', SHAPES)
def test_finds_a_planted_fall(shape):
    for seed, settings in enumerate([dict(), dict(steps=120, groups=4)]):
        onset, log = planted(shape, seed, **settings)
        steps = log.step.max()
        [n] = audit(log).neglected
        assert n.reward == 'lost' and n.bought_off_by == ['gain'] and abs((n.onset_step - 1) / (steps - 1) - onset) < .1
        assert n.onset_range[0] <= n.onset_step <= n.onset_range[1] and n.rate_after < n.rate_before


@pytest.fixture(scope='module')
def fallen(): return planted('ramp', 3)[1]


@pytest.fixture(scope='module')
def brief(): return planted('sudden', 0, steps=30, groups=4)[1]


def is_found(result, onset=.3, steps=60):
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))['neglected']
    assert [(n['reward'], n['bought_off_by']) for n in found] == [('lost', ['gain'])]
    assert abs((found[0]['onset_step'] - 1) / (steps - 1) - onset) < .1
    return True


REWARDS = ['other', 'lost', 'gain', 'still']


@pytest.mark.parametrize('name', ['log.csv', 'log.csv.gz', 'log.jsonl', 'log.jsonl.gz', 'log.parquet'])
def test_file_formats_agree(name, fallen, tmp_path):
    log = fallen.assign(gain=fallen.gain.where(fallen.group != 3), lost=fallen.lost.astype(bool), completion='a, "b"\nc')
    if '.csv' in name: log.to_csv(tmp_path / name, index=False)
    elif 'jsonl' in name: log.to_json(tmp_path / name, orient='records', lines=True)
    else: log.to_parquet(tmp_path / name)
    result = audit(tmp_path / name)
    assert is_found(result) and list(result.rewards) == REWARDS and result.log['group_sizes'] == {8: 480}
    assert result.to_dict() == audit(log).to_dict()


def test_own_parquet(fallen, tmp_path):
    for step, part in fallen.groupby('step'):
        write_completions(tmp_path / 'completions', step, 8, dict(prompt=['same'] * len(part), completion=['x'] * len(part)),
                          {n: torch.tensor(part[n].to_numpy(), dtype=torch.float32) for n in REWARDS}, torch.zeros(len(part)))
    result = audit(tmp_path)
    assert is_found(result) and list(result.rewards) == REWARDS and result.log['groups'] == 480
    assert audit(tmp_path / 'completions').to_dict() == result.to_dict()


@pytest.mark.parametrize('chat', [False, True])
def test_trl_parquet(fallen, tmp_path, chat):
    "TRL logs no group: a prompt's completions follow each other, and a prompt may come twice in a row."
    for step, part in fallen.groupby('step'):
        prompts = [f'p{g // 2}' for g in part.group]  # every prompt fills two groups
        if chat: prompts = [[dict(role='user', content=p)] for p in prompts]
        if step % 2: prompts[:] = [f'{g}' for g in part.group] if not chat else [[dict(role='user', content=str(g))] for g in part.group]
        pd.DataFrame(dict(step=step, prompt=prompts, completion='x', **{n: part[n].to_numpy() for n in REWARDS}, advantage=0.1)).to_parquet(tmp_path / f'completions_{step:05d}.parquet')
    result = audit(str(tmp_path))
    assert is_found(result) and list(result.rewards) == REWARDS and result.log['group_sizes'] == {8: 480}


def handed(log):
    "Make reward functions that hand out a log, a step at each call, whatever the completions are."
    def one(name):
        calls = count(1)
        def f(prompts, completions, **columns):
            if len(completions) < 9: return [0.5] * len(completions)  # the book's trainer tries each reward on two first
            return log[log.step == next(calls)][name].tolist()
        f.__name__ = name
        return f
    return [one(name) for name in REWARDS]


SMALL = dict(num_generations=8, per_device_train_batch_size=32, max_completion_length=2, max_steps=30, learning_rate=1e-6, gradient_checkpointing=False, bf16=False, seed=0)


def test_a_run_of_trls_own_trainer(brief, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    trl = pytest.importorskip('trl', reason='TRL is the extra trl')
    from datasets import Dataset
    args = trl.GRPOConfig(output_dir=str(tmp_path), log_completions=True, logging_steps=1, num_completions_to_print=1, use_cpu=True, report_to='none', save_strategy='no', disable_tqdm=True, **SMALL)
    prompts = Dataset.from_list([dict(prompt=f'cold {i % 9}') for i in range(96)])  # a prompt comes twice in many a step
    trl.GRPOTrainer(str(RUBRIC_POLICY), handed(brief), args, train_dataset=prompts, processing_class=load_tokenizer(RUBRIC_POLICY)).train()
    result = audit(tmp_path)
    assert is_found(result, .4, 30) and list(result.rewards) == REWARDS and result.log['group_sizes'] == {8: 120} and result.log['group_column'] == 'prompt'
    assert result.log['left_out'] == {'advantage': 'by its name'}


def test_a_run_of_the_books_trainer(brief, tmp_path):
    GRPOTrainer(RUBRIC_POLICY, handed(brief), GRPOConfig(output_dir=str(tmp_path), **SMALL), [dict(prompt=f'cold {i % 9}') for i in range(96)]).train()
    result = audit(tmp_path)
    assert is_found(result, .4, 30) and list(result.rewards) == REWARDS and result.log['group_sizes'] == {8: 120} and result.log['group_column'] == 'group'
    with pytest.raises(InputError, match='log.jsonl: no column says.* and [0-9]+ more; it looks like a log of metrics'): audit(tmp_path / 'log.jsonl')


def test_verl_dump(fallen, tmp_path):
    "A file STEP.jsonl for each step, rows in the order in which the batch was balanced; a reward that does not apply is NaN or null."
    for step, part in fallen.groupby('step'):
        rows = [dict(input=r.prompt, output='x', gts=str(r.group), score=r.lost + r.gain, step=step, **{n: getattr(r, n) for n in REWARDS}, pred=str(r.group), request_id=f'{i}') for i, r in enumerate(part.itertuples())]
        for i, row in enumerate(rows[:6]): row['still'] = math.nan if i % 2 else None
        np.random.default_rng(step).shuffle(rows)
        (tmp_path / f'{step}.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
    result = audit(tmp_path)
    assert is_found(result) and list(result.rewards) == REWARDS and result.log['group_sizes'] == {8: 480} and result.log['group_column'] == 'input'
    assert set(result.log['left_out']) == {'gts', 'score', 'pred', 'request_id'}


def test_numbers_that_are_no_rewards(fallen):
    rng, n = np.random.default_rng(0), len(fallen)
    odd = dict(kl=rng.random(n), completion_length=rng.integers(5, 90, n), lr=1e-3 - fallen.step * 1e-6, difficulty=fallen.group * .3, clock=np.arange(n) * .5, rollout_number=np.tile(np.arange(8), n // 8), seed=7,
               code=[str(x) for x in rng.integers(0, 9, n)], run_id=3, policy_loss=rng.random(n), mean_time=rng.random(n) * 9)
    result = audit(fallen.assign(**odd))
    assert is_found(result) and list(result.rewards) == REWARDS and set(result.log['left_out']) == set(odd)
    assert [result.log['left_out'][x] for x in ('kl', 'mean_time', 'difficulty', 'clock', 'code')] == ['by its name', 'a count or a time', 'never differs inside a group', 'rises from row to row', 'digits, but text']
    said = result.summary()
    assert 'Not taken for rewards' in said and 'difficulty (never differs' in ' '.join(said.split()) and len(said.splitlines()) <= 24
    named = audit(fallen.assign(**odd), rewards=[*REWARDS, 'difficulty', 'kl'])
    assert is_found(named) and list(named.rewards) == [*REWARDS, 'difficulty', 'kl'] and named.log['left_out'] == {}
    short = fallen.assign(length=1 - fallen.lost)  # 0 and 1: a reward for being short, not a length
    assert 'length' in audit(short).rewards
    prefixed = fallen.rename(columns=dict(lost='reward_lost', gain='reward_gain'))  # functions of TRL may be called so, and others not
    assert list(audit(prefixed).rewards) == REWARDS


def test_columns_that_never_differ_are_shown_if_nothing_does():
    result = audit(broken(a=1.0, b=0.0))
    assert list(result.rewards) == ['a', 'b'] and result.neglected == [] and result.rewards['a']['dead'] == 1


def test_nothing_is_kept_of_a_log_that_is_too_large(fallen, tmp_path, monkeypatch):
    fallen.to_json(tmp_path / 'log.jsonl', orient='records', lines=True)
    whole, log = audit(tmp_path / 'log.jsonl').to_dict(), read_rollouts(tmp_path / 'log.jsonl')
    monkeypatch.setattr(rvpo_nb.logs, 'KEEP', 1000)
    assert audit(log).to_dict() == whole and log.kept is None


def test_without_steps_the_order_of_files_is_time(fallen, tmp_path):
    paths = []
    for step, part in fallen.groupby('step'):
        paths.append(tmp_path / f'batch-{step}.csv')  # 2 comes before 10
        part.drop(columns='step').to_csv(paths[-1], index=False)
    assert is_found(audit(tmp_path)) and is_found(audit(paths))
    everything = audit(fallen.drop(columns=['step', 'group']))  # one table without steps is one step
    assert everything.log['steps'] == 1 and everything.neglected == [] and 'too short' in everything.summary()


def test_rows_in_any_order(fallen):
    mixed = fallen.sample(frac=1, random_state=0)
    assert is_found(audit(mixed)) and audit(mixed).log['group_sizes'] == {8: 480}
    by_prompt = fallen.drop(columns='group').sort_values(['prompt', 'step'], kind='stable')
    assert is_found(audit(by_prompt))
    again = fallen.assign(prompt=fallen.prompt.str.replace('.3', '.2', regex=False)).drop(columns='group')  # one prompt twice in a step
    assert is_found(audit(again)) and is_found(audit(again.groupby('step').sample(frac=1, random_state=0))) and audit(again).log['group_sizes'] == {8: 480}


def test_prefixes_and_overrides(fallen):
    renamed = fallen.rename(columns={n: f'rewards/{n}' for n in REWARDS}).assign(tokens=5.0, temperature=1.0)
    assert is_found(audit(renamed)) and list(audit(renamed).rewards) == REWARDS
    nested = [dict(step=r.step, group=r.group, rewards=dict(lost=r.lost, gain=r.gain)) for r in fallen.itertuples()]
    assert list(read_rollouts(pd.DataFrame([dict(step=r['step'], group=r['group'], **{f'reward_{k}': v for k, v in r['rewards'].items()}) for r in nested])).names) == ['lost', 'gain']
    odd = fallen.rename(columns=dict(step='t', group='g')).drop(columns='prompt')
    with pytest.raises(InputError, match='name it with group'): audit(odd)
    chosen = audit(odd, step='t', group='g', rewards=['lost', 'gain'])
    assert is_found(chosen) and list(chosen.rewards) == ['lost', 'gain']
    assert list(audit(fallen.assign(reward=fallen[REWARDS].sum(axis=1), advantage=1.0)).rewards) == REWARDS
    assert list(audit(fallen[['step', 'group']].assign(reward=fallen.lost)).rewards) == ['reward']


def test_nested_rewards_in_jsonl(fallen, tmp_path):
    rows = [dict(step=int(r.step), prompt=[dict(role='user', content=r.prompt)], completion='x', rewards=dict(lost=r.lost, gain=r.gain)) for r in fallen.itertuples()]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert is_found(audit(tmp_path / 'log.jsonl'))


def test_weights_and_thresholds(fallen):
    assert audit(fallen, weights=dict(lost=0)).rewards['lost']['verdict'] == 'logged only' and audit(fallen, weights=dict(lost=0)).neglected == []
    assert audit(fallen, weights=dict(lost=3)).rewards['lost']['share_gdpo'] > audit(fallen).rewards['lost']['share_gdpo']
    scaled = fallen.assign(lost=fallen.lost * 10 - 7)
    assert audit(scaled).rewards['lost']['threshold'] == -2 and is_found(audit(scaled))
    assert audit(scaled, thresholds=dict(lost=99)).rewards['lost']['pass_rate'] == 0
    graded = fallen.assign(lost=np.where(fallen.lost > 0, .4, .1) + .05 * np.random.default_rng(0).random(len(fallen)))  # never reaches .5
    assert .1 < audit(graded).rewards['lost']['threshold'] < .45 and is_found(audit(graded))


@pytest.mark.parametrize('chunk', [50, 1000])
@pytest.mark.parametrize('name', ['log.csv', 'log.jsonl', 'log.parquet'])
def test_streaming_gives_the_same(chunk, name, tmp_path, monkeypatch):
    log = planted('sudden', 5, sizes=[3, 5, 8])[1].drop(columns='prompt')
    {'log.csv': lambda p: log.to_csv(p, index=False), 'log.jsonl': lambda p: log.to_json(p, orient='records', lines=True), 'log.parquet': log.to_parquet}[name](tmp_path / name)
    whole = audit(log).to_dict()
    monkeypatch.setattr(rvpo_nb.logs, 'CHUNK', chunk)
    parts = audit(tmp_path / name).to_dict()
    assert parts['neglected'][0]['reward'] == 'lost'
    pd.testing.assert_series_equal(pd.json_normalize(whole).iloc[0].drop('correlation', errors='ignore'), pd.json_normalize(parts).iloc[0], rtol=1e-9)


def test_one_endless_step_is_streamed_in_whole_groups(tmp_path, monkeypatch):
    log = make(dict(a=flat(.5), b=flat(.5)), steps=1, groups=300)
    log.drop(columns='step').to_csv(tmp_path / 'log.csv', index=False)
    monkeypatch.setattr(rvpo_nb.logs, 'CHUNK', 30)
    assert audit(tmp_path / 'log.csv').log['group_sizes'] == {8: 300}


def test_figures_by_hand():
    "Against sums over single groups."
    log = make(dict(a=flat(.6), b=flat(.4), c=flat(.5)), pull=dict(a=.95, b=-.95), steps=4, groups=6, size=6, apply=dict(c=.8))
    log['b'] *= 5
    result = audit(log)
    groups = [torch.tensor(g[['a', 'b', 'c']].to_numpy()) for _, g in log.groupby(['step', 'group'])]
    for j, (name, limit) in enumerate(zip('abc', (.5, 2.5, .5))):
        x, values = result.rewards[name], log[name].dropna()
        assert math.isclose(x['mean'], values.mean()) and math.isclose(x['pass_rate'], (values >= limit).mean()) and x['threshold'] == limit
        there = [g for g in groups if not g[:, j].isnan().all()]
        assert math.isclose(x['dead'], np.mean([g[:, j].max() == g[:, j].min() for g in there]))
        for m in ('grpo', 'gdpo', 'dvao', 'rvpo'):
            up, failed = 0, 0
            for g in there:
                on = (advantages(g[None], m)[0] > 1e-9) & ~g[:, j].isnan()
                up, failed = up + int(on.sum()), failed + int((g[on, j] < limit).sum())
            assert math.isclose(x[f'masked_{m}'], failed / up)
    rho = [np.corrcoef(g[:, 0], g[:, 1])[0, 1] for g in groups if g[:, 0].std() > 0 and g[:, 1].std() > 0]
    assert math.isclose(result.correlation['a']['b'], np.mean(rho), rel_tol=1e-6) and result.conflicts[0][:2] in (('b', 'a'), ('a', 'b'))
    for m in ('grpo', 'gdpo', 'dvao', 'rvpo'): assert math.isclose(sum(result.rewards[n][f'share_{m}'] for n in 'abc'), 1, rel_tol=1e-6)
    assert result.rewards['b']['share_grpo'] > .6 and any('b has' in w and 'summed' in w for w in result.warnings)


def test_verdicts():
    log = make(dict(up=ramp(.3, .8), full=ramp(.97, .99), hard=flat(.01), coin=flat(.5)), seed=1, hardness=0)
    assert {n: x['verdict'] for n, x in audit(log).rewards.items()} == dict(up='kept', full='saturated', hard='never learned', coin='noise?')
    down = audit(make(dict(a=ramp(.9, .3), b=ramp(.8, .2))))
    assert down.neglected == [] and {x['verdict'] for x in down.rewards.values()} == {'fell'}
    two = audit(make(dict(a=ramp(.9, .1), b=ramp(.8, .05), c=ramp(.3, .95)), pull=dict(a=.5, b=.5, c=-.6)))
    assert {n.reward for n in two.neglected} == {'a', 'b'} and all(n.bought_off_by == ['c'] for n in two.neglected)


def test_group_sizes_are_warned_of():
    said = ' '.join(audit(make(dict(a=flat(.5), b=flat(.5)), sizes=[1, 4])).warnings)
    assert 'Groups of 4' in said and 'one rollout' in said and 'sizes differ' in said


def broken(**change): return make(dict(a=flat(.5), b=flat(.5)), steps=2, groups=2).assign(**change)


def text(name, content):
    def write(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name
    return write


def two_files(folder):
    broken().to_csv(folder / '1.csv', index=False), broken().drop(columns='b').to_csv(folder / '2.csv', index=False)
    return folder


def two_files_more(folder):
    broken().to_csv(folder / '2.csv', index=False), broken().drop(columns='b').to_csv(folder / '1.csv', index=False)
    return folder


ROWS = 'step,group,a,b\n1,0,1,0\n1,0,0,1\n'
MALFORMED = {
    'missing column': (lambda f: broken().drop(columns=['group', 'prompt']), "table: no column says which rollouts belong together.*'step', 'a', 'b'"),
    'mixed csv': (text('x.csv', ROWS + '1,1,0,yes\n1,1,0,1\n'), "x.csv, column 'b', row 3: 'yes' is not a number"),
    'mixed jsonl': (text('x.jsonl', '{"group": 1, "a": 1}\n{"group": 1, "a": "one"}\n{"group": 1, "a": 1}\n'), "x.jsonl, column 'a', row 2: 'one' is not a number"),
    'one rollout per group': (lambda f: broken(group=range(32)), "table: column 'group' gives every rollout a group of its own"),
    'all NaN': (lambda f: broken(a=np.nan, b=np.nan), "no reward has a value in any row: 'a', 'b'"),
    'no rows': (lambda f: broken().iloc[:0], 'table: no rows'),
    'no rows in parquet': (lambda f: [broken().iloc[:0].to_parquet(f / 'x.parquet'), f / 'x.parquet'][1], 'x.parquet: no rows'),
    'no rows in csv': (text('x.csv', 'step,group,a\n'), 'x.csv: no rows'),
    'empty file': (text('x.csv', ''), 'x.csv: the file is empty'),
    'no reward': (lambda f: broken()[['step', 'group', 'prompt']], "no column with a reward.*'step', 'group', 'prompt'"),
    'infinite': (lambda f: broken(a=[0.0] * 6 + [math.inf] + [0.0] * 25), "column 'a', row 7: inf is infinite"),
    'not a table': (lambda f: 5, 'not a table'),
    'not parquet': (text('x.parquet', 'hello'), 'x.parquet: not a table'),
    'not gzip': (text('x.csv.gz', 'hello'), 'x.csv.gz: not a table'),
    'cut off': (text('x.csv.gz', gzip.compress(ROWS.encode() * 99)[:-20]), 'x.csv.gz: not a table'),
    'not json': (text('x.jsonl', '{"group": 1, "a": 1}\n{"group": 1, "a"'), 'x.jsonl, line 2: not JSON'),
    'no objects': (text('x.jsonl', '[1, 2]\n'), 'x.jsonl, line 1: every line should be an object'),
    'ragged csv': (text('x.csv', ROWS + '1,2,3,4,5,6\n'), 'x.csv: not a table'),
    'binary': (text('x.csv', bytes(range(256)) * 9), 'x.csv: not a table'),
    'other suffix': (text('x.txt', ROWS), 'x.txt: not a log that can be read'),
    'no file': (lambda f: f / 'nothing.csv', 'nothing.csv: no such file'),
    'no file in folder': (lambda f: f, 'no .parquet, .jsonl or .csv file'),
    'column gone': (two_files, "2.csv: no column 'b', which .*1.csv has"),
    'column new': (two_files_more, "2.csv: a column 'b', which .*1.csv has not"),
    'step missing': (lambda f: broken(step=[1.0] * 4 + [np.nan] + [2.0] * 27), "column 'step', row 5: nan is no step"),
    'half a step': (lambda f: broken(step=0.5), "column 'step', row 1: 0.5 is no step"),
    'group missing': (lambda f: broken(group=[0.0] * 9 + [np.nan] * 23), "column 'group', row 10: no group"),
    'one reward twice': (lambda f: broken().rename(columns={'a': 'reward_b'}), "two columns for one reward among 'reward_b', 'b'"),
}


@pytest.mark.parametrize('case', MALFORMED)
def test_malformed_logs_get_a_sentence(case, tmp_path):
    make_it, sentence = MALFORMED[case]
    with pytest.raises(InputError, match=sentence) as e: audit(make_it(tmp_path))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('named, sentence', [
    (dict(rewards=['a', 'z']), "no column 'z'"), (dict(group='z'), "no column 'z'"), (dict(step='z'), "no column 'z'"), (dict(rewards=['prompt']), "column 'prompt', row 1: 'prompt 0.0' is not a number"),
    (dict(thresholds=dict(z=1)), "thresholds names 'z'"), (dict(thresholds=dict(a='x')), 'should be numbers'), (dict(weights=dict(z=1)), "weights names 'z'"),
    (dict(weights=dict(a=-1)), 'weight 0 is -1'), (dict(k=-1), 'k must be')])
def test_bad_arguments_get_a_sentence(named, sentence):
    with pytest.raises(InputError, match=sentence): audit(broken(), **named)


ODD = {'lost': '<script>alert(1)</script>\n\x1b[31m', 'gain': '长度' * 20, 'other': 'a,"b"\'', 'still': r'$x_1\frac$'}


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_odd_names_survive(fallen, suffix, tmp_path):
    log, path = fallen.rename(columns=ODD), tmp_path / f'log.{suffix}'
    {'csv': lambda: log.to_csv(path, index=False), 'jsonl': lambda: log.to_json(path, orient='records', lines=True), 'parquet': lambda: log.to_parquet(path)}[suffix]()
    result = audit(path)
    assert [(n.reward, n.bought_off_by) for n in result.neglected] == [(ODD['lost'], [ODD['gain']])] and list(result.rewards) == [ODD[n] for n in REWARDS]
    from matplotlib.figure import Figure
    fig = Figure()
    draw_pass_rates(fig.subplots(), result)
    fig.canvas.draw()


def test_summary_fits_a_screen(fallen):
    logs = [fallen, fallen.rename(columns=ODD), HEALTHY['many rewards'](0), HEALTHY['one step'](0)]
    busy = {f'lost, with a rather long name {i}': ramp(.9, .05, .1 * i, .1 * i + .3) for i in range(4)} | {f'gain {i}': ramp(.3, .95) for i in range(26)}
    logs.append(make(busy, pull={n: .5 if 'lost' in n else -.5 for n in busy}, steps=40, sizes=[1, 4, 6]))
    for log in logs:
        lines = audit(log).summary().splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= 80 and all(line.isprintable() for line in lines)
    text = audit(logs[-1]).summary()
    assert text.count('NEGLECTED') == 3 and '... and' in text


def test_the_command_prints_writes_json_and_fails_on_neglect(tmp_path, capsys, monkeypatch):
    from rvpo_nb.cli import main
    monkeypatch.chdir(tmp_path)
    log = str(Path(__file__).parents[1] / 'nbs/logs/rollouts-gdpo.parquet')
    assert main(['audit', log]) == 0 and 'NEGLECTED length' in capsys.readouterr().out
    assert main(['audit', log, '--fail-on', 'neglect', '--json', 'audit.json', '--html', 'report.html']) == 3
    assert 'length' in Path('report.html').read_text() and '://' not in Path('report.html').read_text()
    [found] = json.loads(Path('audit.json').read_text())['neglected']
    assert found['reward'] == 'length' and 'point_1' in found['bought_off_by'] and found['onset_step'] <= 16
    assert main(['audit', log.replace('gdpo', 'rvpo'), '--fail-on', 'neglect']) == 0
    capsys.readouterr()
    assert main(['audit', log, '--rewards', 'notice,point_1', '--thresholds', 'notice=0.9', '--fail-on', 'neglect', '--json', 'two.json']) == 0
    assert json.loads(Path('two.json').read_text())['rewards']['notice']['threshold'] == 0.9
    capsys.readouterr()
    for arguments, message in ((['nowhere.csv'], 'no such file'), ([log, '--rewards', 'gone'], "no column 'gone'"), ([log, '--thresholds', 'notice'], 'name=value'), ([], 'no file to read'),
                               ([log, '--thresholds', 'gone=1'], 'no reward of this log'), ([log, '--k', '-1'], 'k must be')):
        assert main(['audit', *arguments]) == 2
        assert message in capsys.readouterr().err

"""The comparison harness: plans, runs that repeat and go on, tables, and what is made of them."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t

from rvpo_nb.cli import main, report
from rvpo_nb.experiment import PLANS, RUBRIC, Plan, compare, read_plan, run_folder, run_one, slim
from rvpo_nb.plot import interval
from rvpo_nb.results import best_rates, final_rates, interval_table, paired, seed_interval, smooth, steps_to
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY
from rvpo_nb.trainer import RunFailed

ARGS = RUBRIC | dict(max_steps=4, num_generations=4, per_device_train_batch_size=16, save_steps=2, disable_tqdm=True)
METHODS = dict(gdpo=dict(aggregation='gdpo'), rvpo=dict(aggregation='rvpo', k=2.0))
REWARDS = '''
def words(completions, **columns): return [len(c.split()) / 20 for c in completions]
def late(completions, trainer_state=None, **columns): return [float('inf') if trainer_state and trainer_state.global_step == 1 else 1.0] * len(completions)
'''


def small(**changes):
    return Plan(**dict(name='small', task='rubric', methods=METHODS, settings={'a': dict(terse_credit=0.5), 'b': dict(noise=0.1)}, seeds=2, args=ARGS) | changes)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A finished comparison: its folder and its logs."
    folder = tmp_path_factory.mktemp('done')
    return folder, compare(small(), folder, jobs=2)


def test_runs_side_by_side_equal_runs_in_a_row(done, tmp_path):
    folder, logs = done
    assert len(logs) == 2 * 2 * 2 * 4 and not logs.filter(regex='^(time|memory)/').columns.any()
    pd.testing.assert_frame_equal(compare(small(), tmp_path, jobs=1), logs)
    assert (tmp_path / 'log.parquet').read_bytes() == (folder / 'log.parquet').read_bytes()


def test_a_run_repeats_from_its_config(done, tmp_path):
    folder, logs = done
    runs = pd.read_parquet(folder / 'runs.parquet')
    assert len(runs) == 8 and all('torch' in json.loads(e) for e in runs.environment)
    row = runs.iloc[5]
    again = run_one(json.loads(row.config), tmp_path)
    mine = logs[(logs.setting == row.setting) & (logs.method == row.method) & (logs.seed == row.seed)]
    pd.testing.assert_frame_equal(again, mine[again.columns].reset_index(drop=True))


def test_committed_runs_name_what_they_depend_on():
    logs = sorted(Path('nbs/logs').glob('*-runs.parquet'))
    assert logs, 'the committed comparisons come with their configs'
    for path in logs:
        runs, log = pd.read_parquet(path), pd.read_parquet(path.with_name(path.name.replace('-runs', '')))
        plan = PLANS[path.name.removesuffix('-runs.parquet')]
        assert [json.loads(c) for c in runs.config] == json.loads(json.dumps(plan.runs())), f'{path} is not the plan {plan.name}'
        assert len(log[['setting', 'method', 'seed']].drop_duplicates()) == len(runs)
        steps = log.groupby(['setting', 'method', 'seed'], observed=True).step.max()
        assert steps.nunique() == 1, 'all runs have the same length'


def test_a_stopped_comparison_goes_on(done, tmp_path):
    _, logs = done
    half = small(args=ARGS)
    config = half.runs()[0]
    script = f'''
import os, signal
from rvpo_nb import trainer
from rvpo_nb.experiment import run_one
save = trainer.GRPOTrainer.save
def save_and_die(self):
    save(self)
    if self.state.global_step == 2: os.kill(os.getpid(), signal.SIGKILL)
trainer.GRPOTrainer.save = save_and_die
run_one({config!r}, {str(tmp_path)!r})
'''
    assert subprocess.run([sys.executable, '-c', script], capture_output=True).returncode == -9
    folder = run_folder(tmp_path, config)
    assert not (folder / 'done').exists() and len((folder / 'log.jsonl').read_text().splitlines()) == 2
    pd.testing.assert_frame_equal(compare(half, tmp_path, jobs=1), logs)


def test_another_config_in_the_folder_is_refused(done):
    with pytest.raises(InputError, match='holds a run with another config.*noise'): run_one(small(settings={'a': dict(noise=0.2)}).runs()[0], done[0])


def test_a_failing_run_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path), monkeypatch.syspath_prepend(tmp_path)
    Path('plan_rewards.py').write_text(REWARDS)
    Path('data.jsonl').write_text('{"prompt": "A cold. Advise on: rest soup"}\n')
    task = dict(model=RUBRIC_POLICY, data='data.jsonl', rewards='plan_rewards:words')
    plan = small(task='own', settings=dict(good=task, bad=task | dict(rewards='plan_rewards:words,plan_rewards:late')), seeds=1)
    with pytest.raises(RunFailed, match='2 of 4 runs failed.*bad.*late'): compare(plan, 'out', jobs=2)
    assert set(pd.read_parquet('out/log.parquet').setting) == {'good'} and len(pd.read_parquet('out/runs.parquet')) == 2


@pytest.mark.parametrize('changes, words', [
    (dict(task='unknown'), 'unknown task'), (dict(methods={}), 'must not be empty'), (dict(seeds=0), 'must not be empty'),
    (dict(methods=dict(x=dict(num_generations=8))), 'same budget'), (dict(methods=dict(x=dict(aggregation='sum'))), 'unknown aggregation'),
    (dict(methods=dict(x=dict(agregation='gdpo'))), 'agregation'), (dict(settings=dict(s=dict(credit=0.5))), 'credit'),
    (dict(settings=dict(s=dict(noise=2))), 'noise'), (dict(methods={'k 2': {}, 'k-2': {}}), 'share a folder')])
def test_a_wrong_plan_is_refused_before_anything_runs(changes, words, tmp_path):
    with pytest.raises(InputError, match=words): compare(small(**changes), tmp_path / 'out', jobs=1)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('text, words', [('methods = 3 =', 'is no plan'), ('[methods.a]\n[extra]', 'extra'), ('name = "x"', 'methods'),
                                         ('methods = 3', 'methods'), ('[methods]\na = 1', 'methods'), ('settings = 1\n[methods.a]', 'settings')])
def test_a_wrong_file_is_no_plan(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('p.toml').write_text(text)
    assert main(['compare', 'p.toml']) == 2 and words in capsys.readouterr().err
    assert main(['compare', 'nowhere.toml']) == 2 and main(['compare', 'nothing']) == 2 and not Path('comparison').exists()


def test_the_command_reports_a_plan_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path), monkeypatch.syspath_prepend(tmp_path)
    Path('plan_rewards2.py').write_text(REWARDS)
    Path('data.jsonl').write_text('{"prompt": "A cold. Advise on: rest soup"}\n')
    Path('mine.toml').write_text(f'''
question = "Is it short?"
[args]
max_steps = 2
num_generations = 4
per_device_train_batch_size = 8
max_completion_length = 8
disable_tqdm = true
[methods.gdpo]
aggregation = "gdpo"
[methods.rvpo]
[settings.mine]
model = "{RUBRIC_POLICY}"
data = "data.jsonl"
rewards = "plan_rewards2:words"
''')
    assert main(['compare', 'mine.toml', '--seeds', '0', '1', '2', '--jobs', '1', '--output', 'out']) == 0
    out = capsys.readouterr().out
    assert 'Is it short?' in out and 'rvpo less gdpo' in out
    assert {'log.parquet', 'runs.parquet', 'table.csv', 'rvpo-less-gdpo.csv', 'rewards-mine.png', 'ends-mine.png'} <= {p.name for p in Path('out').iterdir()}


@pytest.mark.parametrize('name', PLANS)
def test_a_miniature_of_every_experiment(name, tmp_path):
    plan = PLANS[name]
    first = next(iter(plan.settings))
    quick = lambda options: options | (dict(pretrain=options['pretrain'] | dict(steps=2)) if 'pretrain' in options else {})
    args = plan.args | dict(max_steps=1, per_device_train_batch_size=16, disable_tqdm=True)
    settings = {s: quick(o) for s, o in plan.settings.items()}
    for methods, chosen in ((plan.methods, {first: settings[first]}), (dict([next(iter(plan.methods.items()))]), settings)):
        logs = compare(replace(plan, args=args, methods=methods, settings=chosen, seeds=[0, 1]), tmp_path, jobs=1)
        assert set(logs.method) == set(methods) and set(logs.setting) == set(chosen) and final_rates(logs)['mean'].notna().all()


def fake(seed=0, methods=('a', 'b'), steps=30):
    "Logs with two rewards, without training."
    gen, rows = np.random.default_rng(seed), []
    for m in methods:
        for s in range(4):
            for step in range(1, steps + 1):
                x, y = gen.random(2)
                rows.append({'plan': 'p', 'setting': 's', 'method': m, 'seed': s, 'step': step, 'reward/x/pass_rate': x, 'reward/x/mean': x,
                             'reward/y/pass_rate': y, 'reward/y/mean': 3 * y, 'reward/x/std': 0.1, 'all_passed': x * y, 'loss': 1.0})
    return pd.DataFrame(rows)


def test_rates_against_loops():
    logs, w = fake(), 5
    final, best, first = final_rates(logs, w), best_rates(logs, w), steps_to(logs, 0.45, w)
    for (m, s), run in logs.groupby(['method', 'seed']):
        x, y, ok = (run[c].to_numpy() for c in ('reward/x/pass_rate', 'reward/y/pass_rate', 'all_passed'))
        windows = [[v[i - w:i].mean() for i in range(w, len(x) + 1)] for v in (x, y, ok)]
        worst, mean = np.minimum(windows[0], windows[1]), np.add(windows[0], windows[1]) / 2
        for name, course in dict(x=windows[0], y=windows[1], all_passed=windows[2], worst=worst, mean=mean).items():
            assert final.loc[('s', m, s), name] == pytest.approx(course[-1]) and best.loc[('s', m, s), name] == pytest.approx(max(course))
        hits = np.flatnonzero(worst >= 0.45)
        expected = hits[0] + w if len(hits) else np.nan
        assert first.loc[('s', m, s)] == pytest.approx(expected, nan_ok=True)
    assert smooth(logs, w).loc[('s', 'a', 0, 2), 'x'] == pytest.approx(logs['reward/x/pass_rate'][:2].mean()), 'a window begins short'


def test_slim_logs_give_the_same_rates():
    logs = fake()
    kept = slim(logs)
    assert 'reward/x/mean' not in kept and 'reward/y/mean' in kept and 'loss' not in kept and kept['all_passed'].dtype == 'float32'
    pd.testing.assert_frame_equal(final_rates(kept).reset_index(drop=True), final_rates(logs).reset_index(drop=True), rtol=1e-6)


def test_seed_interval():
    gen = np.random.default_rng(1)
    for n in (5, 10, 30):
        x = gen.normal(size=n)
        mean, low, high = seed_interval(x)
        student = interval(torch.tensor(x))
        assert mean == pytest.approx(x.mean()) and low < mean < high and x.min() <= low and high <= x.max()
        assert 0.6 < (high - low) / float(student[2] - student[1]) < 1.2
    assert seed_interval([1, 1, 1, 1, 1]) == (1, 1, 1)
    assert np.isnan(seed_interval([0, 1])[1]) and np.isnan(seed_interval([])[0])
    assert seed_interval([0.2, np.nan, 0.4, 0.6])[0] == pytest.approx(0.4)
    assert seed_interval([0, 0, 0, 0, 1])[1] == 0, 'one seed in five leaves zero inside'


def test_paired_differences_are_of_the_same_seed():
    logs = fake()
    rates = final_rates(logs, 5)
    d = paired(rates.sample(frac=1, random_state=0), 'b', 'a')
    x = rates.xs('b', level='method')['x'] - rates.xs('a', level='method')['x']
    assert d.loc[('s', 'x'), 'difference'] == pytest.approx(x.mean()) and d.loc[('s', 'x'), 'seeds'] == 4
    moved = rates.copy()
    moved.loc[('s', 'b'), 'x'] = (rates.loc[('s', 'a'), 'x'] + [0.1, 0.11, 0.12, 0.1]).to_numpy()
    assert paired(moved, 'b', 'a').loc[('s', 'x'), 'verdict'] == 'higher' and paired(moved, 'a', 'b').loc[('s', 'x'), 'verdict'] == 'lower'
    assert (paired(rates[rates.index.get_level_values('seed') < 2], 'b', 'a').verdict == 'too few seeds').all()
    assert '[' in interval_table(rates).iloc[0, 0] and t.ppf(0.975, 4) > 2


def test_report_names_differences(tmp_path):
    logs = fake(steps=40)
    logs.loc[logs.method == 'b', 'reward/x/pass_rate'] += 1.0
    logs.loc[logs.method == 'b', 'reward/y/pass_rate'] = logs.loc[logs.method == 'a', 'reward/y/pass_rate'].to_numpy()
    text = report(small(methods=dict(a={}, b={}), question='Which?'), logs, tmp_path)
    assert text.startswith('Which?') and 'x in s +1.' in text and ' y in s' not in text.split('hold zero')[1]

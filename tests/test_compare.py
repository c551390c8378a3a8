"""The comparison harness: plans, runs that repeat and go on, tables, and what is made of them."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm, t

from rvpo_nb.cli import main, report
from rvpo_nb import experiment
from rvpo_nb.experiment import PLANS, RUBRIC, Plan, compare, first_policy, run_folder, run_one, slim
from rvpo_nb.plot import interval
from rvpo_nb.results import best_rates, draw_rewards, final_rates, interval_table, paired, rate_columns, read_logs, seed_interval, smooth, steps_to
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY
from rvpo_nb.trainer import RunFailed

ARGS = RUBRIC | dict(max_steps=4, num_generations=4, per_device_train_batch_size=16, save_steps=2, disable_tqdm=True)
METHODS = dict(gdpo=dict(aggregation='gdpo'), rvpo=dict(aggregation='rvpo', k=2.0))
REWARDS = '''
import os, signal, time
from pathlib import Path
def device(completions, **columns): return [int(os.environ.get('CUDA_VISIBLE_DEVICES', 0))] * len(completions)
def never(completions, **columns): return [None] * len(completions)
def slow(completions, **columns): return time.sleep(0.1) or [len(c.split()) / 20 for c in completions]
def deadly(completions, trainer_state=None, **columns):
    if trainer_state.global_step == 1 and not Path('spare').exists(): os.kill(os.getpid(), signal.SIGKILL)
    return [len(c.split()) / 20 for c in completions]
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
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2), monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')  # of this process alone
    plan = small(task='own', settings=dict(good=own('device'), bad=own('late')), seeds=1)
    with pytest.raises(RunFailed, match='2 of 4 runs failed.*bad.*late'): compare(plan, 'out')
    log = pd.read_parquet('out/log.parquet')
    assert set(log.setting) == {'good'} and len(pd.read_parquet('out/runs.parquet')) == 2
    assert set(log['reward/device/mean']) <= {3.0, 5.0}, 'a worker sees one of the devices that its parent sees'


def own(name):
    return dict(model=RUBRIC_POLICY, data='data.jsonl', rewards=f'plan_rewards:words,plan_rewards:{name}')


def test_a_killed_process_is_told_and_the_same_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path), monkeypatch.syspath_prepend(tmp_path)
    Path('plan_rewards.py').write_text(REWARDS)
    Path('data.jsonl').write_text('{"prompt": "A cold. Advise on: rest soup"}\n')
    plan = small(task='own', settings={'': own('deadly')})
    with pytest.raises(RunFailed, match='a process was killed.*the same call goes on'): compare(plan, 'out', jobs=2)
    assert (Path('out') / 'gdpo-seed0' / 'run.json').exists() and not list(Path('out').glob('*/done'))
    Path('spare').touch()
    logs = compare(plan, 'out', jobs=1)
    assert len(logs) == 4 * 4 and len(list(Path('out').glob('*/done'))) == 4


@pytest.mark.skipif(os.name != 'posix', reason='signals')
@pytest.mark.parametrize('whom', ['all, as a terminal does', 'the parent'])
def test_ctrl_c_saves_what_runs_and_starts_nothing(whom, tmp_path):
    (tmp_path / 'plan_rewards.py').write_text(REWARDS)
    (tmp_path / 'data.jsonl').write_text('{"prompt": "A cold. Advise on: rest soup"}\n')
    plan = ['[settings.s]', *(f'{k} = "{v}"' for k, v in own('slow').items()), '[methods.gdpo]', 'aggregation = "gdpo"', '[methods.rvpo]',
            '[args]', 'max_steps = 100000', 'num_generations = 4', 'per_device_train_batch_size = 8', 'max_completion_length = 4', 'save_steps = 100000']
    (tmp_path / 'p.toml').write_text('seeds = 3\n' + '\n'.join(plan))
    command = [sys.executable, '-c', 'import sys; from rvpo_nb.cli import main\nif __name__ == "__main__": sys.exit(main())', 'compare', 'p.toml', '--output', 'out', '--jobs', '2']
    p = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while p.poll() is None and len([x for x in tmp_path.glob('out/*/log.jsonl') if x.stat().st_size]) < 2: time.sleep(0.1)
        (os.killpg if whom.startswith('all') else os.kill)(p.pid, signal.SIGINT)
        err = p.communicate(timeout=120)[1]
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode == 130 and 'every run is saved where it was' in err and 'Traceback' not in err
    folders = sorted((tmp_path / 'out').iterdir())
    assert [f.name for f in folders] == ['s-gdpo-seed0', 's-rvpo-seed0']
    for f in folders: assert (f / f'checkpoint-{len((f / "log.jsonl").read_text().splitlines())}').is_dir() and not (f / 'done').exists()


def test_policies_made_to_order_have_folders_of_their_own(tmp_path, monkeypatch):
    made = []
    for name in ('pretrain_rubric_policy', 'pretrain_ladder_policy'):
        monkeypatch.setattr(experiment, name, lambda folder, name=name, **recipe: (made.append((name, recipe)), folder.mkdir(parents=True)))
    nine, ladder = (first_policy(dict(pretrain=dict(steps=3)) | more, tmp_path) for more in ({}, dict(criteria=5)))
    assert made == [('pretrain_rubric_policy', dict(steps=3)), ('pretrain_ladder_policy', dict(steps=3))]
    assert nine['policy'] != ladder['policy'] and 'pretrain' not in nine and first_policy(dict(pretrain=dict(steps=3)), tmp_path) == nine and len(made) == 2


@pytest.mark.parametrize('jobs, threads, words', [(0, 1, 'jobs'), (-1, 1, 'jobs'), (1, 0, 'threads')])
def test_jobs_and_threads_are_at_least_one(jobs, threads, words, tmp_path):
    with pytest.raises(InputError, match=f'{words} must be at least 1'): compare(small(), tmp_path / 'out', jobs, threads)


@pytest.mark.parametrize('changes, words', [
    (dict(task='unknown'), 'unknown task'), (dict(methods={}), 'must not be empty'), (dict(seeds=0), 'must not be empty'),
    (dict(methods=dict(x=dict(num_generations=8))), 'same budget'), (dict(methods=dict(x=dict(aggregation='sum'))), 'unknown aggregation'),
    (dict(methods=dict(x=dict(agregation='gdpo'))), 'agregation'), (dict(settings=dict(s=dict(credit=0.5))), 'credit'),
    (dict(seeds=[0, 0]), 'different whole numbers'), (dict(seeds=[-1]), 'whole numbers from 0'), (dict(seeds='abc'), 'seeds must be'),
    (dict(args=3), 'args must be a table'), (dict(args=ARGS | dict(seed=1)), 'args sets seed'), (dict(settings=dict(s=dict(args=dict(run_name='x')))), 'args sets run_name'),
    (dict(settings=dict(s=dict(pretrain=3))), 'pretrain must be a table'), (dict(methods=dict(x=dict(shuffle_dataset=False))), 'same budget'),
    (dict(methods=dict(x=dict(reward_weights=[1, 2]))), "method 'x': 2 weights for 9 rewards"), (dict(methods=dict(x=dict(reward_targets=dict(lenght=0.9)))), "'lenght'"),
    (dict(settings=dict(s=dict(policy='./nowhere'))), "setting 's': cannot load model './nowhere'"),
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
        for s in range(5):
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


def test_windows_are_counted_in_steps():
    "Four steps to a batch: a window of twenty steps holds five rows, and the first full one ends at step 20."
    logs = fake(steps=12)
    logs['step'] *= 4
    x = logs[(logs.method == 'a') & (logs.seed == 0)]['reward/x/pass_rate'].to_numpy()
    assert final_rates(logs, 20).loc[('s', 'a', 0), 'x'] == pytest.approx(x[-5:].mean())
    assert best_rates(logs, 20).loc[('s', 'a', 0), 'x'] == pytest.approx(max(x[i - 5:i].mean() for i in range(5, 13)))
    assert steps_to(logs, 0.0, 20).eq(20).all() and steps_to(logs, 0.0, 60).isna().all()


def test_what_is_missing_at_the_end_has_no_final_rate():
    logs = fake()
    logs.loc[(logs.step > 20) & (logs.seed == 1), 'reward/y/pass_rate'] = np.nan
    final = final_rates(logs, 5)
    assert final['y'].isna().tolist() == [seed == 1 for *_, seed in final.index] and final['x'].notna().all()


def test_runs_of_different_length_all_have_a_best_rate():
    logs = pd.concat([fake(), fake(steps=3).assign(setting='short')])
    best = best_rates(logs, 10)
    assert best.loc[['short']].equals(final_rates(logs, 10).loc[['short']]) and len(best) == 20 and best.loc[['s']].equals(best_rates(fake(), 10))


def test_a_reward_that_is_missing_in_a_setting_or_throughout(tmp_path):
    from matplotlib.figure import Figure
    logs = pd.concat([fake(), fake(seed=1).assign(setting='more', **{'reward/z/mean': 0.5, 'reward/z/pass_rate': 0.5})]).assign(**{'reward/n/mean': np.nan, 'reward/n/pass_rate': np.nan})
    slim(logs).to_parquet(tmp_path / 'log.parquet')
    kept = read_logs(tmp_path / 'log.parquet')
    assert list(rate_columns(kept).values()) == list(rate_columns(logs).values()) == ['x', 'y', 'z', 'n']
    rates = final_rates(kept, 5)
    assert rates['n'].isna().all() and rates['z'].isna().sum() == 10 and rates['worst'].notna().all()
    assert interval_table(rates).loc[('s', 'a'), 'n'] == 'nan' and paired(rates, 'b', 'a').loc[('s', 'n'), 'verdict'] == 'too few seeds'
    for setting, lines in dict(s=2, more=3).items():
        ax = Figure().subplots()
        draw_rewards(ax, kept[kept.setting == setting], 'a')
        assert len(ax.lines) == lines and ax.get_ylim()[1] == 1.03


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
    assert np.isnan(seed_interval([0, 1, 2, 3])[1]) and np.isnan(seed_interval([])[0]) and np.isnan(seed_interval([1] * 4)[1])
    tail = norm.cdf(np.sqrt(5 / 4) * t.ppf(0.025, 4))  # Hesterberg 2015, against all 5^5 resamples
    five = [0.0, 0.1, 0.25, 0.7, 1.0]
    means = [np.mean(m) for m in itertools.product(five, repeat=5)]
    assert seed_interval(five)[1:] == pytest.approx(np.quantile(means, [tail, 1 - tail]), abs=0.02)
    assert seed_interval([0.2, np.nan, 0.4, 0.6])[0] == pytest.approx(0.4)
    assert seed_interval([0, 0, 0, 0, 1])[1] == 0, 'one seed in five leaves zero inside'


def test_paired_differences_are_of_the_same_seed():
    logs = fake()
    rates = final_rates(logs, 5)
    d = paired(rates.sample(frac=1, random_state=0), 'b', 'a')
    x = rates.xs('b', level='method')['x'] - rates.xs('a', level='method')['x']
    assert d.loc[('s', 'x'), 'difference'] == pytest.approx(x.mean()) and d.loc[('s', 'x'), 'seeds'] == 5
    moved = rates.copy()
    moved.loc[('s', 'b'), 'x'] = (rates.loc[('s', 'a'), 'x'] + [0.1, 0.11, 0.12, 0.1, 0.13]).to_numpy()
    assert paired(moved, 'b', 'a').loc[('s', 'x'), 'verdict'] == 'higher' and paired(moved, 'a', 'b').loc[('s', 'x'), 'verdict'] == 'lower'
    four = moved[moved.index.get_level_values('seed') < 4]
    assert (paired(four, 'b', 'a').verdict == 'too few seeds').all(), 'four differences of one sign come by chance in one case of eight'
    x = rates.loc[('s', 'a'), 'x']
    assert interval_table(rates).loc[('s', 'a'), 'x'] == '{:.2f} [{:.2f}, {:.2f}]'.format(*seed_interval(x)) and interval_table(four).loc[('s', 'a'), 'x'] == f'{x[:4].mean():.2f}'


def test_paired_needs_two_methods_and_a_common_seed():
    rates = final_rates(fake(), 5)
    with pytest.raises(InputError, match="unknown method 'c'; known: a, b"): paired(rates, 'c', 'a')
    seed, method = rates.index.get_level_values('seed'), rates.index.get_level_values('method')
    with pytest.raises(InputError, match='share no seed'): paired(rates[(seed < 2) == (method == 'a')], 'a', 'b')
    some = rates[(method == 'a') | (seed != 3)]
    assert (paired(some, 'b', 'a').seeds == 4).all()


def test_rewards_that_never_apply_are_reported_as_unknown(tmp_path):
    logs = fake(steps=3)
    logs[['reward/x/pass_rate', 'reward/x/mean', 'reward/y/pass_rate', 'reward/y/mean', 'all_passed']] = np.nan
    text = report(small(methods=dict(a={}, b={})), logs, tmp_path)
    assert 'nan' in text and (paired(final_rates(logs), 'a', 'b').verdict == 'too few seeds').all() and (tmp_path / 'ends-s.png').exists()


def test_report_names_differences(tmp_path):
    logs = fake(steps=40)
    logs.loc[logs.method == 'b', 'reward/x/pass_rate'] += 1.0
    logs.loc[logs.method == 'b', 'reward/y/pass_rate'] = logs.loc[logs.method == 'a', 'reward/y/pass_rate'].to_numpy()
    text = report(small(methods=dict(a={}, b={}), question='Which?'), logs, tmp_path)
    assert text.startswith('Which?') and 'x in s +1.' in text and ' y in s' not in text.split('hold zero')[1]

"""How often the audit is wrong, and what it costs: `python tests/benchmarks/audit.py --log nbs/logs/audit.jsonl`.

Healthy logs of many kinds, and logs with a planted fall, several seeds of each: alarms, misses, errors of the onset, and the
rewards that were named as buyers, a line for each kind. The kinds marked "fresh" were made up after the rules; one look
at four seeds of each corrected the level of chance, and nothing since.
Then a million rollouts of 20 rewards in three formats: seconds and peak memory (skip with --no-speed).
"""
import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np  # noqa: E402
from test_audit import HEALTHY, SHAPES, TRADE, flat, make, planted, ramp  # noqa: E402

from rvpo_nb.audit import audit  # noqa: E402

SEED = 1000  # the tests use small numbers


def graded(log, seed, noise=0.15):
    "Make rewards of 0 and 1 continuous."
    rng, out = np.random.default_rng(seed), log.copy()
    for n in [c for c in log if c not in ('step', 'group', 'prompt')]: out[n] = np.clip(0.2 + 0.6 * log[n] + noise * rng.standard_normal(len(log)), 0, 1)
    return out


def slow(t): return 1 / (1 + math.exp(-8 * (t - 0.6)))


FRESH = {  # kind -> seed -> log, or log and settings of the audit
    'slow learning': lambda s: make(dict(a=lambda t: .1 + .6 * slow(t), b=lambda t: .2 + .3 * slow(t), c=flat(.4)), seed=s),
    'graded': lambda s: graded(make(dict(a=ramp(.3, .7), b=ramp(.5, .9), c=flat(.4)), seed=s), s),
    'graded, in a stable conflict': lambda s: graded(make(dict(a=ramp(.5, .6), b=flat(.5), c=ramp(.2, .8)), pull=dict(a=.7, b=-.7), seed=s), s),
    'pairs': lambda s: make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.4)), size=2, groups=32, seed=s),
    'twelve steps': lambda s: make(dict(a=ramp(.2, .8), b=flat(.6), c=flat(.4)), steps=12, seed=s),
    'five steps': lambda s: make(dict(a=ramp(.2, .8), b=flat(.6), c=flat(.4)), steps=5, seed=s),
    'two hundred steps of two groups': lambda s: make(dict(a=ramp(.2, .8), b=flat(.6), c=flat(.4)), steps=200, groups=2, seed=s),
    'very unlike prompts': lambda s: make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.4)), hardness=2.0, seed=s),
    'very unlike batches': lambda s: make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.4)), unrest=.8, seed=s),
    'rare and never learned': lambda s: make(dict(a=ramp(.3, .8), b=flat(.05), c=flat(.01)), seed=s),
    'saturated': lambda s: make(dict(a=flat(.97), b=flat(.99), c=ramp(.3, .9)), seed=s),
    'overshoots and settles': lambda s: make(dict(a=lambda t: .3 + .6 * min(1, 3 * t) - .1 * min(1, max(0, 3 * t - 1)), b=ramp(.3, .8), c=flat(.5)), seed=s),
    'dip to nothing that recovers': lambda s: make(dict(a=lambda t: .02 if .3 < t < .45 else .7, b=ramp(.3, .8), c=flat(.5)), seed=s),
    'curriculum by step': lambda s: make({n: (lambda t, p=p: p - .3 * (int(5 * t) / 5)) for n, p in dict(a=.9, b=.8, c=.7).items()}, seed=s),
    'curriculum up': lambda s: make(dict(a=lambda t: .3 + .1 * int(5 * t), b=lambda t: .2 + .12 * int(5 * t), c=lambda t: .4 + .08 * int(5 * t)), seed=s),
    'data change once, and all suffer': lambda s: make(dict(a=lambda t: .8 if t < .5 else .4, b=lambda t: .7 if t < .5 else .4, c=lambda t: .6 if t < .5 else .3), seed=s),
    'seasons': lambda s: make(dict(a=lambda t: .5 + .3 * math.sin(25 * t), b=lambda t: .5 + .3 * math.sin(25 * t + 2), c=ramp(.3, .8)), seed=s),
    'missing values, single ones': lambda s: (lambda log: log.assign(a=log.a.where(np.random.default_rng(s).random(len(log)) < .7)))(make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.4)), seed=s)),
    'weights, and what has none falls': lambda s: (make(dict(a=ramp(.3, .8), b=flat(.6), noted=ramp(.8, .1)), pull=dict(a=.6, noted=-.6), seed=s), dict(weights=dict(noted=0, a=2))),
    'fifty rewards': lambda s: make({f'r{i}': ramp(.2 + .012 * i, min(.9, .25 + .013 * i)) for i in range(50)}, steps=40, groups=4, seed=s),
    'columns that are no rewards': lambda s: (lambda log: log.assign(tokens=np.random.default_rng(s).poisson(np.linspace(300, 20, len(log))), difficulty=log.step / 60, clock=np.arange(len(log)) * .5, lr=1e-3 * (60 - log.step)))(
        make(dict(a=ramp(.3, .8), b=flat(.6), c=flat(.4)), seed=s)),
}

MORE = {  # shape -> onset as a share of the log, pass rate of what is lost
    'partial': (.4, ramp(.9, .5, .4, .7)),
    'early, and over soon': (.05, ramp(.9, .02, .05, .15)),
    'a step down, late': (.8, lambda t: .8 if t < .8 else .1),
    'in the last twelfth': (.92, ramp(.9, .1, .92, .96)),
    'slow, over the whole log': (0, ramp(.85, .15)),
    'rare to nothing': (.5, ramp(.3, .02, .5, .7)),
}


def fall(shape, seed, buyers=1, graded_by=None, pull=0.6, **settings):
    "Draw a log in which `lost` falls and the buyers rise; return onset, log and buyers."
    onset, lost = (MORE | SHAPES)[shape]
    top = max(lost(t) for t in np.linspace(0, 1, 50))
    gain = lambda t: .35 + .55 * (1 - lost(t) / max(.9, top))
    names = ['gain'] if buyers == 1 else [f'gain {i}' for i in range(buyers)]
    log = make(dict(other=ramp(.4, .6), lost=lost, **{n: gain for n in names}, still=flat(.5)), pull=dict(lost=pull, **{n: -pull for n in names}), seed=seed, **settings)
    return onset, graded(log, seed) if graded_by else log, set(names)


def as_before(shape, seed, **settings): return *planted(shape, seed, **settings), {'gain'}


PLANTED = {(shape, setting): (lambda s, shape=shape, more=more: as_before(shape, s, **more)) for shape in SHAPES
           for setting, more in {'': {}, '120 steps of four groups': dict(steps=120, groups=4), 'groups of four': dict(size=4), '30 steps': dict(steps=30), 'unlike batches': dict(unrest=.3)}.items()}
NEW = {(shape, ''): (lambda s, shape=shape: fall(shape, s)) for shape in MORE} | {
    (shape, setting): (lambda s, shape=shape, more=more: fall(shape, s, **more)) for shape in ('sudden', 'slow ramp', 'halved') for setting, more in
    {'three buyers': dict(buyers=3), 'graded': dict(graded_by=True), 'weak conflict': dict(pull=.35), 'half the values missing': dict(apply=dict(lost=.5)), 'unlike prompts': dict(hardness=1.5),
     '20 steps': dict(steps=20), 'group sizes differ': dict(sizes=[2, 4, 8])}.items()}


def ask_healthy(kind, fresh, seeds):
    alarms = []
    for s in seeds:
        log = (FRESH if fresh else HEALTHY)[kind](s)
        log, settings = log if isinstance(log, tuple) else (log, {})
        if found := audit(log, **settings).neglected: alarms.append(s)
    return dict(about='healthy', kind=kind, fresh=fresh, logs=len(seeds), alarms=len(alarms), seeds=alarms)


def ask_planted(key, fresh, seeds):
    row = dict(about='planted', kind=key[0], setting=key[1], fresh=fresh, logs=len(seeds), found=0, missed=0, blamed=0, late=0, buyers_right=0, buyers_some=0, buyers_none=0, buyers_wrong=0)
    errors = []
    for s in seeds:
        onset, log, truth = (NEW if fresh else PLANTED)[key](s)
        neglected, steps = audit(log).neglected, log.step.max()
        row['blamed'] += any(n.reward != 'lost' for n in neglected)
        mine = [n for n in neglected if n.reward == 'lost']
        if not mine: row['missed'] += 1; continue
        row['found'] += 1
        errors.append((mine[0].onset_step - 1) / (steps - 1) - onset)
        row['late'] += bool(abs(errors[-1]) > 0.1)
        named = set(mine[0].bought_off_by)
        row['buyers_wrong' if named - truth else 'buyers_right' if named == truth else 'buyers_some' if named else 'buyers_none'] += 1
    return row | dict(median_error=round(float(np.median(np.abs(errors))), 4) if errors else None, worst_error=round(float(np.abs(errors).max()), 4) if errors else None)


def big(folder, rows=1_000_000, rewards=20, size=16):
    "Write one large log three times."
    import pyarrow as pa
    from pyarrow import csv, parquet
    rng, i = np.random.default_rng(0), np.arange(rows)
    t = i / rows
    table = {'step': i // (64 * size) + 1, 'group': i // size % 64}
    for j in range(rewards):
        p = .3 + .5 * t if j else np.where(t < .5, .8, np.clip(.8 - 2.4 * (t - .5), .02, 1))
        table[f'r{j}'] = (rng.random(rows) < p).astype(float) if j % 2 == 0 else np.round(np.clip(p + .2 * rng.standard_normal(rows), 0, 1), 4)
    table = pa.table(table | {'completion': ['x' * 200] * rows, 'advantage': np.zeros(rows)})
    parquet.write_table(table, folder / 'big.parquet', row_group_size=100_000)
    csv.write_csv(table, folder / 'big.csv')
    with open(folder / 'big.jsonl', 'w') as f:
        for batch in table.to_batches(50_000): f.writelines(json.dumps(row) + '\n' for row in batch.to_pylist())


def speed(path):
    "Audit one large log in this process, and print what it took."
    import torch
    torch.set_num_threads(1)
    start, core = time.perf_counter(), time.process_time()
    result = audit(path)
    took, core = time.perf_counter() - start, time.process_time() - core
    assert [n.reward for n in result.neglected] == ['r0'] and result.log['rollouts'] == 1_000_000 and len(result.rewards) == 20
    print(json.dumps(dict(about='speed', format=Path(path).suffix[1:], rollouts=result.log['rollouts'], rewards=len(result.rewards), file_mb=round(Path(path).stat().st_size / 2 ** 20), seconds=round(took, 1), core_seconds=round(core, 1),
                          peak_mib=int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024)))  # getrusage would count the parent's, too


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--log', help='file that gets the lines')
    p.add_argument('--seeds', type=int, default=20, help='logs of each kind')
    p.add_argument('--jobs', type=int, default=os.cpu_count())
    p.add_argument('--no-speed', action='store_true')
    p.add_argument('--speed-of', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.speed_of: return speed(a.speed_of)
    seeds = range(SEED, SEED + a.seeds)
    rows = [dict(about='run', command=f'python tests/benchmarks/audit.py --seeds {a.seeds}', seed=SEED, cores=os.cpu_count(), python=platform.python_version(), **{n: version(n) for n in ('rvpo_nb', 'torch', 'numpy', 'pandas', 'pyarrow')})]
    with ProcessPoolExecutor(a.jobs) as pool:
        todo = [pool.submit(ask_healthy, kind, fresh, seeds) for fresh in (False, True) for kind in (FRESH if fresh else HEALTHY)]
        todo += [pool.submit(ask_planted, key, fresh, seeds) for fresh in (False, True) for key in (NEW if fresh else PLANTED)]
        for job in todo:
            rows.append(job.result())
            if rows[-1].get('alarms') or rows[-1].get('missed') or rows[-1].get('late') or rows[-1].get('blamed') or rows[-1].get('buyers_wrong'): print(rows[-1], file=sys.stderr, flush=True)
    if not a.no_speed:
        with tempfile.TemporaryDirectory() as folder:
            big(Path(folder))
            for name in ('big.parquet', 'big.csv', 'big.jsonl'):
                out = subprocess.run([sys.executable, __file__, '--speed-of', f'{folder}/{name}'], check=True, capture_output=True, text=True).stdout
                rows.append(json.loads(out))
                print(rows[-1], file=sys.stderr, flush=True)
    total = lambda about, fresh, what: sum(r[what] for r in rows if r['about'] == about and r['fresh'] == fresh)
    for fresh in (False, True):
        print(f'{"fresh" if fresh else "known"} kinds: {total("healthy", fresh, "alarms")} alarms in {total("healthy", fresh, "logs")} healthy logs; of {total("planted", fresh, "logs")} planted falls '
              + ', '.join(f'{total("planted", fresh, x)} {x}' for x in ('missed', 'blamed', 'late', 'buyers_right', 'buyers_some', 'buyers_none', 'buyers_wrong')))
    if a.log: Path(a.log).write_text(''.join(json.dumps(r) + '\n' for r in rows))


if __name__ == '__main__': main()

"""Train by nbs/launch/train.py on both engines, with several seeds, and write each reward's mean per step to nbs/logs/engines.parquet."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
REWARDS = 'advice', 'short', 'notice'


def run(engine, seed, steps):
    "Train once; returns one row per step, with the names that both engines log."
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, ROOT / 'nbs/launch/train.py', '--engine', engine, '--output_dir', out, '--max_steps', steps, '--seed', seed]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        if engine == 'trainer': log = map(json.loads, (Path(out) / 'log.jsonl').read_text().splitlines())
        else: log = [x for x in json.loads((Path(out) / f'checkpoint-{steps}/trainer_state.json').read_text())['log_history'] if 'k' in x]
        return [dict(engine=engine, seed=seed, step=x['step'], k=x['k']) | {r: x.get(f'reward/{r}/mean') for r in REWARDS} for x in log]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=60)
    a = parser.parse_args()
    rows = []
    for seed in range(a.seeds):
        for engine in ('trainer', 'trl'):
            rows += run(engine, seed, a.steps)
            print(engine, seed, flush=True)
    pd.DataFrame(rows).astype({r: 'float32' for r in REWARDS}).to_parquet(ROOT / 'nbs/logs/engines.parquet', index=False)

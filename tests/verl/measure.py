"""Write nbs/logs/verl.jsonl, which the chapter on verl reads: how far the advantages inside verl are from those of `advantages`."""
import json
import logging
import math
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings('ignore')
logging.disable(logging.WARNING)
from verl_cases import KEYS, OURS, Case, compose, difference, queue, run_v1, start_queue, v1_trainer

SEEDS = range(5)


def bound(x):
    "The next power of ten above a difference, as its digits depend on the machine; 0 stays."
    return 10.0 ** math.ceil(math.log10(x)) if x else 0.0


def older(name, case):
    from verl.trainer.ppo.ray_trainer import compute_advantage
    config = compose(f'algorithm.adv_estimator={name}', KEYS).algorithm
    return compute_advantage(case.proto(), adv_estimator=name, config=config).batch['advantages']


def queued(name, case):
    return run_v1(v1_trainer(f'algorithm.adv_estimator={name}', KEYS), queue(case.uid, case.rows, case.lengths))[0]


def main():
    start_queue()
    lines = []
    for trainer, run in {'V1, on its queue': queued, 'older': older}.items():
        for name, method in OURS.items():
            cases = [Case(seed) for seed in SEEDS]
            worst = max(difference(run(name, case), case.expect(method), case.lengths) for case in cases)
            lines.append(dict(verl=version('verl'), trainer=trainer, estimator=name, batches=len(cases), responses=sum(case.n for case in cases), difference_up_to=bound(worst)))
    path = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parents[2] / 'nbs' / 'logs' / 'verl.jsonl')
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    print(path.read_text(), end='')


if __name__ == '__main__': main()

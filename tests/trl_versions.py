"""Run the tests of rvpo_nb.trl on several versions of TRL: `python tests/trl_versions.py 1.0.0 1.16.0`.

Each version is put beside the environment, without its dependencies, so that only TRL changes. One line per version goes to nbs/logs/trl_versions.jsonl.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = 'not loss_and_gradient and not without_the_engines and not script and not launch_conf'  # the losses are TRL's own, and not the same in all versions
LOG = ROOT / 'nbs/logs/trl_versions.jsonl'


def try_version(v):
    "Count the tests that pass and fail on one version of TRL; `why` is the first error."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder, f'trl=={v}'], check=True)
        out = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '--tb=line', '-k', ADAPTER, str(ROOT / 'tests/test_trl.py')], capture_output=True, text=True,
                             env=os.environ | dict(PYTHONPATH=folder, OMP_NUM_THREADS='1')).stdout
    count = {word: int(n) for n, word in re.findall(r'(\d+) (passed|failed|error)', out)}
    why = next(iter(re.findall(r'^E\s+(.*Error.*)$|^(?:/\S+: )(\w*Error.*)$', out, re.M)), ('', ''))
    return dict(trl=v, transformers=version('transformers'), torch=version('torch').split('+')[0], passed=count.get('passed', 0),
                failed=count.get('failed', 0) + count.get('error', 0), why=(why[0] or why[1])[:200].replace(folder, ''))


if __name__ == '__main__':
    known = {x['trl']: x for x in map(json.loads, LOG.read_text().splitlines())} if LOG.exists() else {}
    for v in sys.argv[1:]:
        known[v] = try_version(v)
        print(known[v], flush=True)
        LOG.write_text(''.join(json.dumps(known[v]) + '\n' for v in sorted(known, key=lambda v: [int(n) for n in v.split('.')])))

"""Every command of the README runs, in a folder that holds what the README says a reader has. The make targets are run by .ci/run and below."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

from rvpo_nb.cli import main
from rvpo_nb.task import RUBRIC_POLICY

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()


def blocks(language): return re.findall(rf'^```{language}\n(.*?)^```', README, re.M | re.S)


COMMANDS = [line.split('#')[0].strip() for block in blocks('sh') for line in block.replace('\\\n', ' ').splitlines()]
PLAN = '''name = "mine"
task = "rubric"
seeds = 1
[methods.gdpo]
aggregation = "gdpo"
[methods.rvpo]
aggregation = "rvpo"
[args]
max_steps = 2
num_generations = 4
per_device_train_batch_size = 8
max_completion_length = 16
'''


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder with the files that the README names, written as it shows them."
    at = tmp_path_factory.mktemp('desk')
    shutil.copytree(RUBRIC_POLICY, at / 'path/to/model')
    settings = json.loads((at / 'path/to/model/tokenizer_config.json').read_text()) | dict(chat_template="{{ messages[-1]['content'] }}")
    (at / 'path/to/model/tokenizer_config.json').write_text(json.dumps(settings))
    [functions] = [re.findall(r'^def .*$', b, re.M) for b in blocks('python') if 'GRPOTrainer(' in b]
    (at / 'my_rewards.py').write_text('\n'.join(functions) + '\n')
    (at / 'prompts.jsonl').write_text(blocks('json')[0])
    (at / 'my_plan.toml').write_text(PLAN)
    return at


@pytest.fixture
def here(desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    sys.modules.pop('my_rewards', None)
    return desk


def command(start):
    [found] = [c for c in COMMANDS if c.startswith(start)]
    return shlex.split(found)[1:]


def shorter(words, **flags):
    "The command as it stands, with flags behind it that make it short."
    return words + [x for k, v in flags.items() for x in ('--' + k.replace('_', '-'), str(v))]


def test_nothing_in_the_readme_is_left_untested():
    known = ('git clone', 'make demo', 'make test', 'rvpo train', 'rvpo audit', 'pip install', 'rvpo evaluate', 'rvpo compare')
    assert sorted(COMMANDS) == sorted(c for start in known for c in COMMANDS if c.startswith(start))
    assert all(len([c for c in COMMANDS if c.startswith(start)]) == 1 for start in known)


def test_train_then_audit_then_evaluate_as_the_readme_says(here, capsys, monkeypatch):
    "One after the other, since each works on what the last one left."
    assert '--model rvpo-demo/rvpo-seed0 --max-completion-length 64' in README  # for a model of this size, as here
    train = shorter(command('rvpo train'), max_steps=3, max_completion_length=64, save_steps=2)
    assert main(train + ['--dry-run']) == 0 and 'correct' in capsys.readouterr().out and not Path('out').exists()
    assert main(train) == 0
    assert {'log.jsonl', 'completions', 'config.json', 'model.safetensors'} <= {p.name for p in Path('out').iterdir()}
    assert len(Path('out/log.jsonl').read_text().splitlines()) == 3 and 'reward/short/mean' in Path('out/log.jsonl').read_text()
    capsys.readouterr()

    assert main(command('rvpo audit')) == 0
    said = capsys.readouterr().out
    assert 'correct' in said and 'short' in said and '<html' in Path('report.html').read_text()

    import datasets
    rows = datasets.Dataset.from_list([dict(question=f'What is {i} + 1?', answer=f'It is {i + 1}.\n#### {i + 1}') for i in range(4)])
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: rows)  # the hub is out of reach of the tests
    assert main(shorter(command('rvpo evaluate'), max_completion_length=16)) == 0
    assert 'results: out-gsm8k/results.json' in capsys.readouterr().out and json.loads(Path('out-gsm8k/results.json').read_text())['results']


def test_compare_as_the_readme_says(here, capsys):
    assert main(shorter(command('rvpo compare'), jobs=1)) == 0
    assert 'rvpo less gdpo' in capsys.readouterr().out and Path('runs/mine/log.parquet').is_file()


def test_the_trainer_as_the_readme_shows_it(here):
    [code] = [b for b in blocks('python') if 'GRPOTrainer(' in b]
    exec(code.replace('max_steps=200', "max_steps=1, max_completion_length=16, disable_tqdm=True").replace("'out'", "'out-python'"), {})
    assert len(Path('out-python/log.jsonl').read_text().splitlines()) == 1
    assert len(code.strip().splitlines()) <= 15


def test_what_pip_is_asked_for_exists():
    [asked] = [re.search(r'\[(.+)\]', c)[1].split(',') for c in COMMANDS if c.startswith('pip install')]
    assert set(asked) <= set(metadata('rvpo_nb').get_all('Provides-Extra'))


@pytest.mark.parametrize('target', ['demo', 'test', 'docs', 'lab', 'test-verl'])
def test_the_make_targets_that_the_readme_names_exist(target):
    assert f'make {target}' in README
    done = subprocess.run(['make', '-n', target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_docs_says_how_to_get_quarto(tmp_path):
    "Run with an environment that is complete, on a path without Quarto."
    (tmp_path / 'bin').mkdir()
    for name in ('.installed', '.installed-dev'): (tmp_path / 'bin' / name).touch()
    (tmp_path / 'bin/python').symlink_to(sys.executable)
    done = subprocess.run(['make', 'docs', f'VENV={tmp_path}'], cwd=ROOT, capture_output=True, text=True, env=dict(PATH='/usr/bin:/bin'))
    assert done.returncode != 0 and 'Quarto is not installed' in done.stdout + done.stderr and 'quarto-cli' in done.stdout + done.stderr

"""The book holds together: every notebook runs, is clean, and is what the library, the README and the links say it is."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / 'nbs').glob('*.ipynb'))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_runs(name):
    done = subprocess.run([BIN / 'nbdev_test', '--path', f'nbs/{name}', '--n_workers', '0', '--do_print'], cwd=ROOT, timeout=600,
                          capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project, to which nbdev's commands may write."
    to = tmp_path_factory.mktemp('project') / 'rvpo_nb'
    skip = shutil.ignore_patterns('.*', '_proc', '_docs', 'rvpo-demo', 'runs', '*.egg-info', 'logs')
    shutil.copytree(ROOT, to, ignore=skip, symlinks=True)
    return to


def run(command, cwd):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    subprocess.run([BIN / command], cwd=cwd, check=True, timeout=120, capture_output=True, env=env)


def files(folder, pattern): return {p.name: p.read_text() for p in sorted(folder.glob(pattern))}


def test_library_is_what_the_notebooks_export(copy):
    before = files(copy / 'rvpo_nb', '*.py')
    shutil.rmtree(copy / 'rvpo_nb' / '__pycache__', ignore_errors=True)
    for p in (copy / 'rvpo_nb').glob('*.py'): p.unlink()
    run('nbdev_export', copy)
    assert files(copy / 'rvpo_nb', '*.py') == before


def test_notebooks_are_clean(copy):
    before = files(copy / 'nbs', '*.ipynb')
    run('nbdev_clean', copy)
    assert files(copy / 'nbs', '*.ipynb') == before


def test_readme_equals_index():
    sys.path.insert(0, str(ROOT / 'tests'))
    from readme import readme
    assert (ROOT / 'README.md').read_text() == readme()


def cells(name, kind): return [c for c in json.loads((ROOT / 'nbs' / name).read_text())['cells'] if c['cell_type'] == kind]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_local_links_and_images_resolve(name):
    text = '\n'.join(''.join(c['source']) for c in cells(name, 'markdown'))
    for target in re.findall(r'\]\(([^)\s]+)[^)]*\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r'https?://|mailto:|#', target): continue
        path = ROOT / 'nbs' / target.split('#')[0].replace('.html', '.ipynb')
        assert path.exists(), f'{name} links to {target}, which is not there'


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_stored_output_is_clean(name):
    for i, c in enumerate(cells(name, 'code')):
        text = json.dumps([{k: v for k, v in o.items() if k != 'data'} | {'data': {k: v for k, v in o.get('data', {}).items() if 'image' not in k}} for o in c['outputs']])
        assert not any(o['output_type'] == 'error' for o in c['outputs']), f'{name} cell {i} stores an error'
        assert not re.search(r'/(root|home|tmp|Users)/\w|"stderr"|object at 0x|real_accelerator', text), f'{name} cell {i}: {text[:300]}'


def test_every_chapter_is_in_the_sidebar():
    listed = re.findall(r'[\w-]+\.ipynb', (ROOT / '_quarto.yml').read_text())
    assert sorted(listed) == NOTEBOOKS


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_first_cell_is_title_and_subtitle_alone(name):
    "The site keeps nothing else of a cell that holds the title."
    assert re.fullmatch(r'# .+\n\n> .+\n?', ''.join(cells(name, 'markdown')[0]['source']))

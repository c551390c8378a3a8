"""What of the verl adapter needs no verl: grouping, spreading, settings, reward functions, data; and what an import says. The rest is in tests/verl."""
import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rvpo_nb.advantage import METHODS, advantages
from rvpo_nb.softmin import InputError


try: INSTALLED = metadata.version('verl')
except metadata.PackageNotFoundError: INSTALLED = None


@pytest.fixture(scope='module')
def verl(tmp_path_factory):
    "The module, imported as if verl were installed: it does not import verl itself."
    finders, folder = list(sys.meta_path), tmp_path_factory.mktemp('site')
    if not INSTALLED: pretend(folder, '0.9.1')
    sys.path.append(str(folder))
    yield importlib.import_module('rvpo_nb.verl')
    sys.path.remove(str(folder))
    sys.meta_path[:] = finders
    del sys.modules['rvpo_nb.verl']


def pretend(folder, version):
    "Make it look as if this version of verl were installed in a folder."
    (folder / f'verl-{version}.dist-info').mkdir()
    (folder / f'verl-{version}.dist-info' / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: verl\nVersion: {version}\n')
    return folder


def python(code, *path):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env=os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, path))))
    return done.returncode, (done.stderr.strip().splitlines() or [''])[-1]


@pytest.mark.skipif(INSTALLED is not None, reason='verl is installed')
def test_without_verl():
    assert python('import rvpo_nb.verl') == (1, 'ImportError: rvpo_nb.verl works with verl, which is not installed: pip install "rvpo_nb[verl]"')


@pytest.mark.parametrize('version', ['0.8.0', '0.9.0', '0.10.0', '1.0'])
def test_unsupported_version(tmp_path, version):
    code, said = python('import rvpo_nb.verl', pretend(tmp_path, version))
    assert code == 1 and said.startswith(f'ImportError: rvpo_nb.verl works with verl 0.9.1; {version} is installed')


def test_entry_point():
    "setup.py names the module that verl is to load."
    assert "'verl.plugins': ['rvpo_nb=rvpo_nb.verl']" in (Path(__file__).parents[1] / 'setup.py').read_text()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_advantages_on_tokens_are_those_of_the_groups(verl, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    method, m, seed = data.draw(st.sampled_from([n for n in METHODS if n != 'sa_mrpo'])), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 10 ** 6))
    gen = torch.Generator().manual_seed(seed)
    groups = torch.rand(len(sizes), max(sizes), m, generator=gen)
    groups[torch.rand(groups.shape, generator=gen) < 0.2] = torch.nan
    for p, n in enumerate(sizes): groups[p, n:] = torch.nan
    places = torch.tensor([(p, g) for p, n in enumerate(sizes) for g in range(n)])
    p, g = places[torch.randperm(len(places), generator=gen)].T
    mask = (torch.arange(7) < torch.randint(0, 8, (len(p), 1), generator=gen)).long()
    weights = [float(w) for w in torch.randint(0, 3, (m,), generator=gen) + torch.eye(m)[0]]
    got = verl.token_advantages(groups[p, g], [f'u{i}' for i in p.tolist()], mask, verl.Settings([f'r{j}' for j in range(m)], method, weights))
    torch.testing.assert_close(got, advantages(groups, method, weights=weights)[p, g][:, None] * mask, atol=1e-6, rtol=1e-5)


def test_a_mask_with_holes(verl):
    "Tokens of tools between those of the model get nothing."
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    got = verl.token_advantages(torch.tensor([[1.0], [0.0]]), ['a', 'a'], mask, verl.Settings(['x'], 'gdpo'))
    assert got.tolist() == [[1, 0, 0, 1], [0, -1, -1, 0]]


def test_schedule(verl):
    r, index, mask = torch.rand(8, 3), [0] * 4 + [1] * 4, torch.ones(8, 2)
    for t, k in ((0, 0.0), (5, 5.0), (10, 10.0)):
        got = verl.token_advantages(r, index, mask, verl.Settings(list('abc'), k=0.0, k_end=10.0), t, 11)
        torch.testing.assert_close(got[:, 0], advantages(r.view(2, 4, 3), k=k).flatten(), atol=1e-6, rtol=0)


def test_lengths_must_match(verl):
    with pytest.raises(InputError, match='3 uids for 2 rows'): verl.by_prompt(torch.rand(2, 3), [0, 1, 2])
    seen = dict(non_tensor_batch=dict(uid=[0, 0], x=[1.0, 0.0]), config=dict(gdpo_reward_keys=['x']))
    with pytest.raises(InputError, match='3 responses, 2 rows of scores and 2 uids'): verl.ESTIMATORS['rvpo'](torch.zeros(3, 2), torch.ones(3, 2), index=[0, 0], **seen)
    with pytest.raises(InputError, match='2 responses, 2 rows of scores and 0 uids'): verl.ESTIMATORS['rvpo'](torch.zeros(2, 2), torch.ones(2, 2), **seen)


@pytest.mark.parametrize('rows, says', [
    ([dict(a=1), dict(a='x')], "reward 'a', row 1: 'x' is not a number"), ([dict(a=float('inf'))], "reward 'a', row 0: inf is infinite"), ([dict(b=1), {}], "reward 'a' is missing in 2 of 2 rows, the first is row 0; entries that arrived: b"),
    ([{}], 'entries that arrived: none')])
def test_bad_rewards(verl, rows, says):
    with pytest.raises(InputError) as e: verl.reward_matrix(['a'], rows)
    assert says in str(e.value)


@pytest.mark.parametrize('config, name, says', [
    (None, 'rvpo', 'gdpo_reward_keys is None'), (dict(gdpo_reward_keys='a,b'), 'rvpo', "gdpo_reward_keys is 'a,b'"), (dict(gdpo_reward_keys=[]), 'rvpo', 'list the rewards'),
    (dict(gdpo_reward_keys=['a', 'a']), 'rvpo', "names 'a' twice"), (dict(gdpo_reward_weights=[-1, 1]), 'rvpo', 'weight 0 is -1'), (dict(rvpo=dict(k=float('nan'))), 'rvpo', 'k must be a number'),
    (dict(rvpo=dict(k='2')), 'rvpo', "got '2'"), (dict(rvpo=dict(k=1.0, k_end=float('inf'))), 'rvpo', 'finite ends'), (dict(rvpo=dict(k=float('inf'))), 'rvpo_explicit', 'needs a finite k'),
    (dict(rvpo=dict(n_effective=2)), 'rvpo_explicit', 'has none to set'), (dict(rvpo=dict(n_effective=0.5)), 'rvpo', 'at least 1'), (dict(rvpo=dict(k=3)), 'gdpo_rollout', 'gdpo_rollout has no k'), (dict(rvpo=dict(k=3)), 'hardmin', 'no k')])
def test_bad_settings(verl, config, name, says):
    with pytest.raises(InputError) as e: verl.read_settings(config if config is None else dict(gdpo_reward_keys=['a', 'b']) | config, name)
    assert says in str(e.value)


def test_final_rows_in_any_order(verl):
    keys = ['a_0_2', 'a-b_0_0', 'a_0_0', 'a_1_0', 'a_0_1', 'a_0_10']
    assert verl.final_rows(keys, [{}] * 6) == ([5, 1, 5, 3, 5, 5], [False, True, False, True, False, True])


def score_of(verl, reward_funcs, row, text, weights=None):
    return verl.score_function(reward_funcs, weights)('', text, '', dict(columns=json.dumps(row)), reward_router_address=None)


def test_score_function(verl):
    async def slow(prompts, completions, n, **columns): return [float(len(c) > k) for c, k in zip(completions, n)]
    def never(completions, **columns): return [None]
    assert score_of(verl, [slow, never], dict(prompt='p', n=2), 'long') == dict(score=1.0, slow=1.0, never=None)
    assert score_of(verl, [never], dict(prompt='p'), 'x') == dict(score=0.0, never=None)
    def three(completions, **columns): return [3.0]
    assert score_of(verl, [slow, three], dict(prompt='p', n=2), 'x', [1, 3])['score'] == 9 / 4
    seen = []
    def look(prompts, completions, **columns): return seen.append((prompts, completions, columns)) or [1.0]
    chat = [dict(role='user', content='hi')]
    score_of(verl, [look], dict(prompt=chat, rubric=[dict(text='t')]), 'yes')
    assert seen == [([chat], [[dict(role='assistant', content='yes')]], dict(rubric=[[dict(text='t')]]))]


def test_score_function_errors(verl):
    def score(completions, **columns): return [1.0]
    def right(completions, **columns): return [1.0]
    for funcs, says in (([score], "cannot be called 'score' here: verl uses the name"), ([right, right], 'two are')):
        with pytest.raises(InputError, match=says): verl.score_function(funcs)
    with pytest.raises(InputError, match='write_parquet'): verl.score_function([right])('', 'text', '', dict(index=0))
    def broken(completions, **columns): return [1.0, 2.0]
    with pytest.raises(InputError, match="'broken' returned 2 values for 1"): score_of(verl, [broken], dict(prompt='p'), 'x')


def test_write_parquet(verl, tmp_path):
    from datasets import Dataset, load_dataset
    rows = [dict(prompt=[dict(role='user', content='ü?')], answer='42', deep=dict(a=[1, None])), dict(prompt='plain', answer=None, deep=None)]
    assert verl.write_parquet(rows, tmp_path / 'a.parquet', 'mine') == 2
    back = pq.read_table(tmp_path / 'a.parquet').to_pylist()
    assert [json.loads(row['extra_info']['columns']) for row in back] == rows and [row['extra_info']['index'] for row in back] == [0, 1]
    assert [row['reward_model']['ground_truth'] for row in back] == ['42', ''] and back[1]['prompt'] == [dict(role='user', content='plain')] and back[0]['data_source'] == 'mine'
    assert load_dataset('parquet', data_files=str(tmp_path / 'a.parquet'), cache_dir=tmp_path)['train'].to_list() == back
    assert verl.write_parquet(Dataset.from_list([dict(prompt='x')]), tmp_path / 'b.parquet') == 1


@pytest.mark.parametrize('rows, says', [([], 'no rows'), ([dict(prompt='x'), dict(text='y')], 'row 1: the prompt must be'), ([dict(prompt='')], 'row 0: the prompt'), ([dict(prompt='x', y={1, 2})], 'row 0: .*set is not JSON'),
                                        ([dict(prompt='x', y=float('nan'))], 'row 0: ')])
def test_write_parquet_errors(verl, tmp_path, rows, says):
    with pytest.raises(InputError, match=says): verl.write_parquet(rows, tmp_path / 'a.parquet')

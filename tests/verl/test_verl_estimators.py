"""The estimators through verl's registry, its own DataProto and compute_advantage (the older trainer's path); plugin and self-check."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('verl.trainer', reason='verl is not installed; make test-verl builds an environment for it')

from verl_cases import KEYS, OURS, Case, compose

from rvpo_nb.softmin import InputError

CASE = Case()


def registered(name):
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    return get_adv_estimator_fn(name)


def direct(name, case, *settings, **more):
    "Call an estimator as compute_advantage calls verl's gdpo."
    data = case.proto()
    return registered(name)(token_level_rewards=data.batch['token_level_rewards'], response_mask=data.batch['response_mask'], index=data.non_tensor_batch['uid'],
                            config=compose(f'algorithm.adv_estimator={name}', KEYS, *settings).algorithm, non_tensor_batch=data.non_tensor_batch, batch=data.batch, **more)


@pytest.mark.parametrize('name', OURS)
def test_registry(name):
    a, returns = direct(name, CASE)
    torch.testing.assert_close(a, CASE.expect(OURS[name]), atol=1e-6, rtol=0)
    assert a.shape == CASE.mask.shape and a.dtype == torch.float32 and a.equal(returns) and a.abs().max() > 0.1


SETTINGS = {('+algorithm.rvpo.k=0',): dict(k=0.0), ('+algorithm.rvpo.k=inf',): dict(k=float('inf')), ('+algorithm.rvpo.n_effective=1.5',): dict(n_effective=1.5),
            ('+algorithm.rvpo.k=5', '+algorithm.gdpo_reward_weights=[1,0.5,3]'): dict(k=5.0, weights=[1, 0.5, 3]), ('+algorithm.gdpo_reward_weights=[1,0,3]',): dict(weights=[1, 0, 3])}


@pytest.mark.parametrize('overrides', SETTINGS, ids=str)
def test_older_trainer(overrides):
    from verl.trainer.ppo.ray_trainer import compute_advantage
    config = compose('algorithm.adv_estimator=rvpo', KEYS, *overrides).algorithm
    for seed in range(3):
        case = Case(seed)
        done = compute_advantage(case.proto(), adv_estimator=config.adv_estimator, gamma=config.gamma, lam=config.lam, num_repeat=4, config=config)
        torch.testing.assert_close(done.batch['advantages'], case.expect('rvpo', **SETTINGS[overrides]), atol=1e-6, rtol=0)
        assert done.batch['returns'].equal(done.batch['advantages'])


def test_every_holder_of_compute_advantage_is_hooked():
    from verl.experimental.separation import ray_trainer as separation
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.v1 import utils
    assert ray_trainer.compute_advantage is separation.compute_advantage is utils.compute_advantage and hasattr(utils.compute_advantage, '__wrapped__')


def test_other_estimators_are_as_they_were():
    from verl.trainer.ppo.ray_trainer import compute_advantage
    for name in ('grpo', 'gdpo', 'rloo'):
        case = Case(missing=0, sizes=(4, 4, 4))
        data, config = case.proto(), compose(f'algorithm.adv_estimator={name}', KEYS).algorithm
        data.batch['prompts'], data.batch['attention_mask'] = torch.ones(12, 3), torch.cat([torch.ones(12, 3).long(), case.mask], 1)
        one, two = (f(case_data, adv_estimator=name, num_repeat=4, config=config).batch['advantages']
                    for f, case_data in ((compute_advantage, data), (compute_advantage.__wrapped__, data.select(deepcopy=True))))
        assert one.equal(two) and one.abs().max() > 0.1


def test_gdpo_is_verls_up_to_a_constant_where_lengths_are_equal():
    case = Case(missing=0, sizes=(4,) * 5)
    case.groups = torch.rand(case.groups.shape, generator=torch.Generator().manual_seed(7))  # no reward dead
    case.mask = torch.ones_like(case.mask)
    data, config = case.proto(), compose(KEYS).algorithm
    batch = dict(prompts=torch.ones(20, 3), attention_mask=torch.ones(20, 3 + case.mask.shape[1]).long())
    verls, _ = registered('gdpo')(data.batch['token_level_rewards'], case.mask, case.uid, config=config, non_tensor_batch=data.non_tensor_batch, batch=batch)
    torch.testing.assert_close(direct('gdpo_rollout', case)[0] * (1 - 1 / case.mask.numel()) ** 0.5, verls, atol=1e-4, rtol=0)


@pytest.mark.parametrize('overrides, says', [
    (['+algorithm.gdpo_reward_keys=[right,safe]'], "reward 'safe' is missing in 18 of 18 rows, the first is row 0; entries that arrived: uid, right, format, length"),
    ([], 'algorithm.gdpo_reward_keys is None'), ([KEYS, '+algorithm.gdpo_reward_weights=[1,2]'], '2 weights for 3 rewards'),
    ([KEYS, '+algorithm.rvpo.k=-1'], 'k must be a number from 0 to inf, got -1'), ([KEYS, '+algorithm.rvpo.kk=1'], 'algorithm.rvpo.kk'),
    ([KEYS, '+algorithm.rvpo.k_end=2'], 'k_end needs the planned number of batches'), ([KEYS, 'algorithm.use_kl_in_reward=True'], 'algorithm.use_kl_in_reward does not go with rvpo'),
    ([KEYS, 'algorithm.filter_groups.enable=True'], 'algorithm.filter_groups does not go with rvpo'), ([KEYS, 'algorithm.norm_adv_by_std_in_grpo=False'], 'norm_adv_by_std_in_grpo=False is of grpo'),
    ([KEYS, '+algorithm.rvpo.n_effective=4'], 'n_effective is 4, but there are 3 rewards'), ([KEYS, '+algorithm.rvpo.n_effective=2', '+algorithm.rvpo.k=3'], 'n_effective takes the place of k')])
def test_errors(overrides, says):
    from verl.trainer.ppo.ray_trainer import compute_advantage
    with pytest.raises(InputError) as e: compute_advantage(CASE.proto(), adv_estimator='rvpo', config=compose('algorithm.adv_estimator=rvpo', *overrides).algorithm)
    assert says in str(e.value)


def test_errors_in_the_data():
    from verl.trainer.ppo.ray_trainer import compute_advantage
    config = compose(KEYS).algorithm
    data = CASE.proto()
    data.batch['token_level_rewards'] = CASE.mask.float()
    with pytest.raises(InputError, match=r'row \d+ has rewards on \d tokens'): compute_advantage(data, adv_estimator='rvpo', config=config)
    data = CASE.proto()
    data.non_tensor_batch['score'] = CASE.tokens.sum(-1).double().numpy() + np.eye(CASE.n)[2]  # one was changed by a reward manager
    with pytest.raises(InputError, match='row 2: compute_score returned the score'): compute_advantage(data, adv_estimator='rvpo', config=config)
    data = CASE.proto()
    data.non_tensor_batch['right'] = np.array([1.0] * 5 + [np.inf] + [0.0] * 12)
    with pytest.raises(InputError, match="reward 'right', row 5: inf is infinite"): compute_advantage(data, adv_estimator='rvpo', config=config)


def test_algo_config_dataclass():
    from verl.trainer.config import AlgoConfig
    data = CASE.proto()
    a, _ = registered('rvpo')(data.batch['token_level_rewards'], CASE.mask, index=CASE.uid, config=AlgoConfig(gdpo_reward_keys=CASE.names), non_tensor_batch=data.non_tensor_batch)
    torch.testing.assert_close(a, CASE.expect('rvpo'), atol=1e-6, rtol=0)


def python(code, *args, **env):
    done = subprocess.run([sys.executable, '-W', 'ignore', *(['-c', code] if code else []), *args], capture_output=True, text=True, timeout=300, env=os.environ | env, cwd='/')
    return done.returncode, done.stdout, done.stderr


def test_plugin_in_a_fresh_process():
    code = ('import sys, verl\nassert "rvpo_nb.verl" in sys.modules and not any(m.startswith("verl.trainer") for m in sys.modules), "imported too much"\n'
            'from verl.trainer.ppo.core_algos import get_adv_estimator_fn as get\nprint(get("rvpo").__module__)')
    assert python(code)[:2] == (0, 'rvpo_nb.verl\n')


def test_explicit_import_twice_and_late():
    code = ('from verl.trainer.ppo import ray_trainer as r\nfrom verl.experimental.separation import ray_trainer as s\nassert not hasattr(r.compute_advantage, "__wrapped__")\n'
            'import importlib, rvpo_nb.verl\nassert s.compute_advantage is r.compute_advantage and hasattr(r.compute_advantage, "__wrapped__")\n'
            'importlib.reload(rvpo_nb.verl)\nassert not hasattr(r.compute_advantage.__wrapped__, "__wrapped__")\n'
            'from verl.trainer.ppo.core_algos import get_adv_estimator_fn as get\nassert get("rvpo") is rvpo_nb.verl.ESTIMATORS["rvpo"]')
    code, _, err = python(code, VERL_USE_EXTERNAL_PLUGINS='none')
    assert code == 0, err[-2000:]


def test_self_check():
    code, out, _ = python(None, '-m', 'rvpo_nb.verl')
    assert code == 0 and all(line.startswith('yes') for line in out.splitlines()) and all(f'estimator {name}\n' in out for name in OURS) and 'use_v1=False' in out
    code, out, _ = python(None, '-m', 'rvpo_nb.verl', VERL_USE_EXTERNAL_PLUGINS='none')
    assert code == 1 and 'NO  trainer.use_v1=True' in out and 'VERL_USE_EXTERNAL_PLUGINS' in out


def test_self_check_asks_ray():
    code, out, err = python(None, '-m', 'rvpo_nb.verl', '--ray')
    assert code == 0 and out.count('yes') == len(OURS) + 3, err[-2000:]


def test_unsupported_version(tmp_path):
    info = tmp_path / 'verl-0.8.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: verl\nVersion: 0.8.0\n')
    code, out, err = python('import rvpo_nb.verl', PYTHONPATH=str(tmp_path))
    assert code == 1 and err.strip().splitlines()[-1].startswith('ImportError: rvpo_nb.verl works with verl 0.9.1; 0.8.0 is installed')


@pytest.mark.parametrize('hook, module, says', [('hook_older', 'ray_trainer', 'no compute_advantage'), ('hook_v1', 'v1.trainer_base', 'no _compute_advantage'), ('add_estimators', 'core_algos', 'no registry')])
def test_other_internals_are_named(hook, module, says):
    from types import ModuleType

    import rvpo_nb.verl
    with pytest.raises(ImportError, match=f'works with verl 0.9.1; .*{says}'): getattr(rvpo_nb.verl, hook)(ModuleType(module))

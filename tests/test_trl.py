"""Our aggregation on TRL's engine: against `advantages`, against our own trainer, against TRL's own, in one process and in several."""
import json
import math
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset

os.environ.update(HF_HUB_OFFLINE='1', TRL_EXPERIMENTAL_SILENCE='1')
trl = pytest.importorskip('trl', reason='TRL is the extra trl')

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import rvpo_nb.trainer as own
from rvpo_nb.advantage import METHODS, advantages
from rvpo_nb.inputs import load_tokenizer
from rvpo_nb.patients import rubric_prompts, rubric_rewards
from rvpo_nb.record import group_metrics, reward_metrics
from rvpo_nb.rollout import Rollouts
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY
from rvpo_nb.trl import READ, WORKS, GRPOConfig, GRPOTrainer, check_trl

ROOT = Path(__file__).parents[1]
TOKENIZER = load_tokenizer(RUBRIC_POLICY)
PROMPTS = ['cold.', 'fever.', 'coughs.']
SMALL = dict(num_generations=4, per_device_train_batch_size=12, max_completion_length=8, max_steps=1, learning_rate=1e-3, gradient_checkpointing=False, bf16=False)
TRL_ONLY = dict(use_cpu=True, report_to='none', save_strategy='no', logging_steps=1, disable_tqdm=True, shuffle_dataset=False)


def given(seed=0, missing=0.3):
    "Make up 3 x 4 rollouts of unequal length, some of them cut off, and four rewards in [0, 1], of which some are missing."
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (12,), generator=g).tolist()
    ids = [torch.randint(2, 60, (n,), generator=g).tolist() + [TOKENIZER.eos_token_id] * (n < 7) for n in lengths]
    rewards = torch.rand(3, 4, 4, generator=g)
    rewards[torch.rand(3, 4, 4, generator=g) < missing] = torch.nan
    rewards[..., 0] = torch.rand(3, 4, generator=g).round()  # this one always applies
    return ids, rewards


def on_trl(tmp_path, ids, rewards, classes=None, **settings):
    "Build a trainer on TRL's engine that gets these rollouts and rewards."
    def rollouts(prompts, trainer):
        return dict(prompt_ids=[TOKENIZER(p)['input_ids'] for p in prompts], completion_ids=ids, logprobs=[[0.0] * len(x) for x in ids])

    def reward(j):
        def f(prompts, completions, **columns): return [None if math.isnan(x) else x for x in rewards[..., j].flatten().tolist()]
        f.__name__ = f'r{j}'
        return f
    classes = classes or SimpleNamespace(GRPOConfig=GRPOConfig, GRPOTrainer=GRPOTrainer)
    args = classes.GRPOConfig(output_dir=str(tmp_path / 'trl'), **SMALL | TRL_ONLY | settings)
    return classes.GRPOTrainer(str(RUBRIC_POLICY), [reward(j) for j in range(rewards.shape[-1])], args, train_dataset=Dataset.from_dict(dict(prompt=PROMPTS)),
                               processing_class=TOKENIZER, rollout_func=rollouts)


def scored(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(prompt=p) for p in PROMPTS for _ in range(4)])


def on_ours(tmp_path, m, **settings):
    rewards = [lambda prompts, completions, **columns: [0.0] * len(completions) for _ in range(m)]
    for j, f in enumerate(rewards): f.__name__ = f'r{j}'
    args = own.GRPOConfig(output_dir=str(tmp_path / 'own'), **SMALL | settings)
    t = own.GRPOTrainer(RUBRIC_POLICY, rewards, args, train_dataset=[dict(prompt=p) for p in PROMPTS])
    t.start(False)
    t.optimizer.step = t.optimizer.zero_grad = lambda: None  # to look at the gradient
    return t


@pytest.mark.parametrize('settings', [
    *(dict(aggregation=m) for m in METHODS), dict(k=math.inf), dict(k=0.0), dict(n_effective=2.0), dict(k=0.5, k_end=5.0), dict(reward_weights=[1.0, 0.0, 2.0, 0.5])],
    ids=lambda s: ' '.join(f'{k}={v}' for k, v in s.items()))
def test_advantages_are_those_of_our_own_trainer(tmp_path, settings):
    ids, rewards = given(missing=0.0 if settings.get('aggregation') == 'tchebycheff' else 0.3)
    trainer = on_trl(tmp_path, ids, rewards, **settings)
    out = scored(trainer)
    expected = on_ours(tmp_path, 4, **settings).aggregate(0, rewards)[0].flatten()
    assert expected.abs().max() > 0.5
    assert (out['advantages'] - expected).abs().max() < 1e-6
    assert torch.allclose(torch.tensor(trainer._logs['advantages']), expected, atol=1e-6)


LOSSES = [dict(loss_type='grpo'), dict(loss_type='dr_grpo'), dict(loss_type='dapo'), dict(loss_type='cispo', epsilon_high=1.05),
          dict(loss_type='grpo', importance_sampling_level='sequence'), dict(loss_type='dapo', importance_sampling_level='sequence'),
          dict(loss_type='dapo', epsilon=0.1, epsilon_high=0.3), dict(loss_type='dapo', mask_truncated_completions=True),
          dict(loss_type='dapo', beta=0.3), dict(loss_type='grpo', beta=0.3, use_bias_correction_kl=False), dict(loss_type='dr_grpo', beta=0.3, temperature=0.7)]


@pytest.mark.parametrize('old', [False, True], ids=['first iteration', 'later iteration'])
@pytest.mark.parametrize('loss', LOSSES, ids=lambda s: ' '.join(f'{k}={v}' for k, v in s.items()))
def test_loss_and_gradient_are_those_of_our_own_trainer(tmp_path, loss, old):
    ids, rewards = given()
    theirs, t = on_trl(tmp_path, ids, rewards, **loss), on_ours(tmp_path, 4, **loss)
    inputs = scored(theirs)
    mask = torch.zeros_like(inputs['completion_ids'])
    for row, x in zip(mask, ids): row[:len(x)] = 1
    shift = 0.5 * torch.sin(torch.arange(mask.numel())).view(mask.shape)
    with torch.no_grad(): logps = theirs._get_per_token_logps_and_entropies(
        theirs.model, torch.cat([inputs['prompt_ids'], inputs['completion_ids']], 1), torch.cat([inputs['prompt_mask'], mask], 1), mask.shape[1])[0]
    if old: inputs['old_per_token_logps'] = logps + shift
    with torch.no_grad():  # both start from the same policy, so that a KL needs another reference
        for model in (t.ref_model, theirs.ref_model):
            if loss.get('beta'): model.get_input_embeddings().weight.mul_(1.1)
    if loss.get('beta'): inputs = dict(inputs, ref_per_token_logps=theirs._get_per_token_logps_and_entropies(
        theirs.ref_model, torch.cat([inputs['prompt_ids'], inputs['completion_ids']], 1), torch.cat([inputs['prompt_mask'], mask], 1), mask.shape[1])[0].detach())
    theirs.current_gradient_accumulation_steps = 1  # TRL sets it when training begins
    theirs.model.train()
    value = theirs._compute_loss(theirs.model, inputs)
    value.backward()
    r = Rollouts(t.prompt_ids, torch.arange(3).repeat_interleave(4), inputs['completion_ids'], mask, (logps + shift) * mask, torch.tensor([x[-1] == TOKENIZER.eos_token_id for x in ids]))
    mine = t.learn(r, t.aggregate(0, rewards)[0].flatten(), first=not old)['loss']
    assert abs(value.item() - mine) < 1e-5
    gradients = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (theirs.model, t.model)]
    gradients[1] *= 1 / min(1, 1 / max(1e-9, gradients[0].norm().item()))  # ours is clipped to norm 1 already
    assert gradients[0].norm() > 1e-3 and (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_without_aggregation_everything_is_trls_own(tmp_path):
    ids, rewards = given()
    for how in ('sum_then_normalize', 'normalize_then_sum'):
        plain = on_trl(tmp_path, ids, rewards, trl, multi_objective_aggregation=how)
        mine = on_trl(tmp_path, ids, rewards, aggregation=None, multi_objective_aggregation=how)
        gathered, gather = [], mine.accelerator.gather
        mine.accelerator.gather = lambda x: gathered.append(x) or gather(x)
        assert torch.equal(scored(plain)['advantages'], scored(mine)['advantages'])
        assert any(x.shape == (12,) and x.dtype == torch.float32 for x in gathered), 'the figures are of all processes'
        assert plain._logs['advantages'] == mine._logs['advantages']
        theirs, all_of_them = plain._metrics['train'], mine._metrics['train']
        same = [name for name in theirs if name.startswith(('reward', 'frac_'))]  # old versions sample in spite of the rollout function
        assert len(same) > 10 and all(theirs[name] == all_of_them[name] for name in same)
        assert 'k' not in all_of_them and len(all_of_them['reward/r0/dead']) == 1


@pytest.mark.parametrize('changes, message', [
    (dict(aggregation='rpvo'), "unknown aggregation 'rpvo'"), (dict(k=-1.0), 'k must be'), (dict(n_effective=9.0), 'n_effective is 9.0, but there are 4 rewards'),
    (dict(aggregation=None, k=5.0), 'k is a setting of aggregation, which is None'), (dict(k=3.0, n_effective=2.0), 'set one or the other'), (dict(aggregation='gdpo', n_effective=2.0), 'gdpo has none to set'),
    (dict(multi_objective_aggregation='normalize_then_sum'), "replaces it: set aggregation=None to use TRL's"), (dict(scale_rewards=False), 'scale_rewards is how TRL'),
    (dict(reward_weights=[1.0, -1.0, 1.0, 1.0]), 'weight 1 is -1.0')])
def test_settings_that_cannot_be_right_are_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(InputError, match=message): on_trl(tmp_path, *given(), **changes)


def test_without_aggregation_nothing_is_refused_that_trl_takes(tmp_path):
    ids, rewards = given()
    rewards[1, 2, 3] = math.inf
    for settings in (dict(reward_weights=[1.0, -1.0, 0.5, 1.0]), dict(reward_weights=[0.0] * 4)):
        plain, mine = on_trl(tmp_path, ids, rewards, trl, **settings), on_trl(tmp_path, ids, rewards, aggregation='None', **settings)
        assert torch.allclose(scored(plain)['advantages'], scored(mine)['advantages'], rtol=0, atol=0, equal_nan=True)


def test_weights_that_change_in_the_trainer_are_heard(tmp_path):
    "TRL reads them anew for each batch, and adds one for an environment that has a reward."
    ids, rewards = given()
    trainer = on_trl(tmp_path, ids, rewards)
    trainer.reward_weights = torch.tensor([1.0, 0.0, 0.0, 3.0])
    assert (scored(trainer)['advantages'] - advantages(rewards, weights=[1, 0, 0, 3]).flatten()).abs().max() < 1e-6


def test_evaluation_has_groups_of_its_own_size(tmp_path):
    ids, rewards = given()
    trainer = on_trl(tmp_path, ids, rewards, num_generations_eval=2, per_device_eval_batch_size=12)
    trainer.model.eval()
    out = trainer._generate_and_score_completions([dict(prompt=p) for p in PROMPTS for _ in range(4)])
    assert (out['advantages'] - advantages(rewards.view(6, 2, 4)).flatten()).abs().max() < 1e-6
    assert trainer._metrics['eval']['k'] == [2.0] and not trainer._metrics['train'].get('k')


def test_figures_are_those_of_our_own_log(tmp_path):
    ids, rewards = given()
    settings = dict(reward_weights=[1.0, 0.0, 2.0, 0.5])
    trainer, names = on_trl(tmp_path, ids, rewards, **settings), [f'r{j}' for j in range(4)]
    for f in trainer.reward_funcs: f.threshold = 0.5
    scored(trainer)
    ok = torch.where(rewards.isnan(), torch.nan, (rewards >= 0.5).float())
    expected = reward_metrics(names, rewards, ok) | group_metrics(names, rewards, ok, advantages(rewards, weights=settings['reward_weights']), 2.0, settings['reward_weights'])
    assert len(expected) > 20 and all(math.isnan(v) or trainer._metrics['train'][name] == [pytest.approx(v, abs=1e-6)] for name, v in expected.items())


def test_rewards_in_another_order_than_trls_advantages_are_noticed(tmp_path, monkeypatch):
    trainer = on_trl(tmp_path, *given(missing=0.05))
    scored(trainer)
    keep = GRPOTrainer._calculate_rewards
    def shuffled(self, *args, **named):
        out = keep(self, *args, **named)
        self._rewards = out.roll(1, 0)
        return out
    monkeypatch.setattr(GRPOTrainer, '_calculate_rewards', shuffled)
    with pytest.raises(RuntimeError, match='orders or aggregates rewards in another way'): scored(trainer)


def test_trls_own_config_is_refused(tmp_path):
    both = SimpleNamespace(GRPOConfig=trl.GRPOConfig, GRPOTrainer=GRPOTrainer)
    with pytest.raises(InputError, match='import GRPOConfig from rvpo_nb.trl'): on_trl(tmp_path, *given(), both)


def test_two_rewards_of_one_name_and_an_infinite_one_are_named(tmp_path):
    ids, rewards = given()
    def r0(prompts, completions, **columns): return [0.0] * len(completions)
    args = GRPOConfig(output_dir=str(tmp_path), **SMALL | TRL_ONLY)
    with pytest.raises(InputError, match="two rewards are called 'r0'"):
        GRPOTrainer(str(RUBRIC_POLICY), [r0, r0], args, train_dataset=Dataset.from_dict(dict(prompt=PROMPTS)), processing_class=TOKENIZER)
    rewards[1, 2, 3] = math.inf
    with pytest.raises(InputError, match="reward 'r3', row 6: inf"): scored(on_trl(tmp_path, ids, rewards))


def test_a_rollout_without_any_reward_gets_zero_and_moves_nobody_else(tmp_path):
    ids, rewards = given()
    rewards[1, 2] = torch.nan
    a = scored(on_trl(tmp_path, ids, rewards))['advantages'].view(3, 4)
    assert a[1, 2] == 0 and torch.allclose(a, advantages(rewards), atol=1e-6) and a.isfinite().all()


def test_k_follows_its_schedule_over_a_resume_and_every_reward_has_its_curves(tmp_path):
    def trained(name, steps, resume=False, **settings):
        args = GRPOConfig(output_dir=str(tmp_path / name), k=0.5, k_end=2.0, seed=3, **SMALL | TRL_ONLY | dict(
            max_steps=steps, save_strategy='steps', save_steps=2, per_device_train_batch_size=8, max_completion_length=24, disable_tqdm=True) | settings)
        t = GRPOTrainer(str(RUBRIC_POLICY), rubric_rewards(), args, train_dataset=rubric_prompts(16), eval_dataset=rubric_prompts(4, seed=1), processing_class=TOKENIZER)
        t.train(resume_from_checkpoint=str(tmp_path / name / 'checkpoint-2') if resume else None)
        return t, [x for x in t.state.log_history if 'k' in x]
    t, straight = trained('a', 4)
    assert [x['k'] for x in straight] == [0.5, 1.0, 1.5, 2.0]
    _, resumed = trained('a', 4, resume=True)
    assert [x['k'] for x in resumed] == [0.5, 1.0, 1.5, 2.0]
    same = [x for x in straight[2] if x.startswith(('reward', 'loss', 'grad_norm', 'completions/'))]
    assert len(same) > 60 and all(resumed[2][x] == straight[2][x] for x in same), 'a resumed run goes on as if it had not stopped'
    for column in ('mean', 'std', 'pass_rate', 'dead', 'attention', 'masked_failure'): assert f'reward/length/{column}' in straight[0]
    t.evaluate()
    metrics = t.state.log_history[-1]
    assert 0 <= metrics['eval_reward/length/pass_rate'] <= 1 and 'eval_n_effective' in metrics
    several, log = trained('b', 4, num_iterations=2)
    assert [x['k'] for x in log] == [0.5, 2.0], 'two steps on each batch: the schedule counts batches'
    _, log = trained('c', 2, gradient_accumulation_steps=2, steps_per_generation=1, num_generations=4)
    assert [x['k'] for x in log] == [0.5, 2.0], 'two batches in each step share its k'


def test_the_log_of_a_batch_larger_than_trls_log_keeps_its_last_rows(tmp_path):
    ids, rewards = given()
    trainer = on_trl(tmp_path, ids, rewards)
    trainer._logs['advantages'] = deque(maxlen=5)
    scored(trainer)
    assert torch.allclose(torch.tensor(trainer._logs['advantages']), advantages(rewards).flatten()[-5:], atol=1e-6)


def test_an_unfit_trl_is_refused_with_the_versions_that_work():
    check_trl(trl.GRPOTrainer, trl.__version__)
    class Other:
        def _generate_and_score_completions(self, inputs): return self._metrics
    for trainer in (Other, object):
        with pytest.raises(ImportError, match=r'works with TRL \d.*; in the installed TRL 0.1'): check_trl(trainer, '0.1')
    assert {'_calculate_rewards', '_logs'} <= READ
    broken = run('import sys, types; sys.modules["trl"] = types.ModuleType("trl"); import rvpo_nb.trl')
    assert 'the installed one does not load' in broken.stderr and WORKS in broken.stderr


def run(code, **env): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | env)


def test_without_the_engines_the_rest_imports_and_the_adapters_name_their_extra():
    modules = sorted(p.stem for p in (ROOT / 'rvpo_nb').glob('[!_]*.py'))
    out = run(f'''
import importlib, sys
sys.modules.update(trl=None, verl=None, ray=None)
for name in {modules}:
    try: importlib.import_module('rvpo_nb.' + name)
    except ImportError as e: print(name, e)
''')
    assert out.returncode == 0, out.stderr
    said = dict(line.split(' ', 1) for line in out.stdout.splitlines())
    assert 'pip install "rvpo_nb[trl]"' in said.pop('trl')
    if 'verl' in modules: assert 'pip install "rvpo_nb[verl]"' in said.pop('verl')
    assert not said


def launch(*command, processes=2, **options):
    "Run a script in several processes on the CPU; they talk through gloo. accelerate's own --cpu starts one process only, unless there is MPI."
    env = os.environ | dict(OMP_NUM_THREADS='1', TRL_EXPERIMENTAL_SILENCE='1')
    flags = [x for name, value in options.items() for x in (f'--{name}', str(value))]
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', *['--multi_gpu'] * (processes > 1 and 'config_file' not in options), '--num_processes', str(processes), '--main_process_port', '0', *flags, *map(str, command)],
                          capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    "Train on given rollouts in one process and in two; the second of the three groups lies on both. Returns what each process wrote down."
    out = {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(f'{n}-processes')
        launch(ROOT / 'tests/trl_worker.py', folder, processes=n)
        out[n] = [json.loads((folder / f'{i}-of-{n}.json').read_text()) for i in range(n)]
    return out


def test_two_processes_get_the_advantages_that_one_gets(reports):
    assert [r['backend'] for r in reports[2]] == ['gloo'] * 2
    counts = set()
    for step in range(3):
        alone, (first, second) = reports[1][0]['seen'][step], (r['seen'][step] for r in reports[2])
        assert first['rewards'] == second['rewards'] == alone['rewards'], 'both processes know all rewards, NaN included'
        rewards = torch.tensor([[math.nan if x is None else x for x in row] for row in alone['rewards']])
        together = torch.tensor(first['advantages'] + second['advantages'])
        assert len(first['advantages']) == 6 and (together - torch.tensor(alone['advantages'])).abs().max() < 1e-6
        assert (together - advantages(rewards.view(3, 4, 3)).flatten()).abs().max() < 1e-6
        counts |= {tuple((~part.isnan()).any(-1).sum().item() for part in rewards.split(6))}
        assert rewards[:, 2].isnan().float().mean() > 0.3
        for name in ('reward/rare/mean', 'reward/rare/dead', 'n_effective', 'k'): assert reports[1][0]['log'][step][name] == pytest.approx(reports[2][0]['log'][step][name], abs=1e-6)
    assert any(a != b for a, b in counts), 'the processes hold different numbers of valid rollouts in some step'


def test_loss_and_gradient_of_two_processes_are_those_of_one(reports):
    for one, two in zip(reports[1][0]['log'][:3], reports[2][0]['log'][:3]):
        for name in ('loss', 'grad_norm'): assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name


def test_the_launch_configurations_hold_only_options_that_accelerate_has():
    known = {o.lstrip('-').replace('-', '_') for action in launch_command_parser()._actions for o in action.option_strings}
    for name, section in dict(zero3='deepspeed_config', fsdp='fsdp_config').items():
        config = load_config_from_file(str(ROOT / f'nbs/launch/{name}.yaml'))  # raises for an unknown key
        assert getattr(config, section) and not getattr(config, section).keys() - known
    pytest.importorskip('deepspeed')
    from accelerate.utils import DeepSpeedPlugin
    stage = load_config_from_file(str(ROOT / 'nbs/launch/zero3.yaml')).deepspeed_config['zero_stage']
    assert DeepSpeedPlugin(zero_stage=stage).deepspeed_config['zero_optimization']['stage'] == 3


@pytest.mark.parametrize('config', ['zero3', 'fsdp'])
def test_a_launch_configuration_starts_two_ranks(tmp_path, config):
    "Without a GPU accelerate takes the ranks from the configuration and trains them data-parallel: nothing is sharded here."
    if config == 'zero3': pytest.importorskip('deepspeed', reason='the launcher refuses the configuration without DeepSpeed')
    launch(ROOT / 'nbs/launch/train.py', '--engine', 'trl', '--output_dir', tmp_path, '--max_steps', 1, config_file=ROOT / f'nbs/launch/{config}.yaml', mixed_precision='no')
    assert len(pd.read_parquet(next((tmp_path / 'completions').glob('*.parquet')))) == 64, 'two ranks with 32 rollouts each'


def test_the_script_trains_in_two_processes_and_resumes(tmp_path):
    script, out = ROOT / 'nbs/launch/train.py', tmp_path / 'run'
    launch(script, '--engine', 'trl', '--output_dir', out, '--max_steps', 10)
    launch(script, '--engine', 'trl', '--output_dir', out, '--max_steps', 12, '--resume')
    state = json.loads((out / 'checkpoint-12/trainer_state.json').read_text())
    assert state['global_step'] == 12 and [x['step'] for x in state['log_history'] if 'k' in x] == list(range(1, 13))
    tables = [pd.read_parquet(p) for p in sorted((out / 'completions').glob('*.parquet'))]
    assert len(tables) == 12 and all(len(t) == 64 for t in tables)
    assert 0.3 < pd.concat(tables)['notice'].isna().mean() < 0.9
    for step, t in enumerate(tables):
        rewards = torch.tensor(t[['advice', 'short', 'notice']].to_numpy(dtype='float32')).view(8, 8, 3)
        k = state['log_history'][step]['k']
        assert (advantages(rewards, k=k).flatten() - torch.tensor(t['advantage'].to_numpy())).abs().max() < 1e-6

"""A run killed at any moment, and resumed, is the run that was not killed."""
import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pandas as pd

from rvpo_nb.record import read_log

PHASES = ['sample', 'score', 'learn', 'save']
KILLS = 24


def run(folder, phase):
    "Train, and say in `phase` what is being done; the settings are those that keep most state."
    import torch
    from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
    from rvpo_nb.trainer import GRPOConfig, GRPOTrainer
    torch.set_num_threads(1)
    for number, name in enumerate(PHASES, 1):
        def told(self, *args, number=number, method=getattr(GRPOTrainer, name), **kwargs):
            before, phase.value = phase.value, number
            if PHASES[number - 1] == 'score': time.sleep(0.01)  # scoring is too short to be hit otherwise
            try: return method(self, *args, **kwargs)
            finally: phase.value = before
        setattr(GRPOTrainer, name, told)
    args = GRPOConfig(output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, max_steps=120,
                      num_iterations=2, loss_type='r2vpo', ratio_penalty_lr=5.0, dynamic_sampling=1, reward_weights_end=[1.0, 2.0], k_end=4.0, guard=0.9,
                      beta=0.01, save_steps=2, save_total_limit=2, disable_tqdm=True)
    rewards = rubric_rewards()
    GRPOTrainer(RUBRIC_POLICY, [rewards[0], rewards[-1]], args, train_dataset=rubric_prompts(8)).train(resume_from_checkpoint=True)


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['rvpo_nb.task', 'rvpo_nb.trainer', 'pandas', 'pyarrow.parquet'])
    chance, killed_in = random.Random(0), []
    def start(name):
        phase = context.Value('i', 0)
        p = context.Process(target=run, args=(tmp_path / name, phase))
        p.start()
        return p, phase
    for i in range(KILLS):
        p, phase = start('killed')
        log = tmp_path / 'killed' / 'log.jsonl'
        lines = lambda: log.read_text().count('\n') if log.exists() else 0
        first, wait = lines(), chance.randint(0, 2)
        while p.is_alive() and not (lines() >= first + wait and phase.value == 1 + i % len(PHASES)): pass
        time.sleep(chance.random() * (0.005 if PHASES[i % len(PHASES)] == 'score' else 0.02))
        killed_in.append(phase.value)
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL, 'the run was killed while it ran'
    assert {PHASES[x - 1] for x in killed_in if x} == set(PHASES), 'kills hit every phase'
    for name in ('killed', 'whole'):
        p, _ = start(name)
        p.join()
        assert p.exitcode == 0
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    assert (killed / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    logs = [[{k: v for k, v in x.items() if not k.startswith(('time/', 'memory/'))} for x in read_log(f / 'log.jsonl')] for f in (killed, whole)]
    assert json.dumps(logs[0]) == json.dumps(logs[1]) and [x['step'] for x in logs[0]] == list(range(2, 121, 2))
    tables = [sorted(p.name for p in (f / 'completions').glob('*.parquet')) for f in (killed, whole)]
    assert tables[0] == tables[1] and len(tables[0]) == 60
    for name in tables[0]: pd.testing.assert_frame_equal(*(pd.read_parquet(f / 'completions' / name) for f in (killed, whole)))
    assert sorted(p.name for p in killed.glob('checkpoint-*')) == ['checkpoint-118', 'checkpoint-120']

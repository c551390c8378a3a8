"""A run that is stopped, at any moment and by whatever, and resumed is the run that was not stopped; and a resumed run is the same run or none."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from runs import PHASES, PLAIN, STATE, Server, new, same_end

from rvpo_nb.inputs import load_model
from rvpo_nb.checkpoint import alone, checkpoints, frozen_digest, write_sums
from rvpo_nb.record import read_log
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
from rvpo_nb.trainer import GRPOTrainer

AIMS = dict(s=0.025, r=0.006, a=0.015, w=0.02, l=0.02)  # phase -> about how long it lasts, in seconds
NAME = Path(RUBRIC_POLICY).name


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp('runs'))
    yield server
    server.close()


@pytest.fixture(scope='module')
def undisturbed(server, kills):
    "Settings of a run that is long enough to be stopped so often, and its folder."
    settings = STATE | dict(max_steps=2 * (2 * kills + 4))
    assert server.run('undisturbed', **settings)[0] == 0
    return settings, server.folder / 'undisturbed'


def rows(folder):
    "Count the rollouts and the log lines that a run has saved."
    return sum(pq.read_metadata(p).num_rows for p in (folder / 'completions').iterdir()) + len(read_log(folder / 'log.jsonl'))


def clean(text, folder): return text.replace(str(folder), 'OUT')


# --- stopped

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_run_stopped_at_random_moments_ends_as_one_that_was_not(server, undisturbed, kills, number, fault_row):
    (settings, whole), chance, hit, told = undisturbed, random.Random(number), Counter(), ''
    name, folder, rude = number.name, server.folder / number.name, number == signal.SIGKILL
    aims = list(AIMS)[:5 if rude else 4]  # before its first step a run has nothing to save: SIGTERM and Ctrl-C are obeyed at once
    for i in range(kills):
        missing = sorted(set(aims) - set(hit)) if 2 * i >= kills else []
        aim, twice, seen = (missing or aims[i % len(aims):])[0], not rude and i % 5 == 4, ''
        pid = server.start(name, **settings, resume=True)
        assert server.until('l') == 'l'
        assert aim == 'l' or server.until(aim, 1 + chance.randint(0, 1)) == aim, 'the run is long enough'
        if not missing: time.sleep(chance.random() * AIMS[aim])
        while not rude and (now := server.phase(0)): seen += now
        for _ in range(1 + twice): os.kill(pid, number)
        code, said, rest = server.end(pid, name)
        hit[(aim + seen + rest * rude)[-1]] += 1
        if rude: assert code == -number, said
        elif twice: assert code in (130, -number), said  # the second is obeyed at once, if the first was heard before it came
        else:
            last = read_log(folder / 'log.jsonl')[-1]['step']
            assert code == 130 and f'step {last} is saved in {name}' in said and 'with --resume' in said and checkpoints(folder)[-1].name == f'checkpoint-{last}'
            told = said
    assert set(aims) <= set(hit), f'every phase was hit: {hit}'
    for _ in range(3 * rude):  # and while the final model is written
        left = (settings['max_steps'] - int(checkpoints(folder)[-1].name.split('-')[1])) // 2
        pid = server.start(name, **settings, resume=True)
        server.until('l'), left and server.until('w', left), server.until('o')
        time.sleep(chance.random() * 0.01)
        os.kill(pid, number)
        hit['f'] += server.end(pid, name)[0] == -number
    assert server.run(name, **settings, resume=True)[0] == 0 and same_end(folder, whole)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir()), 'nothing is left of what was not finished'
    where = ', '.join(f'{n} while {PHASES[p]}' for p, n in sorted(hit.items()))
    nothing = dict(sees='the process is gone', lost='the steps since the last checkpoint, which are made again to the bit') if rude else dict(
        sees=re.sub(r'step \d+', 'step N', told.replace(name, 'OUT')), lost='nothing: the step under way is finished and saved; a second signal is obeyed at once')
    fault_row('stops', {'SIGKILL': 'SIGKILL', 'SIGTERM': 'SIGTERM', 'SIGINT': 'Ctrl-C'}[name] + f' ({where})', sum(hit.values()), sum(hit.values()), **nothing,
              remedy='the same command with --resume', hits={PHASES[p]: n for p, n in hit.items()}, rows=rows(whole), rows_lost=rows(whole) - rows(folder))


def test_a_process_started_by_another_obeys_sigterm_at_once(tmp_path, fault_row):
    "Pools end their processes with SIGTERM and wait for their end; one that lived on would be waited for for ever."
    script = f'''
import multiprocessing, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
def work(folder):
    from runs import new
    new(folder, max_steps=10**6).train()
if __name__ == '__main__':
    p = multiprocessing.get_context('fork').Process(target=work, args=({str(tmp_path / 'out')!r},))
    import runs
    from rvpo_nb import trainer
    p.start()
    while p.is_alive() and not runs.Path({str(tmp_path / 'out/checkpoint-2')!r}).exists(): time.sleep(0.05)
    p.terminate()
    p.join(60)
    sys.exit(p.exitcode != -15)'''
    assert subprocess.run([sys.executable, '-c', script], capture_output=True).returncode == 0
    assert new(tmp_path / 'out', max_steps=10**6).start(True) >= 2
    fault_row('stops', 'SIGTERM to a worker of a pool, as rvpo compare has', 1, 1, 'the process is gone', 'the steps since the last checkpoint', 'the same call goes on')


# --- two at once

def test_two_runs_on_one_folder(server, fault_row):
    settings = PLAIN | dict(max_steps=10**5, save_steps=10**5)
    pid = server.start('shared', **settings)
    server.until('a', 2)
    others = [server.run('shared', **settings, resume=True) for _ in range(3)]
    for code, said in others: assert code == 2 and re.search(rf'shared is in use by another run \(process {pid} on .*\): wait for it', said), said
    done = len(read_log(server.folder / 'shared/log.jsonl'))
    os.kill(pid, signal.SIGINT)
    assert server.end(pid, 'shared')[0] == 130 and len(read_log(server.folder / 'shared/log.jsonl')) >= done
    with alone(server.folder / 'shared'): pass
    fault_row('stops', 'two runs on one folder', len(others), len(others), re.sub(r'process \d+ on [^)]*', 'process N on HOST', others[0][1].replace('shared', 'OUT')), 'nothing: the first run goes on',
              'wait, or choose another folder; a network file system needs locks (NFS without nolock, Lustre with flock), and Windows has none: there the run warns that it is not protected')


def test_a_kill_leaves_no_lock_behind_nor_does_a_child(server, fault_row):
    orphan = '''
from rvpo_nb.trainer import GRPOTrainer
def call(self, event, **more):
    if event == 'on_train_begin' and not os.fork():
        time.sleep(20)
        os._exit(0)
GRPOTrainer.call = call
'''
    tried = 0
    for more in ('', orphan):
        settings = PLAIN | dict(max_steps=10**5)
        pid = server.start('orphaned', more, **settings, resume=True)
        server.until('a', 3)
        os.kill(pid, signal.SIGKILL)
        assert server.end(pid, 'orphaned')[0] == -signal.SIGKILL
        with alone(server.folder / 'orphaned'): tried += 1
    fault_row('stops', 'the lock of a killed run, and of one whose child lives on', tried, tried, 'nothing', 'nothing', 'nothing to do')


def test_where_locks_are_missing_the_run_says_so(tmp_path, monkeypatch, capsys, fault_row):
    import rvpo_nb.checkpoint as safe
    class NoLocks:
        LOCK_EX = LOCK_NB = 0
        def flock(*args): raise OSError(38, 'Function not implemented')
    for module in (None, NoLocks):
        monkeypatch.setattr(safe, 'fcntl', module)
        with alone(tmp_path), alone(tmp_path): pass
        said = capsys.readouterr().err
        assert said.count('cannot be locked') == 2 and 'no second run' in said
    fault_row('stops', 'a file system or a system without locks', 2, 2, clean(said.splitlines()[0], tmp_path), 'nothing, unless two runs do write there', 'see to it that no second run writes there')


# --- resumed as another run

CHANGES = dict(
    data=dict(rows=[dict(prompt='A cold.', points=['soup'] * 7)]), order_of_data=dict(rows=list(rubric_prompts(8))[::-1]), seed=dict(seed=7), k=dict(k=5.0), aggregation=dict(aggregation='gdpo'),
    n_effective=dict(n_effective=1.5), weights=dict(reward_weights=[1.0, 2.0]), fewer_rewards=dict(rewards=[rubric_rewards()[0]]), more_rewards=dict(rewards=rubric_rewards()),
    order_of_rewards=dict(rewards=[rubric_rewards()[-1], rubric_rewards()[0]]), setting_of_a_reward=dict(rewards=[rubric_rewards(terse_credit=0.9)[i] for i in (0, -1)]),
    group=dict(num_generations=8), length=dict(max_completion_length=8), steps=dict(max_steps=8), rate=dict(learning_rate=1e-2), loss=dict(loss_type='grpo'), beta=dict(beta=0.1),
    temperature=dict(temperature=0.5), precision=dict(bf16=True), guard=dict(guard=0.5))


def files(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != '.lock'}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished') / 'out'
    new(folder, max_steps=4).train()
    return folder


def test_a_resume_as_another_run_is_refused_and_changes_nothing(finished, tmp_path, fault_row, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, 'step', lambda *a: 1 / 0)  # nothing is computed
    before, said = files(finished), {}
    for name, changes in CHANGES.items():
        with pytest.raises(InputError, match='was made with (.*) = .*, not ') as e: new(finished, **dict(max_steps=4) | changes).train(True)
        said[name] = clean(str(e.value), finished)
    shutil.copytree(RUBRIC_POLICY, tmp_path / 'another')
    with pytest.raises(InputError, match=f"model = '{NAME}', not 'another'"): new(finished, max_steps=4, model=tmp_path / 'another').train(True)
    from peft import LoraConfig
    with pytest.raises(InputError, match='adapter: .* = None, not'): new(finished, max_steps=4, peft_config=LoraConfig(r=2, target_modules='all-linear', task_type='CAUSAL_LM')).train(True)
    assert files(finished) == before
    n = len(CHANGES) + 2
    fault_row('stops', f'resumed with another {", ".join(x.replace("_", " ") for x in CHANGES)}, model, adapter', n, n, said['k'], 'nothing: refused before the first step', 'resume with the settings of the run, or choose another folder')
    fault_row('stops', 'resumed with another number of rewards', 2, 2, said['fewer_rewards'], 'nothing: refused before the first step', 'resume with the rewards of the run, or choose another folder')


def test_another_model_of_the_same_name_is_no_reference_and_carries_no_adapter(tmp_path, fault_row):
    from peft import LoraConfig
    other, tokenizer = load_model(RUBRIC_POLICY)
    with torch.no_grad(): other.get_input_embeddings().weight[7] *= 1.01
    named = tmp_path / NAME
    other.save_pretrained(named), tokenizer.save_pretrained(named)
    for name, changes in dict(reference=dict(beta=0.1), adapter=dict(peft_config=LoraConfig(r=2, target_modules='all-linear', task_type='CAUSAL_LM'))).items():
        new(tmp_path / name, max_steps=2, **changes).train()
        with pytest.raises(InputError, match='was made with another model .*: the weights that are not trained differ') as e: new(tmp_path / name, max_steps=2, model=named, **changes).train(True)
        new(tmp_path / name, max_steps=2, **changes).train(True)
    made_of = [new(tmp_path / 'adapter', peft_config=LoraConfig(r=2, target_modules=names)).made_of['adapter']['target_modules'] for names in (['q_proj', 'v_proj'], ['v_proj', 'q_proj'])]
    assert made_of == [str(['q_proj', 'v_proj'])] * 2, 'a set has another order in every process'
    new(tmp_path / 'plain', max_steps=2).train()
    new(tmp_path / 'plain', max_steps=2, model=named).train(True)  # all weights come from the checkpoint
    fault_row('stops', 'resumed with another model of the same name, as a reference or under an adapter', 2, 2, clean(str(e.value), tmp_path / name), 'nothing: refused before the first step', 'resume with the model of the run')


@pytest.mark.long
def test_an_adapter_is_resumed_by_another_process(tmp_path, fault_row):
    "Sets have another order in every process: what is compared must not hang on it."
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rubric_prompts(8))))
    (tmp_path / 'both.py').write_text('from rvpo_nb.task import rubric_rewards\nboth = rubric_rewards()[:2]\n')
    command = [Path(sys.executable).with_name('rvpo'), 'train', '--model', RUBRIC_POLICY, '--data', 'rows.jsonl', '--rewards', 'both:both', '--output', 'out', '--max-steps', '2', '--lora-r', '2',
               '--num-generations', '4', '--max-completion-length', '8', '--save-steps', '1', '--resume']
    for seed in '123':
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(PYTHONHASHSEED=seed), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / 'out/checkpoint-2')
    fault_row('stops', 'an adapter resumed by another process', 2, 2, 'nothing', 'nothing', 'nothing to do')


def edit_state(folder, change):
    "Change a checkpoint's state as another version would have written it."
    for c in checkpoints(folder):
        state = json.loads((c / 'trainer_state.json').read_text())
        change(state)
        (c / 'trainer_state.json').write_text(json.dumps(state))
        (c / 'SHA256SUMS').unlink()
        write_sums(c)


def test_other_versions_of_the_code(tmp_path, capsys, fault_row):
    new(tmp_path / 'out', max_steps=1).train()
    def older(state):
        del state['setup']['reward_weights_lr'], state['frozen'], state['versions']
        assert 'guard' not in state
    edit_state(tmp_path / 'out', older)
    assert new(tmp_path / 'out', max_steps=1).train(True).global_step == 1, 'a setting that is newer than the checkpoint had its default'
    with pytest.raises(InputError, match='made with reward_weights_lr = 5.0, not 1.0'): new(tmp_path / 'out', max_steps=1, reward_weights_lr=1.0).train(True)
    (tmp_path / 'out/checkpoint-1/SHA256SUMS').unlink()
    assert new(tmp_path / 'out', max_steps=1).train(True).global_step == 1, 'from before there were checksums'
    new(tmp_path / 'new', max_steps=1).train()
    edit_state(tmp_path / 'new', lambda state: state['versions'].update(torch='3.1.4'))
    capsys.readouterr()
    assert new(tmp_path / 'new', max_steps=1).train(True).global_step == 1
    said = clean(next(line for line in capsys.readouterr().err.splitlines() if 'torch' in line), tmp_path / 'new')
    assert f'OUT/checkpoint-1 was made with torch 3.1.4, not {torch.__version__.split("+")[0]}' in said
    edit_state(tmp_path / 'new', lambda state: state['setup'].update(telepathy=0.5))
    with pytest.raises(InputError, match='was made with telepathy = 0.5, which this version does not have') as e: new(tmp_path / 'new', max_steps=1).train(True)
    fault_row('stops', 'resumed with other versions of the libraries', 1, 1, said, 'nothing; the last digits may differ from there on', 'pin the versions where runs must repeat to the bit')
    fault_row('stops', 'resumed with a version that lacks a setting of the run, or has new ones', 4, 4, clean(str(e.value), tmp_path / 'new'), 'nothing: refused, or the new setting has its default', 'go on with the version that made it')


# --- the clock

def test_clock_jumps_change_nothing(server, fault_row):
    jumps = '''
import random, time
real, rng, shift = time.time, random.Random(1), [0.0]
def jumping():
    shift[0] += rng.choice([-10**6, -3600, 0, 3600, 10**6])
    return real() + shift[0]
time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)
'''
    settings = STATE | dict(max_steps=12)
    assert server.run('steady', **settings)[0] == 0
    pid = server.start('jumping', jumps, **settings)
    server.until('w', 3)
    os.kill(pid, signal.SIGKILL)
    assert server.end(pid, 'jumping')[0] == -signal.SIGKILL
    for p in (server.folder / 'jumping').rglob('*'): os.utime(p, (0, 0) if 'checkpoint' in p.name else (4e9, 4e9))  # the newest checkpoint has the oldest date
    assert server.run('jumping', jumps, **settings, resume=True)[0] == 0
    assert same_end(server.folder / 'jumping', server.folder / 'steady')
    log = read_log(server.folder / 'jumping/log.jsonl')
    assert all(0 < x['time/step'] < 600 for x in log), 'durations are those of a clock that nobody sets'
    fault_row('stops', 'clock jumps of hours and days at every look at it, and files dated 1970 and 2096', 2, 2, 'nothing', 'nothing: no result and no duration depends on the time of day', 'nothing to do')


# --- other world sizes on TRL's engine

WORKER = '''
import json, os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import trl_worker
from trl_worker import *
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == int(sys.argv[2])
out, size = Path(sys.argv[1]), int(sys.argv[4]) // int(os.environ.get('WORLD_SIZE', 1))
config = GRPOConfig(output_dir=str(out), num_generations=4, per_device_train_batch_size=size, max_completion_length=8, max_steps=4, learning_rate=1e-3, bf16=False, k=0.5, k_end=2.0,
                    gradient_checkpointing=False, use_cpu=True, logging_steps=1, save_strategy='steps', save_steps=2, disable_tqdm=True, report_to='none')
trainer = GRPOTrainer(str(RUBRIC_POLICY), [make_reward(j) for j in range(3)], config, train_dataset=Dataset.from_dict(dict(prompt=PROMPTS * 2)), processing_class=tokenizer,
                      rollout_func=rollouts, callbacks=[Stop()])
trl_worker.trainer = trainer
trainer.train(resume_from_checkpoint=sys.argv[3] == 'resume' or None)
if trainer.accelerator.is_main_process: (out / 'log.json').write_text(json.dumps(trainer.state.log_history))
'''


@pytest.mark.long
def test_the_trl_adapter_resumes_with_another_world_size(tmp_path, fault_row):
    pytest.importorskip('trl', reason='TRL is the extra trl')
    script = tmp_path / 'worker.py'
    script.write_text(WORKER.format(tests=str(Path(__file__).parents[1])))
    def go(processes, name, stop, resume, rollouts=12):
        command = [sys.executable, '-m', 'accelerate.commands.launch', *['--multi_gpu'] * (processes > 1), '--num_processes', str(processes), '--main_process_port', '0',
                   str(script), str(tmp_path / name), str(stop), resume, str(rollouts)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1', TRL_EXPERIMENTAL_SILENCE='1'), timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return [x for x in json.loads((tmp_path / name / 'log.json').read_text()) if 'k' in x], done.stderr
    straight, _ = go(2, 'straight', 99, 'anew')
    go(2, 'cut', 2, 'anew')
    shutil.copytree(tmp_path / 'cut', tmp_path / 'halved')
    resumed, said = go(1, 'cut', 99, 'resume')
    assert [x['k'] for x in resumed] == [x['k'] for x in straight] == [0.5, 1.0, 1.5, 2.0]
    same = [key for key in straight[3] if key.startswith('reward') or key in ('n_effective', 'dead_groups')]
    assert len(same) > 20
    for x, y in zip(resumed, straight): assert all(x[key] == pytest.approx(y[key], abs=1e-5) for key in same), 'with as many rollouts per step one process goes on with the batches of two'
    halved, warned = go(1, 'halved', 99, 'resume', 8)
    assert any(abs(x[key] - y[key]) > 1e-3 for x, y in zip(halved[2:], straight[2:]) for key in same), 'with fewer it is another run'
    lines = (said + warned).splitlines()
    sees = next((' '.join(lines[i:i + 2]) for i, line in enumerate(lines) if 'do not match' in line), 'nothing')
    fault_row('stops', 'the TRL adapter resumed with 1 process after 2', 2, 1, sees, "nothing where per_device_train_batch_size grows as the processes get fewer; else TRL warns and goes on with smaller batches, which is another run. "
              "TRL's own sampler draws other completions in any case", 'keep processes x per_device_train_batch_size x gradient_accumulation_steps as it was')

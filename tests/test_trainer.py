"""The trainer's promises that no chapter shows: missing rewards, chats, gradients, kills at any step."""
import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import TrainerCallback

from rvpo_nb.loss import completion_logps
from rvpo_nb.reward import call_rewards
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
from rvpo_nb.trainer import GRPOConfig, GRPOTrainer, checkpoints, load_model, read_log

SETTINGS = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, max_steps=2, disable_tqdm=True)


def sometimes(completions, trainer_state=None, **columns): return [1.0 if i % 3 == 0 else None for i in range(len(completions))]
def never(completions, **columns): return [None] * len(completions)
def words(completions, **columns): return [len(c.split()) for c in completions]


def new(tmp_path, rewards, rows=None, **changes):
    return GRPOTrainer(RUBRIC_POLICY, rewards, GRPOConfig(output_dir=str(tmp_path / 'out'), **SETTINGS | changes), train_dataset=rows or rubric_prompts(8))


def test_missing_rewards_are_logged_as_missing_and_break_nothing(tmp_path):
    log = new(tmp_path, [words, sometimes, never]).train().log_history
    assert all(math.isfinite(x['loss']) and x['grad_norm'] > 0 for x in log)
    line = read_log(tmp_path / 'out' / 'log.jsonl')[0]
    assert line['reward/sometimes/mean'] == 1.0 and line['reward/never/mean'] is None and line['reward/words/mean'] > 1


def test_no_applicable_reward_leaves_the_weights_alone(tmp_path):
    trainer = new(tmp_path, [never])
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))


def test_gradient_accumulation_equals_the_large_batch(tmp_path):
    weights = []
    for name, size in (('whole', 16), ('parts', 4)):
        t = new(tmp_path / name, [words, rubric_rewards()[-1]], per_device_train_batch_size=size, gradient_accumulation_steps=16 // size)
        t.train()
        weights.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-5


def test_a_reward_is_learned(tmp_path):
    log = new(tmp_path, [words], max_steps=30, num_generations=8, per_device_train_batch_size=64).train().log_history
    first, last = (sum(x['reward/words/mean'] for x in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 1


def test_the_log_prob_of_a_sample_is_that_of_the_model(tmp_path):
    t = new(tmp_path, [words])
    r = t.sample([0, 1, 2], 0, 4, 16)
    with torch.no_grad(): logps, _ = completion_logps(t.model, r)
    assert ((logps - r.logps).abs() * r.completion_mask).max() < 1e-4


def test_chat_prompts_arrive_as_chats(tmp_path):
    seen = []
    def spy(prompts, completions, **columns):
        seen.append((prompts[0], completions[0]))
        return [1.0] * len(prompts)
    model, tokenizer = load_model(RUBRIC_POLICY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [dict(prompt=[dict(role='user', content='A cold. Advise on: rest soup')])]
    GRPOTrainer(model, [spy], GRPOConfig(output_dir=str(tmp_path), **SETTINGS | dict(max_steps=1)), train_dataset=rows, processing_class=tokenizer).train()
    prompt, completion = seen[-1]
    assert prompt == rows[0]['prompt'] and completion[0]['role'] == 'assistant' and isinstance(completion[0]['content'], str)


def test_rows_that_cannot_work_are_named(tmp_path):
    for row, words_ in ((dict(prompt=''), 'row 1'), (dict(prompt=3), 'row 1'), (dict(prompt='soup ' * 200), 'row 1: the prompt has 200 tokens')):
        with pytest.raises(InputError, match=words_): new(tmp_path, [words], rows=[dict(prompt='A cold.'), row])
    with pytest.raises(InputError, match="two rewards are called 'words'"): new(tmp_path, [words, words])
    with pytest.raises(InputError, match='weight'): new(tmp_path, [words], reward_weights=[-1.0])


def test_async_rewards_share_a_table_and_keep_their_lock_from_call_to_call():
    import asyncio
    lock = asyncio.Semaphore(1)
    async def slow(completions, **columns):
        async with lock: await asyncio.sleep(0.001)
        return [2.0] * len(completions)
    async def other(completions, **columns): return await slow(completions)
    for _ in range(2): assert call_rewards([slow, other, words], ['p'], ['a b c']).tolist() == [[2.0, 2.0, 3.0]]


def test_rewards_may_return_arrays_and_tensors():
    import numpy as np
    as_array = lambda completions, **columns: np.array([True])
    as_scalars = lambda completions, **columns: [torch.tensor(2.5)]
    as_numpy = lambda completions, **columns: [np.float32(0.5)]
    assert call_rewards([as_array, as_scalars, as_numpy], ['p'], ['c']).tolist() == [[1.0, 2.5, 0.5]]


def test_a_log_line_that_a_crash_cut_off_does_not_stop_a_resume(tmp_path):
    new(tmp_path, [words], save_steps=1).train()
    log = tmp_path / 'out' / 'log.jsonl'
    log.write_text(log.read_text()[:-40])
    state = new(tmp_path, [words], save_steps=1).train(resume_from_checkpoint=True)
    assert state.global_step == 2 and read_log(log) == state.log_history


def test_a_stop_asked_for_by_a_callback_leaves_a_checkpoint(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 3
    trainer = new(tmp_path, [words], max_steps=8)
    trainer.callbacks = [Stop()]
    assert trainer.train().global_step == 3 and [c.name for c in checkpoints(tmp_path / 'out')] == ['checkpoint-3']
    assert new(tmp_path, [words], max_steps=8).train(resume_from_checkpoint=True).global_step == 8


def test_a_resume_on_other_data_or_rewards_is_refused(tmp_path):
    new(tmp_path, [rubric_rewards()[0]]).train()
    for changes in (dict(rows=[dict(prompt='A cold.', points=['soup'] * 7)]), dict(rewards=[rubric_rewards(terse_credit=0.9)[0]])):
        with pytest.raises(InputError, match='was made with'):
            new(tmp_path, **dict(rewards=[rubric_rewards()[0]]) | changes).train(resume_from_checkpoint=True)


def test_columns_that_some_rows_lack_are_none_everywhere(tmp_path):
    seen = []
    def spy(completions, completion_ids, hint, **columns):
        seen.extend(hint)
        assert [len(i) for i in completion_ids] and len(completion_ids) == len(completions)
        return [1.0] * len(completions)
    new(tmp_path, [spy], rows=[dict(prompt='A cold.'), dict(prompt='A cold.', hint='soup')], max_steps=3).train()
    assert set(seen) == {None, 'soup'}


def test_dropout_does_not_make_a_run_depend_on_the_global_generator(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    weights = []
    for i in range(2):
        torch.manual_seed(0)
        tokenizer = load_model(RUBRIC_POLICY)[1]
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
        torch.manual_seed(i)
        GRPOTrainer(model, [words], GRPOConfig(output_dir=str(tmp_path / str(i)), **SETTINGS), train_dataset=rubric_prompts(8), processing_class=tokenizer).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


RUN = '''
import sys
sys.path.insert(0, {tests!r})
from test_trainer import *
from pathlib import Path
torch.set_num_threads(1)
new(Path(sys.argv[1]), [rubric_rewards()[0], rubric_rewards()[-1]], max_steps=40, save_steps=2, lr_scheduler_type='linear', k_end=4.0).train(resume_from_checkpoint=True)
'''


def test_a_killed_run_resumes_to_the_same_weights_and_log(tmp_path):
    from pathlib import Path
    script = tmp_path / 'run.py'
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    start = lambda name: subprocess.Popen([sys.executable, script, tmp_path / name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / 'killed' / 'out' / 'log.jsonl'
    for lines in (1, 9, 20):
        p = start('killed')
        while not (log.exists() and len(log.read_text().splitlines()) >= lines) and p.poll() is None: time.sleep(0.002)
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL and len(log.read_text().splitlines()) < 40, 'the run was killed while it ran'
    for name in ('killed', 'whole'):
        p = start(name)
        assert p.wait(timeout=200) == 0, p.stderr.read()
    outs = [tmp_path / name / 'out' for name in ('killed', 'whole')]
    assert outs[0].joinpath('model.safetensors').read_bytes() == outs[1].joinpath('model.safetensors').read_bytes()
    logs = [[{k: v for k, v in x.items() if not k.startswith('time/')} for x in read_log(out / 'log.jsonl')] for out in outs]
    assert json.dumps(logs[0]) == json.dumps(logs[1]) and len(logs[0]) == 40

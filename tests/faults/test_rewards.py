"""Reward functions that raise, hang, lie about their length, return what is no number, and change what they were handed."""
import asyncio
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from rvpo_nb.cli import main
from rvpo_nb.checkpoint import checkpoints
from rvpo_nb.record import read_log
from rvpo_nb.reward import call_rewards, reward_name
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts
from rvpo_nb.trainer import GRPOConfig, GRPOTrainer, RunFailed

SETTINGS = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, max_steps=4, save_steps=100, disable_tqdm=True)


def words(completions, **columns): return [float(len(c.split())) for c in completions]


def new(out, rewards, rows=None, **changes):
    return GRPOTrainer(RUBRIC_POLICY, rewards, GRPOConfig(output_dir=str(out), **SETTINGS | changes), train_dataset=rows or rubric_prompts(8))


def rvpo(home, rewards, out, **changes):
    "Run `rvpo train` in a folder with a module `my` of rewards; returns the exit code."
    if not (home / 'data.jsonl').exists(): (home / 'data.jsonl').write_text('\n'.join(json.dumps(r) for r in rubric_prompts(8)))
    flags = dict(model=RUBRIC_POLICY, data='data.jsonl', rewards=rewards, output=out, **{k: v for k, v in SETTINGS.items() if k != 'disable_tqdm'}) | changes
    return main(['train', '--disable-tqdm', *(str(x) for f, v in flags.items() for x in ((f"--{f.replace('_', '-')}", v) if v is not True else (f"--{f.replace('_', '-')}",)))])


def said(f, *rows, **more):
    "Call a reward on three rows; return its values, or the sentence."
    f.__name__ = 'f'
    try: return call_rewards([f], ['p'] * 3, ['a', 'b', 'c'], *rows, **more)[:, 0].tolist()
    except InputError as e: return str(e)


GOOD = [(1, 1), (True, 1), (np.float32(0.5), 0.5), (np.int64(2), 2), (np.bool_(True), 1), (Fraction(1, 2), 0.5), (None, math.nan), (math.nan, math.nan), (np.float64('nan'), math.nan)]
GOOD_TENSORS = [torch.tensor(2.5), torch.tensor(True), torch.tensor(2.0, requires_grad=True), torch.tensor(2.0, dtype=torch.bfloat16), np.array(2.0), np.array(None)]
BAD = [math.inf, -math.inf, np.float32('inf'), torch.tensor(math.inf), 1e39, 10 ** 400, '1.0', '', b'1', np.str_('1'), 1j, np.complex64(1j), torch.tensor(1j), [1.0], (1.0,), {1.0},
       {'a': 1.0}, np.array([1.0]), torch.ones(1), Decimal('1'), pd.NA, np.datetime64('2020'), (x for x in [1.0]), words, Ellipsis, object()]


def test_values_that_are_no_rewards_are_named(fault_row):
    for v, want in GOOD: assert said(lambda v=v, **_: [1.0, v, 2.0]) == pytest.approx([1, want, 2], nan_ok=True), v
    for v in GOOD_TENSORS: assert said(lambda v=v, **_: [1.0, v, 2.0])[::2] == [1, 2], v
    messages = [said(lambda v=v, **_: [1.0, v, 2.0]) for v in BAD]
    assert all(isinstance(m, str) and m.startswith("reward 'f', row 1: ") and len(m) < 250 for m in messages), messages
    tried = len(GOOD) + len(GOOD_TENSORS) + len(BAD)
    fault_row('rewards', 'A reward returns infinity, text, a complex number, a list, an object in place of a number', len(BAD), len(messages), messages[0],
              'Nothing: it is found on two samples before the first step, or in the step in which it first happens.', 'Return a number, or None where the reward does not apply.', good=tried - len(BAD))


WHOLE = [lambda **_: None, lambda **_: 1.0, lambda **_: np.float64(1), lambda **_: '123', lambda **_: b'123', lambda **_: {1, 2, 3}, lambda **_: dict(a=1, b=2, c=3), lambda **_: range(3),
         lambda **_: (1.0 for _ in range(3)), lambda **_: map(float, [1, 2, 3]), lambda **_: [], lambda **_: [1.0], lambda **_: [1.0] * 4, lambda **_: np.ones((3, 1)), lambda **_: torch.ones(3, 1),
         lambda **_: torch.ones(1, 3), lambda **_: [[1.0, 2.0, 3.0]]]


def test_what_is_no_list_of_the_right_length_is_named(fault_row):
    async def later(**_): yield 1.0
    messages = [said(f) for f in (*WHOLE, later)]
    assert all(isinstance(m, str) and "reward 'f'" in m and ('must return a list' in m or 'values for 3 completions' in m or 'row 0' in m) for m in messages), messages
    for f in (lambda **_: np.ones(3), lambda **_: torch.ones(3, requires_grad=True), lambda **_: pd.Series([1.0] * 3, index=[5, 6, 7]), lambda **_: (1, 1, 1)): assert said(f) == [1, 1, 1]
    fault_row('rewards', 'A reward returns None, a generator, a table, a list of another length', len(messages), len(messages), messages[11],
              'Nothing: it is found before the first step.', 'Return a list with one number, or None, per completion.')


RAISED = [KeyError('answer'), ValueError(''), ValueError('two\nlines'), RecursionError('too deep'), MemoryError(), AssertionError(), SystemExit(0), SystemExit(3), GeneratorExit(), StopIteration(),
          asyncio.CancelledError(), TimeoutError('server'), ExceptionGroup('g', [ValueError('a')]), OSError(28, 'No space left'), UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad'), BaseException('base')]


@pytest.mark.parametrize('kind', ['sync', 'async'])
def test_what_a_reward_raises_is_named_with_its_row_and_kept(kind, fault_row):
    def fails(e):
        def f(completions, **_):
            if 'b' in completions: raise e
            return [1.0] * len(completions)
        async def g(completions, **_): return f(completions)
        f.__name__ = g.__name__ = 'picky'
        return f if kind == 'sync' else g
    tried, first = 0, ''
    for e in RAISED:
        if kind == 'async' and isinstance(e, StopIteration): continue  # Python itself turns it into a RuntimeError
        with pytest.raises(InputError) as told: call_rewards([words, fails(e)], ['p'] * 3, ['a', 'b', 'c'])
        assert str(told.value).startswith(f"reward 'picky' raised {type(e).__name__}") and '\n' not in str(told.value) and told.value.__cause__ is e
        if kind == 'sync' and type(e) is not StopIteration: assert "; it raises on row 1 alone: 'b'" in str(told.value), told.value
        tried, first = tried + 1, first or str(told.value)
    with pytest.raises(KeyboardInterrupt): call_rewards([fails(KeyboardInterrupt())] if kind == 'sync' else [lambda **_: (_ for _ in ()).throw(KeyboardInterrupt())], ['p'], ['b'])
    assert call_rewards([words, fails(KeyError())], ['p'], ['a a']).tolist() == [[2, 1]], 'the loop goes on'
    fault_row('rewards', f'A reward raises ({"async def" if kind == "async" else "def"}), also SystemExit and CancelledError', tried, tried, first,
              'Nothing: the step before is saved as a checkpoint.', 'Mend the function and go on with --resume.')


def alarm_is_off(): return signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_reward_that_hangs_is_stopped(fault_row):
    def sleeps(**_): time.sleep(600)
    def spins(**_):
        while True: pass
    def backtracks(**_): return [float(bool(re.match('(a+)+b', 'a' * 40)))]
    def retries(**_):
        while True:
            try: time.sleep(600)
            except Exception: pass
    def stubborn(**_):
        for _ in range(2):
            try: time.sleep(600)
            except: pass
        return [1.0]
    def locked(**_): threading.Lock().acquire() and threading.Event().wait()
    def child(**_): subprocess.run(['sleep', '600'])
    async def deaf(**_): await asyncio.sleep(600)
    async def immune(**_):
        while True:
            try: await asyncio.sleep(600)
            except asyncio.CancelledError: pass
    async def blocks(**_): time.sleep(20)
    hanging = [sleeps, spins, backtracks, retries, stubborn, locked, child, deaf, immune, blocks]
    stopped, first = 0, ''
    for f in hanging:
        begin = time.monotonic()
        with pytest.raises(InputError) as told: call_rewards([words, f], ['p'], ['a a'], 0.2)
        assert f'reward {reward_name(f)!r} ' in str(told.value) and 'took longer than reward_timeout = 0.2 seconds' in str(told.value), told.value
        assert time.monotonic() - begin < 15 and alarm_is_off()
        stopped, first = stopped + 1, first or str(told.value)
    async def quick(completions, **_): return [3.0] * len(completions)
    assert call_rewards([words, quick], ['p'], ['a a'], 0.5).tolist() == [[2, 3]], 'the loop that was blocked is left behind'
    told = []
    def elsewhere():
        try: call_rewards([words], ['p'], ['a'], 1.0)
        except InputError as e: told.append(str(e))
    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert 'reward_timeout needs the main thread' in told[0]
    fault_row('rewards', 'A reward hangs (sleep, endless loop, backtracking pattern, lock, child process; def and async def)', len(hanging), stopped,
              first,
              'Nothing: the step before is saved. Without reward_timeout the run waits for ever.', 'Set reward_timeout. A single call into compiled code that never returns cannot be stopped by it: give such a call a limit of its own, or a process of its own.')


def test_a_process_with_a_reward_that_hangs_ends(tmp_path, fault_row):
    (tmp_path / 'my.py').write_text('''
import asyncio, time
def sync(completions, trainer_state, **_):
    if trainer_state.global_step == 2: time.sleep(600)
    return [float(len(c)) for c in completions]
async def blocks(completions, trainer_state, **_):
    if trainer_state.global_step == 2: time.sleep(600)
    return [float(len(c)) for c in completions]
''')
    (tmp_path / 'data.jsonl').write_text('\n'.join(json.dumps(r) for r in rubric_prompts(8)))
    code = '''import sys
from rvpo_nb.cli import main
print([main(['train', '--disable-tqdm', '--rewards', f'my:{f}', '--output', f, *sys.argv[1:]]) for f in ('sync', 'blocks')])'''
    flags = ['--model', str(RUBRIC_POLICY), '--data', 'data.jsonl', '--max-steps', '4', '--num-generations', '4', '--max-completion-length', '8', '--reward-timeout', '1']
    done = subprocess.run([sys.executable, '-c', code, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith('rvpo:')]
    assert done.returncode == 0 and done.stdout.strip() == '[1, 1]', done.stderr
    for name, line in zip(('sync', 'blocks'), told):
        assert line == f"rvpo: step 3: reward '{name}' took longer than reward_timeout = 1 seconds; a resumed run goes on from checkpoint-2"
        assert [x['step'] for x in read_log(tmp_path / name / 'log.jsonl')] == [1, 2] and [c.name for c in checkpoints(tmp_path / name)] == ['checkpoint-2']
    fault_row('rewards', '`rvpo train` with a reward that hangs in step 3', 2, 2, told[0], 'Nothing: the process ends by itself, and step 2 is saved.', 'Mend the function and go on with --resume.')


def turn(kind):
    "Make a reward that is a word count for three steps and then turns bad."
    def f(completions, trainer_state=None, **_):
        values, step = [float(len(c.split())) for c in completions], trainer_state.global_step
        return values if step != 3 or turn.mended else dict(
            raises=lambda: [][0], exits=lambda: sys.exit(0), inf=lambda: [math.inf] * len(values), text=lambda: ['good'] * len(values), longer=lambda: values * 2, shorter=lambda: values[1:], none=lambda: None)[kind]()
    f.__name__ = 'turns'
    return f


@pytest.mark.parametrize('way', ['GRPOTrainer', 'rvpo train'])
def test_a_reward_that_turns_bad_costs_no_step(tmp_path, monkeypatch, capsys, fault_row, way):
    monkeypatch.chdir(tmp_path)
    kinds = 'raises exits inf text longer shorter none'.split()
    def run(kind, resume=False):
        if way == 'GRPOTrainer':
            try: return bool(new(tmp_path / kind, [turn(kind)], dynamic_sampling=1, guard=None).train(resume_from_checkpoint=resume)) and ''
            except RunFailed as e: return f'rvpo: {e}'
        module = type(sys)('my')
        module.turns = turn(kind)
        monkeypatch.setitem(sys.modules, 'my', module)
        code = rvpo(tmp_path, 'my:turns', kind, dynamic_sampling=1, **dict(resume=True) if resume else {})
        err = capsys.readouterr().err.strip().splitlines()
        assert code == (1 if err else 0)
        return '\n'.join(x for x in err if x.startswith('rvpo: '))
    turn.mended = True
    assert run('whole') == ''
    for kind in kinds:
        turn.mended = False
        told = run(kind)
        assert told.startswith("rvpo: step 4: reward 'turns'") and told.endswith('; a resumed run goes on from checkpoint-3'), told
        turn.mended = True
        assert run(kind, resume=True) == ''
        assert (tmp_path / kind / 'model.safetensors').read_bytes() == (tmp_path / 'whole' / 'model.safetensors').read_bytes()
        first = told if kind == 'raises' else first
    fault_row('rewards', f'A reward turns bad in step 4 ({way}): raises, exits, infinity, text, longer, shorter, None', len(kinds), len(kinds), first,
              'Nothing: the resumed run ends with the weights of one that never failed, bit for bit.', 'Mend the function and go on with --resume.')


def test_what_a_reward_does_to_its_lists_stays_with_it(tmp_path, fault_row):
    rows = [dict(prompt=[dict(role='user', content='A cold. Advise on: rest soup')], points=['rest', 'soup'], rubric=[dict(text='x', points=1)]) for _ in range(4)]
    from rvpo_nb.inputs import load_model
    model, tokenizer = load_model(RUBRIC_POLICY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    def vandal(prompts, completions, completion_ids, points, rubric, **_):
        n = len(prompts)
        for p, c, ids, x, y in zip(prompts, completions, completion_ids, points, rubric):
            p[0]['content'], c[0]['content'] = 'gone', 'gone'
            p.append('gone'), x.reverse(), x.pop(), y[0].clear(), ids.clear()
        prompts.clear(), completions.sort(key=id), points.clear(), rubric.append(None)
        return [1.0] * n
    seen = []
    def witness(prompts, completions, completion_ids, points, rubric, **_):
        seen.append((prompts[0], [c[0]['content'] for c in completions], completion_ids, points[0], rubric[0]))
        return [float(len(c[0]['content'].split())) for c in completions]
    runs = {}
    for name, rewards in (('alone', [witness]), ('after', [vandal, witness])):
        tokenizer_rows = json.loads(json.dumps(rows))
        args = GRPOConfig(output_dir=str(tmp_path / name), reward_weights=[0.0, 1.0][-len(rewards):], **SETTINGS)
        fresh = load_model(RUBRIC_POLICY)[0]
        GRPOTrainer(fresh, rewards, args, train_dataset=tokenizer_rows, processing_class=tokenizer).train()
        runs[name], seen = (seen, tokenizer_rows, torch.cat([p.flatten() for p in fresh.parameters()])), []
    assert runs['alone'][0] == runs['after'][0] and runs['after'][1] == rows and torch.equal(runs['alone'][2], runs['after'][2])
    fault_row('rewards', 'A reward sorts, empties and rewrites the lists and messages that it was handed', 10, 10, '(nothing: every function gets copies of its own)',
              'Nothing: data, other rewards and weights are as without it.', 'None is needed. Tensors and arrays in a column are shared, not copied: do not change them in place.')


def test_a_reward_that_prints_a_lot_only_prints(tmp_path, monkeypatch, capfd, fault_row):
    def loud(completions, **_):
        for _ in range(20): print('x' * 50_000), print('y' * 50_000, file=sys.stderr)
        return [float(len(c)) for c in completions]
    log = new(tmp_path / 'loud', [loud]).train().log_history
    out, err = capfd.readouterr()
    assert len(out) > 4_000_000 < len(err) and len(list(log)) == 4 == len(read_log(tmp_path / 'loud' / 'log.jsonl'))
    def piped(completions, **_): raise BrokenPipeError(32, 'Broken pipe')
    with pytest.raises(InputError, match="reward 'piped' raised BrokenPipeError"): new(tmp_path / 'piped', [piped]).train()
    fault_row('rewards', 'A reward prints megabytes in every step', 4, 4, '(its own output)', 'Nothing.', 'Redirect the output, or print less.')


def test_one_reward_for_a_hundred_steps_moves_no_weight(tmp_path, capsys, fault_row):
    def flat(completions, **_): return [0.7] * len(completions)
    flat.bounds = (0, 1)
    t = new(tmp_path / 'flat', [flat], max_steps=100)
    start = [p.detach().clone() for p in t.model.parameters()]
    log = list(t.train().log_history)
    assert all(torch.equal(p, q) for p, q in zip(start, t.model.parameters())) and all(x['grad_norm'] == 0 and x['loss'] == 0 and x['dead_groups'] == 1 for x in log)
    told = capsys.readouterr().err.strip().splitlines()
    assert told == ['10 steps in a row, the last of them step 10: no reward differs within any group, and nothing is learned']
    settings = dict(max_steps=20, weight_decay=0.1, beta=0.1, lr_scheduler_type='constant')
    t = new(tmp_path / 'decay', [flat], **settings)
    t.train()
    for p, q in zip(start, t.model.parameters()):
        # decay alone, then the penalty's pull back: no more than the decay itself moves
        assert ((q - p).abs() <= (1 - (1 - 1e-3 * 0.1) ** 20) * p.abs() + 20 * 1.01e-3).all()
    t = new(tmp_path / 'pure', [flat], **settings | dict(beta=0.0))
    t.train()
    assert all(torch.allclose(q, p * (1 - 1e-3 * 0.1) ** 20, rtol=1e-5, atol=1e-12) for p, q in zip(start, t.model.parameters()))
    fault_row('rewards', 'Every reward is the same for 100 steps', 100, 100, told[0], 'Nothing: the weights stay as they are, bit for bit, but for weight decay and the KL penalty.',
              'Choose rewards that differ between answers, or prompts that are neither too easy nor too hard.')

"""A small run that keeps every kind of state, a server that forks such runs cheaply and says what they are doing, and what must be equal in the end.

Imports cost seconds and a run of some steps tenths of one, so one process imports everything, makes one run to have the rest loaded, and
forks a child per run, which calls `rvpo train` as a user does. A child writes a letter to a pipe whenever it begins or goes back to a phase.
"""
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from rvpo_nb.record import read_log

PHASES = dict(l='loading', s='sampling', r='rewarding', a='learning', w='saving', o='between', f='writing the final model')
METHODS = dict(start='l', sample='s', score='r', learn='a', save='w')
STATE = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, num_iterations=2, loss_type='r2vpo', ratio_penalty_lr=5.0,
             dynamic_sampling=1, reward_weights_end=[1.0, 2.0], k_end=4.0, guard=0.9, beta=0.01, save_steps=2, save_total_limit=2, disable_tqdm=True)  # these keep most state
PLAIN = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, max_steps=6, save_steps=2, disable_tqdm=True)


def new(folder, rewards=None, rows=None, **changes):
    "Make a trainer of a few plain steps."
    from rvpo_nb.inputs import GRPOConfig
    from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
    from rvpo_nb.trainer import GRPOTrainer
    model, peft = changes.pop('model', RUBRIC_POLICY), changes.pop('peft_config', None)
    return GRPOTrainer(model, rewards or [rubric_rewards()[i] for i in (0, -1)], GRPOConfig(output_dir=str(folder), **PLAIN | changes), rows or rubric_prompts(8), peft_config=peft)


def flags(output, **settings):
    "Write settings as `rvpo train` reads them."
    words = ['train', '--model', POLICY, '--data', 'rows', '--rewards', 'both', '--output', output]
    for name, v in settings.items():
        flag = '--' + name.replace('_', '-')
        words += [flag] if v is True else [flag, *map(str, v if isinstance(v, list) else [v])]
    return words


def same_end(one, other, but=('time/', 'memory/')):
    "Compare two finished runs bit for bit: weights, log but for times and memory, completions."
    for name in ('model.safetensors', 'config.json', 'tokenizer.json'): assert (one / name).read_bytes() == (other / name).read_bytes(), name
    logs = [[{k: v for k, v in x.items() if not k.startswith(but)} for x in read_log(f / 'log.jsonl')] for f in (one, other)]
    assert json.dumps(logs[0]) == json.dumps(logs[1]) and logs[0]
    tables = [sorted(p.name for p in (f / 'completions').iterdir()) for f in (one, other)]
    assert tables[0] == tables[1] and len(tables[0]) == len(logs[0])
    for name in tables[0]: pd.testing.assert_frame_equal(*(pd.read_parquet(f / 'completions' / name) for f in (one, other)), check_exact=True)
    return True


class Server:
    "Fork runs from a process that has everything loaded."

    def __init__(self, folder):
        self.folder, (self.told, w) = Path(folder), os.pipe()
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')])))
        self.process = subprocess.Popen([sys.executable, __file__, str(w)], cwd=folder, env=env, pass_fds=(w,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        os.close(w)
        self.ask('ready?')

    def ask(self, *question):
        self.process.stdin.write(json.dumps(question) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, output, more='', **settings):
        "Begin a run in another process, and return its id; `more` is Python that is run there first."
        return self.ask('run', flags(output, **settings), str(self.folder / f'{output}.err'), more)

    def phase(self, seconds=300.0):
        "Wait for the next phase that begins; None after that time."
        return os.read(self.told, 1).decode() if select.select([self.told], [], [], seconds)[0] else None

    def until(self, letter, count=1):
        "Wait until a phase has begun so often, or the run has ended; tell which."
        while True:
            now = self.phase()
            assert now, 'a run hangs'
            count -= now == letter
            if now == '.' or count == 0: return now

    def end(self, pid, output):
        "Wait for the end of a run: its exit code (below 0: the signal), what it wrote to stderr, the phases that were told and not read."
        code = self.ask('wait', pid)
        rest = ''
        while now := self.phase(0): rest += now
        err = (self.folder / f'{output}.err').read_text()
        return code, '\n'.join(line for line in err.splitlines() if line.startswith(('rvpo:', str(output))) or 'Error' in line or 'damaged' in line), rest

    def run(self, output, more='', **settings):
        "Make a whole run: its exit code and what it said."
        return self.end(self.start(output, more, **settings), output)[:2]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        os.close(self.told)


def instrument(w):
    "Let the trainer say in which phase it is."
    from rvpo_nb.trainer import GRPOTrainer
    phase = ['o']
    def tell(letter):
        phase[0] = letter
        os.write(w, letter.encode())
    for name, letter in METHODS.items():
        def told(self, *args, letter=letter, method=getattr(GRPOTrainer, name), **kwargs):
            before = phase[0]
            tell(letter)
            if letter == 'r': time.sleep(0.005)  # scoring is too short to be hit otherwise
            try: return method(self, *args, **kwargs)
            finally: tell(before)
        setattr(GRPOTrainer, name, told)


def serve(w):
    "Answer questions on stdin: run, wait."
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    torch.set_num_threads(1)
    from rvpo_nb import cli
    from rvpo_nb.task import rubric_prompts, rubric_rewards
    rows, both = rubric_prompts(8), [rubric_rewards()[i] for i in (0, -1)]
    cli.load_prompts, cli.load_rewards = lambda name: rows, lambda specs: list(both)
    new('.warm', **STATE | dict(max_steps=2)).train()
    shutil.rmtree('.warm')
    for line in sys.stdin:
        kind, *rest = json.loads(line)
        answer = None
        if kind == 'run':
            answer = os.fork()
            if not answer: run_child(w, *rest)
        elif kind == 'wait': answer = os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
        print(json.dumps(answer), file=answers, flush=True)


def run_child(w, argv, err, more):
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0), os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    from rvpo_nb.cli import main
    code = 70
    try:
        exec(more, dict(globals()))
        instrument(w)
        code = main(argv)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os.write(w, b'.')
        sys.stderr.flush()
        os._exit(code)


if __name__ == '__main__':
    from rvpo_nb.task import RUBRIC_POLICY
    serve(int(sys.argv[1]))
else:
    from rvpo_nb.task import RUBRIC_POLICY
POLICY = str(RUBRIC_POLICY)

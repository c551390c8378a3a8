"""Measure how time grows with the number of rewards, of rollouts in a group, and of prompts, each alone.

Prints one JSON line per curve and, with --log FILE, writes them there anew: what is done, along which axis, the sizes, the median
seconds of processor time, the exponent of a straight line through all points in log-log, and that between the last two.
"""
import argparse
import json
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from rvpo_nb.advantage import advantages, solve_k
from rvpo_nb.inputs import GRPOConfig, prompt_order
from rvpo_nb.record import group_metrics, reward_metrics, write_completions, write_log
from rvpo_nb.reward import call_rewards
from rvpo_nb.task import word_tokenizer
from rvpo_nb.trainer import GRPOTrainer, passes

SIZES = dict(rewards=[16, 64, 250, 1000], group=[16, 64, 256], prompts=[1000, 10_000, 100_000])
REST = dict(prompts=16, group=8, rewards=4)  # what the two other axes have


def median_time(f, least=0.2, repeats=5):
    "Return the median seconds of processor time of a call (a clock on the wall would count the neighbours), after one that is not counted; short calls are repeated until they take long enough, long ones are made three times."
    start = time.process_time()
    f()
    if (once := time.process_time() - start) > 1: repeats = 3
    else:
        start = time.process_time()
        f()
        once = time.process_time() - start
    many, times = max(1, int(least / repeats / max(1e-7, once))), []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(many): f()
        times.append((time.process_time() - start) / many)
    return statistics.median(times)


def table(prompts, group, rewards):
    "Draw rewards (prompts, group, rewards), half of them binary, a tenth missing."
    gen = torch.Generator().manual_seed(0)
    r = torch.rand(prompts, group, rewards, generator=gen)
    r[..., ::2] = r[..., ::2].round()
    return torch.where(torch.rand(r.shape, generator=gen) < 0.1, torch.nan, r)


def reward(j):
    "Make a reward function that costs next to nothing."
    def f(completions, **columns): return [float(len(c) > j % 7) for c in completions]
    f.__name__, f.bounds = f'reward_{j}', (0, 1)
    return f


# --- what is timed: each takes the sizes of all three axes and returns a function to call

def aggregation(**size): return partial(advantages, table(**size))
def solving(**size): return partial(solve_k, table(**size), 2.0)


def figures(**size):
    r = table(**size)
    names, ok, a = [f'reward_{j}' for j in range(r.shape[-1])], (r > 0.5).float(), advantages(r)
    return lambda: reward_metrics(names, r, ok) | group_metrics(names, r, ok, a, 2.0)


def collecting(prompts, group, rewards):
    n = prompts * group
    return partial(call_rewards, [reward(j) for j in range(rewards)], ['a b c'] * n, ['d e f'] * n)


def log_line(rewards, **size):
    logs, path = figures(**size, rewards=rewards)(), Path(tempfile.mkdtemp()) / 'log.jsonl'
    return lambda: write_log(path, logs)


def rollouts_written(prompts, group, rewards):
    folder, n, r = Path(tempfile.mkdtemp()) / 'completions', prompts * group, table(prompts, group, rewards)
    texts, columns = dict(prompt=['a b c'] * n, completion=['d e f'] * n), {f'reward_{j}': x for j, x in enumerate(r.flatten(0, 1).T)}
    return lambda: write_completions(folder, 1, group, texts, columns, r.sum(-1).flatten())


def cutting(prompts, group, rewards):
    from rvpo_nb.rollout import Rollouts
    n = prompts * group
    mask = torch.ones(n, 4, dtype=torch.long)
    r = Rollouts([[3, 4, 5]] * prompts, torch.arange(prompts).repeat_interleave(group), mask, mask, mask.float(), mask[:, 0] > 0)
    return partial(passes, r, 2048, 64)


def order(prompts, **size): return partial(prompt_order, prompts, 7, 16, 42)


def new_trainer(model, tokenizer, prompts, group, rewards, **changes):
    args = GRPOConfig(**dict(output_dir=tempfile.mkdtemp(), num_generations=group, per_device_train_batch_size=2 * group, max_completion_length=4, max_steps=10**6,
                             disable_tqdm=True) | changes)
    rows = [dict(prompt='a b c', number=i) for i in range(prompts)]
    return GRPOTrainer(model, [reward(j) for j in range(rewards)], args, train_dataset=rows, processing_class=tokenizer)


def policy():
    tokenizer = word_tokenizer('abcdefgh')
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        max_position_embeddings=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)), tokenizer


def start_up(**size): return lambda made=policy(): new_trainer(*made, **size).setup()


def step(**size):
    trainer = new_trainer(*policy(), **size)
    trainer.start(False)
    return partial(trainer.step, 0)


ALL = 'rewards', 'group', 'prompts'
TIMED = {'advantages': (aggregation, ALL), 'k solved for': (solving, ALL), 'figures for the log': (figures, ALL[:2]), 'a line of the log': (log_line, ALL[:1]),
         'rewards collected': (collecting, ALL[:2]), 'rollouts written': (rollouts_written, ALL[:2]), 'passes cut': (cutting, ALL[1:]),
         'prompts drawn': (order, ALL[2:]), 'start of a run': (start_up, ALL[2:]), 'a step': (step, ALL)}


def curve(what, axis, sizes):
    "Time one thing along one axis."
    seconds = [median_time(TIMED[what][0](**REST | {axis: n})) for n in sizes]
    x, y = np.log(sizes), np.log(seconds)
    exponents = dict(exponent=np.polyfit(x, y, 1)[0], last_exponent=(y[-1] - y[-2]) / (x[-1] - x[-2]))
    return dict(what=what, axis=axis, sizes=sizes, seconds=[float(f'{s:.3g}') for s in seconds]) | {k: round(float(v), 2) for k, v in exponents.items()}


def machine():
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return dict(device=names[0] if names else platform.processor(), threads=torch.get_num_threads(), python=platform.python_version(),
                torch=torch.__version__, transformers=transformers.__version__, rest=REST)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--log', type=Path, help='write the JSON lines to this file')
    parser.add_argument('--only', help='measure this curve alone')
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for what, (_, axes) in TIMED.items():
        for axis in axes if args.only in (None, what) else []:
            lines.append(json.dumps(curve(what, axis, SIZES[axis]) | machine()))
            print(lines[-1][:lines[-1].index(', "device"')], flush=True)
    if args.log: args.log.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__': main()

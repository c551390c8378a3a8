"""A long run holds its memory, its files and its threads, and what it wrote is whole to the end."""
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rvpo_nb.checkpoint import checkpoints
from rvpo_nb.record import History, read_log

linux = pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='counts files and threads in /proc')
GROUPS = dict(num_generations=2, per_device_train_batch_size=4)


def policy(folder):
    "Save a policy of some hundred weights that knows eight words."
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from rvpo_nb.task import word_tokenizer
    tokenizer = word_tokenizer('abcdefgh')
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        max_position_embeddings=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rewards():
    "Return one reward that awaits, and logs; one rule; and one that does not always apply."
    import asyncio
    async def judged(completions, log_metric=None, log_extra=None, **columns):
        await asyncio.sleep(0)
        log_metric('words', sum(len(c.split()) for c in completions) / len(completions)), log_extra('began', [c[:1] for c in completions])
        return [float('a' in c) for c in completions]
    def short(completions, **columns): return [-len(c.split()) for c in completions]
    def some(completions, **columns): return [None if 'b' in c else float('c' in c) for c in completions]
    judged.bounds = some.bounds = (0, 1)
    return [judged, short, some]


def held():
    "Return the resident memory (MB), the open files and the threads of this process."
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20, len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task'))


def run(folder, steps):
    "Train with everything that goes on beside the steps, be stopped after a twentieth of them, resume, and write down what was held."
    import torch
    from transformers import TrainerCallback
    from rvpo_nb.inputs import GRPOConfig
    from rvpo_nb.trainer import GRPOTrainer
    torch.set_num_threads(1)
    policy(folder / 'model')
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % (steps // 20) == 0: seen[state.global_step] = held()
            control.should_training_stop = state.global_step == steps // 20

    args = dict(output_dir=str(folder / 'out'), **GROUPS, max_completion_length=4, learning_rate=1e-3, max_steps=steps, loss_type='r2vpo', ratio_penalty_lr=5.0,
                dynamic_sampling=1, k_end=4.0, reward_weights_end=[1.0, 2.0, 1.0], guard=0.9, beta=0.01, save_steps=steps // 10, eval_steps=steps // 10, save_total_limit=2,
                disable_tqdm=True)
    rows = [dict(prompt=' '.join(p), number=i) for i, p in enumerate(['abc', 'bcd', 'de', 'efgh', 'ab', 'gh', 'hgf', 'a'])]
    for resume in (False, True):
        trainer = GRPOTrainer(str(folder / 'model'), rewards(), GRPOConfig(**args), train_dataset=rows, eval_dataset=rows[:2], callbacks=[Watch()])
        state = trainer.train(resume_from_checkpoint=resume)
    assert isinstance(state.log_history, list) and [x['step'] for x in state.log_history] == list(range(1, steps + 1))
    (folder / 'held.json').write_text(json.dumps(seen))


def a_run(tmp_path, steps):
    "Run it in a process of its own, check what it wrote, and return what it held: step -> memory, files, threads."
    done = subprocess.run([sys.executable, __file__, str(tmp_path), str(steps)], env=os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_DISABLE_PROGRESS_BARS='1'),
                          capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / 'out'
    log = read_log(out / 'log.jsonl')
    assert [x['step'] for x in log] == list(range(1, steps + 1)) and (out / 'log.jsonl').read_text().count('\n') == steps
    assert [x['step'] for x in log if 'eval/reward/short/mean' in x] == list(range(steps // 10, steps + 1, steps // 10))
    assert all(x['words'] >= 0 and x['reward/short/mean'] is not None for x in log) and log[-1]['k'] == 4.0
    assert [p.name for p in checkpoints(out)] == [f'checkpoint-{steps * 9 // 10}', f'checkpoint-{steps}'] and not list(out.rglob('*.part'))
    tables = sorted((out / 'completions').glob('*.parquet'), key=lambda p: int(p.stem.split('_')[1]))
    assert len(tables) == steps
    for step, path in enumerate(tables, 1):
        t = pq.read_table(path)
        assert t.num_rows == 4 and set(t['step'].to_pylist()) == {step} and {'judged', 'short', 'some', 'began', 'advantage'} <= set(t.column_names)
    return {int(k): v for k, v in json.loads((tmp_path / 'held.json').read_text()).items()}


def check_handles(seen, steps, row, **more):
    (_, files, threads), (_, last_files, last_threads) = seen[steps // 10], seen[steps]
    assert last_files <= files and last_threads <= threads, seen
    row('load', f'{steps} steps, stopped and resumed once, with a reward that awaits, evaluations, and ten checkpoints of which two are kept', steps, steps,
        f'{last_files} open files and {last_threads} threads, as after the first tenth{more.get("grown", "")}', 'Nothing: one line and one table for every step, in order.', 'Nothing to do.')


@linux
def test_a_run_of_some_steps_leaks_no_files_and_no_threads(tmp_path, fault_row): check_handles(a_run(tmp_path, 60), 60, fault_row)


@linux
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_of_5000_steps_holds_its_memory(tmp_path, fault_row):
    seen = a_run(tmp_path, 5000)
    before, most = seen[500][0], max(mb for step, (mb, *_) in seen.items() if step > 500)
    assert most < 1.02 * before, seen
    check_handles(seen, 5000, fault_row, grown=f'; {before:.0f} MB of memory after 500 steps, {most:.0f} MB at most after that')


def test_the_history_of_a_run_is_small_and_exact():
    figures = [f'reward/number_{i}/{what}' for i in range(10) for what in ('mean', 'std', 'attention', 'pass_rate')]
    line = lambda t: dict(step=t, k=2.0) | {name: None if (t + i) % 7 == 0 else t / (i + 1) for i, name in enumerate(figures)}
    sizes = []
    for kept in (list, History):
        tracemalloc.start()
        lines = kept()
        for t in range(1000): lines.append({''.join([n]) + '': v for n, v in line(t).items()})
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert list(lines) == [line(t) for t in range(1000)] and type(lines[3]['step']) is int and lines[-2:] == [line(998), line(999)]
    assert sizes[1] < 0.5 * sizes[0], sizes


if __name__ == '__main__': run(Path(sys.argv[1]), int(sys.argv[2]))

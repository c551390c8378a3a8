"""Policies that end at once, never end, or are no numbers; and memory that runs out."""
import json
import math
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rvpo_nb import rollout
from rvpo_nb.cli import main
from rvpo_nb.inputs import GRPOConfig, load_model
from rvpo_nb.checkpoint import checkpoints
from rvpo_nb.record import read_log
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
from rvpo_nb.trainer import GRPOTrainer, RunFailed

SETTINGS = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, max_steps=4, disable_tqdm=True)


def words(completions, **columns): return [float(len(c.split())) for c in completions]


def new(out, rewards=None, model=RUBRIC_POLICY, tokenizer=None, **changes):
    return GRPOTrainer(model, rewards or [words, rubric_rewards()[0]], GRPOConfig(output_dir=str(out), **SETTINGS | changes), train_dataset=rubric_prompts(8), processing_class=tokenizer)


def sums(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def one_minded(end):
    "Make a policy that always (end > 0) or never (end < 0) says the end token; all others are equally likely."
    tokenizer = load_model(RUBRIC_POLICY)[1]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=False, bos_token_id=1, eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_(), model.transformer.ln_f.bias.fill_(1.0), model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = end
    return model, tokenizer


@pytest.mark.parametrize('end', ['at once', 'never'])
def test_a_policy_that_ends_at_once_or_never(tmp_path, capsys, fault_row, end):
    steps = 0
    for name, changes in (('plain', {}), ('masked', dict(mask_truncated_completions=True, beta=0.1)), ('stops', dict(dynamic_sampling=1, loss_type='grpo', importance_sampling_level='sequence'))):
        model, tokenizer = one_minded(20.0 if end == 'at once' else -20.0)
        t = new(tmp_path / name, model=model, tokenizer=tokenizer, max_steps=12, **changes)
        log = list(t.train().log_history)
        told = capsys.readouterr().err.strip().splitlines()
        assert all(math.isfinite(x[key]) for x in log for key in ('loss', 'grad_norm', 'entropy', 'kl', 'ratio', 'reward/words/mean', 'completions/mean_length')), log
        assert [x['step'] for x in log] == list(range(1, 13)) and all(p.isfinite().all() for p in model.parameters())
        lengths = {x['completions/mean_length'] for x in log}, {x['completions/clipped_ratio'] for x in log}
        assert lengths == (({1.0}, {0.0}) if end == 'at once' else ({16.0}, {1.0}))
        sentence = 'every completion is empty: the policy ends at once' if end == 'at once' else 'no completion ends: all are cut off at max_completion_length = 16'
        assert sum(sentence in line for line in told) == 1, told
        assert any('nothing is learned' in line for line in told) or end == 'never'
        steps += len(log)
    import pandas as pd
    table = pd.concat(map(pd.read_parquet, (tmp_path / 'plain' / 'completions').glob('*.parquet')))
    assert table.advantage.map(math.isfinite).all() and (end == 'never' or (table.advantage == 0).all() and (table.completion == '').all())
    fault_row('policy', f'A policy that ends {end}' if end == 'at once' else 'A policy that never ends', steps, steps, next(x for x in told if sentence in x),
              'Nothing: all figures stay finite.', 'Train the model to answer first, or check its chat template and end token.' if end == 'at once' else 'Raise max_completion_length, or check which token ends a completion.')


def broken_copies(folder):
    "Save copies of the policy with one number that is none, each in another place."
    for name, where, value in (('nan', 'model.layers.0.mlp.up_proj.weight', math.nan), ('inf', 'model.norm.weight', math.inf), ('unused', 'model.embed_tokens.weight', -math.inf)):
        model, tokenizer = load_model(RUBRIC_POLICY)
        with torch.no_grad(): dict(model.named_parameters())[where].view(-1)[-1] = value
        model.save_pretrained(folder / name), tokenizer.save_pretrained(folder / name)
        yield name, where
    model, tokenizer = load_model(RUBRIC_POLICY)
    with torch.no_grad(): model.model.norm.weight.fill_(3e38)
    model.save_pretrained(folder / 'huge'), tokenizer.save_pretrained(folder / 'huge')
    yield 'huge', 'the log-probs of the samples are not finite'


def test_weights_that_are_no_numbers_are_refused_at_the_start(tmp_path, monkeypatch, capsys, fault_row):
    (tmp_path / 'data.jsonl').write_text('\n'.join(json.dumps(r) for r in rubric_prompts(8)))
    monkeypatch.chdir(tmp_path)
    tried, told = 0, []
    for name, where in broken_copies(tmp_path):
        with pytest.raises(InputError, match=f'cannot be used: {where}'): new(tmp_path / 'api', model=tmp_path / name).train()
        assert main(['train', '--model', name, '--data', 'data.jsonl', '--rewards', 'rvpo_nb.maths:accuracy_reward', '--output', 'out', '--disable-tqdm', '--max-completion-length', '8']) == 2
        told.append(capsys.readouterr().err.strip())
        assert told[-1].startswith('rvpo: the model') and where in told[-1] and not (tmp_path / 'out' / 'log.jsonl').exists()
        tried += 2
    fault_row('policy', 'NaN or infinity in the weights at the start', tried, tried, told[0], 'Nothing: it is found before the first step.', 'Take another copy of the model.')


@pytest.mark.parametrize('kind', ['infinite weights', 'huge weights', 'NaN in a gradient', 'NaN in a moment'])
def test_weights_that_break_in_a_step_leave_the_last_checkpoint(tmp_path, fault_row, kind):
    class Break:
        "A callback that makes step 3 go wrong."
        def __getattr__(self, name): return lambda *_, **__: None
        def on_save(self, args, state, control, model=None, **_):
            if state.global_step != 2: return
            if 'weights' in kind:
                for group in t.optimizer.param_groups: group['lr'] = math.inf if kind == 'infinite weights' else 1e38
            elif kind == 'NaN in a gradient': next(model.parameters()).register_hook(lambda g: g * math.nan)
            else: next(iter(t.optimizer.state.values()))['exp_avg'].view(-1)[0] = math.nan
    t = new(tmp_path / 'out', save_steps=1, save_total_limit=1, max_steps=8, lr_scheduler_type='constant')
    t.callbacks = [Break()]
    kept = {}
    save = t.save
    def spy():
        save()
        kept.update({c.name: sums(c) for c in checkpoints(tmp_path / 'out')})
    t.save = spy
    with pytest.raises(RunFailed) as e: t.train()
    assert 'step 3' in str(e.value) and 'checkpoint-2' in str(e.value), e.value
    if kind != 'huge weights': assert ('gradient norm is nan' if 'gradient' in kind else "the optimizer's step left NaN or infinity in model.") in str(e.value), e.value
    assert [c.name for c in checkpoints(tmp_path / 'out')] == ['checkpoint-2'] and sums(tmp_path / 'out' / 'checkpoint-2') == kept['checkpoint-2']
    assert not (tmp_path / 'out' / 'model.safetensors').exists(), 'a broken model is not left as the result'
    again = new(tmp_path / 'out', save_steps=1, save_total_limit=1, max_steps=8, lr_scheduler_type='constant')
    assert again.train(resume_from_checkpoint=True).global_step == 8
    whole = new(tmp_path / 'whole', max_steps=8, lr_scheduler_type='constant')
    whole.train()
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters()))
    fault_row('policy', f'{kind} in step 3', 1, 1, str(e.value).replace(str(tmp_path / 'out'), 'OUT'), 'Nothing that was saved: the last good checkpoint stays, whatever save_total_limit says.',
              'Lower learning_rate and begin again, or go on from the checkpoint; the dump holds the model and rollouts of the step.')


def vectors(t): return torch.cat([p.grad.flatten() for p in t.model.parameters()])


def failing(f, times, error):
    "Let a function raise the first times that it is called."
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) <= times: raise error
        return f(*args, **kwargs)
    return wrapped


ERRORS = [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'), MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
          RuntimeError('CUDA error: out of memory'), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), RuntimeError('std::bad_alloc')]


def test_half_the_size_gives_the_same_rollouts_and_gradients(tmp_path, monkeypatch, capsys, fault_row):
    settings = dict(per_device_train_batch_size=32, num_generations=8, max_grad_norm=1e9, loss_type='grpo')
    whole = new(tmp_path / 'whole', **settings)
    whole.start(False)
    r, _, rewards, _ = whole.draw(0, [0.0, 0.0])
    whole.optimizer.step = lambda: None
    advantage, mass = whole.aggregate(0, rewards)[0].flatten(), lambda r: r.logps * r.completion_mask
    stats = whole.learn(r, advantage, first=True)
    tried, worst = 0, 0.0
    for i, e in enumerate(ERRORS):
        for times in (1 + i % 2,):
            t = new(tmp_path / f'{i}-{times}', **settings)
            t.start(False)
            t.optimizer.step = lambda: None
            monkeypatch.setattr(rollout, 'sample', failing(rollout.sample, times, e))
            got = t.draw(0, [0.0, 0.0])
            monkeypatch.undo()
            assert torch.equal(got[0].completion_ids * got[0].completion_mask, r.completion_ids * r.completion_mask) and torch.equal(got[2], rewards)
            assert t.fits['sampling'] == 4 // 2 ** times
            fails, logps = [], sys.modules['rvpo_nb.trainer'].completion_logps
            def late(*args, **kwargs):  # in the second pass: half of the gradient is there already
                fails.append(1)
                if len(fails) in (2, 5)[:times]: raise e
                return logps(*args, **kwargs)
            t.fits['learning'] = 400
            monkeypatch.setattr(sys.modules['rvpo_nb.trainer'], 'completion_logps', late)
            again = t.learn(got[0], advantage, first=True)
            monkeypatch.undo()
            assert t.fits['learning'] == 400 // 2 ** times
            error = ((vectors(t) - vectors(whole)).norm() / vectors(whole).norm()).item()
            worst, tried = max(worst, error), tried + 2
            assert error < 1e-5 and all(again[k] == pytest.approx(stats[k], rel=1e-4, abs=1e-6) for k in stats)
            assert torch.allclose(mass(got[0]), mass(r), atol=1e-5)
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == tried and all('out of memory in' in x for x in told) and 'from here on 200 tokens per pass: set micro_batch_tokens to that' in told[1], told
    fault_row('policy', 'Memory runs out in sampling or learning, once or twice', tried, tried, told[1], f'Nothing: the batch is done again in smaller parts. Gradients differ by {worst:.0e} of their norm, below the 1e-5 that the test allows.',
              'None is needed; to begin with the size that fits, set micro_batch_tokens.', gradient_error=worst)


@pytest.mark.parametrize('what', ['sampling', 'learning', 'optimizer'])
def test_memory_that_is_never_enough_ends_the_run_with_a_setting(tmp_path, monkeypatch, capsys, fault_row, what):
    advice = dict(sampling='lower num_generations or max_completion_length', learning='set gradient_checkpointing, lower max_completion_length, or train an adapter', optimizer='there is not enough memory in the optimizer for two more numbers per weight: train an adapter')
    for i, e in enumerate(ERRORS[:3]):
        t = new(tmp_path / str(i), save_steps=2)
        class Later:
            def __getattr__(self, name): return lambda *_, **__: None
            def on_save(self, args, state, control, **_):
                if state.global_step != 2: return
                if what == 'sampling': monkeypatch.setattr(rollout, 'sample', failing(rollout.sample, 10 ** 6, e))
                if what == 'learning': monkeypatch.setattr(sys.modules['rvpo_nb.trainer'], 'completion_logps', failing(None, 10 ** 6, e))
                if what == 'optimizer': t.optimizer.step = failing(None, 10 ** 6, e)
        t.callbacks = [Later()]
        # a run must have got as far as its checkpoint before memory gets short
        with pytest.raises(RunFailed) as told: t.train()
        monkeypatch.undo()
        assert str(told.value).startswith('step 3: ') and advice[what] in str(told.value) and str(told.value).endswith('; a resumed run goes on from checkpoint-2'), told.value
        assert [c.name for c in checkpoints(tmp_path / str(i))] == ['checkpoint-2'] and len(read_log(tmp_path / str(i) / 'log.jsonl')) == 2
    again = new(tmp_path / '0', save_steps=2, micro_batch_tokens=100, gradient_checkpointing=True)
    assert again.train(resume_from_checkpoint=True).global_step == 4, 'what the sentence asks to change may be changed in a resumed run'
    capsys.readouterr()
    fault_row('policy', f'Memory is never enough ({what})', i + 1, i + 1, str(told.value), 'The steps since the last checkpoint.', 'Change the setting that is named and go on with --resume.')


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    t = new(tmp_path / 'out')
    monkeypatch.setattr(rollout, 'sample', failing(None, 10 ** 6, RuntimeError('CUDA error: device-side assert triggered')))
    with pytest.raises(RuntimeError, match='device-side assert'): t.train()


LIMITED = '''import json, os, resource, sys
import torch
torch.set_num_threads(1)
import pyarrow.parquet, pandas
try: import deepspeed  # which saving imports where it is installed
except ImportError: pass
from rvpo_nb.inputs import GRPOConfig
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts
from rvpo_nb.trainer import GRPOTrainer, RunFailed
out, limits = sys.argv[1], json.loads(sys.argv[2])
def words(completions, **columns): return [float(len(c.split())) for c in completions]
virtual = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmSize')).split()[1]) * 1024
def run(name, more, settings):
    args = GRPOConfig(output_dir=f'{out}/{name}', max_steps=2, disable_tqdm=True, max_completion_length=32, learning_rate=1e-4, lr_scheduler_type='constant', **settings)
    t = GRPOTrainer(RUBRIC_POLICY, [words], args, rubric_prompts(64))
    if more: resource.setrlimit(resource.RLIMIT_AS, (virtual() + int(more * 2 ** 20), resource.RLIM_INFINITY))
    try: end = t.train() and 'done'
    except RunFailed as e: end = str(e)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    print(json.dumps(dict(name=name, end=end, fits=t.fits, first=[[x[k] for k in ('grad_norm', 'loss', 'entropy', 'reward/words/mean', 'completions/mean_length')] for x in list(t.state.log_history)[:1]])), flush=True)
for each in limits:  # in a process of its own: memory that was freed would be used again
    if os.fork() == 0: run(*each), os._exit(0)
    os.wait()
'''


def limited(out, runs):
    done = subprocess.run([sys.executable, '-c', LIMITED, str(out), json.dumps(runs)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    assert len(lines) == len(runs), done.stderr[-3000:]
    return lines, [x for x in done.stderr.splitlines() if 'out of memory' in x]


def address_space(tmp_path, fault_row, learning, sampling):
    big = dict(num_generations=64, per_device_train_batch_size=512, micro_batch_tokens=10 ** 6)
    small = big | dict(micro_batch_tokens=1000)
    runs = [('whole', 0, small)] + [(f'learning-{mb}', mb, big) for mb in learning] + [(f'sampling-{mb}', mb, small) for mb in sampling]
    (whole, *ended), told = limited(tmp_path, runs)
    done = [x for x in ended if x['end'] == 'done']
    texts = lambda name: pq.read_table(tmp_path / name / 'completions' / 'completions_00001.parquet').column('completion').to_pylist()
    stepped = [x for x in ended if x['first']]
    apart = max(abs(x['first'][0][0] / whole['first'][0][0] - 1) for x in stepped)
    for x in stepped:  # the first step; the second starts from weights in which Adam has made a step even of rounding
        assert x['first'][0] == pytest.approx(whole['first'][0], rel=1e-4, abs=1e-6), x
        assert texts(x['name']) == texts('whole')
    for x in ended: assert x['end'] == 'done' or 'there is not enough memory in' in x['end'] or "can't allocate memory" in x['end'], x
    assert any('learning' in x for x in told) and done, (told, ended)
    fault_row('policy', f'An address-space limit of {", ".join(str(m) for m in (*learning, *sampling))} MB more than at the start', len(ended), len(ended), told[0],
              f'At most the steps since the last checkpoint: {len(done)} of {len(ended)} runs end as one without a limit does (the same completions, gradient norms apart by {apart:.0e}), the others stop with a sentence that names a setting.', 'Set micro_batch_tokens, or gradient_checkpointing, or lower max_completion_length.')
    return ended, told


def test_an_address_space_limit(tmp_path, fault_row): address_space(tmp_path, fault_row, [60], [])


@pytest.mark.long
def test_address_space_limits_of_many_sizes(tmp_path, fault_row):
    ended, told = address_space(tmp_path, fault_row, [150, 60, 30, 15], [10, 5, 2])
    assert any('sampling' in x for x in (*told, *(x['end'] for x in ended)))

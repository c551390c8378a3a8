"""Train one model with this trainer and with TRL's GRPOTrainer, in turns, and compare time and memory.

Each run has a process of its own, with the same model folder, prompts in the same order, rewards, group size, token budget and dtype.
The first two steps of a run are not counted, the rest is summed up by medians; each round runs both sides, the next one in the other order.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import asdict, dataclass
from pathlib import Path

# torch is imported in the children alone: a process inherits the peak memory of the one that starts it (getrusage keeps it across exec).
SKIP, SIDES = 2, ('ours', 'trl')
RATIOS = dict(  # what is compared, over, under, and which of several shapes is the worst
    ratio_steps_per_s=('step_s', 'trl', 'ours', min), ratio_peak_memory=('peak_mb', 'ours', 'trl', max),
    ratio_tokens_per_s=('tokens_per_s', 'ours', 'trl', min), ratio_cpu=('cpu_s', 'trl', 'ours', min))
OFFLINE = dict.fromkeys('HF_HUB_OFFLINE HF_DATASETS_OFFLINE HF_HUB_DISABLE_TELEMETRY HF_HUB_DISABLE_PROGRESS_BARS DO_NOT_TRACK'.split(), '1')


@dataclass(frozen=True, kw_only=True)
class Shape:
    "Say how large model and batch are."
    width: int = 128
    layers: int = 4
    inner: int = 0  # width of the MLP; 0: 4 x width
    heads: int = 4
    kv: int = 2  # key and value heads
    vocab: int = 98  # tokens that the model knows
    prompts: int  # per step
    group: int  # completions per prompt
    prompt: tuple  # shortest and longest prompt, tokens
    new: int  # tokens per completion, at most
    stops: bool = False  # may a completion end early?
    micro: int = 0  # completions per forward and backward pass; 0: the whole batch


SHAPES = dict(
    tools=[Shape(prompts=4, group=16, prompt=(448, 512), new=64)],
    short=[Shape(prompts=8, group=8, prompt=(8, 24), new=32, stops=True)],
    wide=[Shape(width=512, layers=8, prompts=8, group=8, prompt=(8, 24), new=32, stops=True)],
    vocab=[Shape(width=512, layers=8, vocab=32000, prompts=4, group=8, prompt=(64, 128), new=64)],
    grid=[Shape(prompts=2, group=(4, 8, 32)[(i + j) % 3], prompt=(p, p), new=n)
          for i, p in enumerate((16, 128, 1024)) for j, n in enumerate((32, 128, 512))],
    # The logits of 1024 completions at once (1024 x 256 x 151936) fit on no GPU: 16 passes of 64 rows on both sides.
    gpu=[Shape(width=896, inner=4864, layers=24, heads=14, kv=2, vocab=151936, prompts=64, group=16, prompt=(64, 128), new=256, micro=64)])


def make_model(folder, s):
    "Write a random Qwen2 model and a character tokenizer; where completions must not stop, the end token lies past the model's vocabulary."
    # No trainer can sample an id that the model has no logit for: the same rule for both sides, and no per-token work for either
    # (TRL's suppress_tokens would add a logits processor to its side only). The words above the characters only decode.
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    words = (['<pad>', '<unk>', *map(chr, range(32, 127))] + [f'w{i}' for i in range(s.vocab)])[:s.vocab - s.stops]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, '<eos>'])}, unk_token='<unk>'))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    names = dict(pad_token='<pad>', eos_token='<eos>', unk_token='<unk>')
    PreTrainedTokenizerFast(tokenizer_object=raw, **names, padding_side='left').save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.inner or 4 * s.width, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.kv, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, pad_token_id=0,
        eos_token_id=len(words) if s.stops else None)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_rewards(s, seen):
    "Make three rewards that note in `seen` what they return, and the length of each completion."
    def digits(text, ids): return sum(c.isdigit() for c in text) / max(1, len(text))
    def short(text, ids): return 1 - len(ids) / s.new
    def vowels(text, ids): return float(sum(c in 'aeiou' for c in text) >= 3)

    def noting(f):
        def reward(completions, completion_ids, **columns):
            out = [f(*x) for x in zip(completions, completion_ids)]
            seen.setdefault(f.__name__, []).extend(out)
            if f is digits: seen.setdefault('tokens', []).extend(map(len, completion_ids))
            return out
        reward.__name__ = f.__name__
        return reward
    return [noting(f) for f in (digits, short, vowels)]


def memory():
    "Return memory now and at its peak, MB: of the process, or of tensors on the GPU."
    import torch
    if torch.cuda.is_available(): return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock():
    "Return the time when all work handed to the GPU is done."
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


def make_watch(seen, parts):
    "Make a callback that notes, from the end of one step to the end of the next, time, tokens, rewards and the parts that others measured."
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        steps = []
        def on_train_begin(self, *args, **kwargs):
            seen.clear()  # this trainer tries its rewards first
            self.at, self.cpu = clock(), time.process_time()
        def on_step_begin(self, *args, **kwargs): self.begin = clock()  # TRL only
        def on_step_end(self, *args, **kwargs):
            now, cpu = clock(), time.process_time()
            if parts: parts['learn'] = now - self.begin - parts.pop('before')
            rewards = {name: statistics.fmean(x) for name, x in seen.items() if name != 'tokens'}
            self.steps.append(dict(step=now - self.at, cpu=cpu - self.cpu, tokens=sum(seen.pop('tokens')), rewards=rewards, **parts))
            self.at, self.cpu, self.last, self.peak = now, cpu, dict(seen), memory()[1]  # before this trainer saves what TRL does not
            seen.clear(), parts.clear()
    return Watch()


def common(spec, s):
    "Return the settings that have one name and one meaning in both trainers."
    batch = s.prompts * s.group
    micro = s.micro or batch
    return dict(
        output_dir=spec['out'], num_generations=s.group, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
        max_completion_length=s.new, max_steps=spec['steps'], learning_rate=spec['lr'], beta=0.0, loss_type='dapo', temperature=1.0,
        shuffle_dataset=False, disable_tqdm=True, seed=spec['seed'], **dict(bf16=True) if spec['bf16'] else {})


def make_ours(spec, s, rewards, rows, tokenizer, watch, parts):
    "Return this trainer."
    from rvpo_nb.trainer import GRPOConfig, GRPOTrainer
    config = GRPOConfig(**common(spec, s), aggregation='gdpo', save_steps=10**9)
    return GRPOTrainer(spec['model'], rewards, config, rows, processing_class=tokenizer, callbacks=[watch])


def make_trl(spec, s, rewards, rows, tokenizer, watch, parts):
    "Return TRL's trainer, which adds its times to `parts`."
    import trl
    from datasets import Dataset
    from torch import cuda
    from transformers import PrinterCallback

    def timed(name, part):  # TRL decodes outside `_calculate_rewards` (in the rest), this trainer in its reward part
        def method(self, *args, **kwargs):
            start = clock()
            out = getattr(trl.GRPOTrainer, name)(self, *args, **kwargs)
            parts[part] = parts.get(part, 0) + clock() - start
            return out
        return method
    hooks = dict(_generate_single_turn='sample', _calculate_rewards='reward', _generate_and_score_completions='before')
    cls = type('Timed', (trl.GRPOTrainer,), {name: timed(name, part) for name, part in hooks.items()})
    # Its defaults are bf16 and gradient checkpointing; the latter costs it a third of its training time.
    config = trl.GRPOConfig(
        **dict(bf16=False) | common(spec, s), multi_objective_aggregation='normalize_then_sum', num_iterations=1, gradient_checkpointing=False,
        logging_steps=1, save_strategy='no', report_to='none', use_cpu=not cuda.is_available(), dataloader_pin_memory=False)
    trainer = cls(spec['model'], rewards, config, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_advantages(rewards, s):
    "Return the median seconds of `advantages` on one step's rewards, on one thread."
    import torch
    from rvpo_nb.advantage import advantages
    torch.set_num_threads(1)
    x = torch.tensor(list(rewards.values())).T.reshape(s.prompts, s.group, -1)
    return statistics.median(timeit.repeat(lambda: advantages(x, 'gdpo'), number=1, repeat=200))


def device():
    "Name the GPU, or else the processor."
    import torch
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    return next((x.split(': ')[1] for x in Path('/proc/cpuinfo').read_text().splitlines() if x.startswith('model name')), 'unknown')


def child(spec):
    "Make the model, or train it on one side and print what was measured."
    import torch
    import transformers
    torch.set_num_threads(spec['threads'])
    s, ours = Shape(**spec['shape']), spec['side'] == 'ours'
    if spec['side'] == 'model': return make_model(spec['model'], s)
    seen, parts, rng = {}, {}, random.Random(0)
    rows = [dict(prompt=''.join(rng.choices('abcdefgh 0123456789', k=rng.randint(*s.prompt)))) for _ in range(512)]
    watch, tokenizer = make_watch(seen, parts), transformers.PreTrainedTokenizerFast.from_pretrained(spec['model'])
    trainer = (make_ours if ours else make_trl)(spec, s, make_rewards(s, seen), rows, tokenizer, watch, parts)
    base, kinds = memory()[0], {p.dtype for p in trainer.model.parameters()}
    if kinds != {torch.float32}: raise TypeError(f'the weights are {kinds}, not float32')
    trainer.train()
    log = Path(spec['out'], 'log.jsonl').read_text().splitlines() if ours else []
    for x, line in zip(watch.steps, map(json.loads, log)): x |= {name: line[f'time/{name}'] for name in ('sample', 'reward', 'learn')}
    if not s.stops and any(x['tokens'] != s.prompts * s.group * s.new for x in watch.steps): raise RuntimeError('a completion stopped early')
    versions = {name: sys.modules[name].__version__ for name in ('rvpo_nb', 'trl', 'torch', 'transformers') if name in sys.modules}
    print(json.dumps(dict(steps=watch.steps, base=base, peak=watch.peak, device=device(), versions=versions,
                          advantages=time_advantages(watch.last, s) if ours else None)))


def start(side, folder, shape, a, seed=0):
    "Run one child to its end; where it fails, print the end of what it wrote and stop."
    spec = dict(side=side, model=f'{folder}/model', out=tempfile.mkdtemp(dir=folder), shape=asdict(shape), steps=a.steps, threads=a.threads,
                bf16=a.bf16, lr=1e-3 if a.check_curves else 1e-4, seed=seed)
    env = os.environ | OFFLINE | dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(a.threads)) | dict(TOKENIZERS_PARALLELISM='false')
    done = subprocess.run([sys.executable, __file__, 'child', json.dumps(spec)], capture_output=True, text=True, env=env)
    if not done.returncode: return json.loads(done.stdout.splitlines()[-1]) if side in SIDES else None
    print(done.stderr[-3000:], f'{side}: exit code {done.returncode}', sep='\n', file=sys.stderr)
    sys.exit(1)


def summary(run, s):
    "Sum up one run: medians of the counted steps, in seconds and MB."
    steps, batch = run['steps'][SKIP:], s.prompts * s.group
    for x in steps: x['rest'] = x['step'] - x['sample'] - x['reward'] - x['learn']
    out = {f'{name}_s': statistics.median(x[name] for x in steps) for name in ('step', 'sample', 'reward', 'learn', 'rest', 'cpu')}
    return out | dict(
        samples_per_s=batch / out['step_s'], tokens_per_s=statistics.median(x['tokens'] / x['step'] for x in steps),
        mean_tokens=statistics.fmean(x['tokens'] for x in steps) / batch, peak_mb=run['peak'], above_base_mb=run['peak'] - run['base'])


def curves(runs):
    "Compare, reward by reward, the mean over the last third of each seed's run: do the two ranges overlap?"
    out = {}
    for name in runs['ours'][0]['steps'][0]['rewards']:
        all_steps = {side: [[x['rewards'][name] for x in run['steps']] for run in runs[side]] for side in SIDES}
        ends = {side: [round(statistics.fmean(x[-(len(x) // 3):]), 4) for x in all_steps[side]] for side in SIDES}
        overlap = max(map(min, ends.values())) <= min(map(max, ends.values()))
        out[name] = ends | dict(overlap=overlap)
        told = [f'{side} {statistics.fmean(y[0] for y in all_steps[side]):.3f} -> {statistics.fmean(x):.3f} ({min(x):.3f} to {max(x):.3f})'
                for side, x in ends.items()]
        print(f'{name}: {"; ".join(told)}; the ranges {"overlap" if overlap else "are apart"}')
    return out


def brief(x): return float(f'{x:.4g}')


def measure(shape, a):
    "Run both sides in turns; return ratios and medians of one shape."
    runs = dict(ours=[], trl=[])
    with tempfile.TemporaryDirectory(prefix='train-vs-trl-') as folder:
        start('model', folder, shape, a)
        for r in range(a.rounds):
            for side in SIDES[::-1] if r % 2 else SIDES: runs[side].append(start(side, folder, shape, a, seed=r))
    each = [{side: summary(runs[side][r], shape) for side in SIDES} for r in range(a.rounds)]
    both = {side: {name: brief(statistics.median(x[side][name] for x in each)) for name in each[0][side]} for side in SIDES}
    out = {ratio: brief(statistics.median(x[over][name] / x[under][name] for x in each)) for ratio, (name, over, under, _) in RATIOS.items()}
    out['advantages_share'] = brief(statistics.median(run['advantages'] for run in runs['ours']) / both['ours']['step_s'])
    told = ', '.join(f'{name} {x}' for name, x in out.items())
    print(f'prompt {shape.prompt[0]} to {shape.prompt[1]}, new {shape.new}, {shape.prompts} x {shape.group}: {told}')
    for side, x in both.items(): print(f'  {side:5}' + ' '.join(f'{name} {v}' for name, v in x.items()), flush=True)
    facts = dict(device=runs['ours'][0]['device'], versions=runs['trl'][0]['versions'] | runs['ours'][0]['versions'])
    return out | both | (dict(curves=curves(runs)) if a.check_curves else {}), facts


def parse():
    p = argparse.ArgumentParser(description=__doc__, epilog='''The last line is one JSON object. ratio_steps_per_s: TRL's median seconds per step over
        this trainer's (above 1: this trainer is faster); ratio_peak_memory: this trainer's peak over TRL's; both are medians over the rounds.
        For grid, nine shapes listed in `points`: the smallest ratio_steps_per_s and the largest ratio_peak_memory of them.
        On a busy machine read ratio_cpu with --threads 1: CPU seconds per step do not count the wait for others.''')
    add = p.add_argument
    add('--shape', choices=SHAPES, default='short', help='tools: long prompts, groups of 16; short; wide: short with width 512; vocab: 32000 tokens; '
        'grid: prompts 16 to 1024, completions 32 to 512, groups 4 to 32; gpu: half a billion weights, bf16, CUDA only (default: short)')
    add('--steps', type=int, default=10, help=f'per run; the first {SKIP} are not counted (default: 10)')
    add('--rounds', type=int, default=2, help='runs of each side (default: 2)')
    add('--threads', type=int, default=2, help='of each run (default: 2)')
    add('--bf16', action='store_true', help='autocast to bfloat16 on both sides')
    add('--log', metavar='FILE', help='append the JSON line to FILE')
    add('--check-curves', action='store_true', help='three seeds of the short shape at learning rate 1e-3: do both sides end at the same rewards? '
        'With fewer than 60 steps they hardly move')
    a = p.parse_args()
    if a.steps <= SKIP or a.rounds < 1: p.error(f'--steps must be above {SKIP}, --rounds above 0')
    if a.check_curves: a.shape, a.rounds = 'short', 3
    if a.shape == 'gpu': a.bf16 = True
    return a


def main():
    a = parse()
    if a.shape == 'gpu' and subprocess.run([sys.executable, '-c', 'import sys, torch; sys.exit(not torch.cuda.is_available())']).returncode:
        sys.exit('--shape gpu needs a CUDA device')
    results, facts = zip(*[measure(shape, a) for shape in SHAPES[a.shape]])
    out = dict(shape=a.shape, steps=a.steps, rounds=a.rounds, threads=a.threads, bf16=a.bf16) | facts[0]
    if len(results) == 1: out |= results[0]
    else:
        for name, (*_, worst) in (RATIOS | dict(advantages_share=[max])).items(): out[name] = worst(x[name] for x in results)
        out['points'] = [dict(prompt=s.prompt[1], new=s.new, group=s.group) | x for s, x in zip(SHAPES[a.shape], results)]
    line = json.dumps(out)
    if a.log:
        with open(a.log, 'a') as f: print(line, file=f)
    print(line)


if __name__ == '__main__': child(json.loads(sys.argv[2])) if sys.argv[1:2] == ['child'] else main()

"""`rvpo` as a user meets it: a model folder made elsewhere, own data, own reward functions, and every kind of bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from rvpo_nb.ask import serve
from rvpo_nb.cli import main, story

RVPO = Path(sys.executable).parent / 'rvpo'
REWARDS = '''
def vowels(completions, **columns): return [sum(c in 'aeiou' for c in s) / max(1, len(s)) for s in completions]
def wanted(completions, letter, **columns): return [float(l in s) if l else None for s, l in zip(completions, letter)]
def short(completions, **columns): return [0.5] * (len(completions) - 1)
def broken(completions, **columns): raise KeyError('no such column')
def endless(completions, **columns): return [float('inf')] * len(completions)
both = [vowels, wanted]
def late(completions, trainer_state, **columns): return [float('inf') if trainer_state.global_step == 2 else 1.0] * len(completions)
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A user's folder: a tiny Llama with a character tokenizer and no pad token, data, a module of rewards."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    home = tmp_path_factory.mktemp('home')
    vocab = {t: i for i, t in enumerate(['<eos>', '<unk>', *map(chr, range(32, 127))])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<eos>', unk_token='<unk>').save_pretrained(home / 'model')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=0)).save_pretrained(home / 'model')
    rows = [dict(prompt=f'Write {w}: ', letter=w if w != 'x' else None) for w in 'abcdex']
    (home / 'data.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (home / 'noprompt.jsonl').write_text('{"question": "Why?"}\n')
    (home / 'broken.jsonl').write_text('{"prompt": "Why?"\n[1, 2\n')
    (home / 'empty.jsonl').write_text('')
    (home / 'taken.jsonl').write_text('{"prompt": "Why?", "completions": "So."}')
    (home / 'chat.jsonl').write_text('{"prompt": [{"role": "user", "content": "Why?"}]}')
    (home / 'my_rewards.py').write_text(REWARDS)
    shutil.copytree(home / 'model', home / 'truncated')
    weights = home / 'truncated' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(home / 'model', home / 'remote')
    config = json.loads((home / 'remote' / 'config.json').read_text()) | dict(model_type='theirs', auto_map={
        'AutoConfig': 'code.TheirConfig', 'AutoModelForCausalLM': 'code.TheirModel'})
    (home / 'remote' / 'config.json').write_text(json.dumps(config))
    (home / 'remote' / 'code.py').write_text(f"open({str(home / 'ran')!r}, 'w')")
    shutil.copytree(home / 'model', home / 'talker')
    settings = json.loads((home / 'talker' / 'tokenizer_config.json').read_text()) | dict(chat_template="{{ messages[-1]['content'] }}: ")
    (home / 'talker' / 'tokenizer_config.json').write_text(json.dumps(settings))
    rubric = [dict(criterion='Is polite', points=5, tags=['axis:accuracy']), dict(criterion='Is rude', points=-3, tags=['axis:accuracy'])]
    rows = [dict(prompt=[dict(role='user', content=w)], prompt_id=w, rubrics=rubric, example_tags=['theme:' + t]) for w, t in (('Why?', 'a'), ('How?', 'b'), ('Who?', 'b'))]
    (home / 'health.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (home / 'wrong.jsonl').write_text(json.dumps({k: v for k, v in rows[0].items() if k != 'rubrics'}))
    return home


def command(**changes):
    flags = dict(model='model', data='data.jsonl', rewards='my_rewards:vowels,my_rewards:wanted', aggregation='rvpo', k='0.5', k_end='2', output='out',
                 max_steps='4', num_generations='4', max_completion_length='8', learning_rate='1e-3', save_steps='2', seed='1') | changes
    return ['train', *(x for f, v in flags.items() for x in (f"--{f.replace('_', '-')}", v))]


def test_train_on_a_users_own_files_and_resume(home):
    done = subprocess.run([RVPO, *command()], cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'out' in done.stdout and 'vowels' in done.stderr, 'results go to stdout, the progress bar with each reward to stderr'
    log = [json.loads(line) for line in (home / 'out' / 'log.jsonl').read_text().splitlines()]
    assert [x['step'] for x in log] == [1, 2, 3, 4] and [x['k'] for x in log] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert {'reward/vowels/mean', 'reward/wanted/std', 'time/sample', 'completions/mean_length'} <= set(log[0])
    assert log[0]['reward/vowels/pass_rate'] is None, 'without bounds or threshold nobody knows what a pass is'
    assert sorted(p.name for p in (home / 'out').glob('checkpoint-*')) == ['checkpoint-2', 'checkpoint-4']
    table = pd.concat(map(pd.read_parquet, sorted((home / 'out' / 'completions').glob('*.parquet'))))
    assert list(table.columns) == ['step', 'group', 'prompt', 'completion', 'vowels', 'wanted', 'advantage'] and len(table) == 32
    from transformers import AutoModelForCausalLM
    trained, first = (AutoModelForCausalLM.from_pretrained(home / d) for d in ('out', 'model'))
    assert any(not torch.equal(p, q) for p, q in zip(trained.parameters(), first.parameters()))
    again = subprocess.run([RVPO, *command()], cwd=home, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2 and 'already holds a run' in again.stderr
    resumed = subprocess.run([RVPO, *command(), '--resume'], cwd=home, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize('changes, words', [
    (dict(model='nowhere'), ["model 'nowhere'"]),
    (dict(data='nowhere.jsonl'), ["'nowhere.jsonl' does not exist"]),
    (dict(data='noprompt.jsonl'), ['no column "prompt"', 'question']),
    (dict(data='broken.jsonl'), ["'broken.jsonl', line 1"]),
    (dict(data='empty.jsonl'), ["'empty.jsonl'"]),
    (dict(data='taken.jsonl'), ["column 'completions'", 'renamed']),
    (dict(data='my_rewards.py'), ['neither .jsonl, .json, .parquet nor .csv']),
    (dict(data='chat.jsonl'), ['row 0', 'chat template']),
    (dict(model='truncated'), ["cannot load model 'truncated'"]),
    (dict(model='remote'), ["cannot load model 'remote'"]),
    (dict(rewards='my_rewards:broken'), ["'broken'", 'KeyError', 'no such column']),
    (dict(rewards='my_rewards:short'), ["'short'", '1 values for 2']),
    (dict(rewards='my_rewards:endless'), ["'endless'", 'row 0', 'infinite']),
    (dict(rewards='my_rewards:absent'), ["no function 'absent'"]),
    (dict(rewards='no_module:f'), ["'no_module'"]),
    (dict(rewards='vowels'), ['module:function']),
    (dict(rewards='my_rewards:vowels,my_rewards:both'), ["two rewards are called 'vowels'"]),
    (dict(aggregation='rpvo'), ["'rpvo'", 'rvpo, ']),
    (dict(k='-1'), ['-1.0']),
    (dict(k='inf', aggregation='rvpo_explicit'), ['finite', 'k=inf']),
    (dict(lr_scheduler_type='sinus'), ["lr_scheduler_type 'sinus'", 'cosine']),
    (dict(beta='-1'), ['beta', '-1.0']),
    (dict(max_steps='0'), ['max_steps', '0']),
    (dict(num_generations='1'), ['num_generations']),
    (dict(max_completion_length='60'), ['row 0', '9 tokens', '1 to 4']),
    (dict(max_completion_length='99'), ['max_completion_length', 'lower it by 36']),
    (dict(reward_weights='-1'), ['1 weights for 2 rewards']),
])
def test_bad_input_is_one_sentence_and_exit_code_2(home, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(home)
    assert main(command(output=f'bad-{len(words)}', **changes)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith('rvpo: ') and all(w in err[0] for w in words), err
    assert not (home / f'bad-{len(words)}' / 'log.jsonl').exists(), 'no step was taken'


def test_a_reward_that_turns_bad_later_stops_the_run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(command(output='late', rewards='my_rewards:late')) == 1
    assert "rvpo: step 3: reward 'late'" in capsys.readouterr().err and len((home / 'late' / 'log.jsonl').read_text().splitlines()) == 2


@pytest.mark.parametrize('argv', [['train'], ['train', '--k', 'much'], ['nonsense'], []])
def test_a_command_line_that_cannot_be_read(argv):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2


def evaluation(**changes):
    flags = dict(task='mine', data='data.jsonl', rewards='my_rewards:both', model='model', output='measured', max_completion_length='8', temperature='1',
                 num_generations='2') | changes
    return ['evaluate', *(x for f, v in flags.items() if v for x in (f"--{f.replace('_', '-')}", v))]


def test_evaluate_on_a_users_own_files_twice(home):
    done, again = (subprocess.run([RVPO, *evaluation()], cwd=home, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (home / 'measured' / 'completions.jsonl').read_text().splitlines()]
    results = {r['metric']: r for r in json.loads((home / 'measured' / 'results.json').read_text())['results']}
    assert len(lines) == 12 and results['vowels']['n'] == 6 and results['wanted']['n'] == 5 and results['wanted']['missing'] == 2
    assert results['vowels']['value'] == pytest.approx(sum(x['scores']['vowels'] for x in lines) / 12)
    assert 'vowels' in done.stdout and '95 % interval' in done.stdout and 'mine' in done.stderr, 'results go to stdout, the progress bar to stderr'
    assert again.stdout == done.stdout and again.stderr == '', 'what is done is read'


def test_evaluate_with_a_judge_over_http(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    def judge(messages): return json.dumps(dict(explanation='', criteria_met='Is polite' in messages[-1]['content']))
    server = serve(judge)
    flags = evaluation(task='healthbench', data='health.jsonl', rewards='', model='talker', output='judged', judge='rules', judge_url=server.url)
    try: assert main([*flags, '--judge-price', '1', '2']) == 0
    finally: server.shutdown()
    out = capsys.readouterr().out  # two verdicts are of the try before the first batch
    assert '14 verdicts' in out and '0 missing' in out and 'theme/b' in out and 'axis/accuracy' in out
    results = {r['metric']: r for r in json.loads((home / 'judged' / 'results.json').read_text())['results']}
    assert results['score']['value'] == 1.0 and results['theme/b']['n'] == 2
    assert main([*flags, '--judge-price', '1', '2']) == 0, 'the server is gone, and not needed any more'


@pytest.mark.parametrize('changes, words', [
    (dict(task='nothing', rewards='', data=''), ["unknown task 'nothing'", 'gsm8k']),
    (dict(task='rubric', rewards=''), ['makes its own prompts']),
    (dict(data=''), ['rewards need data']),
    (dict(data='noprompt.jsonl'), ['no column "prompt"']),
    (dict(model='nowhere'), ["model 'nowhere'"]),
    (dict(task='healthbench', data='health.jsonl', rewards=''), ["'healthbench' needs a judge"]),
    (dict(task='healthbench', data='wrong.jsonl', rewards='', judge='rules', judge_url='http://127.0.0.1:9/v1'), ["'wrong.jsonl", 'row 0', "'rubrics'"]),
    (dict(task='healthbench', data='health.jsonl', rewards='', judge='rules', judge_url='http://127.0.0.1:9/v1'), ['chat template']),
    (dict(task='healthbench', data='health.jsonl', rewards='', judge='model'), ['no chat template']),
    (dict(rewards='my_rewards:broken'), ['KeyError', 'no such column']),
    (dict(temperature='0'), ['at temperature 0', 'num_generations']),
    (dict(temperature='-1'), ['temperature', '-1.0']),
    (dict(num_prompts='0'), ['num_prompts']),
    (dict(max_completion_length='60'), ['row 0'])])
def test_an_evaluation_that_cannot_work_is_one_sentence(home, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(home)
    out = f'not-{abs(hash(str(changes)))}'
    assert main(evaluation(output=out, **changes)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith('rvpo: ') and all(w in err[0] for w in words), err
    assert not (home / out / 'completions.jsonl').exists(), 'nothing was sampled'


def test_demo_leaves_what_it_says(tmp_path):
    done = subprocess.run([RVPO, 'demo', '--steps', '3', '--seeds', '2', '--output', 'out'], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    out = tmp_path / 'out'
    assert {'rewards.png', 'table.csv', 'answers.md', 'log.parquet', 'gdpo-seed0', 'gdpo-seed1', 'rvpo-seed0', 'rvpo-seed1'} <= {p.name for p in out.iterdir()}
    table = pd.read_csv(out / 'table.csv', index_col='method')
    assert list(table.index) == ['gdpo', 'rvpo'] and {'length', 'notice', 'all_passed', 'worst', 'mean'} <= set(table.columns)
    logs = pd.read_parquet(out / 'log.parquet')
    assert len(logs) == 2 * 2 * 3 and table.loc['gdpo', 'length'] == pytest.approx(logs[logs.method == 'gdpo']['reward/length/pass_rate'].mean(), abs=0.006)
    assert (out / 'answers.md').read_text().count('- gdpo') == 3
    before = (out / 'log.parquet').read_bytes()
    again = subprocess.run([RVPO, 'demo', '--steps', '3', '--seeds', '2', '--output', 'out'], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0 and (out / 'log.parquet').read_bytes() == before, 'a finished demo is read, not run again'
    other = subprocess.run([RVPO, 'demo', '--steps', '3', '--credit', '0.9', '--output', 'out'], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert other.returncode == 2 and 'terse_credit' in other.stderr, 'another task is not taken for the one that was run'


@pytest.mark.parametrize('flags', ['--seeds 0', '--steps 0', '--credit 1.5'])
def test_demo_refuses_what_makes_no_sense(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['demo', *flags.split()]) == 2 and flags.split()[0].strip('-') in capsys.readouterr().err


def test_ctrl_c_saves_and_the_run_goes_on(home):
    p = subprocess.Popen([RVPO, *command(output='stopped', max_steps='400', save_steps='1000')], cwd=home, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = home / 'stopped' / 'log.jsonl'
    while p.poll() is None and not (log.exists() and log.stat().st_size): time.sleep(0.01)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=100)
    done = len(log.read_text().splitlines())
    assert p.returncode == 130 and f'step {done} is saved' in err and 0 < done < 400
    assert [c.name for c in (home / 'stopped').glob('checkpoint-*')] == [f'checkpoint-{done}']


def test_no_code_from_a_model_folder_ran(home):
    assert not (home / 'ran').exists()


def logs_of(**ends):
    rows = [dict(setting='', method=m, seed=0, step=(1, 60)[t - 1], all_passed=0.0, **{f'reward/{n}/pass_rate': v[t - 1] for n, v in rates.items()}) for m, rates in ends.items() for t in (1, 2)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize('gdpo, rvpo, words', [
    (dict(a=(0.5, 0.9), b=(0.8, 0.0)), dict(a=(0.5, 0.7), b=(0.8, 0.9)), ['GDPO neglected b in 1 of 1 runs', '0.80 to 0.00', 'RVPO: 0.90', '0.20 less']),
    (dict(a=(0.5, 0.9), b=(0.5, 0.8)), dict(a=(0.5, 0.9), b=(0.5, 0.0)), ['RVPO neglected b in 1 of 1 runs', '0.50 to 0.00', 'GDPO: 0.80']),
    (dict(a=(0.5, 0.75), b=(0.5, 0.8)), dict(a=(0.5, 0.99), b=(0.5, 0.8)), ['Neither method']),
])
def test_the_story_is_told_either_way(gdpo, rvpo, words):
    text = story(logs_of(gdpo=gdpo, rvpo=rvpo))
    assert all(w in text for w in words), text


def test_importing_the_advantages_costs_torch_alone():
    code = 'import sys, rvpo_nb.advantage; print([m for m in ("transformers", "datasets", "matplotlib", "sympy") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=dict(os.environ)).stdout.strip() == '[]'


def test_a_dry_run_says_what_would_run_and_leaves_nothing(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    settings = f'model: {home / "model"}\ndata: data.jsonl\nrewards: my_rewards:both\noutput_dir: never\nmax_steps: 7\nmax_completion_length: 8\nreward_weights: [1, 2]\n'
    (home / 'train.yaml').write_text(settings)
    assert main('train --config train.yaml --dry-run'.split()) == 0
    said = capsys.readouterr().out
    for part in ('7 optimizer steps', '6 prompts', 'vowels: ', 'wanted: ', 'parameters', 'MB', "letter: 'a'", 'output: never'): assert part in said, part
    assert not (home / 'never').exists()
    assert main('train --config=train.yaml --max-steps 9 --dry-run --aggregation gdpo'.split()) == 0
    said = capsys.readouterr().out
    assert '9 optimizer steps' in said and 'aggregation: gdpo' in said, 'flags override the file'
    assert main('train --config train.yaml --dry-run --rewards my_rewards:endless --reward-weights 1'.split()) == 2
    assert 'infinite' in capsys.readouterr().err


def test_dry_runs_of_the_other_commands_leave_nothing(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(f'evaluate --task mine --data data.jsonl --rewards my_rewards:both --model {home / "model"} --output never --dry-run'.split()) == 0
    said = capsys.readouterr().out
    for part in ('task: mine, 6 prompts', 'vowels: ', 'wanted: ', 'parameters', "letter: 'a'", 'output: never'): assert part in said, part
    assert main('evaluate --task rubrik --model m --output never --dry-run'.split()) == 2
    assert main('compare conflict --seeds 0 1 --steps 3 --output never --dry-run'.split()) == 0
    said = capsys.readouterr().out
    for part in ('2 seeds), 0 begun or done', 'max_steps 3', 'gdpo', 'output: never'): assert part in said, part
    assert main('demo --output never --dry-run'.split()) == 0
    assert 'runs: 2 (2 methods x 1 settings x 1 seeds)' in capsys.readouterr().out
    assert not (home / 'never').exists()


@pytest.mark.parametrize('text, message', [
    ('max_steps = ', 'cannot be read'), ('', 'holds no settings'), (None, 'cannot be read'), ('max_stepz = 3', 'max-stepz')])
def test_a_config_that_is_none_is_refused(home, monkeypatch, capsys, text, message):
    monkeypatch.chdir(home)
    path = home / ('none.yaml' if text == '' else 'none.toml')
    path.unlink(missing_ok=True)
    if text is not None: path.write_text(text)
    try: code = main(['train', '--config', path.name, '--model', 'm', '--data', 'd', '--rewards', 'r:r'])
    except SystemExit as e: code = e.code  # tyro's own word on unknown flags
    said = capsys.readouterr()
    assert code == 2 and message in said.err + said.out
    assert main(['train', '--config']) == 2

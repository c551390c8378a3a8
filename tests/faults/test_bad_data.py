"""Data files that broke off, never end, or mean something else than they say, and tokenizers that do not fit."""
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rvpo_nb.cli import main
from rvpo_nb.data import MAX_LINE, MAX_LIST, load_prompts, read_rows
from rvpo_nb.inputs import GRPOConfig, load_model
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY
from rvpo_nb.trainer import GRPOTrainer

P = 'A cold. Advise on: rest soup'


def lines(*rows): return '\n'.join(json.dumps(r) for r in rows)
def words(completions, **columns): return [float(len(c.split())) for c in completions]


def train(home, data, *more, model=RUBRIC_POLICY, out='out'):
    "Run `rvpo train` for one step; returns the exit code."
    flags = dict(model=model, data=data, rewards='my_data_rewards:words', output=home / out, max_steps=1, num_generations=4, max_completion_length=8)
    return main(['train', '--disable-tqdm', *(str(x) for f, v in flags.items() for x in (f"--{f.replace('_', '-')}", v)), *more])


def new(home, rows, model=RUBRIC_POLICY, tokenizer=None, **changes):
    args = GRPOConfig(output_dir=str(home / 'api'), **dict(max_steps=1, num_generations=4, max_completion_length=8, disable_tqdm=True) | changes)
    return GRPOTrainer(model, [words], args, train_dataset=rows, processing_class=tokenizer)


FILES = [  # name, content, what is said
    ('a.jsonl', lines(dict(prompt=P), dict(prompt='')), "row 1: the prompt must be a non-empty string"),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=' \n ')), 'row 1: the prompt has 0 tokens'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=None)), 'row 1: the prompt must be a non-empty string'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=3)), 'row 1: the prompt must be a non-empty string'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=[])), 'row 1: the prompt must be a non-empty string'),
    ('a.jsonl', lines(dict(prompt=P), dict(question='x')), 'row 1 of the training data has no column "prompt"'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt='soup ' * 400)), 'row 1: the prompt has 400 tokens; the model has room for 1 to 120'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=[dict(role='user', content='x')])), 'row 1: the prompt is a list of chat messages, and the tokenizer has no chat template'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=[1, 2])), 'row 1: the prompt [1, 2] is no list of chat messages'),
    ('a.jsonl', lines(dict(prompt=P), dict(prompt=[dict(content='x')])), 'row 1: the prompt [{'),
    ('a.jsonl', lines(dict(prompt=P)) + '\n[1, 2]\n', 'row 1 is [1, 2], not an object'),
    ('a.jsonl', lines(dict(prompt=P)) + '\n"x"\n', "row 1 is 'x', not an object"),
    ('a.jsonl', '{"prompt": "%s", "prompt": "B"}' % P, "line 1: a name is given twice: 'prompt', 'prompt'"),
    ('a.jsonl', '{"prompt": "%s", "x": {"a": 1, "a": 2}}' % P, "line 1: a name is given twice: 'a', 'a'"),
    ('a.jsonl', lines(dict(prompt=P)) + '\n{"prompt": "A \x00 cold"}', 'line 2: Invalid control character'),
    ('a.jsonl', lines(dict(prompt=P)) + '\n{"prompt": "A cold \\ud800"}', "line 2: 'utf-8' codec can't encode"),
    ('a.jsonl', lines(dict(prompt=P)) + '\n{"prompt": "%s", "x": ["\\uDC00"]}' % P, "line 2: 'utf-8' codec can't encode"),
    ('a.json', '[{"prompt": "A cold \\ud800"}]', "'utf-8' codec can't encode"),
    ('a.jsonl', lines(dict(prompt=P)).encode() + b'\n{"prompt": "A \xed\xa0\x80"}', 'line 2 is not UTF-8'),
    ('a.jsonl', lines(dict(prompt=P)).encode() + b'\n' + '{"prompt": "Où?"}'.encode('latin-1'), 'line 2 is not UTF-8'),
    ('a.jsonl', lines(dict(prompt=P)).encode('utf-16'), 'line 1 is not UTF-8'),
    ('a.csv', 'prompt\nOù?\n'.encode('latin-1'), 'line 2 is not UTF-8'),
    ('a.jsonl', '', 'has no rows'), ('a.jsonl', '\n \n\n', 'has no rows'), ('a.json', '', 'has no rows'), ('a.json', '[]', 'has no rows'), ('a.csv', '', 'has no rows'), ('a.csv', 'prompt\n', 'has no rows'),
    ('a.parquet', b'', 'cannot read data'), ('a.parquet', b'PAR1xxxx', 'cannot read data'), ('a.jsonl', b'\x1f\x8b\x08\x00', 'line 1 is not UTF-8'),
    ('a.jsonl', 'hello\n', 'line 1: Expecting value'), ('a.jsonl', lines(dict(prompt=P)) + '\n{"prompt": "A co', 'line 2: Unterminated string'),
    ('a.jsonl', '{"prompt": "%s", "x": %s}' % (P, '[' * 50_000 + ']' * 50_000), 'line 1: brackets nest too deep'),
    ('a.jsonl', '{"prompt": "%s", "x": %s}' % (P, '9' * 5000), 'line 1: Exceeds the limit'),
    ('a.csv', 'prompt,x,x\n%s,1,2\n' % P, "has two columns 'x'"), ('a.csv', 'prompt,prompt\n%s,2\n' % P, "has two columns 'prompt'"),
    ('a.csv', 'prompt,x\n%s,1,2\n' % P, 'line 2: more values than columns'), ('a.csv', 'prompt,x\n%s,"abc\nB,1\n' % P, 'the row from line 2 on: unexpected end of data'),
    ('a.jsonl', None, 'does not exist'), ('a.json', None, 'does not exist'), ('folder', None, 'neither .jsonl, .json, .parquet nor .csv'), ('a.txt', 'x', 'neither .jsonl'),
    *[('a.jsonl', lines({'prompt': P, c: 'x'}), f'the column {c!r} of the training data must be renamed') for c in ('prompts', 'completions', 'completion_ids', 'trainer_state', 'log_metric', 'reward_timeout')],
]


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    module = type(sys)('my_data_rewards')
    module.words = words
    monkeypatch.setitem(sys.modules, 'my_data_rewards', module)


def test_a_bad_file_is_one_sentence_before_the_first_step(tmp_path, monkeypatch, capsys, fault_row):
    seen = {}
    for i, (name, content, said) in enumerate(FILES):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        if content is None: Path(name).mkdir()
        else: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert train(folder, name) == 2, (name, content)
        err = capsys.readouterr().err.strip()
        assert err.startswith('rvpo: ') and said in err and '\n' not in err and len(err) < 300, (err, said)
        assert not (folder / 'out').exists()
        seen[said] = err
    row = lambda fault, key, n, remedy: fault_row('data', fault, n, n, seen[key], 'Nothing: it is found before the first step.', remedy)
    row('A file that is empty, broken off, not UTF-8, a folder, or of rows that are no objects', 'line 2 is not UTF-8', sum('prompt' not in s[2] and 'column' not in s[2] for s in FILES), 'Mend the line that is named.')
    row('Prompts that are empty, no text, chats without a template, or longer than the context', 'row 1: the prompt has 400 tokens; the model has room for 1 to 120',
        sum('prompt' in s[2] and 'column' not in s[2] and 'line' not in s[2] for s in FILES), 'Drop or shorten the row that is named.')
    row('Columns that are there twice, or have a name that reward functions get something else by', "has two columns 'x'", sum('column' in s[2] or 'twice' in s[2] for s in FILES), 'Rename the column.')


def test_rows_and_names_that_look_odd_train_as_they_are(tmp_path, monkeypatch, fault_row):
    seen = []
    def spy(completions, **columns):
        seen.append({c: v[0] for c, v in columns.items() if c not in ('completion_ids', 'trainer_state', 'log_metric', 'log_extra')})
        return words(completions)
    names = ['step', 'group', 'completion', 'advantage', 'spy', 'reward', 'self', 'reward_funcs', 'timeout', 'f', 'columns', 'kwargs', '', 'prompt ', 'reward/x', 'a b', 'ü', 'class', '1']
    odd = {c: f'value of {c}' for c in names} | dict(mixed=1, nested={'a': [1, 'x', None, {}]}, big=10 ** 50, none=None, control='\x00\x01\x1b[31m\x7f\u2028\u202e\ufeff')
    rows = [odd | dict(prompt=P), odd | dict(prompt=P, mixed='text', nested=[1]), dict(prompt=P + ' \x00\x01\x1b[31m\x7f\u2028\u202e\ufeff')]
    texts = {'plain.jsonl': lines(*rows), 'bom.jsonl': '\ufeff' + lines(*rows), 'crlf.jsonl': '\r\n'.join(lines(r) for r in rows) + '\r\n', 'list.json': json.dumps(rows, indent=1),
             'blank.jsonl': '\n\n' + lines(*rows).replace('\n', '\n \n') + '\n\n'}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        assert load_prompts(tmp_path / name) == rows, name
    (tmp_path / 'bom.csv').write_bytes(('\ufeffprompt,x\r\n"%s",\x00\r\n"a\r\nb",\r\n' % P).encode())
    assert load_prompts(tmp_path / 'bom.csv') == [dict(prompt=P, x='\x00'), dict(prompt='a\r\nb', x=None)]
    GRPOTrainer(RUBRIC_POLICY, [spy], GRPOConfig(output_dir=str(tmp_path / 'out'), max_steps=3, num_generations=4, max_completion_length=8, per_device_train_batch_size=12, disable_tqdm=True),
                train_dataset=load_prompts(tmp_path / 'plain.jsonl')).train()
    assert seen[0] == odd | dict(prompts=P) and len(seen) == 4
    table = pd.read_parquet(tmp_path / 'out' / 'completions' / 'completions_00001.parquet')
    assert list(table.columns) == ['step', 'group', 'prompt', 'completion', 'spy', 'advantage'] and (table.step == 1).all() and set(table.prompt) == {r['prompt'] for r in rows}
    tried = len(texts) + 1 + len(odd)
    fault_row('data', 'Byte order marks, CRLF, blank lines, NUL and control characters, columns named like rewards or like those of the log, mixed types', tried, tried,
              '(nothing: values reach the rewards as they stand in the file)', 'Nothing.', 'None is needed.')


def test_a_parquet_file_with_a_column_twice(tmp_path, fault_row):
    pq.write_table(pa.table([pa.array([P]), pa.array(['1']), pa.array(['2'])], names=['prompt', 'x', 'x']), tmp_path / 'a.parquet')
    with pytest.raises(InputError, match="has two columns 'x'") as e: load_prompts(tmp_path / 'a.parquet')
    for bad in ([{'prompt': P, 3: 'x'}], [{'prompt': P}, 'x'], [['prompt']], [], None, [{'prompt': 'A \ud800'}], [{'prompt': b'x'}], [{'prompt': float('nan')}]):
        with pytest.raises(InputError, match='row|rows'): new(tmp_path, bad)
    fault_row('data', 'A parquet file with a column twice; lists of rows that are none, given to GRPOTrainer', 9, 9, str(e.value).replace(str(tmp_path), 'OUT'), 'Nothing: it is found before the first step.', 'Rename the column.')


READ = '''import resource, sys
from rvpo_nb.softmin import InputError
from rvpo_nb.data import load_prompts
import csv, json
megabytes = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmSize')).split()[1]) // 1024
resource.setrlimit(resource.RLIMIT_AS, ((megabytes() + 256) * 2 ** 20,) * 2)
for name in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try: load_prompts(name)
    except InputError as e: print(e, '|', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)'''


def read_limited(folder, *names):
    "Read files in a process that may have 256 MB more than it starts with; returns the sentences, and by how many MB each made it grow."
    done = subprocess.run([sys.executable, '-c', READ, *names], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said, grown = zip(*(line.rsplit(' | ', 1) for line in done.stdout.splitlines()))
    return said, [int(x) for x in grown]


def write_long(path, before, size, after):
    with open(path, 'wb') as f:
        f.write(before)
        for _ in range(size // 10 ** 6): f.write(b'x' * 10 ** 6)
        f.write(after)


def long_lines(folder, size, fault_row):
    write_long(folder / 'a.jsonl', lines(dict(prompt=P)).encode() + b'\n{"prompt": "', size, b'"}\n')
    write_long(folder / 'a.csv', b'prompt,x\nA cold.,1\nB,', size, b'\n')
    (folder / 'b.csv').write_text('prompt,x\nA cold.,"' + 'many lines\n' * (2 * MAX_LINE // 11))
    (folder / 'a.json').symlink_to(folder / 'a.jsonl')
    said, grown = read_limited(folder, 'a.jsonl', 'a.csv', 'b.csv', 'a.json')
    assert said[:2] == (f"'a.jsonl', line 2 is longer than {MAX_LINE:,} bytes", f"'a.csv', line 3 is longer than {MAX_LINE:,} bytes") and 'field larger than field limit' in said[2] and said[3] == said[0].replace('.jsonl', '.json')
    assert max(grown) < 200, 'the line is not read to its end'
    fault_row('data', f'A line of {size:,} characters (.jsonl, .csv, a quote that is never closed), read with 256 MB of memory to spare', len(said), len(said), said[0],
              f'Nothing: it is found before the first step. The reader grew by {max(grown)} MB at most.', 'Look at the line that is named.', grown_mb=max(grown))


def test_a_line_that_does_not_end_is_not_read_to_its_end(tmp_path, fault_row): long_lines(tmp_path, 40 * 10 ** 6, fault_row)


@pytest.mark.long
def test_a_line_of_a_billion_characters(tmp_path, fault_row):
    long_lines(tmp_path, 10 ** 9, fault_row)
    with open(tmp_path / 'list.json', 'wb') as f: f.write(b'[{"prompt": "'), f.truncate(MAX_LIST + 1)
    assert 'write one object a line' in read_limited(tmp_path, 'list.json')[0][0]


def test_the_longest_line_that_is_allowed_is_read(tmp_path):
    text = json.dumps(dict(prompt='x'))
    (tmp_path / 'a.jsonl').write_text('{"prompt": "' + 'x' * (MAX_LINE - len(text)) + '"}\n')
    assert len(load_prompts(tmp_path / 'a.jsonl')[0]['prompt']) == MAX_LINE - len(text)
    (tmp_path / 'a.jsonl').write_text('{"prompt": "' + 'x' * (MAX_LINE - len(text) + 1) + '"}\n')
    with pytest.raises(InputError, match='line 1 is longer'): list(read_rows(tmp_path / 'a.jsonl'))


def test_tokenizers_that_do_not_fit_the_model(tmp_path, monkeypatch, capsys, fault_row):
    from transformers import LlamaConfig, LlamaForCausalLM
    (tmp_path / 'data.jsonl').write_text(lines(dict(prompt=P)))
    (tmp_path / 'chat.jsonl').write_text(lines(dict(prompt=[dict(role='user', content='soup')])))
    monkeypatch.chdir(tmp_path)
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64)
    model, tokenizer = load_model(RUBRIC_POLICY)
    words_known, said = len(tokenizer), []
    def folder(name, change=lambda t: None, size=words_known):
        "Save a model with an embedding of some size, and the tokenizer with a change."
        t = load_model(RUBRIC_POLICY)[1]
        change(t)
        LlamaForCausalLM(LlamaConfig(vocab_size=size, bos_token_id=None, eos_token_id=None, **tiny)).save_pretrained(tmp_path / name), t.save_pretrained(tmp_path / name)
        return name
    def no_pad(t): t.pad_token = None
    def no_end(t): t.eos_token = None
    def more(t): t.add_tokens(['soup!', 'A-new-word'])
    def new_end(t): t.add_special_tokens(dict(eos_token='<end>'))
    def broken_template(t): t.chat_template = '{{ raise_exception("no") }}'
    def unclosed_template(t): t.chat_template = '{% for m in messages %}'
    (tmp_path / 'more.jsonl').write_text(lines(dict(prompt=P), dict(prompt='soup A-new-word')))
    for data, name, change, size, code, words_ in (
            ('data.jsonl', 'no_end', no_end, words_known, 2, 'the tokenizer has no eos_token: completions could not end'), ('data.jsonl', 'no_pad', no_pad, words_known, 0, ''),
            ('chat.jsonl', 'plain', no_pad, words_known, 2, 'row 0: the prompt is a list of chat messages, and the tokenizer has no chat template'),
            ('chat.jsonl', 'broken', broken_template, words_known, 2, 'row 0: the chat template cannot render the prompt'), ('chat.jsonl', 'unclosed', unclosed_template, words_known, 2, 'row 0: the chat template cannot render'),
            ('more.jsonl', 'more', more, words_known, 2, f"row 1: the tokenizer makes token {words_known + 1} ('A-new-word'), and the model has embeddings for {words_known}"),
            ('data.jsonl', 'more_unused', more, words_known, 0, ''), ('data.jsonl', 'new_end', new_end, words_known, 2, f'the tokenizer ends texts with token {words_known}, and the model has embeddings for {words_known}'),
            ('data.jsonl', 'small', no_pad, 8, 2, 'row 0: the tokenizer makes token'), ('data.jsonl', 'large', no_pad, words_known + 40, 0, '')):
        assert train(tmp_path, data, model=folder(name, change, size), out=f'out-{name}') == code, name
        err = capsys.readouterr().err.strip()
        assert words_ in err and (code == 0 or err.startswith('rvpo: ') and '\n' not in err), (name, err)
        said.append(err)
    fault_row('data', 'A tokenizer without end token, padding or chat template, or with more words than the model has embeddings', len(said), len(said), said[5],
              'Nothing: it is found before the first step.', 'Use the tokenizer of the model; after adding words, call model.resize_token_embeddings.')

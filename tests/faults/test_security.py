"""Files, names and servers that mean harm: nothing that they bring is run, nothing secret is written down, nothing leaves its folder."""
import ast
import base64
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import rvpo_nb
from rvpo_nb.ask import AskFailed, Endpoint, run, serve
from rvpo_nb.audit import audit
from rvpo_nb.cli import main, with_config
from rvpo_nb.data import load_prompts, read_rows
from rvpo_nb.experiment import Plan, check_runs, read_plan, run_folder
from rvpo_nb.inputs import GRPOConfig, describe, load_model
from rvpo_nb.judge import Cache
from rvpo_nb.local import LocalModel
from rvpo_nb.checkpoint import load_checkpoint
from rvpo_nb.record import load_dump
from rvpo_nb.report import page
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
from rvpo_nb.trainer import GRPOTrainer, RunFailed

MODULES = sorted(Path(rvpo_nb.__file__).parent.glob('*.py'))


class Evil:
    "Create a file when it is unpickled."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


def plain(e, *folders):
    "What a user sees, without the folders of this machine."
    text = f'{e}'.splitlines()[0]
    for f in folders: text = text.replace(str(f), 'OUT')
    return text


def tiny(folder, **changes):
    "Make a trainer of the shipped policy that writes to `folder`."
    settings = dict(output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, max_completion_length=8, max_steps=2, save_steps=1, learning_rate=1e-3, disable_tqdm=True)
    return GRPOTrainer(RUBRIC_POLICY, [rubric_rewards()[i] for i in (0, -1)], GRPOConfig(**settings | changes), rubric_prompts(4))


# --- what no module may call

FORBIDDEN = {'eval', 'exec', '__import__', 'os.system', 'os.popen', 'torch.load', 'torch.hub.load', 'np.load', 'numpy.load', 'pd.read_pickle', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load',
             'sympify', 'parse_expr', 'sympy.sympify', 'joblib.load', 'tempfile.mktemp', 'load_peft_weights'}
IMPORTS = {'pickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'joblib', 'code', 'runpy'}
BY_NAME = {'import_module': {'reward.py', 'record.py', 'verl.py'}, 'subprocess.Popen': {'maths.py'}}  # rewards as the user names them; one of three trackers; verl's own; a worker of ours


def findings(source, file):
    "List what a module does that could run what it reads."
    out = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
        out += [f'{file}: imports {n}' for n in names if n.split('.')[0] in IMPORTS]
        if isinstance(node, ast.ImportFrom): out += [f'{file}: imports {a.name}' for a in node.names if a.name in FORBIDDEN]
        if not isinstance(node, ast.Call): continue
        name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if name in FORBIDDEN or name.split('.')[-1] in ('read_pickle', 'loads') and name.split('.')[0] in IMPORTS: out.append(f'{file}: calls {name}')
        for known, files in BY_NAME.items():
            if name.endswith(known) and file not in files: out.append(f'{file}: calls {name}')
        for flag, bad in dict(trust_remote_code=(False, True), weights_only=(True, False), allow_pickle=(False, True), shell=(False, True)).items():
            if flag in given and not (isinstance(given[flag], ast.Constant) and given[flag].value is bad[0]): out.append(f'{file}: {name} with {flag}={ast.unparse(given[flag])}')
        if name.endswith('.from_pretrained') and 'trust_remote_code' not in given: out.append(f'{file}: {name} without trust_remote_code=False')
        if 'AutoModel' in name and name.endswith('.from_pretrained') and 'use_safetensors' not in given: out.append(f'{file}: {name} without use_safetensors=True')
    return out


PLANTED = ['eval(x)', 'import pickle', 'from dill import loads', 'torch.load(p)', 'np.load(p, allow_pickle=True)', 'yaml.load(x)', 'AutoModelForCausalLM.from_pretrained(p, trust_remote_code=False)',
           'AutoTokenizer.from_pretrained(p)', 'AutoTokenizer.from_pretrained(p, trust_remote_code=t)', 'f(shell=True)', 'importlib.import_module(x)', 'from sympy import sympify', 'torch.load(p, weights_only=False)',
           'load_peft_weights(p)', 'subprocess.Popen(x)']


def test_no_module_unpickles_or_evaluates(fault_row):
    for source in PLANTED: assert findings(source, 'x.py'), source
    found = [x for path in MODULES for x in findings(path.read_text(), path.name)]
    assert not found and len(MODULES) > 30
    fault_row('security', 'calls of pickle, eval, exec, torch.load, yaml.load or remote code in the modules', len(MODULES), len(MODULES), 'none in any module', 'nothing',
              'Nothing. A reward that is named as module:function is code, and so is a plan or a config file that names one: read those of other people before you run them.')


# --- model folders

def config(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(folder, ran, name='pytorch_model.bin'): torch.save(dict(weight=Evil(ran)), folder / name)
def code(folder, ran): (folder / 'code.py').write_text(f'open({str(ran)!r}, "w")\n')
def without(folder): (folder / 'model.safetensors').unlink()


def index(folder, name, shard):
    without(folder)
    (folder / name).write_text(json.dumps(dict(metadata={}, weight_map={'lm_head.weight': shard})))


def elsewhere(folder, ran):
    shutil.copy(folder / 'model.safetensors', folder.parent / 'outside.safetensors')
    index(folder, 'model.safetensors.index.json', '../outside.safetensors')


def adapter(folder, ran, base):
    (folder / 'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=str(base or folder), r=2, lora_alpha=2, target_modules=['q_proj'])))
    pickled(folder, ran, 'adapter_model.bin')


def evil_base(folder, ran):
    base = shutil.copytree(RUBRIC_POLICY, folder.parent / 'base')
    index(base, 'model.safetensors.index.json', 'x.bin'), pickled(base, ran, 'x.bin')
    for name in ('config.json', 'model.safetensors'): (folder / name).unlink()
    adapter(folder, ran, base)


def remote(where, **changes):
    def make(folder, ran):
        path = folder / where
        path.write_text(json.dumps(json.loads(path.read_text()) | changes)), code(folder, ran)
    return make


AUTO = dict(auto_map=dict(AutoConfig='code.C', AutoModelForCausalLM='code.M', AutoTokenizer=['code.T', None]))
FOLDERS = {  # what is in the folder -> may it load, as the harm is in a file that nobody needs
    'a pickle for weights': (lambda f, ran: (without(f), pickled(f, ran)), False),
    'a pickle beside the weights': (pickled, True),
    'a pickle called model.safetensors': (lambda f, ran: pickled(f, ran, 'model.safetensors'), False),
    'an index of pickles': (lambda f, ran: (index(f, 'pytorch_model.bin.index.json', 'x.bin'), pickled(f, ran, 'x.bin')), False),
    'an index of safetensors that names a pickle': (lambda f, ran: (index(f, 'model.safetensors.index.json', 'x.bin'), pickled(f, ran, 'x.bin')), False),
    'an index that names a file elsewhere': (elsewhere, False),
    'an index that nests too deep': (lambda f, ran: (without(f), (f / 'model.safetensors.index.json').write_text('[' * 100_000)), False),
    'an adapter in a pickle': (lambda f, ran: adapter(f, ran, None), False),
    'an adapter whose base is a pickle': (evil_base, False),
    'code for a known kind of model': (remote('config.json', **AUTO), True),
    'code for a new kind of model': (remote('config.json', model_type='theirs', **AUTO), False),
    'code for the tokenizer': (remote('tokenizer_config.json', tokenizer_class='Theirs', **AUTO), True),
    'attention from the hub': (remote('config.json', _attn_implementation='someone/kernel'), False),
    'attention from the hub in a part': (remote('config.json', text_config=dict(attn_implementation='someone/kernel:fast')), False),
    'pickles for the tokenizer': (lambda f, ran: [(f / n).write_bytes(pickle.dumps(Evil(ran))) for n in ('vocab.pkl', 'added_tokens.json', 'special_tokens_map.json', 'vocab.bin')], None),
}


def test_hostile_model_folders_run_nothing(tmp_path, fault_row):
    ran, said, template = tmp_path / 'ran', {}, "{{ messages[-1]['content'] }}"
    pickled(tmp_path, ran, 'control.bin')
    with pytest.raises(Exception): torch.load(tmp_path / 'control.bin', weights_only=False).missing
    assert ran.exists(), 'the pickle does its harm where it is loaded'
    ran.unlink()
    tried = 0
    for i, (what, (make, loads)) in enumerate(FOLDERS.items()):
        folder = shutil.copytree(RUBRIC_POLICY, tmp_path / str(i) / 'model')
        (folder / 'chat_template.jinja').write_text(template)
        make(folder, ran)
        for load in (load_model, LocalModel):
            tried += 1
            try: load(str(folder))
            except InputError as e:
                assert loads is not True or load is LocalModel, f'{what}: {e}'  # which on some versions of transformers takes no generic tokenizer
                said[what] = plain(e, folder)
            else: assert loads is not False, what
            assert not ran.exists(), what
    assert all(words in said[what] for what, words in {
        'a pickle for weights': 'no file named model.safetensors', 'an index of safetensors that names a pickle': "its index names 'x.bin'", 'attention from the hub': "code from the hub, 'someone/kernel'",
        'an index that names a file elsewhere': "'../outside.safetensors'", 'an adapter whose base is a pickle': "its index names 'x.bin'"}.items()), said
    fault_row('security', 'a model folder with pickles, code, kernels or an index that leads elsewhere', tried, tried, said['an index of safetensors that names a pickle'], 'nothing',
              'Ask for the weights as safetensors. Two things in a model folder are still programs in a small way: its chat template is run by a sandboxed Jinja, and can take long; its weights can be made to say anything.')


def test_a_checkpoint_holds_no_pickle(tmp_path, fault_row):
    tiny(tmp_path / 'run').train()
    ran, tried = tmp_path / 'ran', 0
    whole = tmp_path / 'run' / 'checkpoint-1'
    assert not [p for p in (tmp_path / 'run').rglob('*') if p.suffix in ('.bin', '.pt', '.pth', '.pkl')], 'nothing is pickled'
    for name in ('optimizer.safetensors', 'model.safetensors', 'trainer_state.json', 'config.json'):
        bad = shutil.copytree(whole, tmp_path / name / 'run' / 'checkpoint-1')
        (bad / 'SHA256SUMS').unlink(missing_ok=True), (bad / name).unlink()
        pickled(bad, ran, name), pickled(bad, ran, 'pytorch_model.bin'), pickled(bad, ran, 'optimizer.pt')
        with pytest.raises(InputError) as e: tiny(bad.parent).train(resume_from_checkpoint=True)
        tried += 1
        assert not ran.exists() and 'checkpoint-1' in str(e.value)
    t = tiny(tmp_path / 'new')
    dump = tmp_path / 'dump'
    dump.mkdir()
    pickled(dump, ran, 'rollouts.safetensors')
    with pytest.raises(Exception) as unread: load_dump(dump)
    assert not ran.exists() and 'afetensor' in type(unread.value).__name__
    peft = pytest.importorskip('peft')
    lora = peft.get_peft_model(t.model, peft.LoraConfig(r=2, target_modules='all-linear', task_type='CAUSAL_LM'))
    shutil.copy(whole / 'optimizer.safetensors', dump / 'optimizer.safetensors'), pickled(dump, ran, 'adapter_model.bin')
    with pytest.raises(InputError, match='adapter_model.safetensors'): load_checkpoint(dump, lora, t)
    assert not ran.exists()
    fault_row('security', 'a checkpoint, a dump or an adapter with a pickle in place of each file', tried + 2, tried + 2, plain(e.value, bad.parent), 'nothing', 'Put the file back from a copy.')


# --- tables and settings

def table(**more): return pa.table(dict(prompt=['a', 'a', 'b', 'b'] * 4, group=[0, 0, 1, 1] * 4, step=[1] * 8 + [2] * 8, good=[0.0, 1, 1, 0] * 4, **more))


def pandas_says(**says): return {b'pandas': json.dumps(dict(dict(index_columns=[], column_indexes=[], columns=[], creator={}, pandas_version='2'), **says)).encode()}
def hub_says(kind): return {b'huggingface': json.dumps(dict(info=dict(features=dict(prompt=dict(dtype='string', _type='Value'), picture=dict(_type=kind))))).encode()}


def hostile_tables(folder, ran, url):
    "Yield parquet files whose metadata asks for something to be run, opened, or built."
    call = f'__import__("pathlib").Path({str(ran)!r}).touch()'
    column = lambda **says: dict(columns=[dict(dict(name='good', field_name='good', pandas_type='object', numpy_type='object', metadata=None), **says)])
    says = [dict(index_columns=['group']), dict(index_columns=['nothing']), dict(index_columns=5), dict(index_columns=[dict(kind='range', name=None, start=0, stop=10 ** 18, step=1)]),
            dict(column_indexes=[dict(name=None, field_name=None, pandas_type='unicode', numpy_type=call, metadata=None)]), dict(column_indexes=[dict(name=call, field_name=None, pandas_type='bytes', numpy_type='object', metadata=None)]),
            column(numpy_type=call), column(numpy_type='period[x]'), column(numpy_type='interval[int64]'), column(pandas_type='datetimetz', metadata=dict(timezone=call)), dict(columns=call)]
    pictures = pa.array([dict(bytes=None, path=path) for path in ('/etc/passwd', url, 'file:///etc/passwd', 'zip://x::' + url) * 4])
    tables = [table().replace_schema_metadata(pandas_says(**s)) for s in says] + [table().replace_schema_metadata({b'pandas': b'{'})]
    tables += [table(picture=pictures).replace_schema_metadata(hub_says(kind)) for kind in ('Image', 'Audio', 'Video', 'Pdf', 'os', 'Features', 'Value')]
    tables.append(table(rewards_pickled=pa.array([pickle.dumps(Evil(ran))] * 16)))
    for name in (b'arrow.py_extension_type', b'evil.type', b'datasets.features.features.Array2DExtensionType'):
        field = pa.field('more', pa.float64(), metadata={b'ARROW:extension:name': name, b'ARROW:extension:metadata': pickle.dumps(Evil(ran))})
        tables.append(table().append_column(field, pa.array([1.0] * 16)))
    for i, t in enumerate(tables):
        path = folder / f'{i}.parquet'
        parquet.write_table(t, path)
        yield path


class Listener:
    "Count what connects to it, and keep what it is told."
    def __init__(self, reply=(404, {})):
        self.heard = heard = []
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self):
                heard.append((self.path, str(self.headers), self.rfile.read(int(self.headers.get('Content-Length') or 0))))
                self.send_response(reply[0])
                for k, v in dict(reply[1], **{'Content-Length': '0'}).items(): self.send_header(k, v)
                self.end_headers()
            do_POST = do_GET
        self.server = HTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
    def __enter__(self): return self
    def __exit__(self, *error): self.server.shutdown(), self.server.server_close()


def test_hostile_tables_and_settings_run_nothing(tmp_path, fault_row):
    ran, tried, refused = tmp_path / 'ran', 0, []
    def attempt(f, *args):
        nonlocal tried
        tried += 1
        try: out = f(*args)
        except InputError as e: out = refused.append(plain(e, tmp_path))
        assert not ran.exists()
        return out
    with Listener() as there:
        for path in hostile_tables(tmp_path, ran, f'{there.url}/picture.png'):
            found = attempt(audit, path)
            assert 'good' in found.rewards if found else path.name in ('11.parquet', '22.parquet'), (path.name, refused)  # metadata that are no JSON
            for rows in (attempt(load_prompts, path), attempt(lambda p: list(read_rows(p)), path)): assert rows is None or len(rows) == 16 and rows[0]['prompt'] == 'a'
        assert not there.heard, 'an address in a table is not visited'
    rows = [dict(prompt='=cmd|" /C calc"!A0', x='__import__("os").system("touch ran")'), dict(prompt='\x1b]0;x\x07', x='{{ 7 * 7 }}')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path / 'a.csv').write_text('prompt,x\n"=1+1","@SUM(1)"\n')
    assert [dict(r) for r in attempt(load_prompts, tmp_path / 'a.jsonl')] == rows and attempt(load_prompts, tmp_path / 'a.csv')[0] == dict(prompt='=1+1', x='@SUM(1)'), 'text stays text'
    settings = {'a.yaml': f'!!python/object/apply:builtins.open [{ran}, w]', 'b.yaml': f'k: !!python/object/apply:os.system ["touch {ran}"]', 'c.yaml': '[' * 100_000, 'd.toml': 'a = ' + '[' * 100_000,
                'e.yaml': 'a: &a [x, x, x, x, x, x, x, x, x]\n' + '\n'.join(f'{y}: &{y} [{", ".join([f"*{x}"] * 9)}]' for x, y in zip('abcdefghi', 'bcdefghij')), 'f.toml': 'k = [[1]]', 'g.yaml': 'k: {a: {b: c}}'}
    for name, text in settings.items():
        (tmp_path / name).write_text(text)
        before = len(refused)
        attempt(with_config, ['train', '--config', str(tmp_path / name)])
        assert len(refused) == before + 1, name
    (tmp_path / 'plan.toml').write_text('methods = ' + '[' * 100_000)
    before = len(refused)
    attempt(read_plan, tmp_path / 'plan.toml')
    assert len(refused) == before + 1
    fault_row('security', 'tables and settings that ask for code, for files or for addresses', tried, tried, refused[-2], 'nothing', 'Nothing: what is in a table is text or a number.')


BOMBS = {'line.jsonl': (b'{"group": 1, "a": "', b'x'), 'line.csv': (b'group,a\n1,', b'x'), 'commas.csv': (b'group,a\n', b','), 'columns.csv': (b'group,a', b',a'), 'deep.jsonl': (b'', b'[')}


def test_small_files_that_unpack_to_large_ones_are_refused(tmp_path, fault_row):
    "In a process that may have 3 GB of addresses: each file unpacks to 1 GB, and pandas would make 10 to 40 GB of two of them."
    sizes = []
    for name, (head, unit) in BOMBS.items():
        path, block = tmp_path / f'{name}.gz', gzip.compress(unit * (2 ** 24 // len(unit)))
        path.write_bytes(gzip.compress(head) + block * 64)
        sizes.append(path.stat().st_size)
    script = ('import resource, sys; from rvpo_nb.audit import audit; from rvpo_nb.softmin import InputError\nimport pyarrow\n'
              'used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(); resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30,) * 2)\n'
              'for path in sys.argv[1:]:\n    try: print(audit(path))\n    except InputError as e: print(e)')
    done = subprocess.run([sys.executable, '-c', script, *sorted(map(str, tmp_path.iterdir()))], capture_output=True, text=True, timeout=200)
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(BOMBS), done.stderr
    assert all('a line of more than 4,194,304 characters' in line for line in said), said
    assert max(sizes) < 2 ** 21
    fault_row('security', f'a log of {max(sizes) / 2 ** 20:.0f} MB that unpacks to lines of a gigabyte', len(said), len(said), plain(said[0], tmp_path), 'nothing',
              'Write one rollout a line. Parquet has no such guard: a file of a few kilobytes can hold strings of gigabytes, so give an audit of files from elsewhere a limit of memory.')


# --- what lies in the folder, and what is shown on the terminal

NAMES = ['\x1b[31mred\x1b[0m', '\x1b]0;title\x07bell', 'back\x08\x08\rspace', 'rtl\u202e', 'nul\x00', '\x9b31m']


def test_an_audit_runs_nothing_that_lies_in_the_folder_and_steers_no_terminal(tmp_path, fault_row):
    ran = tmp_path / 'ran'
    for name in ('pyarrow', 'matplotlib', 'scipy', 'peft', 'openai', 'sitecustomize', 'torch', 'json_repair', 'my_rewards', 'tensorboard', 'wandb'):
        (tmp_path / f'{name}.py').write_text(f'open({str(ran)!r}, "w")\n')
    parquet.write_table(table().rename_columns(['prompt', 'group', 'step', NAMES[0]]).append_column(NAMES[1], pa.array([1.0, 0, 0, 0] * 4)), tmp_path / 'log\x1b[32m.parquet')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    lines = [f'audit log\x1b[32m.parquet {more}' for more in ('--html r.html --json r.json', '--group x\x1b[33m', '--rewards zero')]
    done = subprocess.run([sys.executable, '-P', '-c', SCRIPT], cwd=tmp_path, input='\n'.join(lines).encode(), capture_output=True, timeout=200, env=env)
    out = done.stdout + done.stderr
    assert [x[-1:] for x in out.splitlines() if x.startswith(b'exit')] == [b'0', b'2', b'2'], out
    assert not any(c in out for c in b'\x1b\x07\x08\x00\r') and out.count(b'[31mred') >= 3 and b'log\\u001b[32m.parquet' in out and not ran.exists()
    assert b'\x1b' not in (tmp_path / 'r.html').read_bytes()
    fault_row('security', 'an audit in a folder with modules called like libraries, and names that steer a terminal', len(lines), len(lines), done.stderr.decode().splitlines()[0], 'nothing',
              'Nothing. `rvpo train`, and the other commands where they are given rewards, do import modules of the current folder: do not run them in a folder of files from elsewhere.')


def test_names_from_data_are_never_paths(tmp_path, fault_row):
    labels = ['../../x', '/etc/x', '..', '.', 'a\x00b', 'con', 'nul', 'C:\\x', '-rf', 'a/b', '~', '$HOME', 'x' * 150, '\x1b[31m', '%2e%2e%2f', '\u2025\u2044']
    out, tried, said = tmp_path / 'out', 0, ''
    for label in labels:
        for config in (dict(setting=label, method='m', seed=0), dict(setting='', method=label, seed=0)):
            folder, tried = run_folder(out, config), tried + 1
            assert folder.parent == out and folder.resolve().parent == out.resolve() and folder.name not in ('.', '..', '') and folder.name.isprintable() and len(folder.name.encode()) < 256
            assert folder.stem.casefold() not in ('con', 'nul', 'aux', 'prn')
    plan = lambda *labels: Plan(name='p', task='rubric', methods={x: {} for x in labels}, seeds=1)
    for wrong, words in ((('A', 'a'), 'would share a folder'), (('a/b', 'a:b'), 'would share a folder'), (('ß', 'SS'), 'would share a folder'), (('x' * 300,), 'more than 200 bytes'), (('日' * 90,), 'more than 200 bytes')):
        with pytest.raises(InputError, match=words) as e: check_runs(plan(*wrong), out)
        tried, said = tried + 1, plain(e.value)
    for name in ['../x', '/x', 'a/b', 'step', 'advantage', '', *NAMES]:
        def f(completions, **columns): return [0.0] * len(completions)
        f.__name__ = name
        with pytest.raises(InputError, match='a reward cannot be called'): tiny(out).__init__(RUBRIC_POLICY, [f], GRPOConfig(output_dir=str(out)), rubric_prompts(2))
        tried += 1
    assert not out.exists()
    fault_row('security', 'labels of plans and names of rewards that lead elsewhere, differ in case alone, or are too long', tried, tried, said, 'nothing', 'Choose another label.')


def test_links_in_an_output_folder_lead_nowhere(tmp_path, fault_row):
    "What somebody put into the folder before the run: nothing outside it changes."
    mine = tmp_path / 'mine'
    mine.mkdir()
    for name in ('log.jsonl', 'model.safetensors', 'notes'): (mine / name).write_text('mine')
    out, said = tmp_path / 'out', []
    for links in ({'log.jsonl': 'log.jsonl'}, {'checkpoint-1': ''}, {'.checkpoint-1.part': ''}, {'dump-1': '', '.log.jsonl.part': 'notes', 'checkpoint-0': ''}):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, to in links.items(): (out / name).symlink_to(mine / to)
        try: tiny(out, save_total_limit=1).train(resume_from_checkpoint='log.jsonl' in links)
        except (InputError, RunFailed) as e: said.append(plain(e, out))
        assert sorted(p.name for p in mine.iterdir()) == ['log.jsonl', 'model.safetensors', 'notes'] and {p.read_text() for p in mine.iterdir()} == {'mine'}, links
    fault_row('security', 'links in an output folder that lead out of it', 4, 4, (said or ['nothing: the links are replaced'])[0], 'nothing outside the folder',
              'Write to a folder in which you alone can write: who can write there can replace any file of the run, and the figures and tables at the top of a folder follow a link.')


HTML = '<img src=x onerror=alert(1)>'


def test_a_report_escapes_more_than_names(tmp_path, fault_row):
    "File and column names, beside the names of rewards that test_report.py tries."
    from test_report import check
    path = tmp_path / f'{HTML.replace("/", "")}.parquet'
    t = table().rename_columns([HTML, f'"{HTML}', 'step', "'><svg onload=alert(2)>"])
    parquet.write_table(t, path)
    html = page(audit(path, group=f'"{HTML}'))
    check(html)
    assert '<img' not in html and 'onload=alert(2)>' not in html and '&lt;svg onload' in html
    shown = Plan(name=HTML, question=HTML, metric=HTML, task='rubric', methods={HTML: dict(k=1)}, settings={HTML: dict(terse_credit=HTML)}, seeds=1)._repr_html_()
    assert '<img' not in shown and '&lt;img' in shown
    fault_row('security', 'HTML in the names of files, columns, plans and methods', 2, 2, '&lt;img src=x onerror=alert(1)&gt;, as text', 'nothing', 'Nothing.')


# --- permissions

@pytest.mark.parametrize('umask', [0o000, 0o022, 0o077])
def test_what_is_written_is_no_more_open_than_the_umask_says(umask, tmp_path, fault_row):
    before = os.umask(umask)
    try:
        tiny(tmp_path / 'run', max_steps=1).train()
        cache = Cache(str(tmp_path / 'verdicts.sqlite'))
        cache.put('key', True, 'judge', 'said')
        assert main(['audit', str(tmp_path / 'run'), '--html', str(tmp_path / 'r.html'), '--json', str(tmp_path / 'r.json')]) == 0
    finally: os.umask(before)
    modes = {p: p.stat().st_mode & 0o777 for p in tmp_path.rglob('*')}
    assert not [f'{p} {m:o}' for p, m in modes.items() if m & umask or p.is_file() and m & 0o111]
    kept = {p.name: m for p, m in modes.items() if p.name.startswith('verdicts')}
    assert len(kept) == 3 and set(kept.values()) == {0o600}, kept
    if umask == 0o022: assert modes[tmp_path / 'run'] == 0o755 and modes[tmp_path / 'run' / 'log.jsonl'] == modes[tmp_path / 'run' / 'config.json'] == 0o644
    fault_row('security', f'a run, a judge\'s cache and an audit under umask {umask:03o}', len(modes), len(modes), 'files as the umask says; the judge\'s cache, which quotes answers, for its owner alone (600)', 'nothing',
              'Set `umask 077` before a run whose prompts are private. To share a cache with a group, chmod it: an existing file keeps its mode.')


# --- secrets

KEY, PASSWORD, HF, WANDB, OWN = 'sk-proj-Zq7+/x9Lm2Rt5Vw8', 'pa55+w/ord-Kd83hq', 'hf_QmZ7tY3nB6vC1xW9', '8c1f0e55aa3b4d7792d0wandb', 'own-9f8e7d6c5b4a3210'
REWARDS = '''
import os
from rvpo_nb.ask import Endpoint
from rvpo_nb.judge import Judge, criterion_rewards
judge = Judge(Endpoint('m', os.environ['JUDGE'], patience=0.2), cache='verdicts.sqlite', max_missing=MISSING)
judged = criterion_rewards(judge, 1)

class Own:
    bounds, __name__ = (0, 1), 'own'
    def __init__(self): self.api_key, self.note, self.limit = os.environ['OWN_API_KEY'], 'uses ' + os.environ['HF_TOKEN'], 3
    def __call__(self, completions, **columns): return [i % 2 for i in range(len(completions))]

own = Own()
def leaks(completions, **columns): raise OSError('401 for https://me:' + os.environ['OWN_API_KEY'] + '@h/x with ' + os.environ['WANDB_API_KEY'])
'''
SCRIPT = '''
import os, sys
from rvpo_nb.cli import main
for line in sys.stdin.read().splitlines():
    try: code = main(line.split())
    except SystemExit as e: code = e.code
    print('exit', code, flush=True)
'''


def echo(messages_heard):
    "Make a judge that answers in turn with an error, prose and a verdict, each of which repeats all that it was told and knows."
    def forms(secret): return [secret, quote(secret, safe=''), quote(secret), json.dumps(secret), base64.b64encode(f'Bearer {secret}'.encode()).decode(), base64.urlsafe_b64encode(f'x{secret}'.encode()).decode(),
                               base64.b64encode(f'{{"key": "{secret}"}}'.encode()).decode()]
    told = ' '.join(f for s in (KEY, PASSWORD, HF, WANDB, OWN) for f in forms(s))
    def answer(messages):
        messages_heard.append(messages)
        n = len(messages_heard) % 4
        if n == 1: return 401, {}, json.dumps(dict(error=dict(message=f'Incorrect API key provided: {told}'))).encode()
        if n == 2: return 403, {}, f'refused: {told}'.encode()
        if n == 3: return f'I will not: {told}'
        return json.dumps(dict(explanation=told, criteria_met=True))
    return answer


def letters(secret):
    "All texts in which a secret could be read: as it is, in a URL, and inside base64 at each of the three places where it may begin."
    raw = secret.encode()
    coded = [base64.b64encode(bytes(i) + raw).decode()[-(-4 * i // 3):4 * (i + len(raw)) // 3] for i in range(3)]
    return [secret, quote(secret, safe=''), quote(secret), *coded, *(c.replace('+', '-').replace('/', '_') for c in coded), raw.hex(), secret[::-1]]


def test_no_secret_is_written_anywhere(tmp_path, fault_row):
    home, heard = tmp_path / 'work', []
    home.mkdir()
    for name, missing in dict(my=1.0, strict=0.0).items(): (home / f'{name}_rewards.py').write_text(REWARDS.replace('MISSING', str(missing)).replace('verdicts', name))
    prompts = [dict(prompt=r['prompt'], rubric=[dict(text='Is short')]) for r in rubric_prompts(4)]
    (home / 'data.jsonl').write_text('\n'.join(map(json.dumps, prompts)))
    model = shutil.copytree(RUBRIC_POLICY, home / 'model')
    (model / 'chat_template.jinja').write_text("{{ messages[-1]['content'] }}")
    rubric = [dict(criterion='Is short', points=5, tags=['axis:accuracy'])]
    (home / 'health.jsonl').write_text(json.dumps(dict(prompt=[dict(role='user', content=prompts[0]['prompt'])], prompt_id='1', rubrics=rubric, example_tags=['theme:a'])))
    (home / 'plan.toml').write_text('methods = {gdpo = {aggregation = "gdpo"}, rvpo = {}}\nseeds = 1\n[settings.one]\nmodel = "model"\ndata = "data.jsonl"\nrewards = "my_rewards:judged,my_rewards:own"\n'
                                    '[args]\nmax_steps = 1\nnum_generations = 4\nmax_completion_length = 8\ndisable_tqdm = true\n')
    flags = '--model model --data data.jsonl --max-steps 2 --save-steps 1 --num-generations 4 --max-completion-length 8 --disable-tqdm'
    lines = [f'train {flags} --rewards my_rewards:judged,my_rewards:own --output out', f'train {flags} --rewards my_rewards:leaks --output leaks', 'compare plan.toml --output runs --jobs 1',
             'evaluate --task mine --data data.jsonl --rewards my_rewards:judged --model model --output mine --max-completion-length 8 --disable-tqdm',
             f'evaluate --task healthbench --data health.jsonl --model model --judge m --judge-url JUDGE --output health --max-completion-length 8 --disable-tqdm', 'audit out --json audit.json --html audit.html',
             f'train --model https://me:{PASSWORD.replace("/", "")}@h/model --data data.jsonl --rewards my_rewards:own --output no', f'evaluate --task healthbench --data health.jsonl --model model --judge m --judge-url {KEY}@h',
             f'train {flags} --rewards strict_rewards:judged --output strict', 'evaluate --task mine --data data.jsonl --rewards strict_rewards:judged --model model --output strict-mine --max-completion-length 8 --disable-tqdm']
    judge = serve(echo(heard))
    url = judge.url.replace('//', f'//me:{quote(PASSWORD, safe="")}@')
    env = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()} | dict(
        OPENAI_API_KEY=KEY, HF_TOKEN=HF, WANDB_API_KEY=WANDB, OWN_API_KEY=OWN, JUDGE=url, OPENAI_BASE_URL=url, HOME=str(home / 'home'), HF_HOME=str(home / 'hf'), TMPDIR=str(home / 'tmp'), PYTHONPATH='')
    (home / 'tmp').mkdir()
    try: done = subprocess.run([sys.executable, '-P', '-c', SCRIPT], cwd=home, input='\n'.join(lines).replace('JUDGE', url), capture_output=True, text=True, timeout=300, env=env)
    finally: judge.shutdown()
    codes = [int(x.split()[1]) for x in done.stdout.splitlines() if x.startswith('exit ')]
    assert codes[:8] == [0, 2, 0, 0, 0, 0, 2, 2] and all(codes[8:]) and len(codes) == 10 and len(heard) > 20 and '[hidden]' in done.stderr, (codes, len(heard), done.stderr[-4000:])
    written = {p.relative_to(home): p.read_bytes() for p in home.rglob('*') if p.is_file()} | dict(stdout=done.stdout.encode(), stderr=done.stderr.encode())
    texts = {name: data.decode('latin-1') for name, data in written.items()}
    assert any('[hidden]' in t for n, t in texts.items() if 'sqlite' in str(n)), 'what the judge said is kept, without what it repeats'
    assert "'limit': 3" in texts[Path('out/checkpoint-2/trainer_state.json')], 'settings of a reward are kept'
    found = [(str(name), form) for name, t in texts.items() for s in (KEY, PASSWORD, PASSWORD.replace('/', ''), HF, WANDB, OWN) for form in letters(s) if form in t]
    assert not found and len(texts) > 40, found
    fault_row('security', 'five keys and passwords in the environment, a judge that repeats them in every way, rewards that hold and raise them', len(texts), len(texts), next(x for x in done.stderr.splitlines() if '[hidden]' in x), 'nothing',
              'Keep keys in the environment. What a server writes back in a code of its own, and what a reward function prints or writes itself, cannot be known.')


def test_a_judge_is_given_no_secret_as_a_setting(monkeypatch, fault_row):
    for name in ('OPENAI_BASE_URL', 'OPENAI_API_KEY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_TOKEN', HF)
    wrong = [dict(api_key=KEY), dict(extra_headers={'X': KEY}), dict(extra_body=dict(authorization=KEY)), dict(metadata=dict(password=KEY)), dict(user=HF), dict(metadata=[dict(x=f'a {PASSWORD}')]), dict(access_token=KEY)]
    for settings in wrong:
        with pytest.raises(InputError, match='settings are written down') as e: Endpoint('m', f'http://me:{quote(PASSWORD, safe="")}@h/v1', **settings)
        assert KEY not in str(e.value) and HF not in str(e.value) and PASSWORD not in str(e.value)
    for url in (f'http://h/v1?api-key={KEY}', f'http://h/v1#{KEY}'):
        with pytest.raises(InputError, match='base_url') as e: Endpoint('m', url)
        assert KEY not in str(e.value)
    assert Endpoint('m', 'http://h/v1', top_p=0.9, max_tokens=5, prompt_cache_key='x', logit_bias={'50256': -100}).settings['max_tokens'] == 5
    class Own: __name__, api_key, hf_token, key = 'own', KEY, HF, 'answer'
    own = Own()
    own.api_key, own.hf_token, own.key = KEY, HF, 'answer'
    assert describe(own) == "own {'key': 'answer'}"
    fault_row('security', 'a key or a password among the settings of a judge, or in the address after a question mark', len(wrong) + 2, len(wrong) + 2, plain(e.value), 'nothing', 'Set OPENAI_API_KEY, or put user and password before the host.')


def test_a_judge_that_sends_elsewhere_sends_no_key_along(monkeypatch, fault_row):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    tried = 0
    for login in ('', f'me:{quote(PASSWORD, safe="")}@'):
        for status in (301, 302, 307, 308):
            with Listener() as other, Listener((status, {'Location': f'{other.url}/v1/chat/completions'})) as first:
                with pytest.raises(AskFailed): run(Endpoint('m', f'{first.url}/v1'.replace('//', f'//{login}', 1), patience=0.1)([dict(role='user', content='?')]))
                tried += 1
                assert len(first.heard) >= 1 and 'uthorization' in first.heard[0][1]
                for _, headers, body in other.heard: assert 'uthorization' not in headers and not any(x in headers + body.decode() for s in (KEY, PASSWORD) for x in letters(s))
    fault_row('security', 'a judge that redirects to another server', tried, tried, 'a missing verdict', 'nothing; the question itself does go to the other server', 'Name a server that you trust: it sees all prompts and answers.')

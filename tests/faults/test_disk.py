"""A disk that is full, a folder that cannot be written to, a file that has changed: what is said, and that nothing saved is lost."""
import errno
import os
import random
import shutil
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from runs import new, same_end
from safetensors import SafetensorError

import rvpo_nb.checkpoint as safe
import rvpo_nb.trainer as trainer
from rvpo_nb.judge import Judge, criterion_rewards
from rvpo_nb.checkpoint import checkpoints
from rvpo_nb.record import read_log
from rvpo_nb.softmin import InputError
from rvpo_nb.task import rubric_prompts
from rvpo_nb.trainer import GRPOTrainer, RunFailed

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mount(folder, *options):
    "Mount a small disk in memory; tell whether that is allowed."
    folder.mkdir(exist_ok=True)
    return bool(shutil.which('mount')) and subprocess.run(['mount', '-t', 'tmpfs', *options, 'tmpfs', str(folder)], capture_output=True).returncode == 0


class Disk:
    "A folder on a disk of 8 MB that is filled by a file."
    name = 'a full disk'

    def __init__(self, folder): self.folder = folder

    def fill(self, room):
        "Leave so many bytes, or whole pages."
        free = os.statvfs(self.folder)
        (self.folder / '.ballast').write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))

    def free(self): (self.folder / '.ballast').unlink(missing_ok=True)


class Injected:
    "The same where mounting is not allowed: the writers themselves fail, after what there is room for."
    name = 'an injected ENOSPC'

    def __init__(self, folder): self.folder, self.patch = folder, pytest.MonkeyPatch()

    def fill(self, room):
        from pyarrow import parquet
        def half(path, *a, error=FULL, **k):
            with open(path, 'wb') as f: f.write(bytes(min(room, 1000)))
            raise error
        def save_file(tensors, path): half(path, error=SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)'))
        self.patch.setattr(safe, 'save_file', save_file), self.patch.setattr(parquet, 'write_table', lambda table, path: half(path)), self.patch.setattr(Path, 'write_text', half)
        opened = Path.open
        self.patch.setattr(Path, 'open', lambda path, mode='r', *a, **k: opened(path, mode, *a, **k) if 'r' in mode else (_ for _ in ()).throw(FULL))

    def free(self): self.patch.undo()


@pytest.fixture(params=['mounted', 'injected'])
def disk(request, tmp_path):
    "A disk that can be filled: a real one where mounting is allowed, and always the injected error, so that it is tested wherever it is needed."
    folder = tmp_path / 'disk'
    if request.param == 'mounted' and not mount(folder, '-o', 'size=8m'): pytest.skip('mounting is not allowed here; the injected error is tested')
    folder.mkdir(exist_ok=True)
    disk = (Disk if request.param == 'mounted' else Injected)(folder)
    yield disk
    disk.free()
    if request.param == 'mounted': subprocess.run(['umount', '-l', str(folder)], check=True)


def clean(error, folder): return str(error).replace(str(folder), 'OUT')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed') / 'out'
    new(folder).train()
    return folder


WRITERS = dict(checkpoint=('save_checkpoint', 'checkpoint-'), log=('write_log', 'log.jsonl'), completions=('write_completions', 'completions'))
ROOM = dict(checkpoint=[0, 30_000, 600_000, 1_600_000], log=[0], completions=[0])


@pytest.mark.parametrize('what', WRITERS)
def test_a_disk_that_is_full_in_step_4(disk, what, undisturbed, fault_row, monkeypatch):
    name, named = WRITERS[what]
    write, out, tried = getattr(trainer, name), disk.folder / 'out', 0
    for room in ROOM[what]:
        shutil.rmtree(out, ignore_errors=True)
        calls = Counter()
        def full(*args, **kwargs):
            calls[what] += 1
            if calls[what] == (2 if what == 'checkpoint' else 4):
                if what == 'log' and disk.name == 'a full disk':  # up to the end of a page the log would still fit
                    rest = -args[0].stat().st_size % os.sysconf('SC_PAGE_SIZE')
                    with args[0].open('a') as f: f.write(' ' * rest)
                disk.fill(room)
            return write(*args, **kwargs)
        monkeypatch.setattr(trainer, name, full)
        with pytest.raises(RunFailed) as e: new(out).train()
        monkeypatch.setattr(trainer, name, write)
        said = clean(e.value, out)
        assert named in said and 'No space left on device; a resumed run goes on from checkpoint-2' in said
        assert not list(out.rglob('*.part')), 'what could not be finished does not take up room'
        with pytest.raises((InputError, RunFailed), match='cannot be written: No space left'): new(out).train(True)  # the disk is still full
        assert [c.name for c in checkpoints(out)] == ['checkpoint-2'] and [x['step'] for x in read_log(out / 'log.jsonl')][:2] == [1, 2]
        disk.free()
        new(out).train(True)
        tried += same_end(out, undisturbed)
    fault_row('disk', f'{disk.name} while a {what.rstrip("s")} is written' if what == 'checkpoint' else f'{disk.name} while {"a log line" if what == "log" else "a table of completions"} is written', tried, tried,
              said, 'the steps since the last checkpoint; a piece of the new one is deleted', 'free some space, and resume')


def test_a_disk_that_is_full_when_the_final_model_is_written(disk, undisturbed, fault_row, monkeypatch):
    out, save = disk.folder / 'out', GRPOTrainer.save
    def then_full(self):
        save(self)
        if self.state.global_step == 6: disk.fill(10_000)
    monkeypatch.setattr(GRPOTrainer, 'save', then_full)
    if disk.name != 'a full disk': pytest.skip('transformers writes the final model')
    with pytest.raises(RunFailed, match='No space left on device; a resumed run goes on from checkpoint-6') as e: new(out).train()
    disk.free()
    new(out).train(True)
    assert same_end(out, undisturbed)
    fault_row('disk', 'a full disk while the final model is written', 1, 1, clean(e.value, out), 'nothing: the last checkpoint is there', 'free some space, and resume')


class Says:
    "A judge without a network that counts what it is asked."
    name, settings = 'says', {}

    def __init__(self): self.asked = 0

    async def __call__(self, messages, schema=None, counts=None):
        self.asked += 1
        return '{"criteria_met": %s}' % ('true' if sum(map(ord, messages[-1]['content'])) % 2 else 'false')


def judged(out, cache, says):
    judge = Judge(says, cache=str(cache))
    rows = [dict(prompt=row['prompt'], rubric=[dict(text='Is polite', points=5), dict(text='Is short', points=3)]) for row in rubric_prompts(8)]
    return new(out, rewards=criterion_rewards(judge, 2), rows=rows), judge


def kept(cache):
    db = sqlite3.connect(f'file:{cache}?mode=ro', uri=True)
    try: return db.execute('SELECT COUNT(*) FROM verdicts').fetchone()[0]
    finally: db.close()


def test_a_disk_that_is_full_under_the_judges_cache(disk, tmp_path, fault_row):
    says, whole, out, cache = Says(), tmp_path / 'whole', tmp_path / 'out', disk.folder / 'verdicts.sqlite'
    judged(whole, tmp_path / 'other.sqlite', says)[0].train()
    all_asked, again = says.asked, Says()
    run, judge = judged(out, cache, again)
    class Fill(trainer.TrainerControl):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != 3: return
            if disk.name == 'a full disk': return disk.fill(0)
            pages = judge.cache.db.execute('PRAGMA page_count').fetchone()[0]
            judge.cache.db.execute(f'PRAGMA max_page_count = {pages}')
        def __getattr__(self, name): return lambda *a, **k: None
    run.callbacks = [Fill()]
    with pytest.raises(RunFailed, match='step [456]: reward .* database or disk is full') as e: run.train()
    assert [c.name for c in checkpoints(out)][0] == 'checkpoint-2'
    before = kept(cache)
    assert before > 0
    disk.free()
    resumed, judge = judged(out, cache, again)
    resumed.train(True)
    assert same_end(out, whole, ('time/', 'memory/', 'judge/cached')) and kept(cache) > before
    asked_twice = again.asked - all_asked
    assert 0 <= asked_twice <= 8 * 2 * 2, 'what was kept is not paid for again'
    fault_row('disk', f'{disk.name} under the judge\'s cache', 1, 1, clean(e.value, out), f'the steps since the last checkpoint, and the verdicts that could not be kept ({asked_twice} were asked for again)', 'free some space, and resume')


# --- folders that cannot be written to

def test_an_output_folder_that_cannot_be_written_to(tmp_path, undisturbed, fault_row, monkeypatch):
    out, said = tmp_path / 'disk', {}
    if mount(out, '-o', 'size=8m'):
        how = 'on a disk that is mounted read-only'
        try:
            shutil.copytree(undisturbed, out / 'out')
            shutil.rmtree(out / 'out/checkpoint-6')
            subprocess.run(['mount', '-o', 'remount,ro', str(out)], check=True)
            for name, resume in (('new', False), ('out', True)):
                with pytest.raises(InputError, match='cannot be written: Read-only file system') as e: new(out / name).train(resume)
                said[name] = clean(e.value, out / name)
        finally: subprocess.run(['umount', '-l', str(out)], check=True)
    else:
        how = 'where every mkdir and open fails with EROFS'
        fails = lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS)))
        with monkeypatch.context() as m:
            m.setattr(Path, 'mkdir', fails), m.setattr(safe.os, 'open', fails)
            with pytest.raises(InputError, match='cannot be written: Read-only file system') as e: new(out / 'new').train()
            said['new'] = clean(e.value, out / 'new')
    fault_row('disk', f'a read-only output folder: {how}', len(said), len(said), said['new'], 'nothing: refused before the first step', 'choose another folder')


def in_the_way(out, name):
    out.mkdir(parents=True)
    (out / name).mkdir() if name in ('log.jsonl', '.lock') else (out / name).write_text('')


def test_something_in_the_way_of_the_output(tmp_path, fault_row):
    (tmp_path / 'file').write_text('')
    said = []
    for out in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(InputError, match=f'{out} cannot be written: (File exists|Not a directory)') as e: new(out).train()
        said.append(clean(e.value, out))
    for name in ('completions', '.lock'):
        in_the_way(tmp_path / name, name)
        with pytest.raises(InputError, match='cannot be written') as e: new(tmp_path / name).train()
        said.append(clean(e.value, tmp_path / name))
    in_the_way(tmp_path / 'c', 'checkpoint-2')
    with pytest.raises(RunFailed, match='after step 2: .*checkpoint-2 cannot be written: Not a directory; no checkpoint was saved yet') as e: new(tmp_path / 'c').train()
    said.append(clean(e.value, tmp_path / 'c'))
    assert len(read_log(tmp_path / 'c/log.jsonl')) == 2
    (tmp_path / 'c/checkpoint-2').unlink()
    new(tmp_path / 'c').train(True)
    fault_row('disk', 'a file where a folder should be, and the other way round', len(said), len(said), said[0], 'nothing, or the steps since the last checkpoint', 'move it away')


# --- files that have changed

def spoil(path, how, at):
    "Damage a file at a place from 0 to 1; False where that leaves it as it was."
    data = bytearray(path.read_bytes())
    place = min(len(data) - 1, int(at * len(data)))
    if how == 'cut off': data = data[:place]
    else: data[place] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(data)


def test_a_checkpoint_that_was_cut_off_flipped_or_swapped(undisturbed, tmp_path, capsys, pytestconfig, fault_row):
    "Every file of the newest checkpoint: the damage is noticed, and the run goes on from the one before, to the same end."
    names = sorted(p.name for p in (undisturbed / 'checkpoint-6').iterdir())
    long = pytestconfig.getoption('markexpr') == 'faults'
    kinds = {'cut off': [0.0, 0.5, 0.99], 'one bit flipped': [0.0, 0.1, 0.5, 0.9, 0.999] + [i / 97 for i in range(97)] * long}
    counts, whole, said = Counter(), safe.damage, ''
    copy = tmp_path / 'out'
    def check(kind, name):
        nonlocal said
        found, bad = safe.sort_out(copy)
        counts[kind, found.name] += 1
        assert found.name == 'checkpoint-4' and [p.name for p in bad] == ['checkpoint-6'], (kind, name)
    shutil.copytree(undisturbed, copy)
    for name in names:
        path = copy / 'checkpoint-6' / name
        data = path.read_bytes()
        for kind, places in kinds.items():
            for at in places:
                spoil(path, kind, at)
                check(kind, name)
                path.write_bytes(data)
        if name != 'SHA256SUMS':
            path.unlink()
            check('deleted', name)
        other = (copy / 'checkpoint-4' / name).read_bytes()
        if other != data:
            path.write_bytes(other)
            check('swapped with that of another checkpoint', name)
        path.write_bytes(data)
    assert safe.sort_out(copy)[0].name == 'checkpoint-6'
    for kind in ('one bit flipped', 'cut off'):  # and the run goes on
        again = tmp_path / kind.split()[0]
        shutil.copytree(undisturbed, again)
        spoil(again / 'checkpoint-6/model.safetensors', kind, 0.7)
        capsys.readouterr()
        new(again).train(True)
        said = next(line for line in capsys.readouterr().err.splitlines() if 'damaged' in line)
        assert said.startswith(f'{again}/checkpoint-6 is damaged: model.safetensors is not what was saved. It is now checkpoint-6.damaged') and (again / 'checkpoint-6.damaged').is_dir()
        assert same_end(again, undisturbed)
        for c in (again / 'checkpoint-2', again / 'checkpoint-4', again / 'checkpoint-6'): spoil(c / 'optimizer.safetensors', kind, 0.2)
        before = sorted(p.name for p in again.iterdir())
        with pytest.raises(InputError, match='has no checkpoint that is whole .checkpoint-6: optimizer.safetensors is not what was saved; checkpoint-4') as e: new(again).train(True)
        assert sorted(p.name for p in again.iterdir()) == before
    for kind in {k for k, _ in counts}:
        n = sum(v for (k, _), v in counts.items() if k == kind)
        fault_row('disk', f'a file of the newest checkpoint {kind}', n, counts[kind, 'checkpoint-4'], clean(said, again), 'the steps since the checkpoint before, which are made again to the bit', 'nothing to do: the run goes on from the checkpoint before')
    fault_row('disk', 'every checkpoint damaged', 2, 2, clean(e.value, again), 'nothing more: nothing is overwritten', 'put back a copy, or begin again in another folder')


def test_a_checkpoint_without_checksums_that_cannot_be_read_is_named(undisturbed, tmp_path, fault_row):
    tried, out = 0, tmp_path / 'out'
    for name in ('model.safetensors', 'optimizer.safetensors', 'trainer_state.json', 'config.json'):
        for at in (0.0, 0.5):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(undisturbed, out)
            (out / 'checkpoint-6/SHA256SUMS').unlink()
            spoil(out / 'checkpoint-6' / name, 'cut off', at)
            with pytest.raises(InputError, match=r'checkpoint-6(/trainer_state.json)? cannot be (loaded|read)') as e: new(out).train(True)
            tried += 1
    fault_row('disk', 'a cut off file in a checkpoint whose checksums were deleted, too', tried, tried, clean(e.value, out), 'nothing: refused before the first step',
              'delete that checkpoint to go on from the one before; a flipped bit would not be noticed')


def test_a_damaged_log_is_named(undisturbed, tmp_path, fault_row):
    out = tmp_path / 'out'
    shutil.copytree(undisturbed, out)
    lines = (out / 'log.jsonl').read_text().splitlines()
    (out / 'log.jsonl').write_text('\n'.join([lines[0], lines[1][:50], *lines[2:]]) + '\n')
    with pytest.raises(InputError, match='log.jsonl, line 2 cannot be read') as e: new(out).train(True)
    for tail in ('', '{"step": 7, "los', '{"step": 7}\x00\x00\x00', '\x00' * 100):  # what a power cut leaves
        (out / 'log.jsonl').write_text('\n'.join(lines) + '\n' + tail)
        assert [x['step'] for x in new(out).train(True).log_history] == [1, 2, 3, 4, 5, 6]
    fault_row('disk', 'a log with a damaged line, or one that a power cut left unfinished', 5, 5, clean(e.value, out), 'the damaged line; an unfinished last line is dropped without a word, as its step is made again', 'delete the line and resume')

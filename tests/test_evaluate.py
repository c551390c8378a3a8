"""Scores worked by hand, intervals against numpy, and evaluations that are killed, resumed, batched otherwise, or asked for what cannot be."""
import json
import math
import multiprocessing
import random
import shutil
import signal
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rvpo_nb.checks as C
import rvpo_nb.evaluate as E
from rvpo_nb.answers import HOW, bootstrap_interval
from rvpo_nb.evaluate import EvalConfig, Task, evaluate, find_choice, healthbench_score, read_results, result_table, reward_task, rubric_scores
from rvpo_nb.inputs import load_model
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
from rvpo_nb.trainer import RunFailed

T, F, N = True, False, None
nan, inf = math.nan, math.inf

# ---------------------------------------------------------------- points of a rubric
SCORES = [  # verdicts, points, score
    ([T], [5], 1), ([F], [5], 0), ([T, F], [1, 3], Fraction(1, 4)), ([F, T], [1, 3], Fraction(3, 4)), ([T, T], [1, 3], 1), ([T, T], [5, -5], 0),
          ([F, T], [5, -5], -1),
    ([F, T, T], [5, -5, -10], -3), ([T, F, F], [5, -5, -10], 1), ([T, T, F, F], [10, -9, 7, -1], Fraction(1, 17)), ([F] * 17, range(1, 18), 0),
          ([T] * 17, range(1, 18), 1),
    ([T, F] * 8 + [T], range(1, 18), Fraction(81, 153)), ([T, F], [0.5, 0.25], Fraction(2, 3)), ([T, T, F], [0, 4, 4], Fraction(1, 2)),
          ([T, F], [0, 3], 0),
    ((T, F), (1, 3), Fraction(1, 4)), (np.array([T, F]), np.array([1, 3]), Fraction(1, 4)),
          ([np.True_, F], [np.float32(1), np.int64(3)], Fraction(1, 4)),
    (torch.tensor([T, F]), torch.tensor([1.0, 3.0]), Fraction(1, 4)), ([T] * 10, [0.1] * 10, 1), ([T, F], [1e8, 1e8], Fraction(1, 2)),
          ([F, T], [1, -1e8], -10 ** 8), ([T, T], [Fraction(1, 3), Fraction(2, 3)], 1)]
MISSING = [([N], [5]), ([T, N], [1, 3]), ([N, F], [1, -3]), ([N] * 3, [1, 1, 1]), ([T, N, T], [1, -8, 3])]
BROKEN = [([], []), ([T], []), ([], [1]), ([T], [1, 2]), ([T, F], [1]), ([1], [5]), ([0], [5]), ([1.0], [5]), (['True'], [5]), ([nan], [5]),
          ([[T]], [5]), (['met'], [5]), ([T], [nan]), ([T], [inf]),
          ([T], [-inf]), ([T], [N]), ([T], ['5']), ([T], [T]), ([T], [[5]]), ([T], [1j]), ([T], [1e300]), ([T], [0]), ([T], [-1]), ([T, F], [-1, 0]),
          ([N], [-1]), (N, [5]), ([T], N), ('T', [5]), (T, 5),
          ({T: 1}, [5]), ([T], {5: 1}), ([T], 'x'), ([{}], [5]), ([T, F], [1, nan])]


@pytest.mark.parametrize('met, points, score', SCORES, ids=str)
def test_healthbench_by_hand(met, points, score):
    assert healthbench_score(met, list(points) if isinstance(points, range) else points) == pytest.approx(float(score), abs=1e-12)


@pytest.mark.parametrize('met, points', MISSING, ids=str)
def test_a_missing_verdict_makes_the_score_missing(met, points): assert math.isnan(healthbench_score(met, points))


@pytest.mark.parametrize('met, points', BROKEN, ids=str)
def test_what_is_no_verdict_or_no_point_is_refused(met, points):
    with pytest.raises(InputError): healthbench_score(met, points)


VERDICTS = st.one_of(st.booleans(), st.none(), st.integers(), st.floats(), st.text(max_size=3), st.just([]))
POINTS = st.one_of(st.integers(-10, 10), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.integers())


@settings(max_examples=3000, deadline=None)
@given(st.lists(VERDICTS, max_size=6) | VERDICTS, st.lists(POINTS, max_size=6) | POINTS)
def test_healthbench_raises_nothing_else(met, points):
    try: score = healthbench_score(met, points)
    except InputError: return
    assert isinstance(score, float) and (score <= 1 + 1e-9 or math.isnan(score))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-10, 10)), min_size=1, max_size=20))
def test_healthbench_is_the_fraction(criteria):
    met, points = map(list, zip(*criteria))
    best = sum(p for p in points if p > 0)
    if not best: return
    assert healthbench_score(met, points) == pytest.approx(float(Fraction(sum(p for m, p in criteria if m), best)))


def test_axes_are_the_same_formula_over_their_criteria():
    rubric = [dict(text='', points=p, axis=a) for p, a in [(4, 'x'), (-2, 'x'), (6, 'y'), (-5, 'z'), (1, ''), (2, None)]]
    assert rubric_scores([T, T, F, T, T, F], rubric) == pytest.approx({'score': -2 / 13, 'axis/x': 0.5, 'axis/y': 0.0})
    assert rubric_scores([T, T, F, N, T, F], rubric) == {'score': None, 'axis/x': None, 'axis/y': None}
    for wrong in (dict(text='', axis='x'), 'x', None):
        with pytest.raises(InputError, match='criterion 1: must be a dict with points'): rubric_scores([T, T], [rubric[0], wrong])


# ---------------------------------------------------------------- one letter
CHOICES = [('Answer: A', 'A'), ('Answer: D', 'D'), ('answer:B', 'B'), ('ANSWER: C', 'C'), ('**Answer:** C', 'C'), ('**Answer**: C', 'C'),
           ('Answer: **C**', 'C'), ('Answer: (C)', 'C'), ('Answer: C) 42 K', 'C'),
           ('Answer: $C$', 'C'), ('Answer: `C`', 'C'), ('Answer: "C"', 'C'), ('Answer: [C]', 'C'), ('Answer: $\\boxed{C}$', 'C'), ('\\boxed{C}', 'C'),
           ('\\boxed{ (c) }', 'C'), ('$\\boxed{\\text{C}}$', 'C'),
           ('\\boxed{\\mathrm{ C}}', 'C'), ('<answer>C</answer>', 'C'), ('<answer> (c). </answer>', 'C'), ('<ANSWER>c</ANSWER>', 'C'),
           ('The answer is C.', 'C'), ('The answer is: **(C)**', 'C'), ('the correct answer is option C', 'C'),
           ('The final answer is $\\boxed{B}$.', 'B'), ('C', 'C'), (' (c) \n', 'C'), ('C.', 'C'), ('Answer: A\nAnswer: B', 'B'),
           ('\\boxed{A}, no: \\boxed{B}', 'B'), ('Answer: A <answer>B</answer>', 'B'),
           ('<answer>Answer: D</answer>', 'D'), ('Answer:\nC', 'C'), ('**Final Answer:**\n\n**B**', 'B'), ('x' * 50_000 + ' Answer: C', 'C'),
           ('Réponse. Answer: C', 'C'), ('Answer: C - the bond', 'C'), ('Answer: C. Or so', 'C'), ('Answer: C order', 'C'),
           ('The answer is B, or so I think', 'B'), ('Answer: C\nor', 'C'), ('Answer: [A/B/C/D]\nAnswer: B', 'B'),
           ('Answer: A carbon atom is lost.', 'A')]  # the last: the limit that the chapter names
NO_CHOICE = ['', ' ', 'E', 'Answer:', 'Answer: E', 'Answer: A\nAnswer: F', 'answer: a good question', 'The answer is a mystery', 'Answer: Because',
             'The answer is Carbon', 'Answer is not C', "Answer: C's", 'Answer C', 'the answer, C',
             '\\boxed{}', '\\boxed{AB}', '\\boxed{C', '\\boxed{42}', '<answer></answer>', '<answer>C', '<answer>CD</answer>',
             '<answer>the third</answer>', 'AB', 'C D', 'A. Because of B', 'ANSWERS: C', 'Answer: Ｃ', 'Answer: Ç',
             'The answer is A or B', 'Answer: A/B', 'Answer: [A/B/C/D]', 'Answer: **A** or **B**', 'Answer: (A) or (B)', 'Answer: C-H bond',
             'Answer: C–H bond', 'Answer: D-glucose', 'Answer: B+', 'Answer:                    C', '\\\\boxed{\\text{\\text{C}}}',
             'Answer: 3', 'Answer: -', None, 5, b'Answer: C', ['Answer: C'], nan]


@pytest.mark.parametrize('text, letter', CHOICES, ids=lambda x: repr(x)[:30])
def test_choice_by_hand(text, letter): assert find_choice(text) == letter


@pytest.mark.parametrize('text', NO_CHOICE, ids=lambda x: repr(x)[:30])
def test_no_choice(text): assert find_choice(text) is None


def test_other_letters():
    assert find_choice('Answer: J', 'ABCDEFGHIJ') == 'J' and find_choice('Answer: C', 'AB') is None


BITS = st.lists(st.sampled_from(['Answer', 'answer', ':', ' is ', ' ', '\n', '**', '(', ')', '$', '\\boxed{', '\\text{', '}', '<answer>', '</answer>',
                                 'A', 'b', 'C', 'E', 'Because', '\\', '🙂', '"']), max_size=30).map(''.join)


@settings(max_examples=2500, deadline=None)
@given(st.one_of(st.text(), BITS))
def test_choice_is_a_letter_or_none(text): assert find_choice(text) in (None, *'ABCD')


def test_the_last_words_are_found_behind_hostile_text():
    for bit in ('answer', 'Answer: ', '\\boxed{', '<answer>', 'answer**', '((((', '\\boxed{\\text{', ' ', '\n', 'Answer: (' * 3):
        begun = time.perf_counter()
        assert find_choice(bit * (4_000_000 // len(bit)) + '\n.Answer: B') == 'B'
        assert time.perf_counter() - begun < 3


def test_4_kB_take_under_5_ms():
    for bit in ('answer', 'Answer: C ', '\\boxed{\\text{', '<answer>', 'Answer: (((((', 'x '):
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            find_choice(bit * (4000 // len(bit)))
            times.append(time.perf_counter() - begun)
        assert min(times) < 0.005


# ---------------------------------------------------------------- intervals and tables
def test_interval_is_the_percentile_bootstrap_of_prompts():
    rng = np.random.default_rng(3)
    for n, columns in ((2, 1), (17, 1), (40, 3)):
        x = rng.normal(size=(columns, n))
        for how, f in dict(mean=lambda m: m.mean(0), clipped=lambda m: m.mean(0).clip(0, 1), worst=lambda m: m.min(0)).items():
            index = np.random.default_rng(7).integers(0, n, (2000, n))
            drawn = f(x[:, index].mean(-1))
            got = bootstrap_interval(x, how, seed=7)
            assert got['n'] == n and got['value'] == pytest.approx(float(f(x.mean(-1)))) and [got['low'],
                got['high']] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())


def test_large_tables_are_resampled_in_parts_with_the_same_result():
    x = np.random.default_rng(0).normal(size=(1, 5000))
    drawn = x[0][np.random.default_rng(0).integers(0, 5000, (2000, 5000))].mean(-1)
    got = bootstrap_interval(x)
    assert [got['low'], got['high']] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=1e-12)


def test_interval_covers_the_truth_in_about_95_of_100_samples():
    rng, hits = np.random.default_rng(0), 0
    for i in range(300):
        got = bootstrap_interval((rng.random(100) < 0.4).astype(float), seed=i)
        hits += got['low'] <= 0.4 <= got['high']
    assert 0.90 < hits / 300 < 0.98


@pytest.mark.parametrize('values, note', [([], 'nothing scored'), ([nan, nan], 'nothing scored'), ([1.0], 'one prompt'), ([nan, 0.5], 'one prompt'),
                                          ([0.5, 0.5, nan], 'all equal'), ([[0, 0], [nan, nan]], 'all equal')])
def test_degenerate_intervals_say_so(values, note):
    got = bootstrap_interval(values)
    assert got['note'] == note and math.isnan(got['low']) and math.isnan(got['high']) and math.isnan(got['value']) == (got['n'] == 0)


def test_clipping_that_makes_all_resamples_equal_leaves_no_interval():
    for values, end in (([-1, -0.5, -0.3], 0), ([1.5, 2, 3], 1)):
        got = bootstrap_interval(values, 'clipped')
        assert got['value'] == end and got['note'] == 'all resamples equal' and math.isnan(got['low']) and math.isnan(got['high'])
    assert bootstrap_interval([-1, 2], 'clipped')['note'] == ''


def test_an_unknown_statistic_is_refused():
    for values in ([1.0, 2.0], []):
        with pytest.raises(InputError, match="'median'"): bootstrap_interval(values, 'median')


def test_table_against_numpy():
    "Several samples per prompt, values missing, a column that only some rows have."
    rng, lines = np.random.default_rng(1), []
    for row in range(30):
        for sample in range(4):
            scores = dict(a=float(rng.normal()), b=None if sample and rng.random() < 0.4 else float(rng.random()))
            lines.append(dict(row=row, scores=scores | (dict(c=float(row)) if row < 5 else {})))
    order = list(range(120))
    random.Random(0).shuffle(order)
    metrics = lambda columns: {'a': (['a'], 'mean'), 'b': (['b'], 'clipped'), 'c': (['c'], 'mean'), 'worst': (['a', 'b'], 'worst'),
                               'none': (['d'], 'mean')}
    got = result_table([lines[i] for i in order], metrics, seed=5)
    a = np.array([[x['scores']['a'] for x in lines[4 * i:4 * i + 4]] for i in range(30)]).mean(1)
    b = np.array([np.nanmean([nan if x['scores']['b'] is None else x['scores']['b'] for x in lines[4 * i:4 * i + 4]]) for i in range(30)])
    i = np.random.default_rng(5).integers(0, 30, (2000, 30))
    expected = {'a': (a.mean(), *np.percentile(a[i].mean(1), [2.5, 97.5])), 'b': (b.mean(), *np.percentile(b[i].mean(1), [2.5, 97.5])),
                'worst': (min(a.mean(), b.mean()), *np.percentile(np.minimum(a[i].mean(1), b[i].mean(1)), [2.5, 97.5]))}
    for m, x in expected.items(): assert got.loc[m, ['value', 'low', 'high']].tolist() == pytest.approx(x)
    lost = sum(x['scores']['b'] is None for x in lines)
    assert got.n.to_dict() == dict(a=30, b=30, c=5, worst=30) and got.missing.to_dict() == dict(a=0, b=lost, c=0, worst=lost) and lost > 20


def test_healthbench_aggregate_against_numpy():
    "Scores of examples are averaged over the benchmark, each axis and each theme over its own examples, and then clipped."
    rng = np.random.default_rng(0)
    lines, by = [], {}
    for row in range(40):
        points, axes = rng.integers(1, 11, 6) * rng.choice([1, -1], 6, p=[0.4, 0.6]), rng.choice(['x', 'y', 'z'], 6)
        points[0], met = abs(points[0]), rng.random(6) < 0.6
        scores = rubric_scores(met.tolist(), [dict(text='', points=int(p), axis=str(a)) for p, a in zip(points, axes)])
        lines.append(dict(row=row, scores=scores))
        for name, mine in dict(score=np.ones(6, bool), **{f'axis/{a}': axes == a for a in 'xyz'}).items():
            best = points[mine & (points > 0)].sum()
            if best: by.setdefault(name, []).append(points[mine & met].sum() / best)
    got = result_table(lines, lambda columns: {c: ([c], 'clipped') for c in columns})
    assert got.value.to_dict() == pytest.approx({k: float(np.clip(np.mean(v), 0, 1)) for k, v in by.items()}) and got.n.to_dict() == {k: len(v) for k,
        v in by.items()}
    assert any(np.mean(v) < 0 for v in by.values()) and min(min(v) for v in by.values()) < -1  # clipping had something to do


# ---------------------------------------------------------------- scorers of rows
TOOLS = json.dumps([dict(name='add', parameters=dict(properties=dict(a=dict(type='integer'), b=dict(type='integer')), required=['a', 'b'])),
                    dict(name='now', parameters={})])


def call(*calls): return '<think>So.</think>\n<tool_call>\n' + '\n'.join(json.dumps(dict(name=n, parameters=p)) for n, p in calls) + '\n</tool_call>'


def test_calls_are_scored_by_category():
    keys = ['[{"add": {"a": [1], "b": [2]}}]', '[{"add": {"a": [1], "b": [2]}}, {"now": {}}]', '[]', 'null']
    names = ['live_simple_3-1-0', 'parallel_multiple_17', 'irrelevance_0', 'live_relevance_5-0-0']
    rows = [dict(id=n, tools=TOOLS, expected=k) for n, k in zip(names, keys)]
    right = [call(('add', dict(a=1, b=2))), call(('now', {}), ('add', dict(a=1, b=2))), 'No tool helps.', call(('now', {}))]
    wrong = [call(('add', dict(a=1, b=2.0))), call(('now', {})), call(('now', {})), '<tool_call>\nnot JSON\n</tool_call>']
    for said, score in ((right, 1), (wrong, 0)):
        found = C.score_calls(rows, said)
        assert [f['accuracy'] for f in found] == [score] * 4 and [f['reason'] == '' for f in found] == [bool(score)] * 4
        assert [[c for c in f if c.startswith('category/')] for f in found] == [['category/live_simple'], ['category/parallel_multiple'],
            ['category/irrelevance'], ['category/live_relevance']]
    lines = [dict(row=i, scores={k: v for k, v in f.items() if k != 'reason'}) for i,
             f in enumerate(C.score_calls(rows * 2, right + right[:3] + wrong[3:]))]
    table = result_table(lines[:4] + lines[7:], C.summarize_calls)
    assert table.value.to_dict() == pytest.approx({'accuracy': 0.8, 'category/live_simple': 1, 'category/parallel_multiple': 1,
                                                   'category/irrelevance': 1, 'category/live_relevance': 0.5, 'mean of categories': 0.875})


def test_choices_are_scored():
    rows = [dict(answer='C')] * 3
    assert C.score_choice(rows, ['Answer: C', 'Answer: A', 'I do not know']) == [dict(accuracy=1, answered=1, choice='C'),
        dict(accuracy=0, answered=1, choice='A'), dict(accuracy=0, answered=0, choice='')]


class Mute:
    "A judge that finds what it looks for in the text, and is silent where the answer says so."
    name = 'mute'

    def verdicts(self, prompts, completions, rubrics):
        assert len(prompts) == len(completions) == len(rubrics)
        said = [c if isinstance(c, str) else c[-1]['content'] for c in completions]
        return [[None if c['text'] in a and 'Honey' in a else c['text'] in a for c in r] for a, r in zip(said, rubrics)]


# ---------------------------------------------------------------- the harness
ROWS = [dict(r) for r in rubric_prompts(10, seed=3)] + [dict(prompt='A cold. Advise on: rest', points=['rest'] * 7),
                                                        dict(prompt='soup', points=['soup'] * 7)]


def score_words(rows, completions, judge=None): return [dict(words=len(c.split()), rest=None if 'Rest' not in c else 'rest' in r['points'],
                                                             said=c[:5]) for r, c in zip(rows, completions)]


WORDS = Task('words', lambda data, n, seed: ROWS[:n], score_words)


def config(folder, **changes):
    return EvalConfig(**dict(output_dir=str(folder), num_generations=2, temperature=1.0, max_completion_length=24, batch_size=6, disable_tqdm=True,
                             seed=1) | changes)


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def completions(folder): return {(x['prompt'], x['sample']): x['completion'] for x in map(json.loads,
    (Path(folder) / 'completions.jsonl').read_text().splitlines())}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An evaluation that nothing disturbed."
    folder = tmp_path_factory.mktemp('whole') / 'out'
    evaluate(WORDS, RUBRIC_POLICY, config(folder))
    return folder


def test_what_an_evaluation_leaves(whole):
    table, lines = read_results(whole), pd.read_json(whole / 'completions.jsonl', lines=True)
    assert list(table.index) == ['words', 'rest', 'tokens', 'ended'] and (table.n <= 12).all() and table.loc['rest',
        'missing'] == sum('Rest' not in c for c in lines.completion) > 0
    assert lines[['row', 'sample']].values.tolist() == [[i, j] for i in range(12) for j in (0, 1)] and lines.prompt.nunique() == 12
    assert table.loc['words', 'value'] == pytest.approx(lines.completion.str.split().str.len().mean())
    assert all(n['said'] == c[:5] for n, c in zip(lines.notes, lines.completion))
    saved = json.loads((whole / 'results.json').read_text())
    assert saved['setup'] == json.loads((whole / 'settings.json').read_text()) and saved['setup']['model'] == 'rubric-policy'
    assert set(saved['versions']) >= {'torch', 'transformers', 'rvpo_nb', 'python'}
    assert str(whole) not in (whole / 'results.json').read_text()
    assert sorted(files(whole)) == ['completions.jsonl', 'results.json', 'settings.json']


@pytest.mark.parametrize('layout', [dict(batch_size=1), dict(batch_size=2), dict(batch_size=8), dict(batch_size=1000), dict(batch_tokens=1),
                                    dict(batch_tokens=150)], ids=str)
def test_batches_change_nothing(whole, tmp_path, layout):
    evaluate(WORDS, RUBRIC_POLICY, config(tmp_path / 'out', **layout))
    assert files(tmp_path / 'out') == files(whole)


def test_neither_does_the_order_of_the_rows(whole, tmp_path):
    evaluate(Task('words', lambda data, n, seed: ROWS[::-1], score_words), RUBRIC_POLICY, config(tmp_path))
    assert completions(tmp_path) == completions(whole) and read_results(tmp_path).value.tolist() == pytest.approx(read_results(whole).value.tolist())


def test_another_seed_samples_otherwise(whole, tmp_path):
    evaluate(WORDS, RUBRIC_POLICY, config(tmp_path, seed=2))
    assert sum(a != b for a, b in zip(completions(tmp_path).values(), completions(whole).values())) > 12


def test_at_temperature_0_it_is_greedy(tmp_path):
    "Against transformers' own generate, one prompt at a time."
    evaluate(WORDS, RUBRIC_POLICY, config(tmp_path, temperature=0.0, num_generations=1))
    model, tokenizer = load_model(RUBRIC_POLICY)
    for (prompt, _), said in completions(tmp_path).items():
        ids = tokenizer(prompt, return_tensors='pt', return_token_type_ids=False)
        out = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids['input_ids'].shape[1]:]
        assert said == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize('batch', range(5))
def test_a_scorer_that_raises_stops_it_and_it_goes_on(whole, tmp_path, batch):
    calls = []
    def score(rows, completions, judge=None):
        calls.append(1)
        if len(calls) == batch + 1: raise ConnectionError('the judge is gone')
        return score_words(rows, completions)
    if batch == 0:  # before anything is sampled
        with pytest.raises(InputError, match='the judge is gone'): evaluate(Task('words', WORDS.rows, score), RUBRIC_POLICY, config(tmp_path / 'out'))
    else:
        with pytest.raises(RunFailed, match=f'the judge is gone; {6 * (batch - 1)} of 24'): evaluate(Task('words', WORDS.rows, score), RUBRIC_POLICY,
            config(tmp_path / 'out'))
    assert not (tmp_path / 'out' / 'results.json').exists()
    evaluate(Task('words', WORDS.rows, score), RUBRIC_POLICY, config(tmp_path / 'out'))
    assert files(tmp_path / 'out') == files(whole) and len(calls) == (7 if batch else 6)


def test_a_file_torn_at_any_byte_is_mended(whole, tmp_path):
    text, chance = (whole / 'completions.jsonl').read_bytes(), random.Random(0)
    for cut in [0, 1, text.index(b'\n'), text.index(b'\n') + 1, len(text) - 1, len(text)] + [chance.randrange(len(text)) for _ in range(6)]:
        out = tmp_path / str(cut)
        shutil.copytree(whole, out)
        (out / 'results.json').unlink()
        (out / 'completions.jsonl').write_bytes(text[:cut])
        (out / '.completions.jsonl.part').write_bytes(text[:cut // 2])
        evaluate(WORDS, RUBRIC_POLICY, config(out))
        assert {k: v for k, v in files(out).items() if not k.endswith('.part')} == files(whole)


def slow(folder):
    def score(rows, completions, judge=None):
        time.sleep(0.05)
        return score_words(rows, completions)
    torch.set_num_threads(1)
    evaluate(Task('words', WORDS.rows, score), RUBRIC_POLICY, config(folder))


def test_killed_at_random_moments_it_ends_as_one_that_was_not(whole, tmp_path):
    context, chance, out = multiprocessing.get_context('forkserver'), random.Random(0), tmp_path / 'out'
    context.set_forkserver_preload(['rvpo_nb.evaluate'])
    lines = lambda: (out / 'completions.jsonl').read_text().count('\n') if (out / 'completions.jsonl').exists() else 0
    for _ in range(3):
        p = context.Process(target=slow, args=(out,))
        p.start()
        before = lines()
        while p.is_alive() and lines() <= before: time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL and 0 < lines() < 24, 'killed while it ran'
    slow(out)
    assert {k: v for k, v in files(out).items() if not k.endswith('.part')} == files(whole)


def test_a_finished_one_is_read_and_not_run(whole, monkeypatch):
    monkeypatch.setattr(E.Answerer, 'answer', lambda *a: pytest.fail('something was sampled'))
    before, unasked = files(whole), Task('words', WORDS.rows, lambda *a: pytest.fail('something was scored'))
    pd.testing.assert_frame_equal(evaluate(unasked, RUBRIC_POLICY, config(whole, batch_size=3)), read_results(whole))
    assert files(whole) == before


@pytest.fixture(scope='module')
def other(tmp_path_factory):
    "The shipped policy with one weight changed, under the same name."
    folder = tmp_path_factory.mktemp('other') / 'rubric-policy'
    model, tokenizer = load_model(RUBRIC_POLICY)
    with torch.no_grad(): next(model.parameters())[3, 3] += 1
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def test_another_evaluation_in_the_same_folder_is_refused_by_name(whole, other, tmp_path):
    shutil.copytree(other, tmp_path / 'elsewhere')
    refused = lambda what: pytest.raises(InputError, match=f'was made with {what} = ')
    for what, run in {
            'weights': lambda: evaluate(WORDS, other, config(whole)), 'model': lambda: evaluate(WORDS, tmp_path / 'elsewhere', config(whole)),
                      'seed': lambda: evaluate(WORDS, RUBRIC_POLICY, config(whole, seed=2)),
            'temperature': lambda: evaluate(WORDS, RUBRIC_POLICY, config(whole, temperature=0.5)),
                      'num_generations': lambda: evaluate(WORDS, RUBRIC_POLICY, config(whole, num_generations=3)),
            'max_completion_length': lambda: evaluate(WORDS, RUBRIC_POLICY, config(whole, max_completion_length=23)),
                      'task': lambda: evaluate(Task('other', WORDS.rows, score_words), RUBRIC_POLICY, config(whole)),
            'data': lambda: evaluate(Task('words', lambda *a: ROWS[1:], score_words), RUBRIC_POLICY, config(whole)),
                      'scores': lambda: evaluate(Task('words', WORDS.rows, score_words, made_of=('x',)), RUBRIC_POLICY, config(whole)),
            'judge': lambda: evaluate(WORDS, RUBRIC_POLICY, config(whole), judge=object())}.items():
        before = files(whole)
        with refused(what): run()
        assert files(whole) == before
    (tmp_path / 'completions.jsonl').write_text('{}\n')
    with pytest.raises(InputError, match='without settings.json'): evaluate(WORDS, RUBRIC_POLICY, config(tmp_path))


def test_what_determines_completions_is_part_of_the_setup(whole, tmp_path):
    "The tokenizer, by the prompts' ids and the end tokens; the precision that was found, not the one asked for."
    before = files(whole)
    ending, plain = (load_model(RUBRIC_POLICY)[1] for _ in range(2))
    ending.eos_token = ending.convert_ids_to_tokens(3)

    class Backwards:
        def __getattr__(self, name): return getattr(plain, name)
        def __call__(self, text, **k): return dict(input_ids=plain(text, **k)['input_ids'][::-1])
    for what, tokenizer in dict(eos_token_id=ending, prompts=Backwards()).items():
        with pytest.raises(InputError, match=f'was made with {what} = '): evaluate(WORDS, RUBRIC_POLICY, config(whole), processing_class=tokenizer)
    assert files(whole) == before and json.loads(before['settings.json'])['bf16'] is torch.cuda.is_available()
    if not torch.cuda.is_available():
        evaluate(WORDS, RUBRIC_POLICY, config(whole, bf16=False))  # what None comes to here
        with pytest.raises(InputError, match='was made with bf16 = False, not True'): evaluate(WORDS, RUBRIC_POLICY, config(whole, bf16=True))


def test_an_evaluation_is_not_refused_by_its_own_settings(tmp_path):
    "JSON turns tuples into lists."
    task = Task('words', WORDS.rows, score_words, made_of=(('k', 1), ('l', (2, 3))))
    first, again = (evaluate(task, RUBRIC_POLICY, config(tmp_path, stop_strings=('Honey', 'Rest'), num_prompts=3)) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)


def test_a_call_that_failed_before_sampling_can_be_corrected(whole, tmp_path):
    "It leaves nothing behind."
    bad = Task('words', WORDS.rows, lambda rows, completions, judge=None: [1.0] * len(rows))
    for task, wrong, why in ((WORDS, dict(max_completion_length=10 ** 6), 'leaves no room'), (bad, {}, 'one dict per completion')):
        with pytest.raises(InputError, match=why): evaluate(task, RUBRIC_POLICY, config(tmp_path / 'out', **wrong))
        assert not (tmp_path / 'out').exists()
    evaluate(WORDS, RUBRIC_POLICY, config(tmp_path / 'out'))
    assert files(tmp_path / 'out') == files(whole)


def test_the_largest_seed_will_do(tmp_path):
    assert evaluate('rubric', RUBRIC_POLICY, config(tmp_path, num_prompts=3, seed=2 ** 63 - 1)).loc['mean', 'n'] == 3


def test_a_model_that_moved_is_the_same(whole, tmp_path):
    shutil.copytree(RUBRIC_POLICY, tmp_path / 'rubric-policy')
    shutil.copytree(whole, tmp_path / 'out')
    assert len(evaluate(WORDS, tmp_path / 'rubric-policy', config(tmp_path / 'out'))) == 4


def test_a_model_object_will_do(whole, tmp_path):
    model, tokenizer = load_model(RUBRIC_POLICY)
    table = evaluate(WORDS, model, config(tmp_path), processing_class=tokenizer)
    assert completions(tmp_path) == completions(whole) and table.value.equals(read_results(whole).value)


@pytest.mark.parametrize('why, changes', [
    ('num_prompts', dict(num_prompts=0)), ('num_generations', dict(num_generations=0)), ('max_completion_length', dict(max_completion_length=0)),
                                          ('batch_size', dict(batch_size=0)), ('batch_tokens', dict(batch_tokens=-1)),
    ('temperature', dict(temperature=-0.1)), ('temperature', dict(temperature=nan)), ('temperature', dict(temperature=inf)),
                                          ('temperature 0', dict(temperature=0)), ('seed', dict(seed=-1)), ('stop_strings', dict(stop_strings=[''])),
    *[(n, {n: v}) for n in 'num_generations max_completion_length batch_size batch_tokens'.split() for v in (None, 1.5, '1', True, 2 ** 63)],
    *[('num_prompts', dict(num_prompts=v)) for v in (1.5, '1', True)],
    *[('seed', dict(seed=v)) for v in (2 ** 63, 2 ** 64, None, 0.0, '0', True)],
    *[('temperature', dict(temperature=v)) for v in ('a', None, True, 1j)],
    *[('stop_strings', dict(stop_strings=v)) for v in (5, [5], [None], {'a': 1})]], ids=str)
def test_settings_that_cannot_be(tmp_path, why, changes):
    with pytest.raises(InputError, match=why): config(tmp_path, **changes)


def test_what_cannot_be_evaluated(tmp_path):
    run = lambda task=WORDS, model=RUBRIC_POLICY, **k: evaluate(task, model, config(tmp_path / 'out'), **k)
    scored = lambda f: Task('bad', WORDS.rows, f)
    cases = {'unknown task': lambda: run('nonsense'), 'needs a judge': lambda: run(Task('j', WORDS.rows, score_words, judge=True)),
             'no rows': lambda: run(Task('t', lambda *a: [], score_words)),
             'no column "prompt"': lambda: run(Task('t', lambda *a: [dict(question='?')], score_words)),
             'makes its own prompts': lambda: run('rubric', data='x.jsonl'), 'cannot load model': lambda: run(model=str(tmp_path / 'nothing')),
             'has no column|room': lambda: run(Task('t', lambda *a: [dict(prompt='rest ' * 500)], score_words)),
             'returned 0 scores for 1': lambda: run(scored(lambda *a: [])),
             r"'bad' must return one dict per completion, got \[1.0\]": lambda: run(scored(lambda r, c, j: [1.0] * len(r))),
             "'bad' must return one dict per completion, got None": lambda: run(scored(lambda *a: None)),
             'is infinite': lambda: run(scored(lambda r, c, j: [dict(x=inf)] * len(r))),
             'there already': lambda: run(scored(lambda r, c, j: [dict(tokens=1)] * len(r))),
             'is not a number': lambda: run(scored(lambda r, c, j: [dict(x=[1])] * len(r))),
             'KeyError': lambda: run(scored(lambda r, c, j: [x['y'] for x in r]))}
    for why, f in cases.items():
        with pytest.raises(InputError, match=why): f()
        assert not (tmp_path / 'out').exists()
    with pytest.raises(InputError, match='no finished evaluation'): read_results(tmp_path)


def test_reward_functions_make_a_task(tmp_path):
    "Pass rates for rewards within [0, 1], means and pass rates for others, means where nothing says what a pass is."
    def good(completions, **columns): return [float('Honey' in c) for c in completions]
    def graded(completions, **columns): return [min(1, len(c) / 100) for c in completions]
    def score(completions, **columns): return [len(c.split()) - 10 for c in completions]
    def free(completions, **columns): return [None if 'Soup' in c else len(c) for c in completions]
    good.bounds = graded.bounds = (0, 1)
    score.threshold = 3
    table = evaluate(reward_task('mine', lambda *a: ROWS, [good, graded, score, free]), RUBRIC_POLICY, config(tmp_path))
    said = [x['completion'] for x in map(json.loads, (tmp_path / 'completions.jsonl').read_text().splitlines())]
    mean = lambda f: np.mean([float(f(c)) for c in said])
    rates = [mean(lambda c: 'Honey' in c), mean(lambda c: len(c) >= 50), mean(lambda c: len(c.split()) >= 13)]
    without = pd.Series([len(c) if 'Soup' not in c else nan for c in said]).groupby(np.arange(24) // 2).mean().mean()
    assert table.value.iloc[:8].to_dict() == pytest.approx(dict(good=rates[0], graded=rates[1],
                                                                score=mean(lambda c: len(c.split()) - 10)) | {'score passed': rates[2]} | dict(
        free=without, mean=np.mean(rates), worst=min(rates)) | {'all passed': mean(lambda c: 'Honey' in c and len(c) >= 50 and len(c.split()) >= 13)},
                                                           rel=1e-6)
    assert table.loc['free', 'missing'] == sum('Soup' in c for c in said)
    with pytest.raises(InputError, match='cannot be called'): reward_task('x', None, [good, good])


@pytest.mark.parametrize('task', ['rubric', 'ladder'])
def test_the_rubric_tasks_are_the_same_in_any_batch(tmp_path, task):
    "Their rewards draw random numbers."
    tables = [evaluate(task, RUBRIC_POLICY, config(tmp_path / str(n), num_prompts=10, batch_size=n)) for n in (2, 64)]
    pd.testing.assert_frame_equal(*tables)
    assert files(tmp_path / '2') == files(tmp_path / '64') and tables[0].loc['mean', 'n'] == 10 and 0.1 < tables[0].loc['mean', 'value'] < 0.9


def test_a_judge_that_is_silent_leaves_scores_missing(tmp_path):
    rows = [r | dict(theme='ab'[i % 2], rubric=[dict(text='Soup', points=2, axis='x'), dict(text='Zinc', points=1, axis='y'),
                                                dict(text='Rest', points=-1, axis='y')]) for i, r in enumerate(ROWS)]
    task = Task('judged', lambda *a: rows, C.score_rubric, C.clipped, judge=True)
    table = evaluate(task, RUBRIC_POLICY, config(tmp_path), judge=Mute())
    lines = [json.loads(x) for x in (tmp_path / 'completions.jsonl').read_text().splitlines()]
    wanted, by = {}, {}
    for x in lines:
        c = x['completion']
        silent = 'Honey' in c and any(w in c for w in ('Soup', 'Zinc', 'Rest'))
        score = (2 * ('Soup' in c) + ('Zinc' in c) - ('Rest' in c)) / 3
        assert x['scores']['score'] == (None if silent else pytest.approx(score)) and ('?' in x['notes']['verdicts']) == silent
        by.setdefault(x['row'], []).append(nan if silent else x['scores']['score'])
    prompts = pd.DataFrame(by).mean()
    assert table.loc['score', 'value'] == pytest.approx(min(1, max(0, prompts.mean()))) and table.loc['score',
        'missing'] == sum(map(math.isnan, sum(by.values(), []))) > 0
    assert table.loc['theme/a', 'value'] == pytest.approx(max(0, prompts[::2].mean())) and list(table.index[:3]) == ['score', 'axis/x',
        'axis/y'] and json.loads((tmp_path / 'settings.json').read_text())['judge'] == 'mute'
    assert table.loc['theme/a', 'missing'] + table.loc['theme/b', 'missing'] == table.loc['score', 'missing']


def test_rewards_see_tokens_and_chats(tmp_path):
    seen = []
    def sizes(completions, completion_ids, **columns): return [seen.append((c, i)) or float(len(i)) for c, i in zip(completions, completion_ids)]
    table = evaluate(reward_task('t', lambda *a: ROWS, [sizes]), RUBRIC_POLICY, config(tmp_path))
    assert table.loc['tokens', 'value'] == table.loc['sizes', 'value'] and len(seen) == 25 and all(isinstance(c, str) for c, _ in seen)


# ---------------------------------------------------------------- the public sets, on small files with their schemas
def lines_file(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text('\n'.join(map(json.dumps, rows)))
    return str(path)


def bfcl_files(folder, category, keys):
    question = lambda i: dict(id=f'{category}_{i}', question=[[dict(role='user', content=f'Add, please. {i}')]], function=json.loads(TOOLS))
    if 'relevance' not in category: lines_file(folder / 'possible_answer' / f'BFCL_v4_{category}.json',
                                               [dict(id=f'{category}_{i}', ground_truth=k) for i, k in enumerate(keys)])
    return lines_file(folder / f'BFCL_v4_{category}.json', [question(i) for i in range(len(keys))])


@pytest.fixture
def said(monkeypatch):
    "A policy that answers row i with said[i]."
    said = []

    class Scripted:
        def __init__(self, model, processing_class, args, rows):
            self.ids, self.args, self.bf16, self.settings = [[1]] * len(rows), args, False, dict(eos_token_id=[0])

        def answer(self, batch, noise): return [dict(row=i, sample=0, completion=said[i], ids=[7] * len(said[i].split()), ended=1.0) for i in batch]
    monkeypatch.setattr(E, 'Answerer', Scripted)
    return said


def measured(task, data, tmp_path, **settings):
    return evaluate(task, RUBRIC_POLICY, EvalConfig(output_dir=str(tmp_path / 'out'), disable_tqdm=True), data=str(data), **settings)


def test_gsm8k(said, tmp_path):
    data = lines_file(tmp_path / 'gsm.jsonl', [dict(question='1 + 1?', answer='It is 2.\n#### 2')] * 4)
    said += ['<think>.</think><answer>2</answer>', '<answer>2.0</answer>', '<think>.</think><answer>3</answer>', 'two']
    table = measured('gsm8k', data, tmp_path)
    assert table.value.to_dict() == pytest.approx(dict(answer_format_reward=0.5, accuracy_reward=0.5, integer_reward=0.5, mean=0.5, worst=0.5,
                                                       tokens=1, ended=1) | {'all passed': 0.25})


def test_dapo_math(said, tmp_path):
    row = lambda i: dict(prompt=[dict(role='user', content=f'{i}?')], reward_model=dict(ground_truth=str(i)))
    said += ['Answer: 0', 'x ' * 4000 + '\nAnswer: 1', 'Answer: 3']
    table = measured('dapo_math', lines_file(tmp_path / 'dapo.jsonl', map(row, range(3))), tmp_path)
    assert table.value[:2].to_dict() == pytest.approx(dict(accuracy_reward=2 / 3, length=2 / 3)) and table.loc['all passed',
        'value'] == pytest.approx(1 / 3)


def test_rlla(said, tmp_path):
    gold = call(('add', dict(a=1, b=2)))
    said += [gold, gold.replace('2', '3'), 'none']
    table = measured('rlla', lines_file(tmp_path / 'rlla.jsonl', [dict(instruction='Use add.', input=f'{i}', output=gold) for i in range(3)]),
                     tmp_path)
    assert table.loc['format_reward', 'value'] == pytest.approx(2 / 3) and table.loc['tool_correctness_reward passed',
        'value'] == pytest.approx(1 / 3) and -3 < table.loc['tool_correctness_reward', 'value'] < 3


def test_gpqa(said, tmp_path):
    rows = [{'Question': f'{i}?', 'Correct Answer': 'yes', 'Incorrect Answer 1': 'no', 'Incorrect Answer 2': 'maybe',
             'Incorrect Answer 3': 'never'} for i in range(8)]
    data = lines_file(tmp_path / 'gpqa.jsonl', rows)
    options = [r['prompt'][0]['content'] for r in C.TASKS['gpqa'].rows(data, None, 0)]
    right = [next(line[0] for line in text.splitlines() if line.endswith(') yes')) for text in options]
    said += [f'Answer: {x}' for x in right[:5]] + ['Answer: ' + 'ABCD'['BCDA'.index(x)] for x in right[5:7]] + ['Hm.']
    table = measured('gpqa', data, tmp_path)
    assert table.value[:2].to_dict() == dict(accuracy=5 / 8, answered=7 / 8) and len(set(right)) > 1
    assert [r['answer'] for r in C.TASKS['gpqa'].rows(data, 3, 1)] != right[:3] and len(C.TASKS['gpqa'].rows(data, 3, 1)) == 3


def test_healthbench_and_rar(said, tmp_path):
    row = lambda i: dict(prompt_id=str(i), prompt=[dict(role='user', content=f'{i}?')], example_tags=[f'theme:{"ab"[i % 2]}'], rubrics=[
        dict(criterion='Soup', points=3, tags=['axis:accuracy']), dict(criterion='Rest', points=1, tags=['axis:completeness']),
            dict(criterion='Zinc', points=-5, tags=['axis:accuracy'])])
    data = lines_file(tmp_path / 'hb.jsonl', map(row, range(4)))
    said += ['Soup', 'Zinc', 'Soup Rest', 'Rest Honey']  # 3/4, -5/4, 1, missing
    with pytest.raises(InputError, match='needs a judge'): measured('healthbench', data, tmp_path)
    for task in ('healthbench', 'healthbench_hard', 'healthbench_consensus'):
        table = measured(task, data, tmp_path, judge=Mute())
        assert table.value.to_dict() == pytest.approx({'score': 0.5 / 3, 'axis/accuracy': 1 / 9, 'axis/completeness': 1 / 3, 'theme/a': 1.75 / 2,
                                                       'theme/b': 0, 'tokens': 1.5, 'ended': 1})
        assert table.missing.to_dict() == {'score': 1, 'axis/accuracy': 1, 'axis/completeness': 1, 'theme/a': 0, 'theme/b': 1, 'tokens': 0,
                                           'ended': 0} and table.n['score'] == 3
        shutil.rmtree(tmp_path / 'out')
    bad = [row(0), row(1) | dict(rubrics=row(1)['rubrics'][2:])]
    with pytest.raises(InputError, match='row 1: no criterion has positive points'): measured('healthbench', lines_file(tmp_path / 'bad.jsonl', bad),
        tmp_path, judge=Mute())
    rar = [dict(question='?', reference_answer='', rubric=[dict(title='', description='Essential Criteria: Soup', weight=5),
                                                           dict(title='', description='Pitfall Criteria: Zinc', weight=-1)])] * 2
    table = measured('rar', lines_file(tmp_path / 'rar.jsonl', rar), tmp_path, judge=Mute())
    assert table.value[:2].to_dict() == pytest.approx({'score': 0.4, 'axis/essential': 0.5})


def test_toolcall(said, tmp_path):
    "The expected answers, and half of them without the calls."
    rows = list(C.TASKS['toolcall'].rows(None, 6, 0))
    said += [r['answer'] if i % 2 else '<think>No.</think>' for i, r in enumerate(rows)]
    table = evaluate('toolcall', RUBRIC_POLICY, EvalConfig(output_dir=str(tmp_path / 'out'), num_prompts=6, disable_tqdm=True))
    parts = ['tool_name', 'parameter_names', 'parameter_values', 'tool_correctness_reward passed']
    assert table.value[parts].tolist() == [0.5] * 4 and table.loc['tool_correctness_reward', 'value'] == 0 and table.loc['safety', 'value'] == 1
    assert table.loc['length', 'value'] == np.mean([len(t.split()) <= 20 for t in said]) and table.loc['safety',
        'missing'] == sum(not r['destructive'] or i % 2 == 0 for i, r in enumerate(rows))


@pytest.mark.parametrize('task', ['rubric', 'ladder', 'toolcall'])
def test_embedded_prompts_are_not_those_of_training(task):
    rows = C.TASKS[task].rows
    prompts = [set(r['prompt'] for r in rows(None, 40, seed)) for seed in (0, 1)]
    train = {'toolcall': C.toolcall_prompts}.get(task, C.rubric_prompts)
    assert len(prompts[0] & prompts[1]) <= 2 and len(rows(None, None, 0)) == 256 and [dict(r) for r in rows(None, 5,
        3)] == [dict(r) for r in rows(None, 5, 3)]
    assert len(prompts[0] & {r['prompt'] for seed in range(5) for r in train(40, seed)}) <= 2


def test_bfcl(said, tmp_path):
    key, right, wrong = [{'add': {'a': [1], 'b': [2]}}], call(('add', dict(a=1, b=2))), call(('add', dict(a=1, b=3)))
    for category in C.BFCL_CATEGORIES: bfcl_files(tmp_path / 'bfcl', category, [key, key])
    said += [right, wrong] + ['none', 'none'] * (len(C.BFCL_CATEGORIES) - 1)
    table = measured('bfcl', tmp_path / 'bfcl', tmp_path)
    rates = {c: {'simple': 0.5, 'irrelevance': 1, 'live_irrelevance': 1}.get(c, 0) for c in C.BFCL_CATEGORIES}
    assert {m.removeprefix('category/'): v for m, v in table.value.items() if m.startswith('category/')} == rates and table.loc['mean of categories',
        'value'] == pytest.approx(sum(rates.values()) / 11)
    shutil.rmtree(tmp_path / 'out')
    assert measured('bfcl_live_relevance', tmp_path / 'bfcl' / 'BFCL_v4_live_relevance.json', tmp_path).loc['category/live_relevance',
        'value'] == 1  # any call will do
    with pytest.raises(InputError, match='file of one category'): measured('bfcl', tmp_path / 'bfcl' / 'BFCL_v4_simple.json', tmp_path)
    bfcl_files(tmp_path / 'bad', 'simple', [key, [{'divide': {}}]])
    with pytest.raises(InputError, match='simple_1: no tool'): measured('bfcl_simple', tmp_path / 'bad', tmp_path)


def test_chats_go_through_the_template(tmp_path):
    rows = [{'Question': f'{i}?', 'Correct Answer': 'rest', 'Incorrect Answer 1': 'honey', 'Incorrect Answer 2': 'soup',
             'Incorrect Answer 3': 'zinc'} for i in range(3)]
    model, tokenizer = load_model(RUBRIC_POLICY)
    run = lambda name, **settings: evaluate('gpqa', model, config(tmp_path / name, num_prompts=2, max_completion_length=16, **settings),
                                            data=lines_file(tmp_path / 'gpqa.jsonl', rows), processing_class=tokenizer)
    with pytest.raises(InputError, match='row 0: the prompt is a list of chat messages, and the tokenizer has no chat template'): run('none')
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert run('chat').loc['accuracy', ['value', 'n', 'missing']].tolist() == [0, 2, 0]
    said = run('system', system_prompt='Advise on: rest').loc['tokens', 'value']
    assert said > 1 and all(isinstance(x['prompt'], list) for x in map(json.loads,
                                                                       (tmp_path / 'chat' / 'completions.jsonl').read_text().splitlines()))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}. {% endfor %}"
    with pytest.raises(InputError, match='was made with prompts = '): run('chat')
    with pytest.raises(InputError, match='room for'): evaluate('gpqa', model, config(tmp_path / 'long', max_completion_length=100),
                                                               data=str(tmp_path / 'gpqa.jsonl'), processing_class=tokenizer)

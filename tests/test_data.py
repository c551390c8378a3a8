"""Loaders on small files with the published columns: what comes out, what each missing column says, and the way through the rewards."""
import csv
import json
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest

from rvpo_nb.data import (BFCL_CATEGORIES, HEALTHBENCH_FILES, load_bfcl, load_dapo_math, load_gpqa, load_gsm8k, load_healthbench, load_prompts,
                          load_rar, load_rlla, read_rows)
from rvpo_nb.maths import MaxLength, accuracy_reward, extract_answer, integer_reward
from rvpo_nb.reward import format_reward, tool_correctness_reward
from rvpo_nb.softmin import InputError

USER = lambda text: [{'role': 'user', 'content': text}]
CALL = '<think>t</think>\n<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n{"name": "g", "parameters": {}}\n</tool_call>'
RLLA = [{'instruction': f'Tools {i}.', 'input': f'Do {i}.', 'output': CALL.replace('1', str(i))} for i in range(3)]
VERL = [{'data_source': 'rlla', 'prompt': [{'role': 'system', 'content': r['instruction']}, *USER(r['input'])], 'ability': 'math',
         'reward_model': {'style': 'rule', 'ground_truth': r['output']}, 'extra_info': {'split': 'train', 'index': i}} for i, r in enumerate(RLLA)]
GSM8K = [{'question': f'How many is {i}?', 'answer': f'It is <<{i}={i}>>{i},000.\n#### {i},000'} for i in (1, 2, -3)]
DAPO = [{'data_source': 'math_dapo', 'prompt': USER(f'Problem {i}'), 'ability': 'MATH', 'reward_model': {'ground_truth': str(i), 'style': 'x'},
         'extra_info': {'index': f'{i}'}} for i in range(3)]
RAR = [{'question': f'Why {i}?', 'reference_answer': 'So.' if i else '', 'question_source': 's', 'rubric_list': ['x'], 'rubric_count': 2, 'rubric': [
    {'title': 'T', 'description': 'Essential Criteria: Says so.', 'weight': 5}, {'title': 'P', 'description': 'Pitfall Criteria: Recommends it.', 'weight': -2}]}
    for i in range(3)]
HEALTH = [{'prompt_id': f'p{i}', 'prompt': [*USER('Hm'), {'role': 'assistant', 'content': 'Yes?'}, *USER(f'Cough {i}')], 'canary': 'c', 'ideal_completions_data': None,
           'example_tags': ['physician_agreed_category:x', 'theme:hedging'], 'rubrics': [
               {'criterion': 'Is kind.', 'points': 7, 'tags': ['level:example', 'axis:communication_quality']}, {'criterion': 'Is rude.', 'points': -3, 'tags': []}]} for i in range(3)]
GPQA = [{'Question': f'Q{i}?\n', 'Correct Answer': f'right {i}', 'Incorrect Answer 1': 'a, "b"', 'Incorrect Answer 2': 'c', 'Incorrect Answer 3': 'd',
         'Explanation': 'E', 'Subdomain': 'S', 'Record ID': f'r{i}'} for i in range(3)]
TOOLS = [{'name': 'f', 'description': 'F', 'parameters': {'type': 'dict', 'properties': {'x': {'type': 'float', 'default': 1.0}}, 'required': []}},
         {'name': 'g.h', 'description': '漢', 'parameters': {'type': 'dict', 'properties': {}, 'required': []}}]
BFCL = [{'id': f'simple_{i}', 'question': [USER(f'Call {i}')], 'function': TOOLS[:1 + i % 2]} for i in range(3)]
KEYS = [{'id': f'simple_{i}', 'ground_truth': [{'f': {'x': [i, float(i), '']}}]} for i in reversed(range(3))]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.jsonl' or path.name.startswith('BFCL'): path.write_text('\n'.join(json.dumps(r) for r in rows) + '\n')
    elif path.suffix == '.json': path.write_text(' \n' + json.dumps(rows))
    elif path.suffix == '.parquet': pd.DataFrame(rows).to_parquet(path)
    else: pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


# every flat or nested column that a loader needs, with the rows it is dropped from
LOADERS = {'rlla': (load_rlla, RLLA, ['instruction', 'input', 'output']), 'verl': (load_rlla, VERL, ['reward_model', 'reward_model.ground_truth']),
           'gsm8k': (load_gsm8k, GSM8K, ['question', 'answer']), 'dapo': (load_dapo_math, DAPO, ['prompt', 'reward_model', 'reward_model.ground_truth']),
           'rar': (load_rar, RAR, ['question', 'reference_answer', 'rubric']), 'health': (load_healthbench, HEALTH, ['prompt_id', 'prompt', 'rubrics', 'example_tags']),
           'gpqa': (load_gpqa, GPQA, ['Question', 'Correct Answer', 'Incorrect Answer 1', 'Incorrect Answer 2', 'Incorrect Answer 3'])}
DROPS = [(name, column) for name, (*_, columns) in LOADERS.items() for column in columns]


def without(row, column):
    head, _, rest = column.partition('.')
    return {k: without(v, rest) if k == head else v for k, v in row.items() if k != head or rest}


def put(row, column, value):
    head, _, rest = column.partition('.')
    return {**row, head: put(row[head], rest, value) if rest else value}


@pytest.mark.parametrize('name, column', DROPS)
@pytest.mark.parametrize('row', [0, 2])
def test_a_missing_column_is_named_with_the_file_and_the_row(tmp_path, name, column, row):
    load, rows, _ = LOADERS[name]
    rows = [without(r, column) if i == row else r for i, r in enumerate(rows)]
    path = write(tmp_path / 'set.jsonl', rows)
    with pytest.raises(InputError) as e: load(path)
    assert str(e.value).startswith(f"{path!r}, row {row}: no column '{column}") and str(e.value).endswith(f"'; there are: {', '.join(rows[row])}")


@pytest.mark.parametrize('name, column', DROPS)
def test_an_empty_or_wrong_column_is_named(tmp_path, name, column):
    load, rows, _ = LOADERS[name]
    for value in (None, '', ' \n', [], 3.5, True):
        if column == 'reference_answer' and value in (None, '', ' \n'): continue
        with pytest.raises(InputError, match=f"row 1: (no )?column '{column}"): load(write(tmp_path / 'set.jsonl', [rows[0], put(rows[1], column, value)]))


@pytest.mark.parametrize('name, column', [('rlla', 'input'), ('rlla', 'output'), ('verl', 'reward_model.ground_truth'), ('gsm8k', 'question'), ('rar', 'question'),
                                          ('rar', 'reference_answer'), ('health', 'prompt_id'), ('gpqa', 'Question'), ('gpqa', 'Correct Answer')])
def test_text_that_is_no_unicode_is_named(tmp_path, name, column):
    load, rows, _ = LOADERS[name]
    path = write(tmp_path / 'set.jsonl', [rows[0], put(rows[1], column, '\ud800 x')])
    with pytest.raises(InputError) as e: load(path)
    assert str(e.value).startswith(f"{path!r}, line 2: 'utf-8' codec can't encode")


@pytest.mark.parametrize('name, column, gold, said', [
    ('rlla', 'output', '<tool_call>broken', 'not exactly one tool_call block'), ('rlla', 'output', '<tool_call>\n{"name": 3}\n</tool_call>', 'is not {"name": a string'),
    ('verl', 'reward_model.ground_truth', '<tool_call></tool_call>', '0 calls'), ('dapo', 'reward_model.ground_truth', 'x' * 400, 'solution'),
    ('gsm8k', 'answer', 'She has some.\n#### many', 'does not end with'), ('gsm8k', 'answer', '#### ' + '9' * 5000, 'digits')])
def test_a_gold_answer_that_cannot_be_read_is_named(tmp_path, name, column, gold, said):
    load, rows, _ = LOADERS[name]
    path = write(tmp_path / 'set.jsonl', [*rows[:2], put(rows[2], column, gold)])
    with pytest.raises(InputError) as e: load(path)
    assert str(e.value).startswith(f'{path!r}, row 2: ') and said in str(e.value)


@pytest.mark.parametrize('name', LOADERS)
def test_a_path_is_as_good_as_its_name(tmp_path, name):
    load, rows, columns = LOADERS[name]
    path = write(tmp_path / 'set.jsonl', rows)
    assert load(Path(path)).to_list() == load(path).to_list()
    write(tmp_path / 'set.jsonl', [without(rows[0], columns[0])])
    with pytest.raises(InputError) as e: load(Path(path))
    assert str(e.value).startswith(f'{path!r}, row 0: ')
    with pytest.raises(InputError, match="^data file 'nowhere.jsonl' does not exist"): load(Path('nowhere.jsonl'))


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.csv'])
def test_a_byte_order_mark(tmp_path, suffix):
    path = Path(write(tmp_path / f'a{suffix}', GSM8K))
    want = load_gsm8k(path).to_list()
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().lstrip())
    assert load_gsm8k(path).to_list() == want and load_prompts(path) == GSM8K


@pytest.mark.parametrize('name', LOADERS)
@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.parquet'])
def test_every_kind_of_file_gives_the_same(tmp_path, name, suffix):
    load, rows, _ = LOADERS[name]
    want = load(write(tmp_path / 'a.jsonl', rows))
    got = load(write(tmp_path / f'b{suffix}', rows))
    assert got.to_list() == want.to_list() and len(got) == 3 and got.features == want.features
    assert 'prompt' in got.column_names and all(isinstance(r['prompt'], list) and r['prompt'][-1]['role'] == 'user' for r in got)


def test_rlla_through_its_rewards(tmp_path):
    rows = load_rlla(write(tmp_path / 'a.jsonl', RLLA))
    assert rows[1] == {'prompt': VERL[1]['prompt'], 'answer': RLLA[1]['output']}
    assert rows.to_list() == load_rlla(write(tmp_path / 'b.parquet', VERL)).to_list()
    assert tool_correctness_reward(rows['answer'], answer=list(rows['answer'])) == [3] * 3 == [3 * x for x in format_reward(rows['answer'], answer=list(rows['answer']))]
    # names 1 of 1, parameter names 2 of 2 (g has none in both), values 0 of 1: 6 * 3/4 - 3
    assert tool_correctness_reward([rows['answer'][0]], answer=[rows['answer'][1]]) == [1.5]


def test_gsm8k_through_its_rewards(tmp_path):
    path = write(tmp_path / 'a.jsonl', GSM8K)
    rows = load_gsm8k(path)
    assert rows['solution'] == ['1000', '2000', '-3000'] and rows[0]['prompt'][0]['role'] == 'system' and '<answer>' in rows[0]['prompt'][0]['content']
    assert load_gsm8k(path, system=None)[0]['prompt'] == USER('How many is 1?')
    said = [f'<answer>{s}</answer>' for s in rows['solution']]
    assert accuracy_reward(said, rows['solution']) == integer_reward(said) == [1] * 3
    assert accuracy_reward(said, [r['answer'] for r in GSM8K]) == [1] * 3
    with pytest.raises(InputError, match="row 0: column 'answer' does not end"): load_gsm8k(write(tmp_path / 'b.jsonl', [{'question': 'q', 'answer': '72'}]))


def test_dapo_loses_its_copies_and_keeps_the_order(tmp_path):
    copies = [{**r, 'extra_info': {'index': str(i)}} for i, r in enumerate(DAPO * 100)]
    rows = load_dapo_math(write(tmp_path / 'a.parquet', copies))
    assert rows.to_list() == [{'prompt': r['prompt'], 'solution': r['reward_model']['ground_truth']} for r in DAPO]
    said = [f'So.\nAnswer: {s}' for s in rows['solution']]
    assert accuracy_reward(said, rows['solution']) == MaxLength(4000)(said, completion_ids=[[1] * 4000] * 3) == [1] * 3


@pytest.mark.parametrize('text, weight, points, axis', [
    ('Essential Criteria: Names X.', 5, 5, 'essential'), ('Important Criteria: X.', 4, 4, 'important'), ('X.', 1, 1, ''), ('Esssential Criteria: X.', 5, 5, 'esssential'),
    ('Pitfall Criteria: Recommends X.', -2, -2, 'pitfall'), ('Pitfall Criteria: Does not mention X.', -1, -1, 'pitfall'), ('Pitfall Criteria: Fails to avoid X.', -1, -1, 'pitfall'),
    ('Pitfall Criteria: Does not avoid X.', -1, -1, 'pitfall'), ('Pitfall Criteria: Says what one should not do.', -1, -1, 'pitfall'),
    ('Pitfall Criteria: Avoids X.', -1, 1, 'pitfall'), ('Pitfall Criteria: The response should avoid X.', -2, 2, 'pitfall'), ('pitfall criteria: The answer must not do X.', -1, 1, 'pitfall'),
    ('Pitfall Criteria: A good answer should refrain from X.', -1, 1, 'pitfall'), ('Pitfall Criteria: It should never X.', -1, 1, 'pitfall'),
    *[(f'Pitfall Criteria: {fault}', -2, -2, 'pitfall') for fault in (
        'The response fails to mention that the patient should not drive.', 'The answer incorrectly states that children must not be vaccinated.',
        'Any claim that patients should avoid exercise.', 'It suggests that the dose should not be reduced.', 'Avoidance of antibiotics is not recommended.',
        'The patient should not drive.', 'Suggests X should be avoided.')],
    *[(f'Pitfall Criteria: {wish}', -2, 2, 'pitfall') for wish in (
        'Response should avoid X.', 'This response should not X.', 'Must avoid X.', 'Do not recommend X.', 'Should not recommend X.', 'Responses must never X.')]])
def test_signs_and_axes_of_rar(tmp_path, text, weight, points, axis):
    path = write(tmp_path / 'a.jsonl', [{**RAR[0], 'rubric': [{'title': 'T', 'description': text, 'weight': weight}]}])
    c, = load_rar(path)[0]['rubric']
    assert (c['points'], c['axis']) == (points, axis) and text.endswith(c['text'])
    assert load_rar(path, stored_signs=True)[0]['rubric'][0]['points'] == weight


@pytest.mark.parametrize('load, rows, column, keys', [(load_rar, RAR, 'rubric', ['description', 'weight']), (load_healthbench, HEALTH, 'rubrics', ['criterion', 'points', 'tags'])])
def test_a_criterion_without_a_part_is_named(tmp_path, load, rows, column, keys):
    for key in keys:
        bad = [rows[0], {**rows[1], column: [rows[1][column][0], without(rows[1][column][1], key)]}]
        with pytest.raises(InputError, match=f"row 1: a criterion: no column '{key}'"): load(write(tmp_path / 'a.jsonl', bad))
    with pytest.raises(InputError, match='row 0: a criterion'): load(write(tmp_path / 'b.jsonl', [{**rows[0], column: ['be nice']}]))


@pytest.mark.parametrize('load, rows, column, key', [(load_rar, RAR, 'rubric', 'weight'), (load_healthbench, HEALTH, 'rubrics', 'points')])
def test_points_that_are_no_number_are_named(tmp_path, load, rows, column, key):
    for value in (float('nan'), float('inf'), -float('inf'), True, '5', None, 10**400):
        path = write(tmp_path / 'a.jsonl', [rows[0], {**rows[1], column: [{**rows[1][column][0], key: value}]}])
        with pytest.raises(InputError) as e: load(path)
        assert str(e.value).startswith(f'{path!r}, row 1: ') and ('no finite number' in str(e.value) or value == 10**400)


def test_healthbench(tmp_path):
    rows = load_healthbench(write(tmp_path / 'a.jsonl', HEALTH))
    assert rows.column_names == ['prompt', 'prompt_id', 'theme', 'rubric'] and rows[2]['prompt'] == HEALTH[2]['prompt'] and rows['theme'] == ['hedging'] * 3
    assert rows[0]['rubric'] == [{'text': 'Is kind.', 'points': 7.0, 'axis': 'communication_quality'}, {'text': 'Is rude.', 'points': -3.0, 'axis': ''}]
    with pytest.raises(InputError, match="no split 'train', only full, hard, consensus"): load_healthbench(split='train')


def test_gpqa_options(tmp_path):
    many = [{**GPQA[0], 'Correct Answer': f' right {i} '} for i in range(200)]
    path = write(tmp_path / 'a.csv', many)
    rows = load_gpqa(path)
    for i, row in enumerate(rows):
        options = dict(line.split(') ', 1) for line in row['prompt'][0]['content'].split('\n')[-4:])
        assert options[row['answer']] == f'right {i}' and sorted(options) == list('ABCD') and sorted(options.values()) == ['a, "b"', 'c', 'd', f'right {i}']
    counts = pd.Series(rows['answer']).value_counts()
    assert counts.min() > 25 and len(counts) == 4
    assert load_gpqa(path).to_list() == rows.to_list() != load_gpqa(path, seed=1).to_list()
    assert extract_answer(f'Hm.\nAnswer: {rows[0]["answer"]}') == rows[0]['answer']


def test_a_wide_csv_with_line_breaks_and_a_byte_order_mark(tmp_path):
    with open(tmp_path / 'a.csv', 'w', encoding='utf-8-sig', newline='') as f:
        w = csv.DictWriter(f, list(GPQA[0]))
        w.writeheader(), w.writerows(GPQA)
    assert list(read_rows(str(tmp_path / 'a.csv'))) == GPQA
    (tmp_path / 'b.csv').write_text('Question,Correct Answer\nonly a question\n')
    with pytest.raises(InputError, match="row 0: column 'Correct Answer' holds None"): load_gpqa(str(tmp_path / 'b.csv'))


def bfcl(folder, name='BFCL_v3_simple.json', rows=BFCL, keys=KEYS):
    write(folder / name, rows)
    if keys: write(folder / 'possible_answer' / name, keys)
    return str(folder)


def test_bfcl_paths_and_unicode(tmp_path):
    folder = Path(bfcl(tmp_path))
    key = folder / 'possible_answer' / 'BFCL_v3_simple.json'
    assert load_bfcl(folder).to_list() == load_bfcl(folder / 'BFCL_v3_simple.json', answers=key).to_list() == load_bfcl(str(folder)).to_list()
    bfcl(tmp_path, rows=[{**BFCL[0], 'question': [USER('\ud800')]}])
    with pytest.raises(InputError, match="BFCL_v3_simple.json', line 1: 'utf-8' codec"): load_bfcl(folder)


def test_bfcl(tmp_path):
    rows = load_bfcl(bfcl(tmp_path), system=None)
    assert rows.column_names == ['prompt', 'id', 'tools', 'expected'] and rows['id'] == [r['id'] for r in BFCL] and rows[1]['prompt'] == BFCL[1]['question'][0]
    assert [json.loads(t) for t in rows['tools']] == [r['function'] for r in BFCL]
    assert [json.loads(e) for e in rows['expected']] == [k['ground_truth'] for k in KEYS[::-1]]
    asked = load_bfcl(str(tmp_path / 'BFCL_v3_simple.json'))
    system = asked[1]['prompt'][0]
    assert system['role'] == 'system' and all(json.dumps(t, ensure_ascii=False) in system['content'].split('\n') for t in TOOLS) and '{"name": ..., "parameters": {...}}' in system['content']
    assert asked.remove_columns('prompt').to_list() == rows.remove_columns('prompt').to_list() and asked[1]['prompt'][1:] == rows[1]['prompt']


def test_bfcl_v4_and_files_elsewhere(tmp_path):
    bfcl(tmp_path)
    bfcl(tmp_path, 'BFCL_v4_simple_python.json', BFCL[:1])
    assert load_bfcl(str(tmp_path))['id'] == ['simple_0']  # the newer one
    key = write(tmp_path / 'elsewhere' / 'keys.jsonl', KEYS)
    assert len(load_bfcl(write(tmp_path / 'q' / 'questions.jsonl', BFCL), answers=key)) == 3


@pytest.mark.parametrize('category, expected', [('irrelevance', '[]'), ('live_irrelevance', '[]'), ('live_relevance', 'null')])
def test_bfcl_without_answers(tmp_path, category, expected):
    assert load_bfcl(bfcl(tmp_path, f'BFCL_v3_{category}.json', keys=None), category)['expected'] == [expected] * 3


def test_bfcl_puts_the_format_before_a_system_message(tmp_path):
    own = [{**BFCL[0], 'question': [[{'role': 'system', 'content': 'Be brief.'}, *USER('Hi')]]}]
    system, user = load_bfcl(bfcl(tmp_path, rows=own), system='Tools: {tools}')[0]['prompt']
    assert system == {'role': 'system', 'content': f'Tools: {json.dumps(TOOLS[0])}\n\nBe brief.'} and user == USER('Hi')[0]


def test_bfcl_faults(tmp_path):
    for category in ('multi_turn_base', 'java', 'Simple', ''):
        with pytest.raises(InputError, match=f"no single-turn category '{category}', only simple, multiple"): load_bfcl(category=category)
    assert len(BFCL_CATEGORIES) == 11
    folder = bfcl(tmp_path / 'a', keys=None)
    with pytest.raises(InputError, match='possible_answer/BFCL_v3_simple.json.* does not exist'): load_bfcl(folder)
    with pytest.raises(InputError, match='has none of BFCL_v4_parallel.json'): load_bfcl(folder, 'parallel')
    with pytest.raises(InputError, match='row 2: simple_2 is not among the possible answers'): load_bfcl(bfcl(tmp_path / 'b', keys=KEYS[1:]))
    with pytest.raises(InputError, match='row 0: simple_0 has 2 turns'): load_bfcl(bfcl(tmp_path / 'c', rows=[{**BFCL[0], 'question': [USER('a'), USER('b')]}]))
    for column in BFCL[0]:
        with pytest.raises(InputError, match=f"BFCL_v3_simple.json', row 1: no column '{column}'"): load_bfcl(bfcl(tmp_path / 'd', rows=[BFCL[0], without(BFCL[1], column)]))
    for column in KEYS[0]:
        with pytest.raises(InputError, match=f"possible_answer/BFCL_v3_simple.json', row 1: no column '{column}'"): load_bfcl(bfcl(tmp_path / 'e', keys=[KEYS[0], without(KEYS[1], column)]))


@pytest.mark.parametrize('messages', [[5], ['hello'], [{'role': 'user'}], [{'content': 'x'}], [{'role': 'user', 'content': None}], [{'role': 'user', 'content': [{'text': 'x'}]}], {'role': 'user'}])
def test_a_message_that_is_none(tmp_path, messages):
    with pytest.raises(InputError, match='row 0: .* is no chat message|is no list'): load_dapo_math(write(tmp_path / 'a.jsonl', [{**DAPO[0], 'prompt': messages}]))
    with pytest.raises(InputError, match='row 0: .* is no (chat message|list of chat messages)'): load_bfcl(bfcl(tmp_path, rows=[{**BFCL[0], 'question': [messages]}]))


def test_bfcl_without_turns_or_messages(tmp_path):
    for question in (USER('flat'), [[]], ['text'], [None]):
        with pytest.raises(InputError, match="BFCL_v3_simple.json', row 0: .* is no list of chat messages"): load_bfcl(bfcl(tmp_path, rows=[{**BFCL[0], 'question': question}]))


def test_files_that_cannot_be_read(tmp_path):
    for name, content in {'a.jsonl': '{"question": "q"\n', 'b.json': '[{"question": 1},', 'c.parquet': 'PAR1 no', 'd.jsonl': '\xff\xfe\x00', 'e.json': '[[1]]', 'f.jsonl': '5\n', 'g.jsonl': '"question"',
                          'h.jsonl': '[' * 100_000, 'i.json': '{"question": {"a": ' * 50_000}.items():
        (tmp_path / name).write_bytes(content.encode('latin-1'))
        with pytest.raises(InputError, match=name): load_gsm8k(str(tmp_path / name))
    for name in ('empty.jsonl', 'blank.json', 'head.csv'):
        (tmp_path / name).write_text({'head.csv': 'question,answer\n', 'blank.json': ' \n\n'}.get(name, ''))
        with pytest.raises(InputError, match='has no rows'): load_gsm8k(str(tmp_path / name))
    (tmp_path / 'line.jsonl').write_text(json.dumps(GSM8K[0]) + '\n{"question": }\n')
    with pytest.raises(InputError, match='line 2'): load_gsm8k(str(tmp_path / 'line.jsonl'))
    (tmp_path / 'x.txt').write_text('x')
    for bad in (str(tmp_path / 'x.txt'), str(tmp_path)):
        with pytest.raises(InputError, match='is none of .jsonl, .json, .parquet, .csv'): load_gsm8k(bad)
    for load in (load_rlla, load_gsm8k, load_dapo_math, load_rar, load_healthbench, load_gpqa, load_bfcl):
        with pytest.raises(InputError, match="'nowhere.jsonl' does not exist"): load('nowhere.jsonl')


def test_the_hub_is_asked_for_the_right_thing(monkeypatch, tmp_path):
    "The hub's client is replaced; what matters is what it is asked for and that its rows go the same way."
    asked, tables = [], {'emrecanacikgoz/ToolRL': RLLA, 'openai/gsm8k': GSM8K, 'BytedTsinghua-SIA/DAPO-Math-17k': DAPO, 'ScaleAI/RaR-Medicine': RAR, 'Idavidrein/gpqa': GPQA}
    def load_dataset(path, name=None, *, split): return asked.append((path, name, split)) or datasets.Dataset.from_list(tables[path])
    def download(repo, file, *, repo_type):
        asked.append((repo, file, repo_type))
        return write(tmp_path / file, HEALTH if 'healthbench' in repo else KEYS if 'possible' in file else BFCL)
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    board = 'gorilla-llm/Berkeley-Function-Calling-Leaderboard'
    loaded = [load_rlla(), load_gsm8k(split='test'), load_dapo_math(), load_rar(split='val'), load_gpqa(), load_healthbench(split='hard'), load_bfcl()]
    assert [len(d) for d in loaded] == [3] * 7
    assert asked == [('emrecanacikgoz/ToolRL', None, 'train'), ('openai/gsm8k', 'main', 'test'), ('BytedTsinghua-SIA/DAPO-Math-17k', None, 'train'),
                     ('ScaleAI/RaR-Medicine', None, 'val'), ('Idavidrein/gpqa', 'gpqa_diamond', 'train'), ('openai/healthbench', HEALTHBENCH_FILES['hard'], 'dataset'),
                     (board, 'possible_answer/BFCL_v3_simple.json', 'dataset'), (board, 'BFCL_v3_simple.json', 'dataset')]
    local = [load_rlla(write(tmp_path / 'a.jsonl', RLLA)), load_gsm8k(write(tmp_path / 'b.jsonl', GSM8K)), load_dapo_math(write(tmp_path / 'c.jsonl', DAPO))]
    assert [d.to_list() for d in loaded[:3]] == [d.to_list() for d in local]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    "The tests run offline: every default source fails as an input error that names it."
    for load in (load_rlla, load_gsm8k, load_dapo_math, load_rar, load_healthbench, load_gpqa, load_bfcl):
        with pytest.raises(InputError, match='cannot read data .*/'): load()


def test_own_prompts(tmp_path):
    rows = [{'prompt': 'a', 'x': 1}, {'prompt': 'b', 'x': 2}]
    for suffix in ('.jsonl', '.parquet'): assert list(load_prompts(write(tmp_path / f'a{suffix}', rows))) == list(load_prompts(tmp_path / f'a{suffix}')) == rows
    texts = [{'prompt': 'a, "b"\nc', 'solution': '007'}, {'prompt': 'NA', 'solution': None}]
    assert list(load_prompts(write(tmp_path / 'a.csv', texts))) == texts
    with pytest.raises(InputError, match='does not exist'): load_prompts('nowhere.parquet')
    with pytest.raises(InputError, match='neither'): load_prompts(str(tmp_path))
    (tmp_path / 'b.jsonl').write_text('{"prompt": ')
    with pytest.raises(InputError, match='line 1'): load_prompts(str(tmp_path / 'b.jsonl'))

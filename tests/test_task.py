"""The patients' questions: every rule by hand, text that nobody expected, the judge's moods, and the nine criteria as they always were."""
import hashlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rvpo_nb.patients import CRITERIA, LADDER, NINE, PATIENTS, good_answer, room, rubric_prompts, rubric_rewards, rubric_row, rule_judge, word_limit
from rvpo_nb.reward import call_rewards, reward_name
from rvpo_nb.softmin import InputError
from rvpo_nb.task import LADDER_POLICY, LONG_NOTICE, imperfect_answer, imperfect_reply

# one question, whose answers are judged by hand
ROW = dict(prompt='Hello. A cough. Will it pass? It is my toddler. Keep the order. End with: Get better soon. Advise on: honey rest soup zinc masks sleep fluids',
           criteria=list(LADDER), points=['honey', 'rest', 'soup', 'zinc', 'masks', 'sleep', 'fluids'], limit=10, complaint='cough', patient='toddler', avoid='steam',
           closing='Get better soon.')
CASES = {  # criterion: answers that a rule finds explained, met, named, or not
    'point_1': dict(explained=['Honey soothes coughs.', 'Rest. Honey soothes coughs. Rest.', 'Honey soothes coughs', ' Honey soothes coughs . ', 'Honey. Honey soothes coughs.'],
                    named=['Honey.', 'Hello. Honey', 'Honey lowers fever. Honey.'],
                    no=['', 'honey.', 'honey soothes coughs.', 'Honey lowers fever.', 'Honey soothes coughs!', 'Honey  soothes coughs.', 'Soup warms airways.', 'No-honey.']),
    'point_7': dict(explained=['Fluids prevent dehydration.'], named=['Fluids.'], no=['Fluid.', 'Honey soothes coughs.']),
    'length': dict(yes=['', 'a ' * 10, 'Rest rebuilds strength. Soup warms airways. Honey soothes coughs. Zinc.', '\n\n a\tb '], no=['a ' * 11, 'a\n' * 11]),
    'greeting': dict(yes=['Hello.', 'Hello', ' Hello. Rest.', '. Hello. Rest.'], no=['', 'Rest. Hello.', 'hello.', 'Hello there. Rest.']),
    'varied': dict(yes=['Rest. Rest.', 'Rest. Soup. Rest rebuilds strength.', 'A. B. A'], no=['', '...', 'Rest. Soup.', 'Rest Rest Rest.', 'Rest. rest.']),
    'closing': dict(explained=['Get better soon.', 'Rest. Get better soon', 'Rest. Get better soon. . '], named=['Soon.', 'Rest. Soon.', 'Get better soon. Soon.'],
                    no=['', 'Get better soon. Rest.', 'Take good care.', 'Care.', 'soon.']),
    'order': dict(yes=['Honey. Rest.', 'Honey. Hello. Fluids prevent dehydration.', 'Honey lowers fever. Soup.', 'Honey. Steam. Rest.', 'Honey. Rest. Honey.'],
                  no=['', 'Honey.', 'Rest. Honey.', 'Honey. Honey.', 'Honey. Soup. Rest.', 'Steam. Gargling.', 'honey. rest.']),
    'truthful': dict(yes=['Honey lowers fever.', 'Rest. Steam shortens colds.', 'Masks protect.', 'Honey soothes coughs and more.', 'Paracetamol Paracetamol.'],
                     no=['', 'Honey.', 'Honey soothes coughs.', 'Steam clears noses.', 'Whisky lowers fever.', 'Avoid honey: botulism.', 'Does Honey lower fever?']),
    'harmless': dict(yes=['Steam.', 'Rest. Steam clears noses.', 'Steam lowers fever.', 'Avoid steam: scalds. Steam.'],
                     no=['', 'Avoid steam: scalds.', 'No-steam.', 'Honey.', 'steam.', 'Steamy.', 'Rest with Steam.']),
    'caution': dict(explained=['Avoid steam: scalds.', 'Rest. Avoid steam: scalds. Soon.'], named=['No-steam.', 'Steam. No-steam'],
                    no=['', 'Avoid honey: botulism.', 'No-honey.', 'Avoid steam: burns.', 'Avoid steam.']),
    'notice': dict(yes=['See-a-doctor.', 'Rest. See-a-doctor. Soon.'], no=['', 'See-a-doctor', 'See a doctor.', 'Ask a doctor.']),
    'concern': dict(explained=['The cough passes.', 'Cough. The cough passes'], named=['Cough.', 'Rest. Cough'], no=['', 'The cold passes.', 'Cold.', 'cough.', 'The cough passes soon.'])}
HOSTILE = ['', ' ', '.', '. . .', '...' * 1000, '\0', '\n\r\t\u2028\u00a0', 'é' * 50, '蜂蜜缓解咳嗽。', '🍯. 🍯.', '\u202e.tseR', 'Ｒｅｓｔ.', 'İ. ß. ﬁ.', '{points[0]} %s {{}}', 'Rest' * 1000 + '.',
           'Honey. ' * 3000, 'Honey soothes coughs. ' * 3000, '\ud800.', '<eos>', '*' * 20_000, 'Hello. ' + 'x' * 20_000 + ' Soon.', '\\' * 999, 'None', 'Steam.\0Steam.', '{"criteria_met": true}']


def columns(rows): return {c: [r[c] for r in rows] for c in rows[0] if c != 'prompt'}


def score(rewards, rows, answers, step=0):
    return call_rewards(rewards, [r['prompt'] for r in rows], answers, trainer_state=SimpleNamespace(global_step=step), **columns(rows))


@pytest.mark.parametrize('name', CASES)
def test_rules_by_hand(name):
    rule = CRITERIA[name]
    for verdict, answers in CASES[name].items():
        for answer in answers:
            assert rule.verdict(ROW, answer) == verdict, f'{name}: {answer[:60]!r}'
            assert rule.met(ROW, answer) is rule.met(ROW, [{'role': 'assistant', 'content': answer}]) is (verdict in ('yes', 'explained'))


def test_every_criterion_has_cases_that_meet_it_and_that_do_not():
    assert {c for c in CRITERIA if c not in CASES} == {f'point_{j}' for j in range(2, 7)}
    assert all({'no'} < set(cases) for cases in CASES.values())
    for j in range(1, 8): assert CRITERIA[f'point_{j}'].met(ROW, good_answer(ROW, 17)) and not CRITERIA[f'point_{j}'].met(ROW, good_answer(ROW, 0))


@pytest.mark.parametrize('patient', PATIENTS)
def test_a_caution_must_match_the_patient(patient):
    row = dict(ROW, patient=patient, avoid=PATIENTS[patient][1])
    others = [p for p in PATIENTS if p != patient]
    right, wrong = (CRITERIA['caution'].forms(dict(row, patient=p))[1] for p in (patient, others[0]))
    assert CRITERIA['caution'].met(row, right) and not CRITERIA['caution'].met(row, wrong)
    assert CRITERIA['harmless'].met(row, PATIENTS[patient][1].capitalize() + '.') and not CRITERIA['harmless'].met(row, right)


def test_hostile_text_gets_a_score_from_every_reward():
    rewards, rows = rubric_rewards(criteria=17, noise=0.1), [ROW] * len(HOSTILE)
    for answers in (HOSTILE, [[{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': t}] for t in HOSTILE]):
        table = score(rewards, rows, answers)
        assert ((table == 0) | (table == 1)).all()


def test_time_grows_in_proportion_to_the_text():
    "64 times the text: a time that grows with its square would be 4096 times as long."
    def seconds(text):
        def once():
            start = time.process_time()
            score(rubric_rewards(criteria=17), [ROW], [text])
            return time.process_time() - start
        return min(once() for _ in range(3))
    for unit in ('Honey soothes coughs. ', '. ', 'x', 'Rest '): assert seconds(unit * 64_000) < 600 * seconds(unit * 1000) + 0.05, unit


def test_good_answers_meet_everything_but_the_limit():
    for row in rubric_prompts(100, seed=3, criteria=(5, 17)):
        rules = [CRITERIA[c] for c in row['criteria']]
        met = lambda explained, mention: [c for c, r in zip(row['criteria'], rules)
                                          if (r.verdict(row, good_answer(row, explained)) in (('yes', 'explained', 'named') if mention else ('yes', 'explained'))) != (r.points > 0)]
        assert met(17, False) == ['length'] and met(0, True) == met(room(row['criteria']), True) == []
        assert len(good_answer(row, room(row['criteria'])).split()) == row['limit'] < len(good_answer(row, room(row['criteria']) + 1).split())


def test_prompts_are_a_function_of_the_seed():
    for criteria in (NINE, 5, 17, (5, 17), ('point_1', 'point_2', 'harmless')):
        one, same, other = (list(rubric_prompts(20, seed=s, criteria=criteria)) for s in (4, 4, 5))
        assert one == same != other
    longer = list(rubric_prompts(40, seed=4, criteria=17))
    assert longer[:20] == list(rubric_prompts(20, seed=4, criteria=17)), 'more rows begin with the same rows'


def test_the_question_says_what_the_rules_ask_for():
    for row in rubric_prompts(200, seed=0, criteria=(5, 17)):
        asked, names = row['prompt'].split('Advise on: ')[1].split(), row['criteria']
        assert asked == row['points'] and row['avoid'] not in asked and len(set(asked)) == len(asked) == sum(c.startswith('point_') for c in names)
        assert ('Keep the order.' in row['prompt']) == ('order' in names) and ('Will it pass?' in row['prompt']) == ('concern' in names)
        assert row['prompt'].startswith('Hello.') == ('greeting' in names) and f"End with: {row['closing']}" in row['prompt']
        assert PATIENTS[row['patient']][0] in row['prompt'] and f"A {row['complaint']}." in row['prompt'] and PATIENTS[row['patient']][1] == row['avoid']
        assert row['limit'] == word_limit(names)


def test_rewards_and_rubric_items_stand_in_the_same_order():
    for criteria in (NINE, 5, 12, 17, (6, 15)):
        rewards, rows = rubric_rewards(0.0, 1.0, criteria=criteria), list(rubric_prompts(60, seed=2, criteria=criteria))
        rng = np.random.default_rng(0)
        answers = [imperfect_reply(r, rng) if criteria != NINE else imperfect_answer(r['points'], rng) for r in rows]
        table, judge = score(rewards, rows, answers), rule_judge(rows)
        for row, answer, values in zip(rows, answers, table.tolist()):
            assert sorted(row['rubric'][0]) == ['axis', 'points', 'text'] and [reward_name(f) for f in rewards][:len(row['rubric'])] == row['criteria']
            for j, item in enumerate(row['rubric']):
                assert (item['points'], item['axis']) == (CRITERIA[row['criteria'][j]].points, CRITERIA[row['criteria'][j]].axis)
                assert values[j] == (judge(row['prompt'], answer, item['text']) == (item['points'] > 0))
            assert all(v != v for v in values[len(row['rubric']):]), 'no item, no reward'


def test_the_rubric_speaks_of_this_patient():
    row = rubric_row(LADDER, np.random.default_rng(0))
    text = {c: item['text'] for c, item in zip(LADDER, row['rubric'])}
    assert row['points'][0] in text['point_1'] and str(row['limit']) in text['length'] and row['closing'] in text['closing'] and row['complaint'] in text['concern']
    assert row['avoid'] in text['caution'] and row['avoid'] in text['harmless'] and not any('{' in t for t in text.values())
    assert len({item['axis'] for item in row['rubric']}) == 5 and [c for c in LADDER if CRITERIA[c].points < 0] == ['truthful', 'harmless', 'varied']


def test_missing_criteria_are_none():
    rows = list(rubric_prompts(50, seed=1, criteria=(5, 17)))
    sizes = [len(r['criteria']) for r in rows]
    assert min(sizes) == 5 and max(sizes) == 17
    for j, f in enumerate(rubric_rewards(criteria=(5, 17), noise=0.3)):
        values = f([r['prompt'] for r in rows], [''] * 50, **columns(rows))
        assert [v is None for v in values] == [j >= n for n in sizes]


@pytest.mark.parametrize('noise', [0.0, 0.1, 0.3, 1.0])
def test_noise_flips_verdicts_at_its_rate(noise):
    "With credits of 0 and 1 all chance is noise."
    n, answer = 2000, good_answer(ROW, 3)
    clean, noisy = (score(rubric_rewards(0.0, 1.0, criteria=17, noise=v, seed=3), [ROW] * n, [answer] * n) for v in (0.0, noise))
    assert (clean == clean[0]).all(), 'no noise, no chance'
    flipped = (clean != noisy).double().mean(0)
    assert (flipped - noise).abs().max() <= 5 * (noise * (1 - noise) / n) ** 0.5


def test_moods_depend_on_seed_step_and_criterion_alone():
    n, answers = 400, [''] * 400
    def flips(seed=0, step=0, criteria=17): return score(rubric_rewards(0.0, 1.0, criteria=criteria, noise=0.3, seed=seed), [ROW] * n, answers, step) != \
        score(rubric_rewards(0.0, 1.0, criteria=criteria), [ROW] * n, answers, step)
    one = flips()
    assert one.equal(flips()) and one[:, :9].equal(flips(criteria=9)), 'neither the call nor the other rewards matter'
    for other in (flips(seed=1), flips(step=1)): assert (0.3 < (one != other).double().mean(0)).all() and ((one != other).double().mean(0) < 0.54).all()
    pairs = [(one[:, i] != one[:, j]).double().mean() for i in range(17) for j in range(i)]
    assert 0.3 < min(pairs) and max(pairs) < 0.54, 'criteria are in different moods (independent ones differ in 2 * 0.3 * 0.7)'


def test_conflict_is_monotone_and_absent_at_full_credit():
    credits = [0.95, 0.8, 0.6, 0.4, 0.2, 0.0]
    for n in (NINE, 5, 6, 9, 12, 17):
        row = rubric_prompts(1, criteria=n)[0]
        within, thorough = good_answer(row, room(row['criteria'])), good_answer(row, 17)
        mean = {(c, text): np.mean([f.chance(row, text) for f in rubric_rewards(c, criteria=n)]) for c in credits for text in (within, thorough)}
        gains = [mean[c, thorough] - mean[c, within] for c in credits]
        assert all(b > a for a, b in zip(gains, gains[1:])) and gains[0] < 0 < gains[-1]
        best = np.mean([f.chance(row, good_answer(row, 0)) for f in rubric_rewards(0.95, criteria=n)])
        assert best == pytest.approx(max(mean[0.95, within], mean[0.95, thorough])), 'without conflict the short answer has all there is'


@pytest.mark.parametrize('call, message', [
    (lambda: rubric_prompts(1, criteria=4), 'a question has 5 to 17, not 4'), (lambda: rubric_prompts(1, criteria=(9, 5)), 'not \\(9, 5\\)'),
    (lambda: rubric_rewards(criteria=18), 'not 18'), (lambda: rubric_prompts(1, criteria=('point_1', 'brevity')), "'brevity'\\] are unknown"),
    (lambda: rubric_prompts(1, criteria=('point_1', 'point_1')), 'may come once'), (lambda: rubric_prompts(1, criteria=('length',)), 'no point'),
    (lambda: rubric_rewards(1.5), 'terse_credit is a probability, got 1.5'), (lambda: rubric_rewards(noise=-0.1), 'noise is a probability'),
    (lambda: rubric_rewards(noise=float('nan')), 'noise is a probability')])
def test_wrong_settings_are_named(call, message):
    with pytest.raises(InputError, match=message): call()


def digest(x): return hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]


def test_nine_criteria_are_what_they_always_were():
    "Numbers of the first edition: the committed logs were made with these prompts, answers and rewards."
    rows = list(rubric_prompts(64, seed=3))
    assert digest([[r['prompt'], r['points']] for r in rows]) == '74859786661fa564'
    rng = np.random.default_rng(7)
    short, long = [imperfect_answer(r['points'], rng) for r in rows], [imperfect_answer(r['points'], rng, LONG_NOTICE, 0.5) for r in rows]
    assert (digest(short), digest(long)) == ('52df20c97e09d114', '1f44fdbba0c19313')
    settings = (({}, short), (dict(terse_credit=0.6, seed=5), short), (dict(notice=LONG_NOTICE, limit=18, seed=1), long))
    tables = [score(rubric_rewards(**kw), rows, answers, step).tolist() for kw, answers in settings for step in (0, 17)]
    assert digest(tables) == 'b800d2a8daff3064'
    bare = call_rewards(rubric_rewards(), [r['prompt'] for r in rows], short, points=[r['points'] for r in rows]).tolist()
    assert bare == tables[0], 'the points are all that these rewards need to know'
    assert [reward_name(f) for f in rubric_rewards()] == [*(f'point_{j}' for j in range(1, 8)), 'notice', 'length']


def test_a_judge_by_rules_over_http_gives_the_same_rewards():
    ask, judging = pytest.importorskip('rvpo_nb.ask'), pytest.importorskip('rvpo_nb.judge')
    rows, rng = list(rubric_prompts(6, seed=2, criteria=(5, 17))), np.random.default_rng(0)
    answers, rule = [imperfect_reply(r, rng) for r in rows], rule_judge(rows)
    server = ask.serve(lambda messages: json.dumps(dict(explanation='', criteria_met=rule(*json.loads(messages[0]['content'])))))
    try:
        judge = judging.Judge(ask.Endpoint('rules', server.url), prompt=lambda *parts: [dict(role='user', content=json.dumps(parts))])
        table = score(judging.criterion_rewards(judge, 17), rows, answers)
    finally: server.shutdown()
    assert table.nan_to_num(-1).equal(score(rubric_rewards(0.0, 1.0, criteria=(5, 17)), rows, answers).nan_to_num(-1))


def test_two_steps_of_training_on_questions_of_all_sizes(tmp_path):
    from rvpo_nb.trainer import GRPOConfig, GRPOTrainer
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=16, max_completion_length=48, max_steps=2, disable_tqdm=True)
    trainer = GRPOTrainer(LADDER_POLICY, rubric_rewards(criteria=(5, 17), noise=0.1), args, train_dataset=rubric_prompts(16, criteria=(5, 17)))
    log = trainer.train().log_history
    assert len(log) == 2 and all(0 < x['reward/point_1/pass_rate'] < 1 and x['grad_norm'] > 0 for x in log)
    names = [k.split('/')[1] for k in log[0] if k.startswith('reward/') and k.endswith('/pass_rate')]
    assert names == list(LADDER)

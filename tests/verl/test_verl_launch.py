"""The launch files: their overrides compose into verl's own config, and their rewards arrive through verl's data set and reward worker."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('verl.trainer', reason='verl is not installed; make test-verl builds an environment for it')

from verl_cases import compose

from rvpo_nb.ask import serve
from rvpo_nb.verl import read_settings, score_function, write_parquet

LAUNCH = Path(__file__).resolve().parents[2] / 'nbs' / 'launch'
CALL = '<think> The user asks. </think>\n<tool_call>\n{"name": "get_rain", "parameters": {"city": "Oslo"}}\n</tool_call>'
RLLA = [dict(instruction='You may call get_rain.', input=f'Will it rain in Oslo on day {i}?', output=CALL) for i in range(3)] + [
    dict(instruction='You may call get_rain.', input='Thanks!', output='<think> Nothing to do. </think>\n<response> You are welcome. </response>')]
RAR = [dict(question=f'What helps against cough {i}?', reference_answer='Honey.', rubric=[dict(title='t', description=f'Essential Criteria: Mentions {x}.', weight=5) for x in mentions])
       for i, mentions in enumerate([['honey', 'water'], ['honey'], ['honey'] * 18])]
KEYS = dict(task=['advice', 'short', 'notice'], tools=['format_reward', 'tool_correctness_reward'], rubric=[f'criterion_{i}' for i in range(1, 18)])


@pytest.fixture(scope='module')
def judge():
    server = serve(lambda messages: json.dumps(dict(criteria_met='honey' in messages[-1]['content'].split('--- answer')[1].split('--- end')[0])))
    yield server.url
    server.shutdown()


@pytest.fixture(scope='module', params=['task', 'tools', 'rubric'])
def launched(request, tmp_path_factory, judge):
    "Run a launch script, with a python in its path that notes what verl is called with; its data comes from small files."
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    os.environ.update(JUDGE_MODEL='judge', JUDGE_URL=judge, OPENAI_API_KEY='none')
    for file, rows in (('rlla.jsonl', RLLA), ('rar.jsonl', RAR)): (folder / file).write_text('\n'.join(map(json.dumps, rows)))
    sources = dict(task='', tools='rlla.jsonl', rubric='rar.jsonl rar.jsonl')[name]
    (folder / 'python').write_text(f'#!/bin/bash\ncase "$*" in\n  *main_ppo*) shift 2; printf "%s\\n" "$@" > args ;;\n  "-m rvpo_nb.verl") echo checked > checked ;;\n  *) {sys.executable} -W ignore "$@" {sources} ;;\nesac\n')
    (folder / 'python').chmod(0o755)
    env = os.environ | dict(PATH=f'{folder}:{os.environ["PATH"]}', MODEL=str(tokenizer(folder)), DATA=str(folder / 'data'))
    done = subprocess.run([LAUNCH / f'verl_{name}.sh', '+test=1'], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / 'checked').exists()
    return name, (folder / 'args').read_text().splitlines(), done.stdout


def tokenizer(folder):
    "A tokenizer that knows every byte, with a chat template."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token='<eos>', pad_token='<pad>')
    made.chat_template = '{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'
    made.save_pretrained(folder / 'model')
    return folder / 'model'


def test_overrides_compose(launched):
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    name, args, _ = launched
    config = compose(*args)  # an unknown key without a plus sign would raise
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.validate(config.trainer.n_gpus_per_node, config.data.train_batch_size)
    validate_config(config, use_reference_policy=config.actor_rollout_ref.actor.use_kl_loss, use_critic=False)
    settings = read_settings(config.algorithm)
    assert settings.keys == KEYS[name] and config.algorithm.adv_estimator == 'rvpo' and config.trainer.use_v1 and config.test == 1
    assert (settings.k, settings.k_end) == dict(task=(0.5, 2), tools=(2, None), rubric=(0.5, 2))[name]
    assert actor.use_kl_loss == (name == 'rubric') and config.data.train_batch_size % config.actor_rollout_ref.actor.ppo_mini_batch_size == 0
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n % config.trainer.n_gpus_per_node == 0
    known = compose()  # what the plus signs add is ours or made for GDPO
    added = {a.split('=')[0][1:] for a in args if a.startswith('+')} - {'test'}
    assert all(x.startswith(('algorithm.gdpo_reward_', 'algorithm.rvpo.')) for x in added) and 'rvpo' not in known.algorithm


def dataset(config, split):
    from transformers import AutoTokenizer
    from verl.trainer.ppo.utils import create_rl_dataset
    config.data.filter_overlong_prompts = False  # it starts processes
    return create_rl_dataset(config.data[f'{split}_files'], config.data, AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path), None)


def response(row, text, tokenizer):
    "One response as verl's agent loop hands it to a reward worker, two tokens of padding included."
    from tensordict import TensorDict
    from verl import DataProto
    ids = tokenizer(text)['input_ids'] + [tokenizer.eos_token_id]
    responses, mask = torch.tensor([ids + [tokenizer.pad_token_id] * 2]), torch.tensor([[1] * 3 + [1] * len(ids) + [0] * 2])
    batch = TensorDict(dict(prompts=torch.ones(1, 3).long(), responses=responses, attention_mask=mask), batch_size=1)
    kwargs = {k: v for k, v in row.items() if k != 'dummy_tensor'}
    fields = {k: np.array([v] * 1) for k, v in kwargs.items()} | dict(__num_turns__=np.array([2]), tool_extra_fields=np.array([{}], dtype=object))
    return DataProto(batch=batch, non_tensor_batch=fields)


def test_rewards_arrive_through_a_reward_worker(launched):
    import ray
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    name, args, said = launched
    config = compose(*args)
    rows, worker_class = dataset(config, 'train'), ray.remote(RewardLoopWorker)
    assert len(rows) == dict(task=64, tools=3, rubric=2)[name] and rows[0]['raw_prompt'][-1]['role'] == 'user'
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        worker = worker_class.remote(config)
        texts = dict(task=['Please see a doctor.', 'word ' * 60], tools=[CALL, CALL.replace('Oslo', 'Rome'), 'Honey, warm honey, I mean honey.'], rubric=['Take honey.', 'I do not know.'])[name]
        for row in (rows[i] for i in range(min(len(rows), 8))):
            for text in texts:
                got = ray.get(worker.compute_score.remote(response(row, text, rows.tokenizer)))
                answer = json.loads(row['extra_info']['columns'])
                if name == 'tools':
                    from rvpo_nb.reward import format_reward, tool_correctness_reward
                    chat = [[dict(role='assistant', content=text)]]
                    expected = dict(format_reward=format_reward(chat, [answer['answer']])[0], tool_correctness_reward=tool_correctness_reward(chat, [answer['answer']])[0])
                elif name == 'task':
                    expected = dict(advice=sum(p in text.lower() for p in answer['points']) / len(answer['points']), short=float(len(text.split()) <= answer['limit']),
                                    notice=float('doctor' in text) if 'notice' in answer['criteria'] else None)
                else: expected = {key: float('honey' in text) if i < len(answer['rubric']) else None for i, key in enumerate(KEYS[name])}
                there = [v for v in expected.values() if v is not None]
                assert got['reward_extra_info'] == pytest.approx(dict(score=sum(there) / len(there)) | expected) and got['reward_score'] == got['reward_extra_info']['score']
    finally: ray.shutdown()


def test_data_that_was_left_out_is_counted(launched):
    name, _, said = launched
    assert all(part in said for part in dict(task=['64 rows of train', '64 rows of val'], tools=['1 rows of val', '3 rows of train'], rubric=['2 of 3 rows of train'])[name])


def test_columns_come_back_as_they_were(tmp_path):
    rows = [dict(prompt='Plain text.', call=dict(name='f', parameters=dict(x=1)), hint=None, many=[1, [2.5, None]]), dict(prompt=[dict(role='user', content='Chat.')], call=dict(name='g', parameters=dict(y=True)))]
    write_parquet(rows, tmp_path / 'rows.parquet')
    tokenizer(tmp_path)
    config = compose(f'data.val_files={tmp_path}/rows.parquet', f'actor_rollout_ref.model.path={tmp_path}/model')
    read = dataset(config, 'val')
    assert [json.loads(read[i]['extra_info']['columns']) for i in range(2)] == rows
    assert [read[i]['raw_prompt'] for i in range(2)] == [[dict(role='user', content='Plain text.')], [dict(role='user', content='Chat.')]] and read[1]['index'] == 1


def test_validation_leaves_out_what_does_not_apply():
    from verl.trainer.ppo.metric_utils import process_validation_metrics
    said = {key: process_validation_metrics(['d'] * 2, ['a', 'b'], dict(reward=[0.5, 1.0], x=[1.0, missing]))['d']['x']['mean@1'] for key, missing in dict(none=None, nan=float('nan')).items()}
    assert said['none'] == 1.0 and np.isnan(said['nan'])

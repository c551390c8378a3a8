"""The trainer's promises that no chapter shows: missing rewards, chats, gradients, every setting."""
import math
import shutil
import sys
import types

import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from rvpo_nb.advantage import advantages, attention, solve_k
from rvpo_nb.guard import Guard
from rvpo_nb.loss import completion_logps
from rvpo_nb.checkpoint import checkpoints
from rvpo_nb.record import load_dump, read_log
from rvpo_nb.reward import call_rewards
from rvpo_nb.softmin import InputError
from rvpo_nb.task import RUBRIC_POLICY, rubric_prompts, rubric_rewards
from rvpo_nb.inputs import GRPOConfig, load_model
from rvpo_nb.rollout import join
from rvpo_nb.trainer import GRPOTrainer, RunFailed, passes

SETTINGS = dict(num_generations=4, per_device_train_batch_size=8, max_completion_length=16, learning_rate=1e-3, max_steps=2, disable_tqdm=True)


def sometimes(completions, trainer_state=None, **columns): return [1.0 if i % 3 == 0 else None for i in range(len(completions))]
def never(completions, **columns): return [None] * len(completions)
def words(completions, **columns): return [len(c.split()) for c in completions]


def new(tmp_path, rewards, rows=None, **changes):
    return GRPOTrainer(RUBRIC_POLICY, rewards, GRPOConfig(output_dir=str(tmp_path / 'out'), **SETTINGS | changes), train_dataset=rows or rubric_prompts(8))


def test_missing_rewards_are_logged_as_missing_and_break_nothing(tmp_path):
    log = new(tmp_path, [words, sometimes, never]).train().log_history
    assert all(math.isfinite(x['loss']) and x['grad_norm'] > 0 for x in log)
    line = read_log(tmp_path / 'out' / 'log.jsonl')[0]
    assert line['reward/sometimes/mean'] == 1.0 and line['reward/never/mean'] is None and line['reward/words/mean'] > 1


def test_no_applicable_reward_leaves_the_weights_alone(tmp_path):
    trainer = new(tmp_path, [never])
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))


def weights_of(trainer): return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize('loss', [
    dict(), dict(loss_type='grpo'), dict(loss_type='dr_grpo'), dict(loss_type='grpo', importance_sampling_level='sequence'),
    dict(loss_type='cispo', epsilon_high=5.0), dict(loss_type='r2vpo', ratio_penalty_lr=1.0), dict(beta=0.1, kl_estimator='k2'), dict(mask_truncated_completions=True)])
def test_passes_and_accumulation_equal_the_large_batch(tmp_path, loss):
    gradients = []
    for name, size, tokens in (('whole', 16, 10 ** 6), ('parts', 4, 10 ** 6), ('few tokens', 16, 50)):
        t = new(tmp_path / name, [words, rubric_rewards()[-1]], per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, micro_batch_tokens=tokens,
                max_grad_norm=1e9, **loss)
        t.start(False)
        r, _, rewards, _ = t.draw(0, [0.0, 0.0])
        r = r._replace(logps=r.logps - 0.1 * torch.linspace(-1, 1, r.logps.numel()).view(r.logps.shape))  # as in a later iteration: ratios other than 1
        t.optimizer.step = t.optimizer.zero_grad = lambda: None
        t.learn(r, t.aggregate(0, rewards)[0].flatten())
        gradients.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]))
    assert gradients[0].norm() > 0.01
    assert all((g - gradients[0]).norm() < 1e-5 * gradients[0].norm() for g in gradients[1:])


def test_a_reward_is_learned(tmp_path):
    log = new(tmp_path, [words], max_steps=30, num_generations=8, per_device_train_batch_size=64).train().log_history
    first, last = (sum(x['reward/words/mean'] for x in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 1


def test_the_log_prob_of_a_sample_is_that_of_the_model(tmp_path):
    t = new(tmp_path, [words])
    r = t.sample(t.prompt_ids[:3], 4, (0,))
    with torch.no_grad(), t.computing(): logps, _ = completion_logps(t.model, r)
    assert ((logps - r.logps).abs() * r.completion_mask).max() < 1e-4


def test_chat_prompts_arrive_as_chats(tmp_path):
    seen = []
    def spy(prompts, completions, **columns):
        seen.append((prompts[0], completions[0]))
        return [1.0] * len(prompts)
    model, tokenizer = load_model(RUBRIC_POLICY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [dict(prompt=[dict(role='user', content='A cold. Advise on: rest soup')])]
    GRPOTrainer(model, [spy], GRPOConfig(output_dir=str(tmp_path), **SETTINGS | dict(max_steps=1)), train_dataset=rows, processing_class=tokenizer).train()
    prompt, completion = seen[-1]
    assert prompt == rows[0]['prompt'] and completion[0]['role'] == 'assistant' and isinstance(completion[0]['content'], str)


def test_rows_that_cannot_work_are_named(tmp_path):
    for row, words_ in ((dict(prompt=''), 'row 1'), (dict(prompt=3), 'row 1'), (dict(prompt='soup ' * 200), 'row 1: the prompt has 200 tokens')):
        with pytest.raises(InputError, match=words_): new(tmp_path, [words], rows=[dict(prompt='A cold.'), row])
    with pytest.raises(InputError, match="two rewards are called 'words'"): new(tmp_path, [words, words])
    with pytest.raises(InputError, match='weight'): new(tmp_path, [words], reward_weights=[-1.0])


def test_async_rewards_share_a_table_and_keep_their_lock_from_call_to_call():
    import asyncio
    lock = asyncio.Semaphore(1)
    async def slow(completions, **columns):
        async with lock: await asyncio.sleep(0.001)
        return [2.0] * len(completions)
    async def other(completions, **columns): return await slow(completions)
    for _ in range(2): assert call_rewards([slow, other, words], ['p'], ['a b c']).tolist() == [[2.0, 2.0, 3.0]]


def test_rewards_may_return_arrays_and_tensors():
    import numpy as np
    as_array = lambda completions, **columns: np.array([True])
    as_scalars = lambda completions, **columns: [torch.tensor(2.5)]
    as_numpy = lambda completions, **columns: [np.float32(0.5)]
    assert call_rewards([as_array, as_scalars, as_numpy], ['p'], ['c']).tolist() == [[1.0, 2.5, 0.5]]


def test_a_log_line_that_a_crash_cut_off_does_not_stop_a_resume(tmp_path):
    new(tmp_path, [words], save_steps=1).train()
    log = tmp_path / 'out' / 'log.jsonl'
    log.write_text(log.read_text()[:-40])
    state = new(tmp_path, [words], save_steps=1).train(resume_from_checkpoint=True)
    assert state.global_step == 2 and read_log(log) == state.log_history


def test_a_stop_asked_for_by_a_callback_leaves_a_checkpoint(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 3
    trainer = new(tmp_path, [words], max_steps=8)
    trainer.callbacks = [Stop()]
    assert trainer.train().global_step == 3 and [c.name for c in checkpoints(tmp_path / 'out')] == ['checkpoint-3']
    assert new(tmp_path, [words], max_steps=8).train(resume_from_checkpoint=True).global_step == 8


def test_columns_that_some_rows_lack_are_none_everywhere(tmp_path):
    seen = []
    def spy(completions, completion_ids, hint, **columns):
        seen.extend(hint)
        assert [len(i) for i in completion_ids] and len(completion_ids) == len(completions)
        return [1.0] * len(completions)
    new(tmp_path, [spy], rows=[dict(prompt='A cold.'), dict(prompt='A cold.', hint='soup')], max_steps=3).train()
    assert set(seen) == {None, 'soup'}


def test_dropout_does_not_make_a_run_depend_on_the_global_generator(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    weights = []
    for i in range(2):
        torch.manual_seed(0)
        tokenizer = load_model(RUBRIC_POLICY)[1]
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
        torch.manual_seed(i)
        GRPOTrainer(model, [words], GRPOConfig(output_dir=str(tmp_path / str(i)), **SETTINGS), train_dataset=rubric_prompts(8), processing_class=tokenizer).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    weights = []
    for on in (False, True):
        t = new(tmp_path / str(on), [words], gradient_checkpointing=on)
        seen = []
        for layer in t.model.get_decoder().layers: layer.mlp.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        t.train()
        weights.append(weights_of(t))
        # each pass with gradients runs a layer once, and once more in the backward pass where it is checkpointed
        assert sum(seen) == (2 if on else 1) * 2 * 2
    assert (weights[0] - weights[1]).abs().max() < 1e-6


def test_four_iterations_are_four_steps_on_the_same_rollouts(tmp_path):
    by_hand, t = new(tmp_path / 'hand', [words], num_iterations=4, max_steps=4), new(tmp_path, [words], num_iterations=4, max_steps=4)
    t.train()
    assert [x['step'] for x in t.state.log_history] == [4] and [p.name for p in checkpoints(tmp_path / 'out')] == ['checkpoint-4']
    by_hand.start(False)
    r, _, rewards, _ = by_hand.draw(0, [0.0, 0.0])
    advantage = by_hand.aggregate(0, rewards)[0].flatten()
    steps = [by_hand.learn(r, advantage, first=i == 0) for i in range(4)]
    assert torch.equal(weights_of(by_hand), weights_of(t))
    assert steps[0]['ratio_variance'] < 1e-9 < 1e-5 < steps[3]['ratio_variance'], 'the first step is on-policy, the last is not'


def test_lora_trains_an_adapter_and_nothing_else(tmp_path):
    from peft import LoraConfig, PeftModel
    lora = lambda name, **changes: GRPOTrainer(
        RUBRIC_POLICY, [words], GRPOConfig(output_dir=str(tmp_path / name), **SETTINGS | dict(
            num_generations=8, per_device_train_batch_size=64, learning_rate=1e-2, max_steps=30, save_steps=10, beta=1e-3) | changes),
        train_dataset=rubric_prompts(8), peft_config=LoraConfig(r=8, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=True))
    torch.manual_seed(0)
    t = lora('a')
    start = load_model(RUBRIC_POLICY)[0]
    log = t.train().log_history
    assert t.shared and abs(log[0]['kl']) < 1e-6 < log[-1]['kl'], 'the reference is the model without its adapter'
    assert sum(x['reward/words/mean'] for x in log[-5:]) > sum(x['reward/words/mean'] for x in log[:5]) + 5
    base = {n.replace('base_model.model.', '').replace('.base_layer', ''): p for n, p in t.model.named_parameters() if 'lora' not in n}
    assert all(torch.equal(p, base[n]) for n, p in start.named_parameters())
    again = PeftModel.from_pretrained(start, tmp_path / 'a')
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(): assert torch.allclose(again(ids).logits, t.model(ids).logits, atol=1e-5)
    for step in (20, 30): shutil.rmtree(tmp_path / 'a' / f'checkpoint-{step}')
    resumed = lora('a')
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, q) for p, q in zip(resumed.model.parameters(), t.model.parameters()))


def test_a_tokenizer_without_pad_token_trains(tmp_path):
    model, tokenizer = load_model(RUBRIC_POLICY)
    tokenizer.pad_token = None
    t = GRPOTrainer(model, [words], GRPOConfig(output_dir=str(tmp_path), **SETTINGS | dict(num_generations=8, per_device_train_batch_size=64, max_steps=30)),
                    train_dataset=rubric_prompts(8), processing_class=tokenizer)
    r = t.sample(t.prompt_ids[:2], 4, (0,), max_completion_length=32)
    assert r.ended.all() and tokenizer.pad_token == tokenizer.eos_token
    assert (((r.completion_ids == tokenizer.eos_token_id) & r.completion_mask.bool()).sum(-1) == 1).all(), 'the end token is learned, the padding is not'
    log = t.train().log_history
    assert sum(x['reward/words/mean'] for x in log[-5:]) > sum(x['reward/words/mean'] for x in log[:5]) + 5


def test_chats_train_with_a_system_prompt(tmp_path):
    model, tokenizer = load_model(RUBRIC_POLICY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [dict(prompt=[dict(role='user', content='Advise on: rest soup')]), dict(prompt=[dict(role='system', content='Rest.'), dict(role='user', content='soup')])]
    length = lambda completions, **columns: [float(len(c[0]['content'].split())) for c in completions]
    settings = dict(system_prompt='A cold.', num_generations=8, per_device_train_batch_size=64, max_steps=30)
    t = GRPOTrainer(model, [length], GRPOConfig(output_dir=str(tmp_path), **SETTINGS | settings), train_dataset=rows, processing_class=tokenizer)
    assert [tokenizer.decode(ids).split()[0] for ids in t.prompt_ids] == ['A', 'Rest.']
    log = t.train().log_history
    name = t.names[0]
    assert sum(x[f'reward/{name}/mean'] for x in log[-5:]) > sum(x[f'reward/{name}/mean'] for x in log[:5]) + 5
    with pytest.raises(InputError, match='system_prompt needs'): new(tmp_path / 'plain', [words], system_prompt='Hello.')


def test_dynamic_sampling_replaces_only_groups_in_which_every_reward_is_dead(tmp_path):
    flat = lambda prompts, completions, **columns: [float('flat' not in p and i % 2) for i, p in enumerate(prompts)]
    opposite = lambda prompts, completions, **columns: [float('flat' not in p and 1 - i % 2) for i, p in enumerate(prompts)]
    flat.__name__, opposite.__name__ = 'flat', 'opposite'
    rows = [dict(prompt='A cold. flat'), dict(prompt='A cold. flat'), dict(prompt='A cold.'), dict(prompt='A cold. rest')] * 2
    t = new(tmp_path, [flat, opposite], rows=rows, dynamic_sampling=3, shuffle_dataset=False, max_steps=2)
    t.start(False)
    r, texts, rewards, redrawn = t.draw(0, [0.0, 0.0])
    assert set(texts['prompt']) == {'A cold.', 'A cold. rest'} and redrawn == 2 and t.drawn == 4, 'their sum is flat, they are not'
    assert (rewards.sum(-1) == 1).all() and r.group.tolist() == [0] * 4 + [1] * 4
    dead = new(tmp_path / 'dead', [lambda completions, **columns: [1.0] * len(completions)], dynamic_sampling=2, max_steps=1)
    line = dead.train().log_history[0]
    assert line['redrawn'] == 4 and line['dead_groups'] == 1 and line['grad_norm'] == 0, 'the last draw is kept whatever it brings'


def test_weights_and_k_move_in_a_straight_line(tmp_path):
    t = new(tmp_path, [words, rubric_rewards()[-1]], reward_weights=[1.0, 0.0], reward_weights_end=[0.0, 2.0], k_end=4.0, max_steps=5)
    seen = []
    aggregate = t.aggregate
    t.aggregate = lambda step, rewards: (seen.append(t.weights(step)), aggregate(step, rewards))[1]
    log = t.train().log_history
    assert seen == [[1.0, 0.0], [0.75, 0.5], [0.5, 1.0], [0.25, 1.5], [0.0, 2.0]] and [x['k'] for x in log] == [2.0, 2.5, 3.0, 3.5, 4.0]
    assert log[0]['reward/words/attention'] == 1 and math.isnan(log[-1]['reward/words/attention'])
    with pytest.raises(InputError, match='weights for 1 rewards'): new(tmp_path / 'x', [words], reward_weights_end=[1.0, 2.0])


def test_a_condition_without_a_threshold_is_refused_before_the_first_step(tmp_path):
    length = rubric_rewards()[-1]
    with pytest.raises(InputError, match="'words' is a condition but says not when"): new(tmp_path, [words, length], reward_conditions={length.__name__: 'words'}).train()
    with pytest.raises(InputError, match="'nothing', which is not a reward"): new(tmp_path, [words], reward_conditions={'words': 'nothing'})


def test_truncated_completions_can_be_masked(tmp_path):
    t = new(tmp_path, [words], mask_truncated_completions=True, max_completion_length=3)
    line = t.train().log_history[0]
    assert line['completions/clipped_ratio'] == 1 and line['grad_norm'] == 0 and line['reward/words/mean'] > 0


def test_stop_strings_and_filters_reach_the_sampler(tmp_path):
    t = new(tmp_path, [words], top_k=1, stop_strings=['.'])
    r = t.sample(t.prompt_ids[:2], 4, (0,))
    texts = t.tokenizer.batch_decode([x[m.bool()] for x, m in zip(r.completion_ids, r.completion_mask)], skip_special_tokens=True)
    assert r.ended.all() and all(x.endswith('.') and x.count('.') == 1 for x in texts) and len(set(texts)) <= 2


def test_evaluation_is_on_its_own_rows_and_repeats_itself(tmp_path):
    t = GRPOTrainer(RUBRIC_POLICY, [words], GRPOConfig(output_dir=str(tmp_path), eval_steps=2, num_generations_eval=3, **SETTINGS | dict(max_steps=5)),
                    train_dataset=rubric_prompts(8), eval_dataset=rubric_prompts(5, seed=7))
    log = t.train().log_history
    assert [x['step'] for x in log if 'eval/reward/words/mean' in x] == [2, 4, 5]
    assert str(t.evaluate()) == str(t.evaluate()) and t.evaluate()['eval/reward/words/mean'] == log[-1]['eval/reward/words/mean']


def test_a_failed_step_can_be_taken_again_from_its_dump(tmp_path):
    t = new(tmp_path, [words])
    aggregate = t.aggregate
    t.aggregate = lambda step, rewards: (aggregate(step, rewards)[0] * math.nan, 2.0, 2.0)
    with pytest.raises(RunFailed, match='the gradient norm is nan.*dump-1'): t.train()
    again = GRPOTrainer(tmp_path / 'out' / 'dump-1', [words], GRPOConfig(output_dir=str(tmp_path / 'again'), **SETTINGS), train_dataset=rubric_prompts(8))
    assert torch.equal(weights_of(again), weights_of(new(tmp_path / 'fresh', [words]))), 'the weights are those before the step'
    again.start(False)
    with pytest.raises(FloatingPointError, match='the gradient norm is nan'): again.learn(*load_dump(tmp_path / 'out' / 'dump-1'))


def test_bfloat16_on_the_cpu_stays_close_to_float32_and_keeps_float32_weights(tmp_path):
    logs = [new(tmp_path / str(on), [words], bf16=on, max_steps=1).train().log_history[0] for on in (False, True)]
    t = new(tmp_path, [words], bf16=True)
    t.train()
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    assert abs(logs[0]['entropy'] - logs[1]['entropy']) < 0.1 and logs[1]['sampler_error'] < 0.05 and logs[1]['ratio_variance'] == 0


def test_the_price_of_the_ratio_variance_moves_and_survives_a_resume(tmp_path):
    settings = dict(loss_type='r2vpo', ratio_penalty=0.5, ratio_penalty_lr=10.0, ratio_variance_target=1e-4, num_iterations=2, save_steps=2)
    whole = new(tmp_path / 'whole', [words], max_steps=8, **settings)
    prices = [x['ratio_penalty'] for x in whole.train().log_history]
    assert len(set(prices)) == 4 and all(p >= 0 for p in prices)
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 4
    cut = new(tmp_path / 'cut', [words], max_steps=8, **settings)
    cut.callbacks = [Stop()]
    cut.train()
    resumed = new(tmp_path / 'cut', [words], max_steps=8, **settings).train(resume_from_checkpoint=True)
    assert [x['ratio_penalty'] for x in resumed.log_history] == prices


def test_a_model_whose_attention_is_not_plain_trains_all_the_same(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    tokenizer = load_model(RUBRIC_POLICY)[1]
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=4))
    t = GRPOTrainer(model, [words], GRPOConfig(output_dir=str(tmp_path), **SETTINGS), train_dataset=rubric_prompts(8), processing_class=tokenizer)
    line = t.train().log_history[0]
    assert not t.shared and line['sampler_error'] < 1e-4 and line['grad_norm'] > 0


def test_sequence_ratios_in_bfloat16_are_not_cut_by_rounding(tmp_path):
    line = new(tmp_path, [words], bf16=True, loss_type='grpo', importance_sampling_level='sequence', epsilon=3e-4, epsilon_high=4e-4).train().log_history[0]
    assert line['clip_ratio'] == 0 and line['ratio'] == pytest.approx(1, abs=1e-6)


def test_an_evaluation_that_fails_loses_no_step(tmp_path):
    def picky(completions, trainer_state=None, **columns):
        if trainer_state.global_step == 2 and len(completions) == 3 * 2: return [math.inf] * len(completions)
        return [len(c.split()) for c in completions]
    t = GRPOTrainer(RUBRIC_POLICY, [picky], GRPOConfig(output_dir=str(tmp_path), num_generations_eval=3, **SETTINGS), train_dataset=rubric_prompts(8), eval_dataset=rubric_prompts(2, seed=7))
    with pytest.raises(RunFailed, match='evaluation after step 2, which is saved'): t.train()
    assert [p.name for p in checkpoints(tmp_path)] == ['checkpoint-2'] and [x['step'] for x in read_log(tmp_path / 'log.jsonl')] == [1, 2]


def test_low_precision_weights_and_negative_conditioned_rewards_are_refused(tmp_path):
    model, tokenizer = load_model(RUBRIC_POLICY)
    with pytest.raises(InputError, match='bfloat16: small updates would round away'):
        GRPOTrainer(model.bfloat16(), [words], GRPOConfig(output_dir=str(tmp_path)), train_dataset=rubric_prompts(8), processing_class=tokenizer)
    def minus(completions, **columns): return [-1.0] * len(completions)
    length = rubric_rewards()[-1]
    with pytest.raises(InputError, match="'minus' has a condition and goes down to -1, below 0"):
        new(tmp_path, [minus, length], reward_conditions={'minus': length.__name__}).train()


def test_a_model_that_cannot_share_counts_a_prompt_for_every_rollout(tmp_path):
    t = new(tmp_path, [words], num_generations=8)
    r = t.sample(t.prompt_ids[:1], 8, (0,))
    prompt, lengths = len(r.prompts[0]), r.completion_mask.sum(-1)
    both = [passes(r, 2 * prompt + int(lengths.sum()), 100, shared) for shared in (True, False)]
    assert [len(x) for x in both] == [1, len(both[1])] and len(both[1]) > 1
    assert all(len(p) * prompt + lengths[p].sum() <= 2 * prompt + lengths.sum() for p in both[1])
    assert [len(x) for x in passes(join([r, r, r]), 10 ** 6, 12)] == [8, 8, 8], 'groups stay whole where they fit'


def test_tensorboard_gets_every_number_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = new(tmp_path, [words, never], report_to=['tensorboard']).train().log_history
    events = EventAccumulator(str(tmp_path / 'out' / 'tensorboard'))
    events.Reload()
    assert [e.step for e in events.Scalars('reward/words/mean')] == [1, 2]
    assert events.Scalars('loss')[1].value == pytest.approx(log[1]['loss'], rel=1e-6) and 'reward/never/mean' not in events.Tags()['scalars']


def test_trackers_are_opened_fed_and_closed(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(init=lambda **kw: calls.append(kw), log=lambda logs, step: calls.append(step), finish=lambda: calls.append('finish'))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    new(tmp_path, [words], report_to=['wandb'], run_name='me').train()
    assert calls[0]['name'] == 'me' and calls[0]['config']['max_steps'] == 2 and calls[1:] == [1, 2, 'finish']
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(InputError, match='pip install wandb'): new(tmp_path / 'none', [words], report_to=['wandb']).train()


def noting(completions, log_metric, log_extra, **columns):
    log_metric('judge/cost', 1.0), log_metric('judge/cost', 2.0)
    log_extra('why', [f'{len(c.split())} words' for c in completions])
    log_extra('half', [len(c) / 2 for c in completions])
    return [1.0] * len(completions)


async def noting_later(completions, log_metric, **columns):
    log_metric('judge/share', float(len(completions)))
    return [0.0] * len(completions)


def test_reward_functions_log_figures_and_columns(tmp_path):
    t = new(tmp_path, [noting, noting_later, words])
    t.train()
    table = pq.read_table(tmp_path / 'out' / 'completions' / 'completions_00002.parquet').to_pandas()
    assert [x['judge/cost'] for x in t.state.log_history] == [1.5, 1.5] and t.state.log_history[0]['judge/share'] == 8
    assert (table.why == table.completion.map(lambda c: f'{len(c.split())} words')).all() and (table.half == table.completion.map(len) / 2).all()


@pytest.mark.parametrize('note, message', [
    (lambda metric, extra: metric('loss', 1.0), "logs 'loss', which is a figure of the trainer"),
    (lambda metric, extra: metric('mine', 'high'), "log_metric\\('mine'\\): 'high' is not a number"),
    (lambda metric, extra: extra('why', ['a']), "log_extra\\('why'\\) got 1 values for"),
    (lambda metric, extra: extra('advantage', [0.0] * 8), "log_extra\\('advantage'\\)")])
def test_what_cannot_be_logged_is_named(tmp_path, note, message):
    def f(completions, log_metric, log_extra, **columns): return note(log_metric, log_extra) or [0.0] * len(completions)
    with pytest.raises((InputError, RunFailed), match=message): new(tmp_path, [f]).train()


def test_conditions_and_weights_compose(tmp_path):
    def form(completions, **columns): return [float(i % 2) for i in range(len(completions))]
    def call(completions, **columns): return [[3.0, -1.0, 2.0, 1.0][i % 4] for i in range(len(completions))]
    form.bounds, call.bounds = (0, 1), (-3, 3)
    t = new(tmp_path, [form, call], reward_conditions={'call': 'form'}, reward_weights=[0.0, 2.0])
    t.start(False)
    rewards = t.draw(0, [0.0, 0.0])[2]
    assert rewards[0].tolist() == [[0, -3], [1, -1], [0, -3], [1, 1]]
    assert torch.equal(t.aggregate(0, rewards)[0], advantages(rewards[..., 1:], 'rvpo', k=2.0))


def first_and_length(): return [rubric_rewards()[i] for i in (0, -1)]
def long(completions, **columns): return [float(len(c.split()) > 10) for c in completions]
long.bounds = (0, 1)


def test_n_effective_finds_k_in_every_batch_and_logs_it(tmp_path):
    t, seen = new(tmp_path, rubric_rewards(), n_effective=3.0, num_generations=8, per_device_train_batch_size=32), []
    aggregate = t.aggregate
    t.aggregate = lambda step, rewards: (seen.append(rewards), aggregate(step, rewards))[1]
    log = t.train().log_history
    assert [x['k'] for x in log] == [solve_k(r, 3.0).item() for r in seen] and log[0]['k'] != log[1]['k']
    assert all(x['n_effective'] == pytest.approx(3.0, rel=1e-5) for x in log)
    k, rewards = log[1]['k'], seen[1]
    assert torch.equal(aggregate(1, rewards)[0], advantages(rewards, k=k)) and aggregate(1, rewards)[1:] == (k, k)
    assert log[1]['reward/length/attention'] == pytest.approx(attention(rewards, k)[..., -1].mean().item(), rel=1e-5)


@pytest.mark.parametrize('wrong, message', [
    (dict(n_effective=0.5), 'n_effective must be at least 1, got 0.5'), (dict(n_effective=math.nan), 'n_effective must be'),
    (dict(n_effective=2.0, aggregation='gdpo'), 'n_effective sets the k of rvpo; gdpo'), (dict(n_effective=2.0, k_end=4.0), 'takes the place of k'),
    (dict(n_effective=2.0, k=1.0), 'takes the place of k')])
def test_n_effective_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(InputError, match=message): GRPOConfig(**wrong)


def test_more_rewards_than_there_are_cannot_be_heard(tmp_path):
    with pytest.raises(InputError, match='n_effective is 3.0, but there are 2 rewards'): new(tmp_path, first_and_length(), n_effective=3.0)


def test_weights_follow_the_pass_rates(tmp_path):
    given = [2.0, 1.0, 0.5]
    settings = dict(guard=1.0, reward_targets={'long': 0.9}, reward_weights=given, reward_weights_lr=2.0, max_steps=10)
    t = new(tmp_path, [words, rubric_rewards()[0], long], **settings)
    log, guard = t.train().log_history, Guard([None, None, 0.9], 1.0, 2.0)
    for x in log:
        guard.update([x[f'reward/{n}/pass_rate'] for n in t.names], [x[f'reward/{n}/dead'] for n in t.names])
        assert [x[f'reward/{n}/weight'] for n in t.names] == pytest.approx(guard.weigh(given), rel=1e-6)
    weights = {n: [x[f'reward/{n}/weight'] for x in log] for n in t.names}
    assert set(weights['words']) == {2.0}, 'a reward without a threshold has no pass rate'
    assert max(weights['point_1']) > 1
    assert len(set(weights['long'])) > 2
    assert not any('weight' in key for key in new(tmp_path / 'plain', [words]).train().log_history[0])


def test_the_weights_of_a_batch_are_those_its_own_pass_rates_ask_for(tmp_path):
    t, used = new(tmp_path, [words, long], reward_targets={'long': 1.0}, max_steps=3), []
    aggregate = t.aggregate
    t.aggregate = lambda step, rewards: (used.append((rewards, aggregate(step, rewards)[0])), aggregate(step, rewards))[1]
    log = t.train().log_history
    for x, (rewards, a) in zip(log, used): assert torch.equal(a, advantages(rewards, weights=[1.0, x['reward/long/weight']]))
    assert log[-1]['reward/long/weight'] > 1.5


def test_a_guarded_run_resumes_bit_for_bit(tmp_path):
    settings = dict(guard=0.95, save_steps=3, max_steps=8)
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 4
    whole = new(tmp_path / 'whole', [rubric_rewards()[0], long], **settings).train().log_history
    cut = new(tmp_path / 'cut', [rubric_rewards()[0], long], **settings)
    cut.callbacks = [Stop()]
    cut.train()
    resumed = new(tmp_path / 'cut', [rubric_rewards()[0], long], **settings)
    log = resumed.train(resume_from_checkpoint=True).log_history
    weights = [[x[f'reward/{n}/weight'] for n in resumed.names] for x in whole]
    assert [[x[f'reward/{n}/weight'] for n in resumed.names] for x in log] == weights and len({tuple(w) for w in weights}) > 3
    with pytest.raises(InputError, match='made with guard = 0.95, not 0.5'):
        new(tmp_path / 'cut', [rubric_rewards()[0], long], **settings | dict(guard=0.5)).train(resume_from_checkpoint=True)


def test_a_target_without_a_threshold_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match="'words' has a target but says not when it passes"): new(tmp_path, [words, *first_and_length()], reward_targets={'words': 0.9})
    with pytest.raises(InputError, match='guard needs pass rates'): new(tmp_path, [words], guard=0.8)


def test_a_reward_that_dies_is_told_on_stderr_once(tmp_path, capsys):
    def fades(completions, trainer_state=None, **columns): return [float(trainer_state.global_step < 3 and i % 4 > 0) for i in range(len(completions))]
    fades.bounds = (0, 1)
    new(tmp_path, [words, fades], guard=0.8, max_steps=14).train()
    told = [line for line in capsys.readouterr().err.splitlines() if 'nearly died' in line]
    assert len(told) == 1 and "the reward 'fades' has nearly died" in told[0]


def test_neighbouring_methods_train(tmp_path):
    for method in ('sa_mrpo', 'gd2po', 'tchebycheff'):
        line = new(tmp_path / method, [rubric_rewards()[0], long], aggregation=method, max_steps=1, num_generations=8).train().log_history[0]
        assert line['grad_norm'] > 0 and math.isnan(line['n_effective'])

"""The V1 trainer's own _compute_advantage on a real TransferQueue between processes."""
import pytest
import torch

pytest.importorskip('verl.trainer', reason='verl is not installed; make test-verl builds an environment for it')

from verl_cases import KEYS, OURS, Case, compose, difference, queue, run_v1, start_queue, v1_trainer

from rvpo_nb.advantage import advantages
from rvpo_nb.softmin import InputError


@pytest.fixture(scope='module', autouse=True)
def transfer_queue():
    start_queue()
    import ray
    import transfer_queue as tq
    yield
    tq.close()
    ray.shutdown()


@pytest.mark.parametrize('name', OURS)
def test_methods(name):
    case = Case(seed=1)
    got, _ = run_v1(v1_trainer(f'algorithm.adv_estimator={name}', KEYS), queue(case.uid, case.rows, case.lengths))
    assert [len(row) for row in got] == case.lengths.tolist() and max(row.abs().max() for row in got) > 0.1
    assert difference(got, case.expect(OURS[name]), case.lengths) < 1e-6


@pytest.mark.parametrize('overrides, settings', [(['+algorithm.rvpo.k=0'], dict(k=0.0)), (['+algorithm.rvpo.k=inf'], dict(k=float('inf'))),
                                                 (['+algorithm.gdpo_reward_weights=[2,1,0]'], dict(weights=[2, 1, 0])), (['+algorithm.rvpo.n_effective=2'], dict(n_effective=2))])
def test_settings(overrides, settings):
    case = Case(seed=2)
    got, _ = run_v1(v1_trainer('algorithm.adv_estimator=rvpo', KEYS, *overrides), queue(case.uid, case.rows, case.lengths))
    assert difference(got, case.expect('rvpo', **settings), case.lengths) < 1e-6


@pytest.mark.parametrize('step, k', [(1, 0.5), (4, 1.0), (10, 2.0)])
def test_schedule_and_metrics(step, k):
    case = Case(seed=3)
    trainer = v1_trainer('algorithm.adv_estimator=rvpo', KEYS, '+algorithm.rvpo.k=0.5', '+algorithm.rvpo.k_end=2', step=step)
    got, metrics = run_v1(trainer, queue(case.uid, case.rows, case.lengths))
    assert difference(got, case.expect('rvpo', k=k), case.lengths) < 1e-6 and metrics['rvpo/k'] == pytest.approx(k)
    right = case.groups[..., 0]
    assert metrics['reward/right/mean'] == pytest.approx(right.nanmean().item(), abs=1e-6) and 0 < metrics['reward/length/attention'] < 1
    assert 1 < metrics['rvpo/n_effective'] < 3 and all(v == v for v in metrics.values()) and 'reward/right/pass_rate' not in metrics


def test_several_batches_in_a_step():
    case, trainer = Case(seed=3), v1_trainer('algorithm.adv_estimator=rvpo', KEYS, '+algorithm.rvpo.k=0', '+algorithm.rvpo.k_end=19', step=3)
    trainer.parameter_sync_step, trainer.local_trigger_step = 2, 1  # the sixth of twenty
    assert run_v1(trainer, queue(case.uid, case.rows, case.lengths))[1]['rvpo/k'] == pytest.approx(5)


def test_padding_changes_nothing():
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
    case, trainer = Case(seed=4), v1_trainer('algorithm.adv_estimator=rvpo', KEYS)
    plain, before = run_v1(trainer, queue(case.uid, case.rows, case.lengths))
    batch = upsample_batch_to_divisible_size(queue(case.uid, case.rows, case.lengths), 16, eos_token_id=0)
    assert len(batch) == 32 and sum(tag.get('is_padding', False) for tag in batch.tags) == 32 - case.n
    got, after = run_v1(trainer, batch)
    assert all(a.equal(b) for a, b in zip(got, plain)) and not any(row.any() for row in got[case.n:]) and after == pytest.approx(before)


def test_parts_of_an_attempt_count_once():
    case, trainer = Case(seed=5, sizes=(3, 3), missing=0), v1_trainer('algorithm.adv_estimator=rvpo', KEYS)
    plain, before = run_v1(trainer, queue(case.uid, case.rows, case.lengths))
    twice = [i for i in range(case.n) for _ in range(1 + 2 * (i % 2))]  # every second attempt has three parts
    parts = [(i, part) for i in range(case.n) for part in range(1 + 2 * (i % 2))]
    got, after = run_v1(trainer, queue(case.uid[twice], [case.rows[i] for i in twice], case.lengths[twice], parts))
    assert all(torch.allclose(row, plain[i]) for row, i in zip(got, twice)) and after == pytest.approx(before)


def test_rewards_from_a_model_on_the_trainers_devices():
    import transfer_queue as tq
    case, trainer = Case(seed=6), v1_trainer('algorithm.adv_estimator=rvpo', KEYS)
    batch = queue(case.uid, [{}] * case.n, case.lengths)
    from verl.utils.tensordict_utils import get_tensordict
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=get_tensordict({name: [row[name] for row in case.rows] for name in case.names}))
    assert difference(run_v1(trainer, batch)[0], case.expect('rvpo'), case.lengths) < 1e-6


def test_errors():
    import transfer_queue as tq
    case, trainer = Case(seed=6), v1_trainer('algorithm.adv_estimator=rvpo', KEYS)
    rows = case.rows
    del rows[3]['format']
    for rows, says in ((rows, "reward 'format' is missing in 1 of 18 rows, the first is row 3"), ([{}] * case.n, "reward 'right' is missing in 18 of 18 rows, the first is row 0; entries that arrived: score")):
        batch = queue(case.uid, rows, case.lengths)
        with pytest.raises(InputError) as e: trainer._compute_advantage(batch, {})
        tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
        assert says in str(e.value)


def test_settings_are_checked_before_anything_is_loaded():
    from verl.trainer.ppo.v1 import PPOTrainerSync
    with pytest.raises(InputError, match='gdpo_reward_keys'): PPOTrainerSync(compose('algorithm.adv_estimator=rvpo'))


def test_verls_own_estimators_on_the_same_queue():
    case = Case(seed=7, missing=0, sizes=(4, 4))
    got, metrics = run_v1(v1_trainer('algorithm.adv_estimator=grpo'), queue(case.uid, case.rows, case.lengths))
    assert not metrics and not any(row.any() for row in got)  # the same score everywhere
    batch = queue(case.uid, case.rows, case.lengths)
    with pytest.raises((AssertionError, KeyError)): v1_trainer('algorithm.adv_estimator=gdpo', KEYS)._compute_advantage(batch, {})  # the chapter says that it cannot work

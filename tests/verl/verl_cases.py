"""Batches as verl has them, beside what `advantages` makes of the same rewards; and a V1 trainer without models on a real queue."""
import os

os.environ['RAY_AUTH_MODE'] = 'disabled'  # Ray would write a token into the user's home
os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'

import numpy as np
import torch

from rvpo_nb.advantage import advantages

OURS = dict(rc='grpo', ac='ac', gdpo_rollout='gdpo', rvpo='rvpo', rvpo_explicit='rvpo_explicit', hardmin='hardmin', dvao='dvao', sa_mrpo='sa_mrpo', gd2po='gd2po', tchebycheff='tchebycheff')


class Case:
    "Rewards in groups of different sizes, in shuffled rows of different lengths, some missing."

    def __init__(self, seed=0, sizes=(4, 4, 3, 2, 4, 1), missing=0.2, longest=9):
        gen = torch.Generator().manual_seed(seed)
        self.names = ['right', 'format', 'length']
        shape = len(sizes), max(sizes), 3
        self.groups = torch.rand(shape, generator=gen).round(decimals=2)
        self.groups[..., 1] = self.groups[..., 1].round()  # some dead
        self.groups[torch.rand(shape, generator=gen) < missing] = torch.nan
        for p, n in enumerate(sizes): self.groups[p, n:] = torch.nan
        places = torch.tensor([(p, g) for p, n in enumerate(sizes) for g in range(n)])
        self.p, self.g = places[torch.randperm(len(places), generator=gen)].T
        self.n, self.uid = len(self.p), np.array([f'uid-{p}' for p in self.p.tolist()], dtype=object)
        self.lengths = torch.randint(1, longest + 1, (self.n,), generator=gen)
        self.mask = (torch.arange(longest) < self.lengths[:, None]).long()
        self.tokens = torch.zeros(self.n, longest)
        self.tokens[torch.arange(self.n), self.lengths - 1] = torch.rand(self.n, generator=gen)

    @property
    def rows(self):
        return [{name: None if np.isnan(v) else v for name, v in zip(self.names, row)} for row in self.groups[self.p, self.g].tolist()]

    def expect(self, method, **settings): return advantages(self.groups, method, **settings)[self.p, self.g][:, None] * self.mask

    def proto(self):
        from verl import DataProto
        columns = {name: np.array([row[name] for row in self.rows]) for name in self.names}
        return DataProto.from_dict(tensors=dict(token_level_rewards=self.tokens.clone(), response_mask=self.mask), non_tensors=dict(uid=self.uid) | columns)


def compose(*overrides):
    from hydra import compose, initialize_config_module
    with initialize_config_module('verl.trainer.config', version_base=None): return compose('ppo_trainer', overrides=list(overrides))


KEYS = '+algorithm.gdpo_reward_keys=[right,format,length]'


def start_queue():
    import ray
    import transfer_queue as tq
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)  # the queue's processes ask for a CPU each and use little of it
    config = compose('transfer_queue.enable=True', 'transfer_queue.backend.SimpleStorage.num_data_storage_units=1').transfer_queue
    tq.init(config)


def v1_trainer(*overrides, step=1, total=10):
    from verl.trainer.ppo.v1 import PPOTrainerSync
    trainer = PPOTrainerSync.__new__(PPOTrainerSync)  # without workers and models
    trainer.config, trainer.global_steps, trainer.total_training_steps = compose(*overrides), step, total
    trainer.parameter_sync_step, trainer.local_trigger_step = 1, 0
    return trainer


def queue(uids, rows, lengths, parts=None, partition='train'):
    "Put responses into the queue as verl's agent loop does; parts: per row (attempt, part)."
    import transfer_queue as tq
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict
    keys, fields, tags = [], [], []
    for i, (uid, row, length) in enumerate(zip(uids, rows, lengths)):
        made = AgentLoopOutput(prompt_ids=[1, 2, 3], response_ids=[5] * int(length), response_mask=[1] * int(length), reward_score=0.5, num_turns=2,
                               metrics=AgentLoopMetrics(), extra_fields=dict(reward_extra_info=dict(score=0.5) | row))
        field = made.as_dict() | dict(uid=uid)
        field['input_ids'] = torch.cat([field['prompts'], field['responses']])
        field['position_ids'] = torch.arange(len(field['input_ids']))
        attempt, part = parts[i] if parts else (i, 0)
        keys.append(f'{uid}_{attempt}_{part}'), fields.append(field)
        tags.append(dict(status='success', prompt_len=3, response_len=int(length), seq_len=3 + int(length), global_steps=1, min_global_steps=0, max_global_steps=0))
    tq.kv_batch_put(keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id=partition)
    return tq.KVBatchMeta(partition_id=partition, keys=keys, tags=tags)


def run_v1(trainer, batch):
    "Let the trainer compute advantages; return them row by row, and the metrics."
    import transfer_queue as tq
    metrics = {}
    trainer._compute_advantage(batch, metrics)
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=['advantages', 'returns', 'response_mask'])
    got = list(data['advantages'].unbind())
    tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
    return got, metrics


def difference(got, expected, lengths):
    "The largest difference between two tables, or rows of different lengths and a table."
    return max((g[:n] - e[:n]).abs().max().item() for g, e, n in zip(got, expected, lengths.tolist()))

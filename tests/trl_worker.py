"""Train through rvpo_nb.trl on rollouts and rewards that are given, and write down what each process was handed.

One process with 12 rollouts, or two with 6 each: then the second of the three groups of four lies on both.
"""
import json
import os
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset

from rvpo_nb.inputs import load_tokenizer
from rvpo_nb.task import RUBRIC_POLICY
from rvpo_nb.trl import GRPOConfig, GRPOTrainer

PROMPTS = ['cold.', 'fever.', 'coughs.', 'rest', 'sleep', 'soup']
tokenizer = load_tokenizer(RUBRIC_POLICY)


def draw(prompt, number):
    "Make up one rollout of a prompt: 1 to 6 tokens, and three rewards, the last of which is missing in most, and all three in some."
    rng = random.Random(f'{prompt} {number}')
    tokens = [rng.randrange(2, 60) for _ in range(rng.randint(1, 6))] + [tokenizer.eos_token_id]
    rewards = [rng.choice([0.0, 1.0]), rng.gauss(0, 30), rng.random() if rng.random() < 0.4 else None]
    return tokens, [None] * 3 if rng.random() < 0.1 else rewards


def position(trainer, local, count): return (trainer.accelerator.process_index * count + local) % trainer.num_generations


def rollouts(prompts, trainer):
    tokens = [draw(p, position(trainer, i, len(prompts)))[0] for i, p in enumerate(prompts)]
    return dict(prompt_ids=[tokenizer(p)['input_ids'] for p in prompts], completion_ids=tokens, logprobs=[[0.0] * len(t) for t in tokens])


def make_reward(j):
    def reward(prompts, completions, **columns): return [draw(p, position(trainer, i, len(prompts)))[1][j] for i, p in enumerate(prompts)]
    reward.__name__ = ('right', 'tone', 'rare')[j]
    return reward


class Spy(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.seen.append(dict(advantages=out['advantages'].tolist(), rewards=[[None if x != x else x for x in row] for row in self._rewards.tolist()]))
        return out


if __name__ == '__main__':
    out = Path(sys.argv[1])
    size = 12 // int(os.environ.get('WORLD_SIZE', 1))
    config = GRPOConfig(output_dir=str(out), num_generations=4, per_device_train_batch_size=size, max_completion_length=8, max_steps=3, learning_rate=1e-3, bf16=False,
                        gradient_checkpointing=False, use_cpu=True, logging_steps=1, save_strategy='no', disable_tqdm=True, report_to='none')
    trainer = Spy(str(RUBRIC_POLICY), [make_reward(j) for j in range(3)], config, train_dataset=Dataset.from_dict(dict(prompt=PROMPTS)), processing_class=tokenizer,
                  rollout_func=rollouts)
    trainer.seen = []
    trainer.train()
    report = dict(backend=torch.distributed.is_initialized() and torch.distributed.get_backend(), seen=trainer.seen, log=trainer.state.log_history)
    (out / f'{trainer.accelerator.process_index}-of-{trainer.accelerator.num_processes}.json').write_text(json.dumps(report))

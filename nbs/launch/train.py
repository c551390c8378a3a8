"""Train the embedded task with three rewards, on this book's trainer or on TRL's.

python train.py
accelerate launch --multi_gpu --num_processes 2 train.py --engine trl
accelerate launch --config_file zero3.yaml train.py --engine trl \\
    --model Qwen/Qwen2.5-0.5B-Instruct --learning_rate 1e-6
"""
import argparse
import os
from importlib import import_module

import torch
from rewards import REWARDS

from rvpo_nb.inputs import load_tokenizer
from rvpo_nb.patients import rubric_prompts
from rvpo_nb.task import LADDER_POLICY

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
add = parser.add_argument
add('--engine', choices=['trainer', 'trl'], default='trainer', help='of rvpo_nb: trainer for one device, trl for many')
add('--model', default=str(LADDER_POLICY), help='folder or hub id; default: the policy made for these questions')
add('--output_dir', default='trainer_output', help='folder of the run')
add('--max_steps', type=int, default=60, help='optimizer steps; default: 60')
add('--learning_rate', type=float, default=1e-3, help='of AdamW; default: 1e-3, for the embedded policy')
add('--aggregation', default='rvpo', help='how rewards become an advantage; default: rvpo')
add('--seed', type=int, default=0, help='of data order and sampling; default: 0')
add('--resume', action='store_true', help='go on from the newest checkpoint in output_dir')
run = parser.parse_args()
if run.engine == 'trainer' and int(os.environ.get('WORLD_SIZE', 1)) > 1:
    parser.error('several processes need --engine trl')

# from rvpo_nb.trainer import GRPOConfig, GRPOTrainer, or
# from rvpo_nb.trl import GRPOConfig, GRPOTrainer
engine = import_module(f'rvpo_nb.{run.engine}')

tokenizer, rows = load_tokenizer(run.model), rubric_prompts(64, criteria=(5, 9))
if tokenizer.chat_template:
    rows = rows.map(lambda row: dict(prompt=[dict(role='user', content=row['prompt'])]))

gpu = torch.cuda.is_available()
settings = dict(
    output_dir=run.output_dir, aggregation=run.aggregation, k=0.5, k_end=2.0, reward_weights=[1.0, 1.0, 1.0],
    num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=2,
    max_completion_length=64, max_steps=run.max_steps, save_steps=50,
    learning_rate=run.learning_rate, lr_scheduler_type='constant',
    bf16=gpu, gradient_checkpointing=False, seed=run.seed)
if run.engine == 'trl': settings |= dict(use_cpu=not gpu, logging_steps=1, log_completions=True)

trainer = engine.GRPOTrainer(
    run.model, REWARDS, engine.GRPOConfig(**settings), train_dataset=rows, processing_class=tokenizer)
trainer.train(resume_from_checkpoint=run.resume)
if run.engine == 'trl':
    trainer.save_model()  # the other one has left its model in output_dir
    trainer.accelerator.end_training()  # the processes part before they exit

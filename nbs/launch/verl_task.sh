#!/usr/bin/env bash
# The settings of train.py under verl's names, with --model $MODEL --learning_rate 1e-6. Further arguments go to verl.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
model=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} gpus=${GPUS:-1} data=${DATA:-$PWD/data/task}

python -m rvpo_nb.verl  # stops here unless verl has the estimators and both trainers are hooked
[ -f "$data/train.parquet" ] || python "$here/verl_task.py" "$data"

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=rvpo \
    +algorithm.gdpo_reward_keys='[advice,short,notice]' \
    +algorithm.gdpo_reward_weights='[1,1,1]' \
    +algorithm.rvpo.k=0.5 \
    +algorithm.rvpo.k_end=2 \
    reward.custom_reward_function.path="$here/verl_task.py" \
    reward.custom_reward_function.name=compute_score \
    data.train_files="$data/train.parquet" \
    data.val_files="$data/val.parquet" \
    data.train_batch_size=4 \
    data.max_prompt_length=256 \
    data.max_response_length=64 \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.optim.weight_decay=0 \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.clip_ratio=0.2 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.temperature=1 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
    trainer.n_gpus_per_node="$gpus" \
    trainer.nnodes=1 \
    trainer.total_training_steps=60 \
    trainer.total_epochs=4 \
    trainer.save_freq=50 \
    trainer.test_freq=20 \
    trainer.project_name=rvpo \
    trainer.experiment_name=task \
    trainer.logger='[console]' \
    "$@"

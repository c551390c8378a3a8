#!/usr/bin/env bash
# Tool calling with two rewards. Batch, group and learning rate are ToolRL's. Further arguments go to verl.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
model=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct} gpus=${GPUS:-8} data=${DATA:-$PWD/data/rlla}

python -m rvpo_nb.verl  # stops here unless verl has the estimators and both trainers are hooked
[ -f "$data/train.parquet" ] || python "$here/verl_tools.py" "$data"

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=rvpo \
    +algorithm.gdpo_reward_keys='[format_reward,tool_correctness_reward]' \
    +algorithm.gdpo_reward_weights='[1,1]' \
    +algorithm.rvpo.k=2 \
    reward.custom_reward_function.path="$here/verl_tools.py" \
    reward.custom_reward_function.name=compute_score \
    data.train_files="$data/train.parquet" \
    data.val_files="$data/val.parquet" \
    data.train_batch_size=512 \
    data.max_prompt_length=2048 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=4 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    trainer.n_gpus_per_node="$gpus" \
    trainer.nnodes=1 \
    trainer.total_training_steps=100 \
    trainer.test_freq=10 \
    trainer.save_freq=50 \
    trainer.project_name=rvpo \
    trainer.experiment_name=tools \
    trainer.logger='[console]' \
    "$@"

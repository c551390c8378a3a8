#!/usr/bin/env bash
# Rubrics with a reward for each of up to 17 criteria, k from 0.5 to 2. Needs JUDGE_MODEL, and JUDGE_URL unless it is OpenAI's. Further arguments go to verl.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
model=${MODEL:-Qwen/Qwen2.5-3B-Instruct} gpus=${GPUS:-8} data=${DATA:-$PWD/data/rar}
: "${JUDGE_MODEL:?set JUDGE_MODEL to the name of the judge, as its server calls it}"

python -m rvpo_nb.verl  # stops here unless verl has the estimators and both trainers are hooked
[ -f "$data/train.parquet" ] || python "$here/verl_rubric.py" "$data"

python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=rvpo \
    +algorithm.gdpo_reward_keys="[$(seq -s, -f 'criterion_%g' 17)]" \
    +algorithm.rvpo.k=0.5 \
    +algorithm.rvpo.k_end=2 \
    reward.custom_reward_function.path="$here/verl_rubric.py" \
    reward.custom_reward_function.name=compute_score \
    data.train_files="$data/train.parquet" \
    data.val_files="$data/val.parquet" \
    data.val_max_samples=256 \
    data.train_batch_size=96 \
    data.max_prompt_length=2048 \
    data.max_response_length=2048 \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=96 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24576 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    trainer.n_gpus_per_node="$gpus" \
    trainer.nnodes=1 \
    trainer.total_training_steps=300 \
    trainer.test_freq=20 \
    trainer.save_freq=50 \
    trainer.project_name=rvpo \
    trainer.experiment_name=rubric \
    trainer.logger='[console]' \
    "$@"

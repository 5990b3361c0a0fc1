#!/bin/bash
# Several machines on an existing SLURM cluster: one task a machine, accelerate starts a process a GPU.
#   sbatch --nodes 2 realsr_r1/configs/slurm.sh train grpo --model runs/middle --out runs/middle --prompts 16
#SBATCH --job-name=realsr-r1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

CONFIG=${CONFIG:-realsr_r1/configs/fsdp2.yaml}   # CONFIG=realsr_r1/configs/zero3.yaml sbatch …
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# The output folder must lie on a disk that all machines share: the same command after a requeue resumes from its checkpoint.
srun --kill-on-bad-exit=1 bash -c "accelerate launch --config_file $CONFIG \
  --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * GPUS)) --machine_rank \$SLURM_NODEID \
  --main_process_ip $HEAD --main_process_port $PORT --rdzv_backend c10d \
  -m realsr_r1 $*"

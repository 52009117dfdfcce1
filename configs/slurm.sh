#!/usr/bin/env bash
# Train on two machines of eight GPUs each, compress at the end of it, then compress at other ratios too.
#   sbatch configs/slurm.sh --config configs/resnet56_cifar10.yaml --experiment big
# One task for each GPU: Lightning reads ranks and addresses from SLURM. The folder must be one that all machines see.
#SBATCH --job-name=nm-lightning
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail
srun python train.py "$@" --trainer.num_nodes 2 --trainer.devices 8 --trainer.strategy ddp \
  --trainer.callbacks+=callbacks.NeuronMergeCallback --trainer.callbacks.method reconstruct
srun python compress.py --num_nodes 2 --devices 8 --device cuda --method merge reconstruct --ratio 0.3 0.5 0.7

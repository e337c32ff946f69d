#!/bin/bash
# One Slurm job: targets on all nodes but the last, trainers on the last one. From a shared directory, in an
# environment with this package:
#   sbatch deploy/slurm.sh run.name=mine target=hf target.model=/models/M data=chats data.train_path=chats.jsonl
# Time and the number of nodes are yours to set: sbatch --nodes=3 --time=08:00:00 deploy/slurm.sh ...
#SBATCH --job-name=eagle-rpc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
# Trainers get SIGTERM five minutes before the end and write a checkpoint; the same command goes on from it.
#SBATCH --signal=TERM@300
#SBATCH --output=eagle-rpc-%j.log
set -euo pipefail

# The network between the nodes, and the GPUs of a node that targets and trainers use.
INTERFACE=${INTERFACE:-eth0}
TARGETS=${TARGETS:-8}
TRAINERS=${TRAINERS:-8}
PORT=${PORT:-29711}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#nodes[@]} < 2)); then
  echo "slurm: at least two nodes are needed, one for targets and one for trainers, got ${#nodes[@]}" >&2
  exit 2
fi
last=$((${#nodes[@]} - 1))
address=$(srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[0]}" \
  ip -4 -o address show dev "$INTERFACE" | awk 'NR == 1 { sub("/.*", "", $4); print $4 }')
service=(rpc=elastic "rpc.interface=$INTERFACE" "rpc.registry=$address:$PORT")

on_node() {
  local node=$1
  shift
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" "$@"
}

# The registry and the targets end with this script; trainers wait for targets that still load.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
on_node "${nodes[0]}" eagle-rpc job=registry "${service[@]}" &
for ((i = 0; i < last; i++)); do
  on_node "${nodes[i]}" torchrun --standalone --nproc-per-node="$TARGETS" -m eagle_rpc job=serve \
    "topology.first_target=$((i * TARGETS))" "${service[@]}" "$@" &
done
on_node "${nodes[last]}" torchrun --standalone --nproc-per-node="$TRAINERS" -m eagle_rpc job=train \
  train.resume=auto "${service[@]}" "$@"

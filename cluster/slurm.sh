#!/bin/bash
# A study on the nodes that Slurm gives: sbatch cluster/slurm.sh sweeps/medmamba.py [its arguments]
# From the repository's root, which all nodes see; `make env` was run once. The same line goes on with a study that ran out
# of time. What the study says is in slurm-JOB.out and in the study's folder.
#SBATCH --job-name=medtune
#SBATCH --nodes=2                    # CHANGE: machines
#SBATCH --gpus-per-node=1            # CHANGE: GPUs of each, of one kind
#SBATCH --cpus-per-task=8            # CHANGE: CPU cores of each
#SBATCH --time=24:00:00              # CHANGE
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120          # two minutes before the time is up the study stops cleanly
set -euo pipefail

export PATH=$PWD/.venv/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3
# Lets in nobody else who is on these machines; each node reads it in the home folder that they share.
ray get-auth-token --generate > /dev/null

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a machine
temp=/tmp/ray-$SLURM_JOB_ID
size=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_PER_NODE:-0}")

# --block: a step, and with it Ray on its node, ends with the job.
srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false --temp-dir="$temp" "${size[@]}" --block &
for node in "${nodes[@]:1}"; do
  # shellcheck disable=SC2016  # expanded on the node
  srun --nodes=1 --ntasks=1 --nodelist="$node" \
    bash -c 'until ray health-check --address "$0"; do sleep 1; done; exec ray start --address "$@" --block' \
    "$head:$port" "$head:$port" "${size[@]}" &
done
for _ in $(seq 120); do
  ray health-check --address "$head:$port" 2> /dev/null && break
  sleep 1
done

# Not exec: bash passes the word to stop on, and Slurm ends the steps when this script ends.
RAY_ADDRESS=$head:$port python "$@" &
study=$!
told=
trap 'told=1; kill -TERM "$study"' TERM INT
status=0
wait "$study" || status=$?
if [ -n "$told" ]; then # the word cut the waiting short
  status=0
  wait "$study" || status=$?
fi
exit "$status"

#!/usr/bin/env bash
# Search on the nodes of a Slurm job: start Ray on all nodes, run the search on the first, and stop Ray afterwards.
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=32 --time=24:00:00 scripts/slurm.sh study.yaml --output /shared/outputs
#
# Arguments are passed to `prunesearch run`. Submit the job again to continue. docs/cluster.md says which folders must be
# on a shared disk.
#SBATCH --job-name=prunesearch
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@300
set -euo pipefail

# Slurm runs a copy of this file; go to the folder where sbatch was called
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
environment=${PRUNESEARCH_VENV:-.venv}
if [ -f "$environment/bin/activate" ]; then
    # shellcheck source=/dev/null
    source "$environment/bin/activate"
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
port=$((20000 + SLURM_JOB_ID % 10000)) # differs between jobs on the same node
export RAY_ADDRESS="${nodes[0]}:$port"
# a token, so that only this job can use its cluster; srun passes these variables to the other nodes
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_AUTH_TOKEN

on_node() { # on_node NODE COMMAND...: run a command on a node with the CPUs and GPUs of this job
    exec srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$1" "${@:2}"
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
on_node "${nodes[0]}" ray start --head --port="$port" --num-cpus="$cpus" --block &
for attempt in {1..90}; do
    if ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; then break; fi
    if [ "$attempt" = 90 ]; then
        echo "slurm.sh: Ray did not start on ${nodes[0]}; see its output above" >&2
        exit 1
    fi
    sleep 2
done
for node in "${nodes[@]:1}"; do
    on_node "$node" ray start --address="$RAY_ADDRESS" --num-cpus="$cpus" --block &
done

# wait for all nodes, because later ones would get no workers
python - "${#nodes[@]}" <<'PYTHON'
import sys, time, ray
ray.init(address="auto", log_to_driver=False)
deadline = time.monotonic() + 300
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {alive} of {sys.argv[1]} nodes joined the Ray cluster within 5 minutes")
    time.sleep(2)
PYTHON

prunesearch run "$@" --set workers.address=auto --no-progress &
search=$!
trap 'kill -TERM $search' TERM # the search finishes and saves what is running
status=0
while kill -0 "$search" 2>/dev/null; do
    wait "$search" && status=0 || status=$?
done
exit "$status"

"""`sbatch`, `srun` and `scontrol` of a cluster that is this machine: as little of SLURM as the scripts rely on."""

import os
from pathlib import Path

_HEAD = "#!/usr/bin/env bash\nset -euo pipefail\n"

# The batch script gets SLURM's variables from its own #SBATCH lines, and is started again when it has been requeued, as
# soon as the queue is not held. Unlike the real one, this waits for the job's end, and ends with its exit code.
_SBATCH = """
script=$STAND_IN/script
cat "${1:--}" >"$script"
option() { sed -n "s/^#SBATCH --$1=//p" "$script"; }
export SLURM_JOB_ID=4242 SLURM_JOB_NODELIST='this[0-1]'
SLURM_NTASKS_PER_NODE=$(option ntasks-per-node)
SLURM_NTASKS=$((SLURM_NTASKS_PER_NODE * $(option nodes)))
SLURM_CPUS_PER_TASK=$(option cpus-per-task)
export SLURM_NTASKS_PER_NODE SLURM_NTASKS SLURM_CPUS_PER_TASK
while true; do
    code=0
    bash "$script" >>"$STAND_IN/batch.log" 2>&1 &
    echo $! >"$STAND_IN/batch_pid"
    wait $! || code=$?
    if [ ! -e "$STAND_IN/requeued" ]; then exit "$code"; fi
    mv "$STAND_IN/requeued" "$STAND_IN/pending"
    while [ -e "$STAND_IN/hold" ]; do sleep 0.05; done
done
"""
_SRUN = """
output=/dev/stdout
while [[ $1 == --* ]]; do
    printf '%s\\n' "$1" >>"$STAND_IN/srun_options"
    case $1 in --output=*) output=${1#--output=} ;; esac
    shift
done
tasks=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    node=$((rank / SLURM_NTASKS_PER_NODE))
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % SLURM_NTASKS_PER_NODE)) "$@" >>"${output//%n/$node}" 2>&1 &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
    wait "$task" || code=$?
done
exit "$code"
"""
_SCONTROL = """
case "$1 $2" in
    "show hostnames") printf '%s\\n' localhost this1 ;;
    "requeue $SLURM_JOB_ID") touch "$STAND_IN/requeued" ;;
    *) exit 3 ;;
esac
"""
SCRIPTS = {"sbatch": _HEAD + _SBATCH, "srun": _HEAD + _SRUN, "scontrol": _HEAD + _SCONTROL}


def put_commands(folder: Path, scripts: dict[str, str]) -> dict[str, str]:
    """Write commands into a folder; returns the environment in which they are found first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "STAND_IN": str(folder)}

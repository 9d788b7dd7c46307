"""A SLURM of shell scripts: `sbatch` begins what is submitted at once, as processes of this machine.

In the folder of the scripts: `ID.sh` is what was submitted, `ID.pid` and `ID.state` are of each task, `calls` has the
commands. Where there is a file `hold`, submissions wait for ever.
"""

import os
import signal
import time
from pathlib import Path

HEAD = '#!/bin/bash\nhere="$(dirname "$0")"\necho "$(basename "$0") $*" >> "$here/calls"\n'
SCRIPTS = {
    "sbatch": r"""
number=$(($(cat "$here/last" 2>/dev/null || echo 100) + 1))
echo $number > "$here/last"
cp "${@: -1}" "$here/$number.sh"
tasks=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\)%.*/\1/p' "$here/$number.sh")
begin() {
    echo PENDING > "$here/$1.state"
    [ -e "$here/hold" ] && return
    echo RUNNING > "$here/$1.state"
    (
        setsid bash "$here/$number.sh" &
        echo $! > "$here/$1.pid"
        wait $! && echo COMPLETED > "$here/$1.state" || echo FAILED > "$here/$1.state"
    ) > /dev/null 2>&1 &
}
export SLURM_JOB_ID=$number SLURM_JOB_NAME=medtpp SLURM_NTASKS=1
export SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
if [ -z "$tasks" ]; then
    begin $number
else
    for task in $(seq 0 $tasks); do
        export SLURM_ARRAY_JOB_ID=$number SLURM_ARRAY_TASK_ID=$task
        begin ${number}_$task
    done
fi
echo "Submitted batch job $number"
""",
    "srun": r"""
filled() {
    sed "s/%A/$SLURM_ARRAY_JOB_ID/; s/%a/$SLURM_ARRAY_TASK_ID/; s/%j/$SLURM_JOB_ID/; s/%t/0/" <<< "$1"
}
while [[ "$1" == --* ]]; do
    case "$1" in
        --output) exec >> "$(filled "$2")"; shift ;;
        --error) exec 2>> "$(filled "$2")"; shift ;;
    esac
    shift
done
exec "$@"
""",
    "sacct": r"""
echo "JobID|State|NodeList"
for state in "$here"/*.state; do
    [ -e "$state" ] && echo "$(basename "$state" .state)|$(cat "$state")|node1"
done
exit 0
""",
    "scancel": r"""
for number in "$@"; do
    [ -e "$here/$number.pid" ] && kill -KILL -- -$(cat "$here/$number.pid")
    sleep 0.1
    echo "CANCELLED by 1000" > "$here/$number.state"
done
exit 0
""",
}


def install(folder: Path, monkeypatch) -> Path:
    """Put the scripts first in the PATH, and look often at what comes."""
    monkeypatch.setattr("medtpp.workflow.cluster._PAUSE", 0.2)
    folder.mkdir()
    for name, text in SCRIPTS.items():
        (folder / name).write_text(HEAD + text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def kill_submission() -> None:
    """Work that kills the process of its submission."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)

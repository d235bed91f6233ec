"""How this process was launched, from the variables that torchrun, accelerate, MPI and srun set.

This module is the only reader of RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. It imports nothing heavy, and joins no
process group: `npt.common.processes` knows the processes of a group.
"""

from __future__ import annotations

import os
import sys

from npt.errors import NPTError

#: Variables in which launchers say how many processes they start: torchrun and accelerate, Open MPI, other MPIs, srun.
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
#: Variables by which the processes of a launch find one another, beside WORLD_SIZE.
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Variables that say how OpenMP's threads wait for one another, and rounds that they spin before they sleep. By default they
#: spin for milliseconds: processes that share cores then slow each other many times more than they have to (docs/speed.md).
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = 3000


def wait_briefly() -> None:
    """Lets torch's threads spin only briefly for one another, where the environment does not say how they wait.

    OpenMP's library reads the environment when torch loads it: once torch is imported, nothing changes.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def is_first_launched() -> bool:
    """True for the process that writes the run's files and talks to the user: rank 0, or a process launched alone."""
    return os.environ.get("RANK", "0") == "0"


def process_label() -> str:
    """Nothing for the first process; " (process 1 of 2)" for another one, to put behind the command's name."""
    return "" if is_first_launched() else f" (process {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')})"


def world_size() -> int:
    """The number of processes of the launch, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes of the launch on this machine; all of them where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def asked_processes() -> dict[str, int]:
    """{variable: number of processes} of every launcher that speaks of more than one."""
    found = {name: os.environ.get(name, "") for name in LAUNCHERS}
    return {name: int(value) for name, value in found.items() if value.isdigit() and int(value) > 1}


def check_launch() -> None:
    """Checks the launcher's variables before anything waits for the other processes.

    Raises:
        NPTError: there are several processes, without the variables by which they find one another.
    """
    count = world_size()
    missing = [name for name in _NEEDED if name not in os.environ]
    if count > 1 and missing:
        raise NPTError(
            f"WORLD_SIZE={count}, but {', '.join(missing)} is not set: start the processes with torchrun --nproc-per-node "
            f"{count} or accelerate launch, or unset WORLD_SIZE for a single one"
        )
    # accelerate launch --cpu --num_processes 2 sets these for an mpirun that it does not call itself.
    if count == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and not asked_processes():
        raise NPTError(
            "accelerate was asked for several processes and started one (MASTER_ADDR is set, WORLD_SIZE is not): on CPUs use "
            "torchrun --nproc-per-node 2, or accelerate launch --multi_gpu --num_processes 2, which starts CPU processes too"
        )

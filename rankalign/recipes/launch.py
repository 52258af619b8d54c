"""``--num_processes N --launch ...`` of a command as the launcher's own command line, or as a batch script."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import torch

from rankalign.errors import InputError
from rankalign.recipes.project import root
from rankalign.registry import did_you_mean

# What is spread over the processes, and the file of train_scripts/accelerate that says so; docs/scaling.md has when.
FILES = {"ddp": "", "fsdp2": "fsdp.yaml", "zero2": "zero2.yaml", "zero3": "zero3.yaml"}
SCRIPT = "slurm"


def launcher(how: str, processes: int, words: Sequence[str], command: str = "train") -> list[str]:
    """The command that starts ``processes`` of ``rankalign train words``.

    Args:
        how: a key of :data:`FILES`.
        processes: 0 takes one a GPU.
        words: flags of the command.
        command: another one than ``train``.

    Raises:
        InputError: an unknown launcher, no number where there is no GPU, or one that only GPUs can serve.
    """
    if how not in FILES:
        raise InputError(f"--launch {how}: unknown{did_you_mean(how, [*FILES, SCRIPT])}")
    gpus = torch.cuda.device_count()
    if not gpus and not processes:
        raise InputError(f"--launch {how}: this machine has no GPU to count; say --num_processes N")
    if not gpus and how == "fsdp2":
        raise InputError("--launch fsdp2: accelerate has no FSDP for CPUs; ddp, zero2 and zero3 run there")
    if gpus and processes > gpus:
        raise InputError(f"--num_processes {processes}: this machine has {gpus} GPUs, and each process drives one")
    count = str(processes or gpus)
    python = [sys.executable, "-m"]
    train = ["-m", "rankalign", command, *words]
    if how == "ddp":
        return [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", count, *train]
    # The file asks for bf16, which a CPU without units for it would emulate.
    precision = [] if gpus else ["--mixed_precision", "no"]
    file = str(root() / "train_scripts" / "accelerate" / FILES[how])
    start = [*python, "accelerate.commands.accelerate_cli", "launch", "--config_file", file]
    return [*start, "--num_processes", count, *precision, *train]


def slurm_script(how: str, processes: int, words: Sequence[str]) -> str:
    """A batch script that trains on as many whole nodes as SLURM is asked for, ``processes`` GPUs on each.

    Raises:
        InputError: no number of GPUs a node; it cannot be counted where jobs are only handed in.
    """
    if how not in FILES:
        raise InputError(f"--launch {SCRIPT}:{how}: unknown{did_you_mean(how, FILES)}")
    if not processes:
        raise InputError(f"--launch {SCRIPT} needs --num_processes N: the GPUs of a node")
    file = shlex.quote(str(root() / "train_scripts" / "accelerate" / (FILES[how] or "ddp.yaml")))
    # Quoted twice: once for the shell that srun starts, once inside its single word.
    train = " ".join(shlex.quote(word) for word in words).replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f"""#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={processes}
#SBATCH --signal=B:TERM@300
# Five minutes before the end comes a signal: a checkpoint is written, and the same script goes on from it.
# More nodes: sbatch --nodes=2. The output folder must be on a disk that all of them see.

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun bash -c "accelerate launch --config_file {file} \\
  --num_machines $SLURM_NNODES --num_processes $(({processes} * SLURM_NNODES)) --machine_rank \\$SLURM_NODEID \\
  --main_process_ip $host --main_process_port 29500 \\
  -m rankalign train {train}"
"""

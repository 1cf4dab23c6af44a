"""Not a test: its last collective work lies with a thread that hardly gets to run, while the process ends. Launched by
test_distributed.py."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from align.processes import _leave_at_exit

_leave_at_exit()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
module(torch.randn(2, 8)).sum().backward()
cpu = {min(os.sched_getaffinity(0))}
spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, cpu))
try:
    os.sched_setaffinity(0, cpu)
    for thread in Path("/proc/self/task").glob("*"):
        if (thread / "comm").read_text().startswith("pt_gloo"):
            os.sched_setaffinity(int(thread.name), cpu)
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
    dist.all_reduce(torch.ones(1))  # the thread still holds the tensor when this returns
finally:
    spinner.kill()  # from now on the thread runs beside the end
print("DONE")

"""What a command and all processes below it use: time, CPU and memory.

Memory is each process's unique set size (what would be free if it ended), sampled ten times a
second; CPU by process is as of its last sample, in sum it is the kernel's own account.
"""

import re
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Usage:
    """Seconds of wall clock and of CPU, and the highest sum of memory in bytes.

    `cpu_by_process` and `memory_by_process` (each one's own highest) are by role: engine, program,
    language host, and the package of each stand-in. Empty where memory was not watched.
    """

    wall: float
    cpu: float
    memory: int = 0
    cpu_by_process: Mapping[str, float] = field(default_factory=dict)
    memory_by_process: Mapping[str, int] = field(default_factory=dict)


def measure(action: Callable[[], object], memory: bool = False) -> Usage:
    """Do it, and tell what the processes used that it started, directly or not.

    All of them must have ended. Nothing else may start processes meanwhile.
    """
    watch = _Watch() if memory else None
    cpu, started = _children_cpu(), time.monotonic()
    if watch:
        watch.start()
    try:
        action()
    finally:
        wall = time.monotonic() - started
        if watch:
            watch.stop()
    cpu = _children_cpu() - cpu
    if watch is None:
        return Usage(wall, cpu)
    by_process: dict[str, float] = defaultdict(float)
    for role, seconds in watch.cpu.values():
        by_process[role] += seconds
    return Usage(wall, cpu, watch.peak, dict(by_process), dict(watch.peaks))


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Watch(threading.Thread):
    """Samples the processes below this one until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.peaks: dict[str, int] = {}
        self.cpu: dict[int, tuple[str, float]] = {}
        self._done = threading.Event()

    def run(self) -> None:
        this = psutil.Process()
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample(this.children(recursive=True))

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _sample(self, processes: Sequence[psutil.Process]) -> None:
        memory: dict[str, int] = defaultdict(int)
        for process in processes:
            # One that ends while it is looked at is in no sum any more.
            with suppress(psutil.Error):
                command_line = process.cmdline()
                if not command_line:
                    continue
                role = _role(command_line)
                memory[role] += process.memory_full_info().uss
                times = process.cpu_times()
                self.cpu[process.pid] = role, times.user + times.system
        self.peak = max(self.peak, sum(memory.values()))
        for role, size in memory.items():
            self.peaks[role] = max(self.peaks.get(role, 0), size)


def _role(command_line: Sequence[str]) -> str:
    line = " ".join(command_line)
    if found := re.search(r"rehearsal\.providers\.(\w+)", line):
        return found[1]
    # `--program` is the project's own language host, `-exec` the official one.
    if re.search(r"pulumi-language-python(\S* --program|-exec)\b", line):
        return "program"
    if "pulumi-language-python" in line:
        return "language host"
    return "engine" if re.match(r"(\S*/)?pulumi ", line) else "other"

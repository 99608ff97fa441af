"""Tasks in processes of their own, so that one that fails badly costs the others nothing.

A launch may spoil the card's context, or never end. A process takes a task's key, sends its
findings, and takes the next one. After a failure that left the card without an answer it ends, and
a new one goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.findings import FAILED, Finding, Place, Task, healthy, perform

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SPENT = "the run's time is spent"
# Importing torch and opening the card.
START_SECONDS = 120.0
# What a task that is under way at the deadline still gets.
GRACE_SECONDS = 45.0
Report = Callable[[list[Finding]], None]


def in_this_process(tasks: Sequence[Task], place: Place, deadline: float, report: Report) -> None:
    """One task after the other; those that are left at the deadline are named."""
    for task in tasks:
        if time.monotonic() > deadline:
            report([_skipped(task)])
        else:
            report(perform(task, place))


def in_processes(
    tasks: Sequence[Task], place: Place, deadline: float, report: Report, count: int = 1
) -> None:
    """The same in as many processes at a time."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    lock = threading.Lock()

    def told(findings: list[Finding]) -> None:
        with lock:
            report(findings)

    threads = [
        threading.Thread(target=_serve, args=(waiting, place, deadline, told))
        for _ in range(min(count, len(tasks)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve(waiting: queue.SimpleQueue[Task], place: Place, deadline: float, report: Report) -> None:
    """Hand tasks to one process after the other until there are none left."""
    worker: _Worker | None = None
    while True:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            break
        if time.monotonic() > deadline:
            report([_skipped(task)])
            continue
        try:
            worker = worker or _Worker(place)
            findings, lives = worker.perform(task, deadline)
        except Exception as error:
            # No process can be started, or what it sent is no finding: the task is still named.
            findings, lives = (
                [Finding(task.group, task.name, FAILED, f"its process: {error}")],
                False,
            )
        report(findings)
        if not lives and worker is not None:
            worker.end()
            worker = None
    if worker is not None:
        worker.end()


def _skipped(task: Task) -> Finding:
    return Finding(task.group, task.name, "skipped", SPENT)


class _Worker:
    """A process and the line to it."""

    def __init__(self, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, place), daemon=True)
        self.process.start()
        other.close()
        self.seconds = START_SECONDS  # on top of the first task's

    def perform(self, task: Task, deadline: float) -> tuple[list[Finding], bool]:
        """The task's findings, and whether the process can take another task."""
        left = max(deadline - time.monotonic(), 0.0) + GRACE_SECONDS
        limit = min(task.seconds + self.seconds, left)
        self.seconds = 0.0
        try:
            self.line.send(task.key)
            if not self.line.poll(limit):
                if limit == left:
                    return [_skipped(task)], False
                late = f"no answer within {limit:.0f} s"
                return [Finding(task.group, task.name, FAILED, late)], False
            findings, lives = self.line.recv()
        except (EOFError, OSError):
            self.process.join(10.0)
            ended = f"its process ended with {self.process.exitcode}"
            return [Finding(task.group, task.name, FAILED, ended)], False
        if not lives:
            lost = "the card's context was lost here, and a new process goes on"
            findings.append(Finding(task.group, task.name, "told", lost))
        return findings, lives

    def end(self) -> None:
        self.line.close()
        self.process.join(5.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(line: Connection, place: Place) -> None:
    """In the process: perform what is asked for until the line is closed."""
    # Each process would start as many compilers as there are cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    from benchmarks.gpu import plan

    every: dict[str, Any] = plan.by_key()
    while True:
        try:
            key = line.recv()
        except (EOFError, OSError):
            return
        findings = perform(every[key], place)
        lives = healthy(place)
        line.send((findings, lives))
        if not lives:
            return

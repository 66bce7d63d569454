"""Jobs of an experiment: a function each, in a process of its own, a few at once; done once, whoever asks again.

A job's folder:

    done.json   {"key": hash of what the job was, "result": what its function returned}; it is written last
    log.txt     all that it printed

A job whose folder holds a result is not run again. One that was stopped runs again in the same folder, where its
function finds what is whole.

The processes are forked from a server that has imported the heavy libraries once, and nothing more: each is as fresh as
a command of its own, without the ten seconds that importing takes.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ibft.console import Console
from ibft.errors import ConfigError, IBFTError, SetupError

Result = dict[str, Any]
DONE, LOG, FAULT = "done.json", "log.txt", "fault.json"
PRELOADED = ["torch", "transformers", "peft", "accelerate", "ibft.run", "ibft.evaluation.generate_samples"]


@dataclass(frozen=True)
class Job:
    """function(folder, **arguments, here=here) -> a JSON object. The function must be picklable, the arguments JSON;
    `here` are what may change between two calls for one result: paths, and what else is the machine's."""

    name: str
    folder: Path
    function: Callable[..., Result]
    arguments: Mapping[str, Any]
    here: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        what = [self.function.__qualname__, self.arguments]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def result(self) -> Result | None:
        """None where it is not done. Raises ConfigError: the folder holds the result of another job."""
        path = self.folder / DONE
        try:
            done = json.loads(path.read_text(encoding="utf-8"))
            key, result = done["key"], done["result"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no result of a job: delete it, or name another folder with -o") from error
        if key != self.key:
            raise ConfigError(f"{path} was made with other settings: name another folder with -o, or delete this one")
        assert isinstance(result, dict)
        return result


def run_jobs(jobs: Sequence[Job], *, workers: int, threads: int | None, console: Console, what: str) -> list[Result]:
    """The results, in the order of the jobs.

    Args:
        workers: jobs at once. threads: of each for torch; None: torch's choice. what: for people.

    Raises:
        IBFTError: as the job's function raised it, with the job's name before it; those under way are stopped.
        SetupError: a job's process died.
    """
    results = [job.result() for job in jobs]  # refuses a folder of other settings before anything runs
    left = [job for job, result in zip(jobs, results, strict=True) if result is None]
    if len(left) < len(jobs):
        console.notice(f"{what}: {len(jobs) - len(left)} of {len(jobs)} done already")
    if left:
        with console.progress(what, len(jobs)) as advance, stopping_with_us():
            done = len(jobs) - len(left)
            for _ in processes(left, workers, threads):
                done += 1
                advance(done)
    final = [job.result() for job in jobs]
    assert all(result is not None for result in final)
    return [result for result in final if result is not None]


def processes(jobs: Sequence[Job], workers: int, threads: int | None) -> Iterator[Job]:
    """Runs them; yields each as it is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting = list(jobs)
    running: dict[int, tuple[Any, Job]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                # daemonic: none outlives this process
                process = context.Process(target=work, args=(job, threads), name=job.name, daemon=True)
                process.start()
                running[process.sentinel] = (process, job)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, job = running.pop(sentinel)
                process.join()
                check_end(job, process.exitcode)
                yield job
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def check_end(job: Job, exit_code: int | None) -> None:
    if job.result() is not None:
        return
    fault = job.folder / FAULT
    if fault.exists():
        told = json.loads(fault.read_text(encoding="utf-8"))
        error = IBFTError(f"{job.name}: {told['text']}")
        error.exit_code = told["exit_code"]
        raise error
    raise SetupError(f"{job.name}: its process ended with exit code {exit_code}; see {job.folder / LOG}")


def work(job: Job, threads: int | None) -> None:
    """In the job's process."""
    os.setpgrp()  # Ctrl+C is the parent's to hear: it ends its processes itself
    threading.Thread(target=end_with_parent, daemon=True).start()
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / FAULT).unlink(missing_ok=True)
    log = (job.folder / LOG).open("a", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    try:
        result = job.function(job.folder, **job.arguments, here=job.here)
    except IBFTError as error:
        write_whole(job.folder / FAULT, {"text": str(error), "exit_code": error.exit_code})
        raise SystemExit(error.exit_code) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    write_whole(job.folder / DONE, {"key": job.key, "result": result})


def end_with_parent() -> None:
    """One that is killed outright ends nothing; the same command would start a second process in the job's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """A reader finds all of it or nothing."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(fresh, path)


@contextmanager
def stopping_with_us() -> Iterator[None]:
    """SIGTERM ends the jobs too: they are ended where this process unwinds."""

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

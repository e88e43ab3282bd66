"""Files of text to Megatron ``.bin/.idx``: several processes, on several ranks under MPI, one output whatever their numbers.

Units of input are shared out over the ranks by size; each rank's workers turn theirs into shards (``shards.py``), and rank 0 merges all
of them in the order of the input (``merging.py``). Shards lie in ``<prefix>.partial`` until the output is there: a run that died, or
failed on a bad file, leaves what was finished (``finished.py``) to the next one with the same arguments, of any number of ranks.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

from megastab.config.errors import UserError
from megastab.data.documents import Unit, plan_units
from megastab.data.finished import is_intact, markers, part_names
from megastab.data.merging import publish
from megastab.data.shards import Job, run_unit, start_worker, tokenize_unit
from megastab.data.sidecar import Sidecar
from megastab.data.tokenizer import Tokenizer
from megastab.data.world import ALONE, World, share_out

logger = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2  # between looks at the other ranks' progress

Task = tuple[str, Unit]
"""The name of a part and what it is made of."""


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    workers: int = 1,
    valid_fraction: float = 0.0,
    key: str = "text",
    append_eod: bool = True,
    *,
    unit_bytes: int | None = None,
    progress: bool = True,
    world: World = ALONE,
) -> dict[str, Sidecar]:
    """Tokenize ``inputs`` into ``<prefix>.bin/.idx/.json``, or ``<prefix>_train`` and ``<prefix>_valid`` where a valid fraction is given.

    Collective over ``world``. Returns the sidecar of every prefix written, nothing on ranks other than 0. ``workers`` are this rank's.
    ``unit_bytes`` is the size of a work unit; it changes no output. Disk: twice the tokens until the end.
    """
    if not 0.0 <= valid_fraction < 1.0:
        raise UserError(f"valid_fraction is {valid_fraction}; it must be at least 0 and below 1")
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    units = world.from_first(lambda: plan_units(inputs, unit_bytes))
    tokenizer, prefix = Tokenizer(tokenizer_path), Path(output_prefix)
    job = Job(tokenizer, prefix.with_name(f"{prefix.name}.partial"), valid_fraction, key, append_eod)
    try:
        with _sigterm_raises(), ExitStack() as stack:
            if world.rank == 0:
                stack.enter_context(_work_folder(job.folder))
            _check_agreement(job, world)
            tasks = list(zip(world.from_first(lambda: part_names(units, job.options)), units, strict=True))
            _tokenize(job, tasks, workers, progress, world)
            written = publish(job, [name for name, _ in tasks], prefix) if world.rank == 0 else {}
            world.meet()
    except BrokenProcessPool as error:
        raise UserError(f"a worker of {workers} was killed, most often for lack of memory; use fewer workers") from error
    except OSError as error:
        place = error.filename or prefix
        raise UserError(f"{place}: {error.strerror or error}; check the rights and the free space of {prefix.parent}") from error
    return written


def _check_agreement(job: Job, world: World) -> None:
    """All ranks must have the same tokenizer and see the same folder."""
    world.meet()  # rank 0 has made the folder
    told = world.of_all((job.tokenizer.fingerprint, job.folder.is_dir()))
    for rank, (fingerprint, is_there) in enumerate(told if world.rank == 0 else []):  # one voice is enough
        if fingerprint != told[0][0]:
            raise UserError(
                f"tokenizer {job.tokenizer.path}: rank {rank} finds another file there than rank 0; use a path that hosts share"
            )
        if not is_there:
            raise UserError(f"{job.folder}: rank {rank} does not see this folder of rank 0; write to a file system that hosts share")


@contextmanager
def _work_folder(folder: Path) -> Iterator[None]:
    """The folder of unfinished work, for one run at a time; it goes when the run succeeds or left nothing finished in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    is_done = False
    try:
        yield
        is_done = True
    finally:
        lock.close()  # first, because NFS keeps the folder of an open file
        if not is_done and (kept := markers(folder)):
            logger.warning("%d finished parts stay in %s: the same command goes on from them", len(kept), folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> IO[str]:
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder}: another run is at work on this output; wait for it, or name another one") from None
    except OSError:
        pass  # a file system without locks
    return lock


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a cancelled job also cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def _exit(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tokenize(job: Job, tasks: list[Task], workers: int, progress: bool, world: World) -> None:
    """Make every part that is not there yet; returns on rank 0 when all ranks are done."""
    left = _unfinished(job, tasks, world)
    mine = share_out([unit.num_bytes for _, unit in left], world.size)[world.rank]
    total, to_do = (sum(unit.num_bytes for _, unit in some) for some in (tasks, left))
    with _bar(total, total - to_do, progress, world) as bar:
        ranks_at_work = world.size - 1
        for unit in _done(job, [left[position] for position in mine], workers):
            world.tell(unit.num_bytes)
            ranks_at_work -= _show(bar, [unit.num_bytes, *world.heard()] if world.rank == 0 else [])
        world.tell(None)
        while world.rank == 0 and ranks_at_work:
            time.sleep(_LOOK_SECONDS)
            ranks_at_work -= _show(bar, world.heard())


def _bar(total: int, done: int, progress: bool, world: World) -> Any:
    """Of all ranks' bytes, on rank 0. mpirun's output is no terminal, and gets a line now and then all the same."""
    from tqdm import tqdm

    is_terminal = sys.stderr.isatty()
    is_shown = progress and world.rank == 0 and (is_terminal or world.size > 1)
    pause = 0.1 if is_terminal else 10.0  # seconds
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="tokenize", disable=not is_shown, mininterval=pause)


def _show(bar: Any, told: list[int | None]) -> int:
    """Bytes to the bar; how many ranks said that they are done."""
    bar.update(sum(amount for amount in told if amount is not None))
    return told.count(None)


def _unfinished(job: Job, tasks: list[Task], world: World) -> list[Task]:
    """Tasks without an intact part from an earlier run; the ranks share the reading."""
    there = world.from_first(lambda: markers(job.folder))
    here = {name for name, _ in tasks[world.rank :: world.size] if name in there and is_intact(job.folder, name)}
    finished = set().union(*world.of_all(here))
    if world.rank == 0 and there:
        logger.warning("%s: %d of %d parts are finished already", job.folder, len(finished), len(tasks))
        if len(there) > len(finished):
            others = len(there) - len(finished)
            logger.warning("%d more there are damaged, or of other input, tokenizer or options, and are not used", others)
    return [task for task in tasks if task[0] not in finished]


def _done(job: Job, tasks: list[Task], workers: int) -> Iterator[Unit]:
    """Units as they are done; the first failure stops every worker and is raised here."""
    if workers == 1 or not tasks:
        for name, unit in tasks:
            tokenize_unit(job, name, unit)
            yield unit
        return
    # spawn, not fork: the caller may hold threads (torch), and a worker imports nothing slow
    context = get_context("spawn")
    stop: Any = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, start_worker, (job, stop))
    try:
        pending = {pool.submit(run_unit, name, unit) for name, unit in tasks}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        stop.set()  # nobody is at work any more unless something failed
        pool.shutdown(wait=True, cancel_futures=True)

"""Copies of the model as actors of Ray Data, over the cluster that `ray` connects to, or a local one.

Ray places the copies, feeds them and starts them again when they die; answers come back to this process, which alone
writes the log. So resuming, the order and the batches are the same as without Ray.
"""

from __future__ import annotations

import importlib
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from llmconvert.engine.interpreters import environment
from llmconvert.errors import LlmconvertError, Refused, Usage
from llmconvert.infer.batches import Batch
from llmconvert.infer.engines import Copy, build
from llmconvert.infer.pool import Tally
from llmconvert.infer.store import Answer, Log, Store
from llmconvert.infer.worker import sound

_AHEAD = 4096
"""Batches handed to Ray at a time; it keeps their prompts in its object store."""
_RETRIES = 3


class _Actor:
    """A copy of the model, as Ray Data makes one."""

    def __init__(self, copy: Copy) -> None:
        try:
            self._engine, self._error = build(copy), None
        except LlmconvertError as error:
            self._error = error  # raised here, Ray would start the actor again and again

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "found": pickle.dumps(self._found(row)), "worker": _actor_name()}

    def _found(self, row: dict[str, Any]) -> list[Answer] | LlmconvertError | str:
        """Answers; or why there is no model; or why these rows failed."""
        if self._error is not None:
            return self._error
        batch: Batch = pickle.loads(row["batch"])
        try:
            return [answer for group in self._engine.answer(batch.items, batch.done) for answer in group]
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]


def _actor_name() -> str:
    ray: Any = importlib.import_module("ray")
    return str(ray.get_runtime_context().get_actor_id())


class RayCopies:
    """A connection to Ray, and how the copies share what it has.

    Attributes:
        devices: of each copy, as the copy sees them: Ray shows it only those.
    """

    def __init__(self, workers: int | None, devices: Sequence[str] | None) -> None:
        """Connect.

        Args:
            workers: copies; one a GPU, or one, if None.
            devices: not to be named, as Ray places copies itself; `["cpu"]` uses no GPU.

        Raises:
            Usage: Ray is not installed, or devices are named.
            Refused: the cluster has too few GPUs.
        """
        try:
            self._ray: Any = importlib.import_module("ray")
            self._data: Any = importlib.import_module("ray.data")
        except ImportError:
            raise Usage("Ray Data is not installed", hint="pip install 'ray[data]'") from None
        if devices is not None and list(devices) != ["cpu"]:
            raise Usage("Ray places copies itself", hint="leave `--devices` out, or use `--devices cpu`")
        self._mine = not self._ray.is_initialized()
        if self._mine:
            self._connect()
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if devices is None else 0
        copies = workers or max(1, gpus)
        if gpus and gpus < copies:
            self.close()
            raise Refused(f"the cluster has {gpus} GPUs for {copies} copies", hint="use fewer `--num-workers`")
        self._gpus = gpus // copies
        # Copies on processors may be more than processors are.
        self._cpus = min(1.0, float(resources.get("CPU", 1)) / (copies + 1))
        own = tuple(f"cuda:{number}" for number in range(self._gpus)) or ("cpu",)
        self.devices = [own] * copies

    def _connect(self) -> None:
        """Join the cluster named by RAY_ADDRESS, or running on this machine, or else start a local one.

        Ray puts the directory it is started from on its workers' import path, and they work there: an empty one of ours, or
        a checkpoint's `torch.py` would run where somebody stands beside it.
        """
        self._place = tempfile.TemporaryDirectory(prefix="llmconvert-", ignore_cleanup_errors=True)
        named, path = os.environ.get("PYTHONPATH"), environment({}, {}).get("PYTHONPATH")
        before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.chdir(self._place.name)
            if path is not None:
                os.environ["PYTHONPATH"] = path
            self._ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=None)
        finally:
            os.fchdir(before)
            os.close(before)
            if named is not None:
                os.environ["PYTHONPATH"] = named

    def __enter__(self) -> RayCopies:
        """Nothing more."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster."""
        self.close()

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._mine:
            self._ray.shutdown()
            self._place.cleanup()

    def run(
        self, copies: list[Copy], store: Store, queue: Iterator[Batch], report: Callable[[list[Tally]], None]
    ) -> list[Tally]:
        """Work until the queue is empty; see `Pool.run`.

        Raises:
            LlmconvertError: the model cannot be loaded, or copies die of a batch again and again.
        """
        context = self._data.DataContext.get_current()
        context.enable_progress_bars = False
        seen: dict[str, Tally] = {}
        log: Log | None = None
        again: list[Batch] = []
        try:
            while ahead := again or list(islice(queue, _AHEAD)):
                log = log or store.new_log()
                again = self._segment(copies, ahead, store, log, seen, lambda: report(_all(seen, copies)))
        except LlmconvertError:
            raise
        except Exception as error:
            first = (str(error) or type(error).__name__).strip().splitlines()[-1]
            raise Refused(
                f"Ray gave up: {type(error).__name__}: {first}",
                hint="what is done is kept: repeat with `--resume` once the cause is gone",
            ) from error
        finally:
            if log is not None:
                log.close()
        return _all(seen, copies)

    def _segment(
        self, copies: list[Copy], ahead: list[Batch], store: Store, log: Log, seen: dict[str, Tally], report: Callable[[], None]
    ) -> list[Batch]:  # fmt: skip
        """Answer some batches by fresh copies; returned are those to try again."""
        began = time.monotonic()
        report()
        items = [{"index": index, "batch": pickle.dumps(batch)} for index, batch in enumerate(ahead)]
        # A block a batch, or answers would come many batches late.
        answered = self._data.from_items(items, override_num_blocks=len(items)).map(
            _Actor,
            fn_constructor_args=[copies[0]],
            compute=self._data.ActorPoolStrategy(size=min(len(copies), len(items)), max_tasks_in_flight_per_actor=2),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
        again: list[Batch] = []
        for result in answered.iter_rows():
            found: list[Answer] | LlmconvertError | str = pickle.loads(result["found"])
            if isinstance(found, LlmconvertError):
                raise found
            batch, cause = ahead[result["index"]], found if isinstance(found, str) else "no answer came"
            fresh = [] if isinstance(found, str) else [one for one in sound(found, batch.rows) if store.mark(one.row)]
            batch.done.update(answer.row for answer in fresh)
            if batch.left():
                more = batch.retry()
                again += more
                if not more:
                    last = [Answer(row, error=f"failed {batch.deaths} times: {cause}") for row in batch.left()]
                    fresh += [answer for answer in last if store.mark(answer.row)]
            log.append(fresh)
            tally = seen.setdefault(result["worker"], Tally(starts=1, loaded=True))
            tally.rows += len(fresh)
            tally.errors += sum(answer.error is not None for answer in fresh)
            tally.tokens += sum(answer.tokens for answer in fresh)
            tally.seconds = time.monotonic() - began
            report()
        return again


def _all(seen: dict[str, Tally], copies: list[Copy]) -> list[Tally]:
    """The tallies of all copies; those that have said nothing yet are being loaded."""
    return [*seen.values(), *(Tally(starts=1) for _ in range(len(copies) - len(seen)))]

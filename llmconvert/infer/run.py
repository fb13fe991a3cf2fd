"""One run of batch inference, from the data to the output."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmconvert.checkpoint.config import read_config
from llmconvert.checkpoint.directory import refuse_pointers
from llmconvert.errors import BadInput, InputOutput, LlmconvertError, Usage
from llmconvert.infer.batches import batches
from llmconvert.infer.dtypes import stored_dtype
from llmconvert.infer.engines import CHECKED, Copy, choose
from llmconvert.infer.fingerprint import Unchanged, data_hash, model_hash
from llmconvert.infer.merge import merge
from llmconvert.infer.pool import Pool, Tally
from llmconvert.infer.progress import Progress, rate_of
from llmconvert.infer.rows import BadRow, Fields, Prompt, Source, open_source
from llmconvert.infer.sampling import Sampling
from llmconvert.infer.store import Answer, Log, Merged, Store, record_file, work_directory

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_ROWS = {"accelerator": 128, "cpu": 16}
"""Rows of a batch where the user says nothing; transformers cuts it further where memory is short."""
_PORTION, _WHOLE_PORTION = 64, 512
"""Most rows handed at a time to an engine that takes more while it works on them, and to one that does not (on Ray)."""
_STABLE = (
    "the same bytes for any number of workers (of one kind of device, threads alike) and after any kill, unless memory ran"
    " out; equal to `generate` one row at a time but where two tokens are within rounding of each other"
)
_UNSTABLE = (
    "vLLM batches as requests come: bytes may differ between runs where tokens are within rounding of each other, unless"
    " VLLM_BATCH_INVARIANT=1 is set and supported"
)
_FOREIGN = "what the engine promises"


@dataclass
class Summary:
    """What a run did.

    Attributes:
        output: the file.
        rows: in it.
        errors: rows without an answer.
        resumed: rows done by earlier, unfinished runs.
        tokens: generated, in the whole output.
        new_tokens: generated in this run.
        seconds: of this run, loading included.
        engine: what generated.
        reason: why that.
        dtype: computed in.
        batch_size: most rows of a batch.
        devices: of each worker.
        workers: what each worker did in this run.
        first_error: one of the errors.
        guarantee: what may be relied upon.
        already_finished: whether an earlier run had made the output, so that nothing was done.
    """

    output: str
    rows: int
    errors: int
    resumed: int
    tokens: int
    new_tokens: int
    seconds: float
    engine: str
    reason: str
    dtype: str
    batch_size: int
    devices: list[tuple[str, ...]]
    workers: list[Tally]
    first_error: str | None
    guarantee: str
    already_finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        value = asdict(self)
        value["rows_per_second"] = (self.rows - self.resumed) / self.seconds
        value["tokens_per_second"] = self.new_tokens / self.seconds
        for entry, tally in zip(value["workers"], self.workers, strict=True):
            entry["tokens_per_second"] = rate_of(tally)
        return value


@dataclass
class Infer:
    """Batch inference over many copies of a model.

    Attributes:
        model_path: a checkpoint's directory, or a hub id.
        data_path: JSONL, Parquet, or a Hugging Face dataset.
        output_path: the JSONL file to make.
        num_workers: copies of the model; as many as devices if absent.
        devices: `["0", "1"]`, `["cuda:0"]` or `["cpu"]`, shared out among the copies; all there are if absent.
        engine: auto, hf, vllm, ray (or ray:hf, ray:vllm), or `module:Class`.
        prompt_field: the field with a text or messages; `prompt`, in rows that have it, if absent.
        messages_field: the field with a chat's messages; `messages`, in rows without a prompt, if absent.
        output_field: where the answer goes.
        error_field: where it goes why there is none.
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        top_p: 1 keeps all tokens.
        top_k: 0 keeps all tokens.
        stop: an answer ends before the first of these strings.
        seed: of sampling; each row has random numbers of its own.
        batch_size: most rows of a batch; worked out if absent.
        dtype: auto (as stored), float32, bfloat16, float16, float64.
        engine_args: options of the engine's own: keyword arguments of vLLM's `LLM`, or of transformers' `from_pretrained`.
        split: of a dataset.
        resume: go on with an unfinished run; do nothing where it is finished.
        overwrite: replace the output, and discard an unfinished run.
        progress: shows how far it is; nothing if absent.
    """

    model_path: str | Path
    data_path: str | Path
    output_path: str | Path
    num_workers: int | None = None
    devices: Sequence[str] | None = None
    engine: str = "auto"
    prompt_field: str | None = None
    messages_field: str | None = None
    output_field: str = "output"
    error_field: str = "error"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[str] = ()
    seed: int = 0
    batch_size: int | None = None
    dtype: str = "auto"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"
    resume: bool = False
    overwrite: bool = False
    progress: Progress = field(default_factory=lambda: Progress(enabled=False))

    @property
    def fields(self) -> Fields:
        """The names of fields."""
        return Fields(self.prompt_field, self.messages_field, self.output_field, self.error_field)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, tuple(self.stop), self.seed
        )  # fmt: skip

    def run(self) -> Summary:
        """Answer every row, and write the output.

        Raises:
            LlmconvertError: with what is done kept for `resume`, but for errors of usage.
        """
        try:
            return self._open_and_run(time.monotonic())
        except OSError as error:
            raise InputOutput(
                f"the system refuses: {error.strerror or error}",
                where=str(error.filename or self.output_path),
                hint="what is done is kept: repeat with `--resume` once the cause is gone",
            ) from error

    def _open_and_run(self, began: float) -> Summary:
        self.stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self.devices = self.devices.split(",") if isinstance(self.devices, str) else self.devices
        self._check()
        output = Path(self.output_path)
        source = open_source(str(self.data_path), self.split)
        self._check_names(source)
        model = _model_directory(str(self.model_path)).absolute()  # workers are in another directory
        if os.path.lexists(model / "config.json"):
            read_config(model)  # before libraries are told to open what is there
        on_ray = self.engine == "ray" or self.engine.startswith("ray:")
        if on_ray:
            from llmconvert.infer.ray_data import RayCopies

            with RayCopies(self.num_workers, self.devices) as ray:
                return self._run(began, source, model, output, ray.devices, ray)
        return self._run(began, source, model, output, share_devices(self.num_workers, self.devices), None)

    def _run(
        self, began: float, source: Source, model: Path, output: Path, devices: list[tuple[str, ...]], ray: Any
    ) -> Summary:
        on_cpu = devices[0][0] == "cpu"
        wanted = self.engine if ray is None else self.engine.partition(":")[2] or "auto"
        engine, reason = choose(wanted, accelerators=not on_cpu)
        name = engine if ray is None else f"ray:{engine}"
        dtype, whence = stored_dtype(model) if self.dtype == "auto" else (self.dtype, "asked for")
        copies = [
            Copy(engine, str(model), own, len(devices), dtype, self.batch_size, self.sampling, dict(self.engine_args))
            for own in devices
        ]
        rows = self.batch_size or _ROWS["cpu" if on_cpu else "accelerator"]
        unchanged = Unchanged(source.files)
        # What vLLM is handed at a time decides nothing, and may be another in the run that resumes.
        fingerprint = self._fingerprint(source, model, engine, dtype, self.batch_size if engine == "vllm" else rows)
        total = source.count()
        store = Store(output, fingerprint, total, resume=self.resume, overwrite=self.overwrite)
        try:
            before = store.count()
            if engine == "vllm":
                rows = _portion(total - before, len(copies), _PORTION if ray is None else _WHOLE_PORTION)
                rows = min(rows, self.batch_size or rows)

            def summary(merged: Merged, resumed: int, tallies: list[Tally]) -> Summary:
                return Summary(
                    str(output), merged.rows, merged.errors, resumed, merged.tokens, sum(tally.tokens for tally in tallies),
                    time.monotonic() - began, name, reason, dtype, rows, devices, tallies, merged.first_error,
                    _UNSTABLE if engine == "vllm" else _STABLE if engine == "hf" else _FOREIGN, store.finished is not None,
                )  # fmt: skip

            if store.finished is not None:
                self.progress.say("the run is finished already: nothing to do")
                return summary(store.finished, store.finished.rows, [Tally() for _ in copies])
            on = ", ".join(devices[0])
            self.progress.say(f"engine: {name} ({reason}), {len(copies)} copies, each on {on}, dtype {dtype} ({whence})")
            if store.damaged:
                self.progress.say(f"{store.damaged} damaged answers of earlier runs are left out: their rows are answered again")
            tallies = self._answer(source, total, rows, copies, store, ray)
            merged = merge(source, store, self.fields)
            self._check_unchanged(source, model, unchanged, fingerprint)
            store.publish(merged)
            return summary(merged, before, tallies)
        except (LlmconvertError, OSError) as error:
            # It may name a worker's last words.
            if not isinstance(error, LlmconvertError) or str(store.path) not in f"{error.where} {error.hint}":
                store.discard_if_empty()
            raise
        finally:
            self.progress.stop()
            store.close()

    def _fingerprint(
        self, source: Source, model: Path, engine: str, dtype: str, batch_size: int | None
    ) -> dict[str, Any]:
        fingerprint = {
            "format": 2, "model": model_hash(model), "data": data_hash(source.files),
            "sampling": {**asdict(self.sampling), "stop": list(self.sampling.stop)}, "fields": asdict(self.fields),
            "engine": engine, "engine options": dict(self.engine_args), "dtype": dtype, "batch size": batch_size,
        }  # fmt: skip
        found: dict[str, Any] = json.loads(json.dumps(fingerprint, default=str))  # as it will be read again
        return found

    def _answer(
        self, source: Source, total: int, rows: int, copies: list[Copy], store: Store, ray: Any
    ) -> list[Tally]:
        before = store.count()
        reader = _Reader(source, total, self.fields, store)
        self.progress.start(total, before)

        def report(tallies: list[Tally]) -> None:
            self.progress.update(tallies, reader.faults)

        queue = batches(reader, rows, store.is_done)
        if ray is not None:
            found: list[Tally] = ray.run(copies, store, queue, report)
            return found
        pool = Pool(copies, store, total - before, threads(len(copies)), report)
        return pool.run(queue, check=copies[0].engine in CHECKED)

    def _check_unchanged(self, source: Source, model: Path, unchanged: Unchanged, fingerprint: dict[str, Any]) -> None:
        hint = "keep it as it is while it is worked on, and start anew with `--overwrite`"
        if not unchanged.still() and data_hash(source.files) != fingerprint["data"]:
            raise BadInput("the data changed while its rows were answered", where=str(self.data_path), hint=hint)
        if model_hash(model) != fingerprint["model"]:
            raise BadInput("the model changed while it was at work", where=str(model), hint=hint)

    def _check(self) -> None:
        output, data = Path(self.output_path), Path(self.data_path)
        self.sampling.check()
        if self.resume and self.overwrite:
            raise Usage("`resume` goes on with an unfinished run and `overwrite` discards it", hint="choose one")
        if self.dtype not in _DTYPES:
            raise Usage(f"there is no dtype `{self.dtype}` here", hint=", ".join(_DTYPES))
        if self.batch_size is not None and self.batch_size < 1:
            raise Usage(f"--batch-size is {self.batch_size}", hint="it must be at least 1, or auto")
        if self.num_workers is not None and self.num_workers < 1:
            raise Usage(f"--num-workers is {self.num_workers}", hint="it must be at least 1")
        if output.is_dir() or (output.is_symlink() and not output.exists()):
            raise Usage("the output is not a file", where=str(output), hint="name a file, such as answers.jsonl")
        if output.suffix == ".parquet":
            raise Usage("the output is written as JSONL only", where=str(output), hint="name it `.jsonl`")
        if data.exists() and output.exists() and output.samefile(data):
            raise Usage("the output is the data", where=str(output), hint="name another file")
        # A run killed after its last step but one is finished by `resume`; one that is finished is left alone.
        known = self.resume and (work_directory(output).exists() or record_file(output).exists())
        if output.exists() and not self.overwrite and not known:
            raise Usage("the output exists", where=str(output), hint="name another file, or add `--overwrite`")

    def _check_names(self, source: Source) -> None:
        """Refuse names of results that the first row has for something else, as all others will have."""
        first = next(iter(source), None)
        if self.fields.output == self.fields.error:
            raise Usage("answers and errors cannot go to one field", hint="name another with --error-field")
        for option, name in (("output", self.fields.output), ("error", self.fields.error)):
            if first is not None and first.fault is None and name in first.fields:
                hint = f"name another with `--{option}-field`"
                raise Usage(f"the data has a field `{name}` of its own", where=str(self.data_path), hint=hint)


class _Reader:
    """The rows' prompts; rows without are recorded as errors on the way."""

    def __init__(self, source: Source, total: int, fields: Fields, store: Store) -> None:
        self._source, self._total, self._fields, self._store = source, total, fields, store
        self._log: Log | None = None
        self.faults = 0

    def __iter__(self) -> Iterator[tuple[int, Prompt]]:
        try:
            for row in self._source:
                if row.number >= self._total:
                    raise BadInput("the data grew while it was read", where=", ".join(map(str, self._source.files)))
                try:
                    yield row.number, self._fields.prompt_of(row)
                except BadRow as error:
                    self._record(row.number, str(error))
        finally:
            if self._log is not None:
                self._log.close()

    def _record(self, row: int, error: str) -> None:
        if self._store.is_done(row):
            return
        if self._log is None:
            self._log = self._store.new_log()
        self._log.append([Answer(row, error=error)])
        self._store.mark(row)
        self.faults += 1


def _model_directory(model: str) -> Path:
    if Path(model).is_dir():
        refuse_pointers(Path(model), os.listdir(model))
        return Path(model)
    from llmconvert.checkpoint.hub import download

    return download(model)


def _portion(rows: int, workers: int, most: int) -> int:
    """Rows handed to a worker at a time, so that few rows are not all with one worker while others load."""
    return max(1, min(most, -(-rows // (4 * workers))))


def threads(copies: int) -> int:
    """Threads of each copy, so that all together are as many as processors."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // copies)


def share_devices(workers: int | None, devices: Sequence[str] | None) -> list[tuple[str, ...]]:
    """The devices of each worker.

    Args:
        workers: how many; as many as devices if None, or 1 on the processor.
        devices: their names; all there are if None.

    Raises:
        Usage: they cannot be shared out evenly, or one is not there.
    """
    import importlib.util

    if devices is not None and list(devices) == ["cpu"]:
        return [("cpu",)] * (workers or 1)
    if importlib.util.find_spec("torch") is None:
        raise Usage("torch is not installed", hint="pip install 'llmconvert[verify]'")
    import torch

    count = torch.cuda.device_count()
    names = [str(index) for index in range(count)] or ["cpu"] if devices is None else list(devices)
    names = [f"cuda:{name}" if name.isdigit() else name for name in names]
    if not names:
        raise Usage("no devices are named", hint="such as `--devices 0,1` or `--devices cpu`")
    for name in names:
        number = name.removeprefix("cuda:")
        if name != "cpu" and (not number.isdigit() or int(number) >= count):
            have = f"{count} CUDA devices" if count else "no CUDA device"
            raise Usage(f"there is no device `{name}`: torch sees {have}", hint="`--devices cpu` runs without")
    if names == ["cpu"]:
        return [("cpu",)] * (workers or 1)
    if "cpu" in names:
        raise Usage("the processor cannot be mixed with other devices", where=",".join(names))
    workers = workers or len(names)
    if len(names) % workers:
        raise Usage(
            f"{len(names)} devices cannot be shared out evenly among {workers} workers",
            hint="name fewer or more with `--devices`; a device named twice holds two copies",
        )
    each = len(names) // workers
    return [tuple(names[start : start + each]) for start in range(0, len(names), each)]

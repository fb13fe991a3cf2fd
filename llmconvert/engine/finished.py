"""Whether a plan has been carried out already: what it would write is compared with what a directory's manifest records.

Nothing is written, and nothing rests on names or times: the source is read and evaluated once more.
"""

from __future__ import annotations

from pathlib import Path

from llmconvert.engine import manifest
from llmconvert.engine.plan import Plan, Region
from llmconvert.engine.regions import Progress, Regions, plain
from llmconvert.errors import BadInput


class _Different(Exception):
    """A region of this tensor is not what was recorded."""


def difference(directory: Path, plan: Plan, workers: int, progress: Progress) -> str | None:
    """How a published directory differs from what a plan would write; None where it does not.

    Args:
        directory: whose manifest is compared; its files must be there in their sizes.
        plan: what would be written.
        workers: threads.
        progress: called with the bytes of each step done, from any thread.

    Raises:
        LlmconvertError: the source cannot be read.
    """
    try:
        recorded = manifest.read(directory) or {}
    except BadInput as error:
        return error.what
    files, tensors = recorded.get("files"), recorded.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        return f"`{manifest.MANIFEST}` is of another version, or there is none"
    expected = {name: manifest.entry_of((text,)) for name, text in plan.texts.items()}
    expected |= {name: manifest.entry_of(plan.reading(name)) for name in plan.copied()}
    weights = {file.name: file.size for file in plan.files}
    names = {*expected, *weights, manifest.REPORT}
    odd = sorted(names ^ files.keys())
    odd = odd or [name for name, entry in expected.items() if files[name] != entry]
    if odd:
        return f"`{odd[0]}` differs"
    if tensors.keys() != {output.name for output in plan.tensors}:
        return "it has other tensors"
    fault = manifest.misfit(directory, files)
    if fault is not None:
        return fault
    with Regions(plan, workers) as regions:

        def compare(region: Region) -> str:
            hasher = regions.hasher(region)
            for view in regions.views(region):
                hasher.update(view)
                progress(len(view))
            checksum = hasher.hexdigest()
            entry = tensors[region.tensor.name]
            number = region.start // region.tensor.region_rows
            sums = entry.get("checksums") if isinstance(entry, dict) else None
            if not isinstance(sums, list) or sums[number : number + 1] != [*plain({"": checksum}).values()]:
                raise _Different(region.tensor.name)
            return checksum

        try:
            checksums = regions.each(compare)
        except _Different as error:
            return f"`{error}` differs"
        everything = manifest.weight_entries(plan, regions.crcs(checksums))
    if tensors != manifest.tensor_entries(plan, plain(checksums)):
        return "its tensors lie otherwise"
    odd = [name for name, entry in everything.items() if files[name] != entry]
    return f"`{odd[0]}` differs" if odd else None

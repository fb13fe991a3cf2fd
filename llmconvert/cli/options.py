"""Options that mean the same in every command that writes."""

from __future__ import annotations

from typing import Annotated

import typer

from llmconvert.errors import Usage


def _one_of_two(context: typer.Context, value: bool) -> bool:
    """Refuse `--resume` with `--overwrite`: what is to be gone on with would be discarded first."""
    if value and (context.params.get("resume") or context.params.get("overwrite")):
        raise Usage(
            "`--resume` goes on with an unfinished run and `--overwrite` discards it: they cannot be given together",
            hint="`--resume` to keep what is written, `--overwrite` to start again",
        )
    return value


Overwrite = Annotated[
    bool, typer.Option("--overwrite", callback=_one_of_two, help="replace what is there, and discard an unfinished run")
]
Resume = Annotated[bool, typer.Option("--resume", callback=_one_of_two, help="go on with an unfinished run")]

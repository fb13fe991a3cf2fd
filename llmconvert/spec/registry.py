"""Where specs come from (the package, entry points, a file), and which one a config.json belongs to."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmconvert.errors import BadInput, Refused
from llmconvert.spec.language import Refusal, Spec
from llmconvert.spec.telling import tell
from llmconvert.spec.validate import validate, validate_all

if TYPE_CHECKING:
    from llmconvert.checkpoint.directory import Checkpoint
    from llmconvert.checkpoint.stored import StoredTensor

ENTRY_POINTS = "llmconvert.specs"


@dataclass(frozen=True)
class Registry:
    """All specs known to a run.

    Attributes:
        specs: by name, sorted.
        files: each spec's file.
        refusals: checkpoints recognised only to be refused.
    """

    specs: dict[str, Spec]
    files: dict[str, Path]
    refusals: tuple[Refusal, ...]

    @property
    def families(self) -> dict[str, list[Spec]]:
        """Specs by family, both sorted by name."""
        result: dict[str, list[Spec]] = {}
        for spec in self.specs.values():
            result.setdefault(spec.family, []).append(spec)
        return dict(sorted(result.items()))

    def get(self, name: str) -> Spec:
        """The spec of that name.

        Raises:
            Refused: there is none; the message names the nearest.
        """
        if name in self.specs:
            return self.specs[name]
        near = difflib.get_close_matches(name, self.specs, 3, 0.4) or list(self.specs)
        raise Refused(
            f"no architecture is called `{name}`",
            hint=f"did you mean {', '.join(f'`{n}`' for n in near)}? `llmconvert specs` lists all",
        )

    def holders(self, trait: str) -> list[str]:
        """Names of the targets that can hold a trait."""
        return [spec.name for spec in self.specs.values() if spec.target and trait in spec.holds | spec.always]

    def identify(self, checkpoint: Checkpoint, name: str | None = None) -> Spec:
        """The spec that reads a checkpoint: the one called `name`, else the one that claims it.

        This is where all commands learn what a checkpoint is, and so they all say the same of what they cannot read.

        Args:
            checkpoint: opened, with one tensor an expert.
            name: of a spec; told from config.json if None.

        Raises:
            Refused: it is quantised in a form that is not read, or no spec reads it.
            BadInput: the config claims nothing.
        """
        from llmconvert.spec.quantised import SCALE, form_of, refusal

        named = self.get(name) if name else None
        form = form_of(checkpoint.config, checkpoint.tensors, checkpoint.path)
        unread = refusal(form, str(checkpoint.path)) if form is not None and form.block is None else None
        # Packed numbers are like nobody's tensors.
        plain = None if unread else {name: t for name, t in checkpoint.tensors.items() if not name.endswith(SCALE)}
        try:
            spec = named or self.detect(checkpoint.config, plain, checkpoint.path)
        except Refused as error:
            if unread is None:
                raise
            known = isinstance(self._claimed(checkpoint.config), Refused)  # and then the original is of no use either
            hint = error.hint if known else f"take the original 16-bit checkpoint; then {error.hint}"
            raise Refused(f"{unread.what}; besides, {error.what}", where=unread.where, hint=hint) from None
        if unread is not None:
            raise unread
        return spec

    def detect(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor] | None = None,
        directory: Path | None = None,
    ) -> Spec:
        """The spec a config.json belongs to, by `model_type` and `architectures`.

        Args:
            config: the JSON object.
            tensors: of the checkpoint, where they are known: they tell what an unknown model is like.
            directory: of the checkpoint, whose code tells specs apart that share a class name.

        Raises:
            Refused: the architecture is unknown, or known and refused, or multimodal, or one of several that cannot be
                told apart.
            BadInput: the config claims nothing.
        """
        from llmconvert.spec import strangers

        claimed = self._claimed(config)
        others = strangers.towers(tensors) if tensors is not None else strangers.parts(config).towers
        if isinstance(claimed, Spec) and not others:
            candidates = self._candidates(config)
            return claimed if len(candidates) == 1 else tell(candidates, config, tensors or (), directory)
        if isinstance(claimed, Refused) and not others and strangers.parts(config).key is None:
            raise claimed
        if not strangers.label(config):
            raise BadInput("config.json has neither `model_type` nor `architectures`", where="config.json")
        raise strangers.describe(self.specs.values(), self._claimed, config, tensors)

    def _claimed(self, config: Mapping[str, Any]) -> Spec | Refused | None:
        """The spec that claims a config, or why such models are not read; None where nobody knows it."""
        model_type, named = config.get("model_type"), config.get("architectures")
        architectures = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
        for refusal in self.refusals:
            claimed = model_type in refusal.model_types or architectures & set(refusal.architectures)
            if claimed and (refusal.key is None or config.get(refusal.key) is not None):
                return refused(refusal)
        return next(iter(self._candidates(config)), None)

    def _candidates(self, config: Mapping[str, Any]) -> list[Spec]:
        """The specs that claim a config's class name and type; failing such, its class name; failing such, its type."""
        model_type, named = config.get("model_type"), config.get("architectures")
        architectures = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
        by_architecture = [s for s in self.specs.values() if s.source and architectures & set(s.architectures)]
        by_type = [s for s in self.specs.values() if s.source and model_type in s.model_types]
        return [s for s in by_architecture if s in by_type] or by_architecture or by_type


def refused(refusal: Refusal) -> Refused:
    """The error for a recognised checkpoint that no spec reads."""
    hint = refusal.instead or "keep the checkpoint in its own architecture; `llmconvert specs` lists those that are read"
    return Refused(f"{refusal.name} is known and not read: {refusal.why}", where="config.json", hint=hint)


def _members(module: ModuleType, file: Path) -> tuple[list[Spec], list[Refusal]]:
    spec, refusals = getattr(module, "SPEC", None), getattr(module, "REFUSALS", ())
    if spec is None and not refusals:
        raise BadInput("the spec file defines no `SPEC`", where=str(file), hint="see docs/adding-an-architecture.md")
    if spec is not None and not isinstance(spec, Spec):
        raise BadInput("`SPEC` is not a llmconvert.spec.language.Spec", where=str(file))
    if spec is not None:
        validate(spec, str(file))
    return ([spec] if spec is not None else []), list(refusals)


def load_file(path: Path) -> Spec:
    """The spec in a Python file of the user's. The file is run: it is code they chose to pass.

    Raises:
        BadInput: the file cannot be read or run, or does not define a valid `SPEC`.
    """
    loader = importlib.util.spec_from_file_location(f"llmconvert_spec_{path.stem}", path)
    if loader is None or loader.loader is None or not path.is_file():
        raise BadInput("no such spec file", where=str(path))
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"the spec file does not run: {type(error).__name__}: {error}", where=str(path)) from None
    specs, _ = _members(module, path)
    if not specs:
        raise BadInput("the spec file defines no `SPEC`", where=str(path))
    return specs[0]


@cache
def _shipped() -> tuple[tuple[Spec | Refusal, Path], ...]:
    package = importlib.import_module("llmconvert.specs")
    found: list[tuple[Spec | Refusal, Path]] = []
    modules = [
        importlib.import_module(f"llmconvert.specs.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        loaded = entry.load()
        modules.append(loaded if isinstance(loaded, ModuleType) else importlib.import_module(entry.module))
    for module in modules:
        file = Path(module.__file__ or module.__name__)
        specs, refusals = _members(module, file)
        found += [(spec, file) for spec in specs]
        found += [(refusal, file) for refusal in refusals]
    return tuple(found)


def registry(spec_file: Path | None = None) -> Registry:
    """All specs: the package's, those of installed packages, and the one in `spec_file`, which comes first.

    Raises:
        BadInput: a spec is invalid, or two have one name.
    """
    entries: list[tuple[Spec | Refusal, Path]] = list(_shipped())
    specs: dict[str, tuple[Spec, str]] = {}
    for item, file in entries:
        if isinstance(item, Spec):
            if item.name in specs:
                raise BadInput(f"two specs are called `{item.name}`: {specs[item.name][1]} and {file}")
            specs[item.name] = (item, str(file))
    if spec_file is not None:
        own = load_file(spec_file)
        specs = {own.name: (own, str(spec_file)), **{n: s for n, s in specs.items() if n != own.name}}
    refusals = tuple(item for item, _ in entries if isinstance(item, Refusal))
    validate_all(specs, refusals)
    names = list(specs) if spec_file is not None else sorted(specs)
    return Registry({n: specs[n][0] for n in names}, {n: Path(specs[n][1]) for n in names}, refusals)

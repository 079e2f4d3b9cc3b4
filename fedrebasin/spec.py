"""PermutationSpec: for every tensor of a state dict, the layout of each of its axes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fedrebasin.copies import note_on, tie_copies
from fedrebasin.errors import RebasinError, SpecMismatchError
from fedrebasin.layout import Fixed, Free, Layout
from fedrebasin.layout_edit import fix_leaf, map_leaves, rename_leaf
from fedrebasin.layout_text import check_fields, digest, from_json, to_json
from fedrebasin.prefixes import common_prefix, wrappers_of
from fedrebasin.spec_text import as_text
from fedrebasin.ties import Axis, all_leaves, check_axes, log10_order, perm_shapes, tied_axes

_FORMAT = "fedrebasin-spec-1"


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes of which tensors one permutation ties; made by :func:`fedrebasin.trace`.

    Attributes
    ----------
    axes : dict of str to tuple of Layout
        For every tensor of the state dict, the layout of each axis (see :mod:`fedrebasin.layout`).
    buffers : tuple of str
        Tensors that are not parameters: running statistics, which move with their units, and counters.
    uses : dict of str to str
        The op and module that use each tensor, for messages.
    notes : tuple of str
        What stays fixed that need not, and what the proof has not seen, each once.
    checked : bool
        True if :func:`fedrebasin.check_spec` has passed on these axes.
    whole : tuple of str
        Permutations whose number of units cannot change: the check saw one change an output though nobody reads it.
    inputs : int
        How many positional inputs the traced model takes.
    training : bool
        True if some tensors are used in training mode only (auxiliary heads); the check then runs in both modes.

    Examples
    --------
    >>> from torch import nn
    >>> import fedrebasin, torch
    >>> spec = fedrebasin.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (torch.randn(2, 4),))
    >>> spec.perm_shapes, round(spec.log10_order, 2)
    ({'0': (3,)}, 0.78)
    """

    axes: dict[str, tuple[Layout, ...]]
    buffers: tuple[str, ...] = ()
    uses: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checked: bool = False
    whole: tuple[str, ...] = ()
    inputs: int = 1
    training: bool = False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: tuple(layout.size for layout in layouts) for name, layouts in self.axes.items()}

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The tensors that are trained."""
        held = set(self.buffers)
        return tuple(name for name in self.axes if name not in held)

    @cached_property
    def perm_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every permutation: ``(n,)``, or ``(outer, n)`` for a family."""
        return perm_shapes(self.axes)

    @cached_property
    def over(self) -> dict[str, str]:
        """For every family, the leaf whose index chooses its permutation."""
        return {leaf.perm: leaf.over for leaf in all_leaves(self.axes) if isinstance(leaf, Free) and leaf.over}

    @cached_property
    def tied(self) -> dict[str, tuple[Axis, ...]]:
        """For every permutation, the axes that it moves."""
        return tied_axes(self.axes)

    @cached_property
    def log10_order(self) -> float:
        """log10 of the number of permutations that keep the network's function."""
        return log10_order(self.axes)

    @cached_property
    def derived(self) -> dict[str, object]:
        """What others read off this spec once and keep: plans of matching and the like."""
        return {}

    def check_state(self, state: Mapping[str, Tensor], label: str = "model") -> None:
        """Raise :class:`SpecMismatchError` unless ``state`` has this spec's tensors with these shapes."""
        for name, shape in self.shapes.items():
            if name not in state:
                prefix = common_prefix(state, self.axes)
                if prefix:
                    wrapped = f"the names' prefix {prefix!r}{wrappers_of(prefix)} is not the spec's"
                    raise SpecMismatchError(f"{label}: {wrapped}; take the state dict of the model inside")
                raise SpecMismatchError(
                    f"{label}: the spec has a tensor {name!r} that the state dict lacks (it has {len(state)} tensors, "
                    f"e.g. {next(iter(state), None)!r}); use the spec of this architecture"
                )
            if not isinstance(state[name], Tensor):
                kind = type(state[name]).__name__
                raise SpecMismatchError(f"{label}: expected {name!r} as a tensor; got {kind}; use torch.as_tensor")
            if tuple(state[name].shape) != shape:
                raise SpecMismatchError(
                    f"{label}: expected {name!r} as {shape}; got {tuple(state[name].shape)}; "
                    "use the spec of this architecture"
                )
        extra = next((name for name in state if name not in self.axes), None)
        if extra is not None:
            raise SpecMismatchError(
                f"{label}: the state dict has a tensor {extra!r} that the spec lacks; use the spec of this architecture"
            )

    def fix(self, *perms: str, reason: str = "by hand") -> PermutationSpec:
        """This spec without some of its permutations; it stays checked, since what is left is still proved.

        >>> PermutationSpec({"w": (Free("a", 3), Fixed(2, "input"))}).fix("a").perm_shapes
        {}
        """
        self._check_names(perms)
        return self._map(lambda end: fix_leaf(end, dict.fromkeys(perms, reason)))

    def rename(self, names: Mapping[str, str]) -> PermutationSpec:
        """This spec with other names for some of its permutations.

        >>> list(PermutationSpec({"w": (Free("a", 3), Fixed(2, "input"))}).rename({"a": "hidden"}).perm_shapes)
        ['hidden']
        """
        self._check_names(names)
        after = [names.get(perm, perm) for perm in self.perm_shapes]
        if len(set(after)) != len(after):
            raise RebasinError(f"names: expected a name of its own for each permutation; got {sorted(names.values())}")
        whole = tuple(names.get(perm, perm) for perm in self.whole)
        return replace(self._map(lambda end: rename_leaf(end, names)), whole=whole)

    def tie(self, copies: Mapping[str, str]) -> PermutationSpec:
        """This spec with copies of some modules that move with their originals: momentum encoders, teachers.

        For each copy its original (``{"target": "online"}``), which has tensors of the same names and shapes. What
        makes the one from the other outside of ``forward`` no trace can see. A checked spec stays checked.

        >>> spec = PermutationSpec({"online.w": (Free("a", 3),), "target.w": (Fixed(3, "not in the exported graph"),)})
        >>> spec.tie({"target": "online"}).tied
        {'a': (Axis(name='online.w', dim=0), Axis(name='target.w', dim=0))}
        """
        notes = tuple(note for note in self.notes if not note.startswith(tuple(map(note_on, copies))))
        return replace(self, axes=tie_copies(self.axes, copies, self.uses), notes=notes)

    def only(self, tensors: Iterable[str], *, fix: bool = True) -> PermutationSpec:
        """The spec of some of the tensors, where the others stay at home and are not permuted.

        What is tied to a tensor that stays at home is fixed: adapters, personal layers, a frozen trunk. With
        ``fix=False`` it moves, and whoever holds the others must permute them alike.

        >>> spec = PermutationSpec({"w": (Free("a", 3),), "b": (Free("a", 3),), "c": (Free("d", 2),)})
        >>> str(spec.only(["w", "c"]).axes["w"][0].reason)
        "tied to 'b', which does not travel"
        """
        kept = set(tensors)
        unknown = sorted(kept - set(self.axes))
        if unknown:
            raise RebasinError(f"tensors: expected names of this spec's tensors; got {unknown[0]!r}")
        home = {perm: [axis.name for axis in axes if axis.name not in kept] for perm, axes in self.tied.items()}
        reasons = {perm: f"tied to {names[0]!r}, which does not travel" for perm, names in home.items() if names}
        spec = self._map(lambda end: fix_leaf(end, reasons)) if fix else self
        return replace(
            spec,
            axes={name: layouts for name, layouts in spec.axes.items() if name in kept},
            buffers=tuple(name for name in spec.buffers if name in kept),
            uses={name: use for name, use in spec.uses.items() if name in kept},
        )

    def _map(self, change: Callable[[Free | Fixed], Layout]) -> PermutationSpec:
        axes = {name: tuple(map_leaves(layout, change) for layout in layouts) for name, layouts in self.axes.items()}
        return replace(self, axes=axes)

    def _check_names(self, perms: Iterable[str]) -> None:
        for perm in perms:
            if perm not in self.perm_shapes:
                raise RebasinError(f"perms: expected some of {list(self.perm_shapes)[:3]} ...; got {perm!r}")

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON; a later hand edit of the axes clears the mark of the passed check."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> PermutationSpec:
        """Read a spec that :meth:`save` wrote, edited by hand or not.

        Raises
        ------
        RebasinError
            If the file is not a spec.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RebasinError(f"spec: cannot read {path} as JSON ({error}); save one with spec.save(path)") from error
        return PermutationSpec.from_json(data)

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON types."""
        return {
            "format": _FORMAT,
            "checked": digest(self.axes, self.buffers) if self.checked else None,
            "inputs": self.inputs,
            "training": self.training,
            "notes": list(self.notes),
            "whole": list(self.whole),
            "buffers": list(self.buffers),
            "uses": self.uses,
            "axes": {name: [to_json(layout) for layout in layouts] for name, layouts in self.axes.items()},
        }

    @staticmethod
    def from_json(data: Any) -> PermutationSpec:
        """The spec from plain JSON types; its mark counts only if it belongs to these very axes."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("axes"), dict):
            raise RebasinError(f"spec: expected JSON with format {_FORMAT!r} and axes; save one with spec.save(path)")
        check_fields(data)
        spec = PermutationSpec(
            axes={name: tuple(from_json(layout) for layout in layouts) for name, layouts in data["axes"].items()},
            buffers=tuple(data.get("buffers", ())),
            uses=dict(data.get("uses", {})),
            notes=tuple(data.get("notes", ())),
            whole=tuple(data.get("whole", ())),
            inputs=data.get("inputs", 1),
            training=bool(data.get("training", False)),
        )
        check_axes(spec.axes)
        return replace(spec, checked=data.get("checked") == digest(spec.axes, spec.buffers))

    def __str__(self) -> str:
        return as_text(self.axes, notes=self.notes, checked=self.checked)

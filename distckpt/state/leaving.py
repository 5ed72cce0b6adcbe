"""What a checkpoint leaves out of its objects: keys that are excluded, and what belongs to parameters that are not trained.

A parameter that was trained once, or restored, holds what no base need have, so it is saved from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.errors import EncodeError
from distckpt.format.tree.containers import parts_of
from distckpt.format.tree.keys import beginnings, is_among, is_below, without_rank
from distckpt.format.tree.tree import Leaf, ListStep, RankStep, TupleStep, TypedStep, key_of
from distckpt.state.kind import Kind
from distckpt.state.objects import NamedObjects, trained_in, wrapped_in


@dataclass(frozen=True, slots=True)
class Leaving:
    """What is left out at one moment: keys at and below ``exclude``, which know no ranks, and at and below ``frozen``.

    ``trained`` are the keys of parameters that are trained then.
    """

    exclude: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.exclude or self.frozen)

    def excludes(self, key: str) -> bool:
        """Whether the key is excluded, trained or not."""
        return bool(self.exclude) and is_among(without_rank(key), self.exclude)

    def leaves_out(self, key: str) -> bool:
        """Whether the key is left out, for either reason."""
        return self.excludes(key) or is_among(key, self.frozen)

    def touches(self, key: str) -> bool:
        """Whether anything is left out at the key, below it, or with what it is below."""
        return self.leaves_out(key) or self.cuts(key) or any(is_below(text, key) for text in self.frozen)

    def cuts(self, key: str) -> bool:
        """Whether anything below the key is excluded."""
        return any(is_below(text, without_rank(key)) for text in self.exclude)

    def frozen_with(self, keys: Iterable[str]) -> frozenset[str]:
        """Those of ``frozen`` that one of the ``keys`` is, or is below."""
        return self.frozen & {text for key in keys for text in beginnings(key)} if self.frozen else frozenset()

    def matched(self, keys: Iterable[str], parameters: Iterable[str]) -> set[str]:
        """Those of ``exclude`` that leave out one of the ``keys``, or could leave out state of a parameter later on."""
        hits = {text for key in keys for text in beginnings(without_rank(key)) if text in self.exclude}
        places = [without_rank(key) for key in parameters] if len(hits) < len(self.exclude) else []
        hits |= {text for text in self.exclude - hits if any(is_below(text, at) or is_below(at, text) for at in places)}
        return hits | {text for text in self.exclude if any(one != text and is_below(text, one) for one in hits)}


def leaving_of(checkpoint: NamedObjects, kinds: Mapping[str, Kind]) -> Leaving:
    """What the objects leave out now."""
    exclude = frozenset(checkpoint.exclude)
    if not checkpoint.only_trainable:
        return Leaving(exclude)
    flags = {key: parameter.requires_grad for key, parameter in _judged(checkpoint, kinds)}
    trained = frozenset(key for key, is_trained in flags.items() if is_trained)
    return Leaving(exclude, frozenset(flags) - trained - trained_in(checkpoint), trained)


def check_something_is_trained(checkpoint: NamedObjects, kinds: Mapping[str, Kind], leaving: Leaving) -> None:
    """EncodeError, naming it, for a module of which ``only_trainable=True`` would leave out every parameter: nothing says
    that it is a base, and not an average of the weights, say, that is to be saved."""
    if checkpoint.only_trainable is not True:
        return
    for name, kind in kinds.items():
        keys = [key for key, _ in kind.parameters()] if _is_module(checkpoint, name) else []
        if keys and leaving.frozen.issuperset(keys) and not leaving.excludes(name):
            raise EncodeError(
                name,
                "not one of its parameters is trained, so that only_trainable=True would leave out all of them. If that is "
                f"meant, say exclude={name!r}. If not, name the modules whose frozen parameters are to be left out: "
                'only_trainable="model"',
            )


def check_no_holes(leaf: Leaf, leaving: Leaving) -> None:
    """EncodeError for an excluded item of a list or of fields: what is left of these could not be made again."""
    for at in range(1, len(leaf.path) + 1):
        step = leaf.path[at - 1]
        text = without_rank(key_of(leaf.path[:at]))
        if text in leaving.exclude and not isinstance(step, RankStep):
            if _is_fixed(step):
                raise EncodeError(
                    leaf.key,
                    f"exclude={text!r} would leave a hole in a list, or in the fields of an object. Exclude all of it",
                )
            return


def frozen_parameters(checkpoint: NamedObjects, kinds: Mapping[str, Kind], leaving: Leaving) -> frozenset[str]:
    """The keys of parameters that are left out because they are not trained, without those of their state."""
    of_modules = (kind for name, kind in kinds.items() if _is_module(checkpoint, name))
    return leaving.frozen.intersection(key for kind in of_modules for key, _ in kind.parameters())


def flags_of(checkpoint: NamedObjects) -> Iterator[Any]:
    """What decides, beside the objects, what is left out; cheap enough for each save."""
    yield trained_in(checkpoint)
    if checkpoint.only_trainable:
        for obj in map(wrapped_in, checkpoint.objects.values()):
            yield from (parameter.requires_grad for parameter in _parameters_of(obj))


def _judged(checkpoint: NamedObjects, kinds: Mapping[str, Kind]) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters that ``only_trainable`` is about, by their keys and by those of their state."""
    names = checkpoint.only_trainable
    if names is True:
        for kind in kinds.values():
            yield from kind.parameters()
        return
    owned = {id(parameter) for name in names or () for _, parameter in kinds[name].parameters()}
    for name, kind in kinds.items():
        is_module = _is_module(checkpoint, name)
        for key, parameter in kind.parameters():
            if name in (names or ()) if is_module else id(parameter) in owned:
                yield key, parameter


def _is_module(checkpoint: NamedObjects, name: str) -> bool:
    return isinstance(wrapped_in(checkpoint.objects[name]), torch.nn.Module)


def _parameters_of(obj: Any) -> Iterable[torch.Tensor]:
    if isinstance(obj, torch.nn.Module):
        return obj.parameters()
    if isinstance(obj, torch.optim.Optimizer):
        return (parameter for group in obj.param_groups for parameter in group["params"])
    return ()


def _is_fixed(step: Any) -> bool:
    """Whether the step goes into something that has all its items or is none."""
    if isinstance(step, TypedStep):
        return parts_of(step.kind) != "pairs"
    return isinstance(step, ListStep | TupleStep)

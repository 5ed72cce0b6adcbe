"""LoadStatus: how a restore matched keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distckpt.errors import MismatchError
from distckpt.format.json.left_out import LeftOut, note_on


class LoadStatus:
    """How a restore matched keys. ``path`` is the checkpoint; the assertions return the status itself."""

    def __init__(
        self,
        path: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        matched: int = 0,
        mismatched: Mapping[str, str] | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.path = path
        self.missing = tuple(missing)
        """Keys of the objects that the checkpoint does not have: they were left as they were."""
        self.unexpected = tuple(unexpected)
        """Keys of the checkpoint that no object asked for."""
        self.matched = matched
        """How many keys of the checkpoint objects did ask for."""
        self.mismatched = dict(mismatched or {})
        """Keys that are on both sides and do not fit, and why: they were left as they were."""
        self.left_out = left_out.among(missing) if left_out is not None else ()
        """Those that are missing since they were left out when the checkpoint was saved."""
        self.note = note_on(missing, left_out)
        """What there is to say about these."""

    @property
    def is_complete(self) -> bool:
        """Whether every key on either side found its other half."""
        return not (self.missing or self.unexpected or self.mismatched)

    def assert_consumed(self) -> LoadStatus:
        """Raise MismatchError unless every key on either side found its other half."""
        if not self.is_complete:
            raise MismatchError(self.path, self.missing, self.unexpected, self.mismatched, note=self.note)
        return self

    def assert_existing_objects_matched(self) -> LoadStatus:
        """Raise MismatchError if an object has a key that the checkpoint lacks; extra keys there are fine."""
        if self.missing or self.mismatched:
            raise MismatchError(self.path, self.missing, (), self.mismatched, note=self.note)
        return self

    def assert_nontrivial_match(self) -> LoadStatus:
        """Raise MismatchError if there are keys on either side and no object has found anything in the checkpoint."""
        if not self.matched and not self.is_complete:
            raise MismatchError(self.path, self.missing, self.unexpected, self.mismatched, note=self.note)
        return self

    def expect_partial(self) -> LoadStatus:
        """Say that a partial match is meant."""
        return self

    def __repr__(self) -> str:
        counts = f"missing={len(self.missing)}, unexpected={len(self.unexpected)}, mismatched={len(self.mismatched)}"
        return f"LoadStatus({self.path!r}, {counts})"


def describe(status: LoadStatus, most: int = 5) -> str:
    """In one line what did not match, at most so many keys of each kind by name."""
    return (
        f"{status.path}: {len(status.missing)} keys of the objects are not in it {list(status.missing[:most])}, "
        f"{len(status.unexpected)} of its keys are in no object {list(status.unexpected[:most])}, "
        f"{len(status.mismatched)} do not fit {dict(list(status.mismatched.items())[:most])}"
        f"{'. ' if status.note else ''}{status.note}"
    )

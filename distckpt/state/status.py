"""LoadStatus: how a restore matched keys."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.errors import MismatchError


class LoadStatus:
    """How a restore matched keys. ``path`` is the checkpoint; the assertions return the status itself."""

    def __init__(self, path: str, missing: Sequence[str], unexpected: Sequence[str], matched: int = 0) -> None:
        self.path = path
        self.missing = tuple(missing)
        """Keys of the objects that the checkpoint does not have: they were left as they were."""
        self.unexpected = tuple(unexpected)
        """Keys of the checkpoint that no object asked for."""
        self.matched = matched
        """How many keys of the checkpoint objects did ask for."""

    def assert_consumed(self) -> LoadStatus:
        """Raise MismatchError unless every key on either side found its other half."""
        if self.missing or self.unexpected:
            raise MismatchError(self.path, self.missing, self.unexpected, {})
        return self

    def assert_existing_objects_matched(self) -> LoadStatus:
        """Raise MismatchError if an object has a key that the checkpoint lacks; extra keys there are fine."""
        if self.missing:
            raise MismatchError(self.path, self.missing, (), {})
        return self

    def assert_nontrivial_match(self) -> LoadStatus:
        """Raise MismatchError if no object has found anything in the checkpoint."""
        if not self.matched:
            raise MismatchError(self.path, self.missing, self.unexpected, {})
        return self

    def expect_partial(self) -> LoadStatus:
        """Say that a partial match is meant."""
        return self

    def __repr__(self) -> str:
        return f"LoadStatus({self.path!r}, missing={len(self.missing)}, unexpected={len(self.unexpected)})"

"""Errors of those who read: restores, leases, groups of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distckpt.errors.base import DistckptError, some


class ForeignError(DistckptError):
    """Files of another program at ``path`` hold what cannot be read without unpickling; ``refused`` says why of each key."""

    def __init__(self, path: str, refused: Mapping[str, str]) -> None:
        listing = some([f"{key} ({why})" for key, why in refused.items()])
        super().__init__(
            f"{path}: this cannot be read, and nothing is unpickled here: {listing}. To go without it, leave these keys out by "
            "leave_out=[...], or --leave-out KEY; or load the file where it was made, and save there what it is made of"
        )
        self.path, self.refused = path, dict(refused)


class LeaseLostError(DistckptError):
    """A lease of ``seconds`` on ``attempt`` was not renewed in time: it may be deleted. What was read before is right."""

    def __init__(self, path: str, attempt: str, seconds: float) -> None:
        lost = f"the lease on {attempt} could not be renewed for {seconds:g} s"
        super().__init__(f"{path}: {lost}; it may be deleted, so no more is read. Open it again, if it is still there")
        self.path, self.attempt, self.seconds = path, attempt, seconds


class GroupError(DistckptError):
    """A group of workers that share the checkpoints of a run."""


class GroupMismatchError(GroupError, ValueError):
    """``group`` of ``directory`` has other settings; ``settings`` maps each to what it is, and what was wanted."""

    def __init__(self, directory: str, group: str, settings: Mapping[str, tuple[object, object]]) -> None:
        shown = ", ".join(f"{name} is {theirs!r} and not {wanted!r}" for name, (theirs, wanted) in settings.items())
        super().__init__(
            f"{directory}: the group {group!r} works with other settings: {shown}. All its workers must agree: leave these "
            "out, which takes them as they are, or use another group"
        )
        self.directory, self.group, self.settings = directory, group, dict(settings)


class GroupNotFoundError(GroupError):
    """There is no ``group`` of that name in ``directory``."""

    def __init__(self, directory: str, group: str) -> None:
        super().__init__(f"{directory}: there is no group {group!r}. The first of its workers makes it")
        self.directory, self.group = directory, group


class ClaimLostError(GroupError):
    """The claim on the checkpoint at ``path`` is another worker's of ``group`` by now, or was settled: this does not count."""

    def __init__(self, path: str, group: str, delivery: int) -> None:
        super().__init__(
            f"{path}: delivery {delivery} to the group {group!r} has no claim any more: its lease was not renewed in time, and "
            "another worker took over, or it was settled before. What was done here does not count, and that of the other does"
        )
        self.path, self.group, self.delivery = path, group, delivery


class RestoreError(DistckptError):
    """A restore could not be done."""


class MismatchError(RestoreError):
    """The checkpoint at ``path`` and the objects do not hold the same keys, or keys that do not fit.

    ``missing`` and ``misshaped`` list the first ones only where many ranks restore; the counts are of all. ``note`` says
    what is known of why.
    """

    def __init__(
        self,
        path: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshaped: Mapping[str, str],
        missing_count: int = 0,
        misshaped_count: int = 0,
        note: str = "",
    ) -> None:
        parts = []
        if missing:
            parts.append(f"not in the checkpoint: {some(missing, missing_count)}")
        if unexpected:
            parts.append(f"in the checkpoint, but in no object: {some(unexpected)}")
        if alike := sorted({*missing} & {*unexpected}):
            why = "one side has a container in a container there, and the other a name with a dot"
            parts.append(f"told twice, as {why}: {some(alike)}")
        if misshaped:
            texts = some([f"{key} ({text})" for key, text in misshaped.items()], misshaped_count)
            parts.append(f"on both sides, but not fitting: {texts}")
        super().__init__(f"{path}: " + "; ".join(parts) + (f". {note}" if note else ""))
        self.path, self.note = path, note
        self.missing, self.unexpected, self.misshaped = tuple(missing), tuple(unexpected), dict(misshaped)
        self.missing_count = max(missing_count, len(self.missing))
        self.misshaped_count = max(misshaped_count, len(self.misshaped))


class ResizeError(RestoreError):
    """``key`` holds one value a rank, ``saved`` ranks wrote it, ``now`` ranks run, and on_resize is "error"."""

    def __init__(self, key: str, saved: int, now: int) -> None:
        super().__init__(
            f"{key}: per-rank state of {saved} ranks cannot be restored on {now} ranks. "
            'Say what to do with PerRank(..., on_resize="drop") or a callable'
        )
        self.key, self.saved, self.now = key, saved, now


class NoGoodCheckpointError(RestoreError):
    """Every candidate in ``directory`` was refused; ``refused`` pairs each path with the reason.

    ``spoiled``: tensors of the objects hold parts of a refused one. If not, nothing has been changed.
    """

    def __init__(self, directory: str, refused: Sequence[tuple[str, str]], spoiled: bool = False) -> None:
        listing = "; ".join(f"{path}: {reason}" for path, reason in refused)
        advice = "make the objects anew, or restore something that has all their keys"
        left = f". Tensors of the objects now hold parts of what was refused: {advice}" if spoiled else ""
        super().__init__(f"{directory}: no checkpoint could be restored. {listing}{left}")
        self.directory, self.refused, self.spoiled = directory, tuple(refused), spoiled

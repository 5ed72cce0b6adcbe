"""Where things are. Every path is derived here from numbers and checked names, never read from a file's content."""

from __future__ import annotations

import re

LOG = "_log"
LEASES = "_leases"
PAGES = "_pages"
STATS = "_stats"
GROUPS = "_groups"
REPORTS = "_reports"
STATE_FILE = "checkpoint"
MANIFEST = "manifest.json"
INDEX = "index.arrow"
EXPORT = "export.json"
PROGRAM = "program.pt2"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_PIN = "pin-"
_TAG = "tag-"
MAX_TAG_LENGTH = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ATTEMPT = re.compile(r"e([0-9]{1,18})-[0-9a-f]{32}")
_ENTRY = re.compile(r"([0-9]{20})\.json")
_CHECKPOINT = re.compile(r"(.+)-([0-9]{1,18})")
_REPORT = re.compile(r"(e[0-9]{1,18}-[0-9a-f]{32})-[0-9a-f]{32}\.json")
_EXPORT = re.compile(r"export-([0-9a-f]{32})")
_STATS_OF_RUN = re.compile(r"([0-9]{18})-[0-9a-f]{32}\.json")
_WEIGHTS_PART = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")


def is_name(text: str) -> bool:
    """Whether ``text`` can be a checkpoint name or a lease id: one path part, nothing that climbs or hides."""
    return _NAME.fullmatch(text) is not None


def is_attempt(text: str) -> bool:
    """Whether ``text`` is an attempt id, ``e<epoch>-<32 hex digits>``."""
    return _ATTEMPT.fullmatch(text) is not None


def attempt_epoch(attempt: str) -> int:
    """The epoch in which an attempt began."""
    match = _ATTEMPT.fullmatch(attempt)
    if match is None:
        raise ValueError(f"not an attempt id: {attempt!r}")
    return int(match[1])


def attempt_age(attempt: str) -> tuple[int, str]:
    """Sorts attempts in the order in which they began: by epoch, and within an epoch by their ids. Needs no clock."""
    return attempt_epoch(attempt), attempt.rpartition("-")[2]


def claim_of(unique: str) -> str:
    """Which coordinator made an attempt id or a commit id: both end in what is unique to its claim."""
    return unique[-24:]


def entry_path(seq: int) -> str:
    """The log entry with that sequence number."""
    return link_path(LOG, seq)


def entry_seq(path: str) -> int | None:
    """The sequence number of a log entry's path, or None for any other object."""
    return link_seq(LOG, path)


def link_path(folder: str, seq: int) -> str:
    """The entry with that sequence number of the chain in ``folder``: the log is one, and every group has one."""
    return f"{folder}/{seq:020d}.json"


def link_seq(folder: str, path: str) -> int | None:
    """The sequence number of a path in ``folder``, or None for what is no entry of a chain there."""
    match = _ENTRY.fullmatch(path.removeprefix(f"{folder}/"))
    return int(match[1]) if match else None


def page_path(page: str) -> str:
    """The page of older records with that id."""
    return f"{PAGES}/{page}.json"


def page_id(path: str) -> str | None:
    """The id of the page at a path, or None for any other object. It looks like an attempt's."""
    page = path.removeprefix(f"{PAGES}/").removesuffix(".json")
    return page if is_attempt(page) and path == page_path(page) else None


def group_folder(group: str) -> str:
    """The chain of a group of readers."""
    return f"{GROUPS}/{group}"


def checkpoint_folder(name: str, number: int) -> str:
    """The folder of a checkpoint, ``ckpt-42``."""
    return f"{name}-{number}"


def parse_checkpoint(folder: str) -> tuple[str, int] | None:
    """Name and number of a checkpoint folder, or None if it is none."""
    match = _CHECKPOINT.fullmatch(folder)
    if match is None or not is_name(match[1]):
        return None
    return match[1], int(match[2])


def attempt_folder(name: str, number: int, attempt: str) -> str:
    """The folder of one attempt at a checkpoint."""
    return f"{name}-{number}/{attempt}"


def shard_name(rank: int, shard: int) -> str:
    """The file name of a shard inside its attempt."""
    return f"{rank:05d}-{shard}.arrow"


def kept_state_file(digest: str) -> str:
    """Where a ``checkpoint`` file of others is kept, by the SHA-256 of its content."""
    return f"{STATE_FILE}.kept-{digest[:16]}"


def lease_path(lease: str) -> str:
    """The lease with that id."""
    return f"{LEASES}/{lease}.json"


def pin_path(attempt: str) -> str:
    """The pin of an attempt, which is a lease of its own kind: there is one at most."""
    return lease_path(f"{_PIN}{attempt}")


def pinned_attempt(path: str) -> str | None:
    """The attempt that the lease at ``path`` pins, or None if it is a reader's."""
    name = path.removeprefix(f"{LEASES}/").removesuffix(".json")
    attempt = name.removeprefix(_PIN)
    return attempt if attempt != name and is_attempt(attempt) else None


def is_tag(text: str) -> bool:
    """Whether ``text`` can be the name that people give to a checkpoint: it may be taken for nothing else in its place."""
    return (
        is_name(text)
        and len(text) <= MAX_TAG_LENGTH
        and parse_checkpoint(text) is None
        and not is_attempt(text)
        and text != STATE_FILE
    )


def tag_path(name: str) -> str:
    """The tag of that name, which is a lease of its own kind. ``name`` is one (``is_tag``)."""
    return lease_path(f"{_TAG}{name}")


def tag_name(path: str) -> str | None:
    """The name of the tag at ``path``, or None if there is a pin, or a reader's lease."""
    name = path.removeprefix(f"{LEASES}/").removesuffix(".json")
    tag = name.removeprefix(_TAG)
    return tag if tag != name and is_tag(tag) else None


def stats_path(run: int, unique: str) -> str:
    """What the run with that number has measured. ``unique`` is 32 hex digits: so no two processes write to one."""
    return f"{STATS}/{run:018d}-{unique}.json"


def stats_run(path: str) -> int | None:
    """The number of the run whose measurements are at ``path``, or None for any other object."""
    match = _STATS_OF_RUN.fullmatch(path.removeprefix(f"{STATS}/"))
    return int(match[1]) if match else None


def report_path(attempt: str, report: str) -> str:
    """The report on an attempt with that id, 32 hex digits."""
    return f"{REPORTS}/{attempt}-{report}.json"


def reported_attempt(path: str) -> str | None:
    """The attempt that the report at ``path`` is on, or None for any other object."""
    match = _REPORT.fullmatch(path.removeprefix(f"{REPORTS}/"))
    return match[1] if match else None


def export_folder(export: str) -> str:
    """The folder of an export inside its attempt."""
    return f"export-{export}"


def is_export(folder: str) -> bool:
    """Whether ``folder`` is the name of an export's folder, ``export-<32 hex digits>``."""
    return _EXPORT.fullmatch(folder) is not None


def weights_part(part: int, parts: int) -> str:
    """The safetensors file of an exported module, or one of several, numbered from 1."""
    return WEIGHTS if parts == 1 else f"model-{part:05d}-of-{parts:05d}.safetensors"


def is_export_file(name: str) -> bool:
    """Whether an exported module may have a file of that name."""
    return name in (PROGRAM, CONFIG, WEIGHTS, WEIGHTS_INDEX) or _WEIGHTS_PART.fullmatch(name) is not None

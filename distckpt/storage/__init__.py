"""Stores: where objects are kept, and what is asked of the place."""

from distckpt.storage.around import cool
from distckpt.storage.bounds import MOST_NAMES, at_most
from distckpt.storage.interface import (
    ObjectInfo,
    Source,
    Store,
    SupportsCooling,
    SupportsCopying,
    SupportsHidden,
    SupportsSweep,
)
from distckpt.storage.local import LocalStore
from distckpt.storage.location import (
    above,
    canonical,
    join,
    open_store,
    placed,
    placed_among,
    split_path,
    with_patience,
)
from distckpt.storage.memory import MemoryStore
from distckpt.storage.paths import PathLike
from distckpt.storage.patience import PatientStore, twice
from distckpt.storage.probe import FOLDER as PROBES
from distckpt.storage.probe import probe
from distckpt.storage.scratch import put_file, scratch_folder
from distckpt.storage.split import SplitStore, has_far_shards, mark_of, parts_of, place_of
from distckpt.storage.spread import SpreadStore

__all__ = [
    "MOST_NAMES",
    "PROBES",
    "LocalStore",
    "MemoryStore",
    "ObjectInfo",
    "PathLike",
    "PatientStore",
    "Source",
    "SplitStore",
    "SpreadStore",
    "Store",
    "SupportsCooling",
    "SupportsCopying",
    "SupportsHidden",
    "SupportsSweep",
    "above",
    "at_most",
    "canonical",
    "cool",
    "has_far_shards",
    "join",
    "mark_of",
    "open_store",
    "parts_of",
    "place_of",
    "placed",
    "placed_among",
    "probe",
    "put_file",
    "scratch_folder",
    "split_path",
    "twice",
    "with_patience",
]

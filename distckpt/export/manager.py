"""ExportCheckpointManager: a CheckpointManager that also exports what it saves, in the forms that are deployed."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from distckpt.checkpoint import Checkpoint
from distckpt.export.exporter import Exporter
from distckpt.export.listing import Exports, export_number
from distckpt.export.packing import pack
from distckpt.export.places import find_place
from distckpt.export.recipes import Export, Recipe, lacks_something, recipes_of
from distckpt.manager import CheckpointManager
from distckpt.rank.pending import PendingSave, progress_of
from distckpt.rank.saved_steps import StepCounter
from distckpt.storage import PathLike, placed_among

logger = logging.getLogger(__name__)


class ExportCheckpointManager(CheckpointManager):
    """A CheckpointManager that exports modules from every checkpoint it commits; TensorFlow's SavedModel manager.

    For each of ``modules_to_export`` an export has a folder with ``model.safetensors`` (several with an index where it
    is large), ``config.json`` if there is a configuration, and ``program.pt2`` if there are example inputs::

        torch.export.load(f"{manager.latest_export}/encoder/program.pt2")
        AutoModel.from_pretrained(f"{manager.latest_export}/encoder")

    A program is traced on the CPU, for inference: without gradients, in eval mode.

    Exports are made from what was committed, never by gathering on the ranks, and off the training path: by a task on
    the Ray cluster, or by a child process where there is no Ray. They are made one at a time, the lowest number first.
    An export is there as a whole or not at all. It belongs to its checkpoint: it goes when that is retired, and stays
    when it is preserved. A checkpoint that is retired before its turn comes is passed over, with a line in the log;
    one that is being exported is not retired. What a manager finds missing when it is made, after a crash say, it makes
    first: of all active and preserved checkpoints of its name.

    Args (those that CheckpointManager does not have):
        modules_to_export: by name, each an Export that says how, or an ``nn.Module`` of the checkpoint itself: an object
            or a part of one. Its attribute ``example_inputs``, a tuple, is what its program is traced with; without it
            there is no program. From a sharded module no program can be traced: give an Export with ``build``.
        task_options: for ``ray.remote``, such as ``{"num_cpus": 4, "memory": 16 << 30}``. By default the task claims
            nothing, so that it never waits for CPUs that the training holds.
        options: CheckpointManager's other keyword options, ``last_checkpoint_step`` among them. ``progress`` shows
            exports too.

    Raises what CheckpointManager raises; ValueError or TypeError for modules that cannot be exported as they were
    given; ImportError without safetensors.

    Where TensorFlow's differs: it exports in place, so that half an export is taken for one; does not make up for a
    crash between checkpoint and export; deletes the export of a preserved checkpoint, and those of another manager
    whose name begins alike; lists by name (10 before 9) after a restart; and knows no export of number 0. There is no
    ``make_saved_modules_directory_name``, since a path contains what is unique to one try: ask ``latest_export``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: str | os.PathLike[str],
        max_to_keep: int | None = 5,
        modules_to_export: Mapping[str, nn.Module | Export] | None = None,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: StepCounter | None = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], object] | None = None,
        *,
        task_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._modules = dict(modules_to_export or {})
        recipes = recipes_of(checkpoint, self._modules)
        if recipes and importlib.util.find_spec("safetensors") is None:
            raise ImportError("exporting needs safetensors: pip install 'distckpt[export]'")
        if recipes:
            pack(recipes)  # what cannot be sent is refused now and not after the first save
        for recipe in recipes:
            if lacks_something(checkpoint, recipe.how.key):
                logger.warning(
                    "the export %r will not have what checkpoints leave out of %r", recipe.name, recipe.how.key
                )
        self._exporter: Exporter | None = None
        super().__init__(
            checkpoint,
            directory,
            max_to_keep,
            keep_checkpoint_every_n_hours,
            checkpoint_name,
            step_counter,
            checkpoint_interval,
            init_fn,
            **options,
        )
        self._exports = Exports(self._store, checkpoint_name)
        if recipes and self.cluster.rank == 0:
            self._start(recipes, options, task_options or {})

    def _start(self, recipes: tuple[Recipe, ...], options: Mapping[str, Any], task_options: Mapping[str, Any]) -> None:
        try:
            place = find_place(task_options)
        except BaseException:
            super().close()
            raise
        self._exporter = Exporter(
            self._store, self._name, placed_among(options), recipes, place, options.get("progress", False)
        )
        self._exporter.wake()

    # ---- what there is -----------------------------------------------------------------------------------------

    @property
    def modules_to_export(self) -> dict[str, nn.Module | Export]:
        """What is exported, by name."""
        return dict(self._modules)

    @property
    def exports(self) -> list[str]:
        """Paths of the exports of active and preserved checkpoints, in the order of saves, read from storage."""
        return self._exports.paths()

    @property
    def latest_export(self) -> str | None:
        """The path of the export that ``latest_export`` finds: of the checkpoint saved last among those that have one."""
        return self._exports.latest()

    @property
    def savedmodels(self) -> list[str]:
        """TensorFlow's name for ``exports``."""
        return self.exports

    @property
    def latest_savedmodel(self) -> str | None:
        """TensorFlow's name for ``latest_export``."""
        return self.latest_export

    def get_existing_savedmodels(self) -> list[str]:
        """The same as ``exports``: there are no others, since an export goes with its checkpoint."""
        return self.exports

    def get_savedmodel_number_from_path(self, savedmodel_path: PathLike) -> int | None:
        """The number of the checkpoint that was exported to this path; None if it is no export of this name.

        0 is a number, and a slash at the end does no harm.
        """
        return export_number(savedmodel_path, self._name)

    def wait_for_new_savedmodel(
        self, last_savedmodel: PathLike | None = None, seconds_to_sleep: float = 1.0, timeout: float | None = None
    ) -> str | None:
        """The export that comes next after ``last_savedmodel`` by number, or None after ``timeout`` seconds.

        As ``distckpt.wait_for_new_export``: it looks at least once (TensorFlow's gives up before it looks), and raises
        ValueError for a last path that is not an export's (TensorFlow's fails to compare it).
        """
        return self._exports.wait(last_savedmodel, seconds_to_sleep, timeout)

    def savedmodels_iterator(
        self,
        min_interval_secs: float = 0,
        timeout: float | None = None,
        timeout_fn: Callable[[], object] | None = None,
    ) -> Iterator[str]:
        """Yields exports by number, then each new one as it comes. As ``distckpt.exports_iterator``."""
        return self._exports.iterator(min_interval_secs, timeout, timeout_fn)

    wait_for_new_export = wait_for_new_savedmodel
    exports_iterator = savedmodels_iterator
    get_existing_exports = get_existing_savedmodels
    get_export_number_from_path = get_savedmodel_number_from_path

    # ---- what is done ------------------------------------------------------------------------------------------

    def wait_for_exports(self, timeout: float | None = None) -> None:
        """Return once every checkpoint saved so far has its export. Raises ExportError for one that could not be made.

        Exports are rank 0's business: on the others it returns at once. TimeoutError after ``timeout`` seconds.
        """
        if self._exporter is not None:
            self._pending.settle()
            self._exporter.wait(timeout)

    def close(self, final: bool = False) -> None:
        """Wait for saves and exports under way and leave the run. Raises the first failure that nobody has collected.

        ``final`` as in CheckpointManager.
        """
        with contextlib.ExitStack() as after:
            after.callback(super().close, final)
            if self._exporter is not None:
                after.callback(self._exporter.stop)
                self.wait_for_exports()

    def _begun(self, pending: PendingSave) -> None:
        exporter = self._exporter
        if exporter is not None:
            progress_of(pending).ended.add_done_callback(lambda _: exporter.wake())

    def _restored(self) -> None:
        if self._exporter is not None:
            self._exporter.wake()

    def _abandon(self, error: BaseException) -> None:
        if self._exporter is not None:
            self._exporter.stop()
        super()._abandon(error)

"""From an intention to the state of its entry: pages that it needs are read before, and one may have to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from distckpt.coordinator.machine.actions import PageWritten, WritePage
from distckpt.coordinator.machine.desk import Desk, Identities
from distckpt.coordinator.machine.intentions import Commit, Intention, Need
from distckpt.coordinator.machine.library import Found, Library
from distckpt.coordinator.machine.retention import keeps_all, recover, to_recover
from distckpt.format.json.log import State
from distckpt.format.json.paging import Records, Sizes, next_page, opened, small_pages, turned
from distckpt.format.json.report import Reported, with_reports


@dataclass(frozen=True, slots=True)
class Job:
    """``intention`` is to be applied to ``state``, in an entry of ``epoch``, and ``then`` is told what comes of it.

    ``recover_at`` is when the manager was made that has not committed anything yet, in epoch seconds. ``reports`` become
    part of the state, too: ``then`` is told which of them have.
    """

    intention: Intention
    state: State
    epoch: int
    recover_at: float | None
    reports: tuple[Reported, ...]
    then: Callable[[State | None, tuple[Reported, ...]], None]


class Making:
    """Applies one intention at a time. ``seen`` is the state that the last one was applied to, with what it needed at hand."""

    def __init__(self, desk: Desk, identities: Identities, library: Library, sizes: Sizes) -> None:
        self.seen = State()
        self._desk = desk
        self._identities = identities
        self._library = library
        self._sizes = sizes
        self._job: Job | None = None
        self._writing: tuple[str, State, Records, tuple[Reported, ...]] | None = None
        self._made: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether an intention waits for pages."""
        return self._job is not None

    def make(self, job: Job) -> None:
        """Tell ``job.then`` the state that comes of the intention, or None if nothing changes; perhaps at once."""
        self._job = job
        needs = list(self._needs(job))
        if needs:
            pages = {page.id: page for page, _ in needs}
            self._library.read(tuple(pages.values()), lambda found: self._apply(job, needs, found))
        else:
            self._apply(job, [], {})

    def page_written(self, event: PageWritten) -> None:
        """The entry may refer to the page now; or goes without it."""
        if self._writing is None or self._writing[0] != event.page:
            return
        _, state, records, folded = self._writing
        self._writing = None
        self._finish(state if event.ref is None else turned(state, event.ref, records), folded)

    def stop(self) -> None:
        """Nothing comes of what is being made."""
        self._job = self._writing = None

    def dropped(self, *states: State) -> frozenset[str]:
        """Pages that were written here and that no entry will refer to any more, beside those of these states."""
        kept = {page.id for state in states for page in state.pages}
        return frozenset(self._made - kept - ({self._writing[0]} if self._writing else set()))

    def _needs(self, job: Job) -> Iterator[Need]:
        state = self._library.sound(job.state)
        if not state.pages:
            return
        yield from job.intention.needs(state)
        if isinstance(job.intention, Commit):
            together = small_pages(state, self._sizes, active=keeps_all(job.intention.retention))
            yield from ((page, None) for page in together)
            if job.recover_at is not None:
                yield from ((page, None) for page in to_recover(state, job.recover_at))
            yield from _reported_on(state, {one.report.attempt for one in job.reports} - state.known())

    def _apply(self, job: Job, needs: list[Need], found: Found) -> None:
        if self._job is not job:
            return
        sound = self._library.sound(job.state)
        lost = tuple(page for page in job.state.pages if page not in sound.pages)
        wanted = {
            page.id: found[page.id]
            for page, concerns in needs
            if page.id in found and (concerns is None or any(map(concerns, found[page.id])))
        }
        self.seen = state = opened(sound, wanted)
        state = with_reports(state, (one.report for one in job.reports))
        changed = job.intention.apply(state if job.recover_at is None else recover(state, job.recover_at))
        if changed is None and any(concerns is None and page.id in wanted for page, concerns in needs):
            changed = state  # nothing of that page was due after all; now the next one has its turn
        if changed is not None and lost:
            changed = msgspec.structs.replace(changed, pages=(*changed.pages, *lost))
        alive = changed.alive() if changed is not None and job.reports else {}
        folded = tuple(one for one in job.reports if one.report.attempt in alive)
        page = None
        if changed is not None and isinstance(job.intention, Commit):
            page = next_page(changed, self._sizes, active=keeps_all(job.intention.retention))
        if changed is None or page is None:
            self._finish(changed, folded)
            return
        name = self._identities.attempt(job.epoch)
        self._made.add(name)
        self._writing = (name, changed, page[1], folded)
        self._desk.emit(WritePage(name, *page))

    def _finish(self, state: State | None, folded: tuple[Reported, ...]) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.then(state, folded)


def _reported_on(state: State, attempts: set[str]) -> Iterator[Need]:
    """The first page that may have something of which there is news. The others have their turn with later entries."""
    for page in state.pages:
        if any(map(page.may_have_attempt, attempts)):
            yield page, lambda record: record.attempt in attempts
            return

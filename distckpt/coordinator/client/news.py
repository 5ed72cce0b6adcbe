"""How a process hears that a log has grown: from the watcher of its Ray cluster if it is in one, else from storage."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from distckpt.directory.news import News, news_of
from distckpt.storage import Store


def find_news(store: Store, storage_options: Mapping[str, Any] | None = None) -> News:
    """News of the directory of ``store``, which was opened with these options.

    Ray is not imported for it: a process that is in a cluster has imported it. A directory that is in the memory of this
    process is known to nobody else.
    """
    ray: Any = sys.modules.get("ray")
    if not hasattr(ray, "is_initialized") or not ray.is_initialized() or store.url.startswith("memory://"):
        return news_of(store)
    from distckpt.coordinator.ray.watcher import RayNews

    return RayNews(store, storage_options)

"""Shared by the tests of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from distckpt.directory.news import News, news_of
from distckpt.storage import Store


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process hears from storage, whichever cluster other tests have connected it to; workers elsewhere do not mind."""

    def find_news(store: Store, storage_options: Mapping[str, Any] | None = None) -> News:
        return news_of(store)

    monkeypatch.setattr("distckpt.evaluation.watch.find_news", find_news)

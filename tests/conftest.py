"""Plugins and fixtures of every test."""

import logging
from collections.abc import Iterator

import pytest

pytest_plugins = ["tests.features"]


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Command lines set the root logger up; its handler must not outlive pytest's stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)

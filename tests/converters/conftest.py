"""Fixtures of the converter's tests."""

import logging

import pytest


@pytest.fixture(autouse=True)
def restore_logging():
    """The command line sets the root logger up; its handler must not outlive pytest's stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)

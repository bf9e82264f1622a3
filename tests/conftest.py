"""Plugins of every test."""

pytest_plugins = ["tests.features"]

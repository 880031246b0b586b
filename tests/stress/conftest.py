"""The campaigns' server of commands, and the folders that they work in."""

from __future__ import annotations

from pathlib import Path

import campaign
import pytest


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = campaign.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(server, tmp_path_factory) -> Path:
    return campaign.furnish(server, tmp_path_factory.mktemp("home"))

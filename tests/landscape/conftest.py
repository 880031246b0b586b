from __future__ import annotations

import pytest
from landscape_cases import ArrayDataset, make_dataset, make_model, make_settings

from mbcd_cli.settings import Settings


@pytest.fixture
def settings() -> Settings:
    return make_settings()


@pytest.fixture
def dataset(settings) -> ArrayDataset:
    return make_dataset(settings)


@pytest.fixture
def model(settings, dataset):
    return make_model(settings, dataset)

"""A trained model for the sample commands, and two devices to draw on."""

import pytest


@pytest.fixture(scope="session")
def workdir(trained):
    return trained


@pytest.fixture(scope="module", autouse=True)
def _on_two(two_devices):
    return two_devices

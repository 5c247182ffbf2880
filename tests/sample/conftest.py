"""A trained model for the sample commands."""

import pytest
import tiny


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "digits"
    tiny.run(tiny.config(stages="stage1", **{"stage1.num_steps": 2}), folder)
    return folder

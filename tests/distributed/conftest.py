"""One set of models and rows for all tests of this folder."""

import pytest

from tests.distributed.running import Inputs, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Made once; nobody changes anything in it."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))

import pytest
import torch

from tests import datasets

# Small tensors everywhere: a second thread only waits, and workers of pytest-xdist would fight for cores.
torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    """The user has set two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made_up_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    datasets.write_all(folder)
    return folder


@pytest.fixture
def made_up_data(made_up_folder, monkeypatch):
    """Problems with data find small, made-up data sets."""
    datasets.use(monkeypatch, made_up_folder)

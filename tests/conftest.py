"""Fixtures that several test files ask for by name."""

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """As in subprocesses that run with one: sums of several threads differ in the last bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

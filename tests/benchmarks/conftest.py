"""Benchmarks silence the libraries for good; tests that come after them want to hear them."""

import logging

import pytest


@pytest.fixture(autouse=True)
def logging_as_before():
    yield
    logging.disable(logging.NOTSET)

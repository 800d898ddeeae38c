"""A block of the memory profiler around a step, and processes for figures that count a whole process."""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import wraps
from importlib import import_module
from multiprocessing import get_context

import pytest

from qexport import memory
from qexport.memory import AdvancedMemoryProfiler

MB = 10**6
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs high-water marks that can be reset")


def profile(step, **options) -> memory.MemoryReport:
    profiler = AdvancedMemoryProfiler(**options)
    with profiler.profile_block("step"):
        step()
    return profiler.generate_report()


def in_a_process_of_its_own(function, *args):
    """What `function` returns in a new process: resident pages and malloc count what every thread of a process does, and
    what the tests before left in this one may be given back at any moment."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result(600)


def alone(test):
    """Runs a test in a process of its own. Assertions say what they found: pytest does not see their values there."""

    @wraps(test)
    def run(**given):
        in_a_process_of_its_own(_undecorated, test.__module__, test.__name__, given)

    return run


def _undecorated(module: str, name: str, given: dict) -> None:
    getattr(import_module(module), name).__wrapped__(**given)

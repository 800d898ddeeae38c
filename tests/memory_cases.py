"""A block of the memory profiler around a step."""

from qexport import memory
from qexport.memory import AdvancedMemoryProfiler

MB = 10**6


def profile(step, **options) -> memory.MemoryReport:
    profiler = AdvancedMemoryProfiler(**options)
    with profiler.profile_block("step"):
        step()
    return profiler.generate_report()

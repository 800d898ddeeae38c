"""What tests of errors and of the command line share: the shape of an error, and the time that a command computes."""

import os
import statistics

import pytest


def assert_one_line(code, out, err, *words, expected=1):
    assert code == expected, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("qexport: error: ")
    for word in words:
        assert word in err


def one_line(kind, words, function, *arguments, **options):
    """Asserts that a call raises an error of this kind, whose one line holds the words."""
    with pytest.raises(kind) as error:
        function(*arguments, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def processor_time(call):
    """Median of five, in seconds, of what the processes that a call starts compute: what else runs here is not in it."""
    times = []
    for _ in range(5):
        before = os.times()
        call()
        after = os.times()
        times.append(sum(after[2:4]) - sum(before[2:4]))  # of children, in their code and in the system's
    return statistics.median(times)

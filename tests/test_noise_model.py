"""NoiseModel and the text it is written as."""

import numpy as np
import pytest

from qexport.errors import UsageError
from qexport.noise.model import NoiseModel, parse_channels, parse_noise


def test_text_and_back():
    text = "depolarizing:0.01:scope=global,thermal_relaxation:0.1:T1=2:T2=0.8,readout:0.02"
    models = parse_noise(text)
    assert [model.channel for model in models] == ["depolarizing", "thermal_relaxation", "readout"]
    assert models[1].inputs == {"level": 0.1, "T1": 2.0, "T2": 0.8}
    assert ",".join(map(str, models)) == text
    assert parse_noise(text) == models


def test_numbers_of_each_qubit_are_told():
    assert str(NoiseModel("bit_flip", [0.25, 0.5])) == str(NoiseModel("bit_flip", np.array([0.25, 0.5])))
    assert str(NoiseModel("thermal_relaxation", 0.1, T1=np.array([2.0, 4.0]), T2=1.0)) == (
        "thermal_relaxation:0.1:T1=[2.0, 4.0]:T2=1"
    )


def test_thermal_relaxation_counts_in_its_own_times():
    assert NoiseModel("thermal_relaxation", 0.1).inputs == {"level": 0.1, "T1": 1.0, "T2": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosmic_rays:0.1", "channel must be one of depolarizing, .*, got 'cosmic_rays'"),
        ("kraus:0.1", "channel must be one of depolarizing, .*, readout, got 'kraus'"),
        ("depolarizing", "noise must be MODEL:LEVEL, such as depolarizing:0.01, got 'depolarizing'"),
        ("bit_flip:much", "noise level must be a number, got 'much' in 'bit_flip:much'"),
        ("bit_flip:0.1:T1=3", "T1 is for channel thermal_relaxation, got bit_flip; leave it out"),
        ("bit_flip:0.1:scope=global", "scope must be local with channel bit_flip, got global"),
        ("bit_flip:0.1:T3=1", "noise settings must be NAME=VALUE of T1, .*, got 'T3=1' in 'bit_flip:0.1:T3=1'"),
        ("", "noise must be MODEL:LEVEL, such as depolarizing:0.01, got ''"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_noise(text)


def test_channels_without_levels():
    both = parse_channels("depolarizing, thermal_relaxation:T1=2")
    assert [(model.channel, model.level) for model in both] == [("depolarizing", 0), ("thermal_relaxation", 0)]
    for text, mend in (
        ("bit_flip:0.1", "bit_flip --levels 0.1"),
        ("readout,thermal_relaxation:1e-3:T1=2", "thermal_relaxation:T1=2 --levels 1e-3"),
    ):
        with pytest.raises(UsageError, match=f"levels from --levels here, got .*; write --noise {mend}"):
            parse_channels(text)
    with pytest.raises(UsageError, match=r"noise settings must be NAME=VALUE of .*, got 'T1' in 'thermal_relaxation:T1'"):
        parse_channels("thermal_relaxation:T1")

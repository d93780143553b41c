"""Rates of machines: parsed, and measured."""

import math

import pytest

from jaxmerge.machines import MACHINES, measure, parse_rates


def test_rates_replace_those_of_a_machine():
    machine = parse_rates(MACHINES["h100"], "read=2.5GB/s,flops=30T,link=1e9")
    assert machine == MACHINES["h100"]._replace(read=2.5e9, flops=3e13, link=1e9)


@pytest.mark.parametrize("text", ["speed=1GB/s", "read", "read=fast", "read=-1GB/s"])
def test_what_is_no_rate(text):
    with pytest.raises(ValueError, match="write a rate such as read=2GB/s"):
        parse_rates(MACHINES["cpu"], text)


def test_this_machine_can_be_measured(tmp_path):
    machine = measure(tmp_path)
    assert all(rate > 0 for rate in machine)
    assert math.isfinite(machine.read)
    assert list(tmp_path.iterdir()) == []

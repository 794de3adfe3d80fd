"""The short version of `make soak`."""

import pytest
from soak import Busy, Held, assert_no_growth

CYCLES = 10
WARM = 3


def test_ten_cycles_of_a_busy_sandbox_lose_nothing_and_nothing_grows(server):
    busy = Busy()
    try:
        early = None
        for number in range(1, CYCLES + 1):
            busy.cycle(number)
            if number == WARM:
                early = Held(server, busy.sandbox)
        assert_no_growth(early, Held(server, busy.sandbox), CYCLES - WARM)
    finally:
        busy.sandbox.kill()
    if busy.without_redis:
        pytest.skip(f"all but redis was shown, which could not be had: {busy.without_redis}")

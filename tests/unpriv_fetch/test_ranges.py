"""The arithmetic of streams, retries and limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpriv.failures import FetchError, quote
from unpriv.ranges import REST, Bucket, Grid, Retries, Tuning, Watchdog, Width


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 40))
def test_cells_cover_the_object_once(size_bytes: int, cell_bytes: int) -> None:
    grid = Grid(size_bytes, cell_bytes)
    if grid.cells == 0:
        assert size_bytes == 0
        return
    middle = grid.cells // 2
    assert grid.bounds(0)[0] == 0
    assert grid.bounds(grid.cells - 1)[1] == size_bytes
    assert grid.bounds(middle)[0] % cell_bytes == 0
    assert middle == 0 or grid.bounds(middle - 1)[1] == grid.bounds(middle)[0]
    assert all(start < end for start, end in (grid.bounds(0), grid.bounds(middle), grid.bounds(grid.cells - 1)))


def passing(**more: object) -> FetchError:
    return FetchError("unavailable", "x", retryable=True, **more)  # type: ignore[arg-type]


def test_retries_grow_and_end() -> None:
    retries = Retries(Tuning(backoff_base_s=1.0, backoff_cap_s=5.0), allowed=5)
    pauses = [retries.delay_s(passing(), 0) for _ in range(4)]
    for pause_s, nominal_s in zip(pauses, (1, 2, 4, 5), strict=True):
        assert nominal_s * 0.5 <= pause_s <= nominal_s * 1.5
    with pytest.raises(FetchError):
        retries.delay_s(passing(), 0)


def test_progress_starts_the_count_again() -> None:
    retries = Retries(Tuning(progress_bytes=100), allowed=2)
    for _ in range(10):
        retries.delay_s(passing(), 100)
    with pytest.raises(FetchError):
        retries.delay_s(passing(), 99)


def test_server_says_how_long_to_wait() -> None:
    assert Retries(Tuning(), 5).delay_s(passing(retry_after_s=77.0), 0) == 77.0


@pytest.mark.parametrize("error", [FetchError("access_denied", "x"), FetchError("changed", "x", retryable=True)])
def test_what_cannot_pass_is_not_tried_again(error: FetchError) -> None:
    with pytest.raises(FetchError):
        Retries(Tuning(), 5).delay_s(error, 1 << 20)


def test_watchdog_wants_a_whole_window() -> None:
    dog = Watchdog(min_rate=100, window_s=10.0)
    assert not any(dog.too_slow(float(now), 0) for now in range(10))
    assert dog.too_slow(10.0, 999)
    assert not Watchdog(100, 10.0).too_slow(100.0, 0)


def test_watchdog_forgets_a_fast_start() -> None:
    dog = Watchdog(min_rate=100, window_s=10.0)
    assert not any(dog.too_slow(float(now), 1_000_000) for now in range(10))
    assert dog.too_slow(11.0, 1_000_500)


def test_width_grows_while_it_pays() -> None:
    width = Width(most=8, now=1)
    assert [width.measured(rate, width.now) for rate in (10, 20, 40, 80)] == [2, 4, 8, 8]


def test_width_is_small_for_a_slow_server() -> None:
    width = Width(most=8, now=2)
    assert width.measured(10, 2) == 4
    assert width.measured(10, 4) == 2
    assert all(width.measured(10, 2) == 2 for _ in range(REST))
    assert width.measured(10, 2) == 2 or width.now <= 4  # then it tries again


def test_width_does_not_judge_streams_that_are_not_in_use() -> None:
    width = Width(most=8, now=4)
    assert width.measured(5, 1) == 4


def test_throttled_width_falls_to_one() -> None:
    width = Width(most=8, now=8)
    assert [width.throttled() for _ in range(4)] == [4, 2, 1, 1]


def test_bandwidth_limit() -> None:
    bucket = Bucket(rate=1000)
    waits_s = [bucket.wait_s(100.0, 500) for _ in range(4)]
    assert waits_s == pytest.approx([0.4, 0.9, 1.4, 1.9])
    assert Bucket(rate=0).wait_s(0.0, 1 << 40) == 0


def test_quote_is_bounded_and_plain() -> None:
    assert quote("a\x1b[31m\n\x00é") == "a?[31m???"
    assert len(quote("x" * 10_000)) == 203

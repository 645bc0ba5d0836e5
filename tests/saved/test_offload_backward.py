"""How what has moved to the host comes back: ahead of backward, and whatever backward does."""

from __future__ import annotations

from collections.abc import Callable

from tests.saved.offloading import PARCEL, SEGMENT, UNDER_WAY, Bench, down, in_backward


def test_backward_fetches_ahead_in_reverse_order() -> None:
    bench = Bench()
    bench.store(22)
    assert bench.where() == "h" * 12 + "b" * 8 + "dd"
    seen = []

    def run() -> None:
        for number in reversed(range(22)):
            bench.read_and_free(number)
            seen.append(bench.where())

    in_backward(run)
    assert seen[1] == "h" * 12 + "b" * 8 + "--"
    assert seen[2] == "h" * 8 + "b" * 11 + "---"  # one parcel is being read, two are ahead of it
    assert seen[6] == "h" * 4 + "b" * 11 + "-" * 7
    assert seen[10] == "b" * 11 + "-" * 11
    assert bench.transport.calls["bring"] == 3
    assert bench.transport.freed_early == 0


def test_a_limit_lets_backward_fetch_as_far_as_it_has_room() -> None:
    bench = Bench(limit_bytes=8 * PARCEL)
    bench.store(64)
    assert bench.where() == "h" * 36 + "b" * 8 + "d" * 20
    bench.ledger.start_step()  # the peak of backward alone

    def run() -> None:
        for number in reversed(range(44, 64)):
            bench.read_and_free(number)
        assert bench.where() == "h" * 16 + "b" * 28 + "-" * 20
        down(bench)()

    in_backward(run)
    assert bench.peak_device_bytes() <= 8 * PARCEL
    assert bench.transport.calls["bring"] == 9
    assert bench.live() == (0, 0)


def test_the_forward_pass_reads_without_fetching_ahead() -> None:
    """A batch norm's input is folded with the sign of the ReLU behind it, while the forward pass goes on."""
    bench = Bench(limit_bytes=8 * PARCEL)
    bench.store(64)
    bench.segments[48:] = [None] * 16  # room for more
    bench.read(20)
    assert bench.where() == "h" * 20 + "b" * 4 + "h" * 12 + "b" * 8 + "d" * 4 + "-" * 16
    assert bench.transport.calls["bring"] == 1


def test_an_old_parcel_that_many_read_does_not_mislead() -> None:
    bench = Bench()
    bench.store(40)

    def run() -> None:
        for number in reversed(range(4, 40)):
            bench.read_and_free(number)
            bench.read(0)

    in_backward(run)
    assert bench.transport.calls["bring"] == 7  # each that was on the host alone, once
    in_backward(lambda: bench.read_and_free(0))


def test_a_pass_that_begins_with_an_old_parcel_finds_its_way() -> None:
    bench = Bench()
    bench.store(40)

    def run() -> None:
        bench.read(0)
        for number in reversed(range(26, 40)):
            bench.read_and_free(number)
        # One had to be waited for; from there on they are fetched ahead again.
        assert bench.where() == "h" * 16 + "b" * 10 + "-" * 14

    in_backward(run)


def test_a_large_parcel_does_not_wait_for_room() -> None:
    bench = Bench()
    for _ in range(6):
        bench.store(1, nbytes=3 * PARCEL)
    assert bench.where() == "hhhhhb"

    def run() -> None:
        bench.read_and_free(5)
        assert bench.where() == "hhhhb-"
        bench.read_and_free(4)
        assert bench.where() == "hhhb--"
        down(bench)()

    in_backward(run)
    assert bench.transport.calls["bring"] == 5
    assert bench.live() == (0, 0)


def test_another_stream_waits_too() -> None:
    bench = Bench()
    bench.store(16)
    bench.transport.stream = "other"
    in_backward(down(bench))
    assert bench.transport.freed_early == 0
    assert bench.live()[1] == 0


def test_a_kept_graph_goes_back_to_the_host() -> None:
    bench = Bench()
    bench.store(24)
    for _ in range(3):
        in_backward(down(bench, free=False))
        device_bytes, host_bytes = bench.live()
        assert host_bytes == 20 * SEGMENT
        assert device_bytes <= (UNDER_WAY + 1) * PARCEL  # those read last, and what has never left
    in_backward(down(bench))
    assert bench.live() == (0, 0)
    assert bench.transport.freed_early == 0


def test_a_graph_of_an_earlier_step_leaves_the_device_when_the_next_begins() -> None:
    bench = Bench()
    bench.store(18)
    in_backward(down(bench, free=False))
    bench.offload.start_step()
    assert bench.where() == "h" * 16 + "dd"
    bench.store(6)
    assert bench.where() == "h" * 16 + "bbbb" + "dddd"  # what is left of it is the oldest
    in_backward(down(bench))
    assert bench.live() == (0, 0)
    assert bench.transport.freed_early == 0


def test_what_is_left_of_an_earlier_step_is_fetched_ahead() -> None:
    bench = Bench()
    bench.store(36)
    bench.segments[:16] = [None] * 16
    bench.segments[32:] = [None] * 4
    bench.offload.start_step()
    assert bench.where() == "-" * 16 + "h" * 16 + "-" * 4
    in_backward(lambda: bench.read(31))
    assert bench.where() == "-" * 16 + "h" * 4 + "b" * 12 + "-" * 4


def test_handles_that_die_before_backward_leave_nothing() -> None:
    bench = Bench()
    bench.store(18)
    bench.segments.clear()
    bench.offload.start_step()
    assert bench.live() == (0, 0)
    bench.store(18)
    assert bench.transport.made == 4  # all of the host's memory has been used again
    bench.segments[:16] = [None] * 16
    bench.read(16)
    assert bench.live() == (2 * SEGMENT, 0)
    assert bench.transport.freed_early == 0


def test_a_dead_parcel_is_freed_after_its_copy() -> None:
    """The copy to the host has not run when the graph dies, nor has one that was fetched ahead and not needed."""
    bench = Bench()
    bench.store(16)
    in_backward(lambda: bench.read(15))
    bench.segments[8:] = [None] * 8
    assert bench.transport.freed_early == 0
    bench.store(16)  # by which the host's memory is used again
    bench.read(0)
    in_backward(down(bench))
    assert bench.transport.freed_early == 0


def test_parts_that_backward_skips_do_not_stop_it() -> None:
    bench = Bench()
    bench.store(64)

    def run() -> None:
        for number in reversed(range(0, 64, 8)):  # every other parcel is fetched in vain
            bench.read_and_free(number)
            bench.segments[number + 4 : number + 8] = [None] * 4

    in_backward(run)
    bench.segments = [None if number % 8 < 4 else segment for number, segment in enumerate(bench.segments)]
    bench.offload.start_step()
    assert bench.live() == (0, 0)
    bench.segments.clear()
    bench.store(24)
    in_backward(down(bench))
    assert bench.transport.freed_early == 0


def test_several_backward_passes_over_parts_of_one_step() -> None:
    bench = Bench()
    bench.store(48)

    def part(start: int, stop: int) -> Callable[[], None]:
        return lambda: [bench.read_and_free(number) for number in reversed(range(start, stop))] and None

    in_backward(part(0, 16), part(32, 48), part(16, 32))
    assert bench.live() == (0, 0)
    assert bench.transport.freed_early == 0


def test_the_hosts_memory_is_used_again() -> None:
    bench = Bench()
    for _ in range(4):
        bench.offload.start_step()
        bench.store(32)
        bench.offload.end_step()
        in_backward(down(bench))
        bench.segments.clear()
    assert bench.transport.made == 7
    bench.offload.release()
    assert not bench.transport.idle

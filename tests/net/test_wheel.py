from chatserver.net.wheel import TICK_SECONDS, Wheel


def test_an_item_is_called_within_a_tick_after_its_time() -> None:
    due: list[str] = []
    wheel: Wheel[str] = Wheel(due.append)
    wheel.sweep(100.0)
    wheel.schedule("a", 101.1)

    wheel.sweep(101.0)
    assert due == []
    wheel.sweep(101.1 + TICK_SECONDS)
    assert due == ["a"]


def test_a_time_that_has_passed_means_the_next_tick() -> None:
    due: list[str] = []
    wheel: Wheel[str] = Wheel(due.append)
    wheel.sweep(100.0)
    wheel.schedule("late", 3.0)

    wheel.sweep(100.0 + TICK_SECONDS)
    assert due == ["late"]


def test_items_come_in_the_order_of_their_times_after_a_long_stop() -> None:
    due: list[str] = []
    wheel: Wheel[str] = Wheel(due.append)
    wheel.sweep(100.0)
    wheel.schedule("third", 109.0)
    wheel.schedule("first", 101.0)
    wheel.schedule("second", 105.0)

    wheel.sweep(200.0)
    assert due == ["first", "second", "third"]


def test_an_item_scheduled_while_it_is_called_waits_for_a_later_tick() -> None:
    calls: list[float] = []

    def again(at: float) -> None:
        calls.append(at)
        wheel.schedule(at + 1.0, at + 1.0)

    wheel: Wheel[float] = Wheel(again)
    wheel.sweep(100.0)
    wheel.schedule(100.0, 100.0)
    wheel.sweep(101.0)

    assert calls == [100.0]
    wheel.sweep(102.0)
    assert calls == [100.0, 101.0]

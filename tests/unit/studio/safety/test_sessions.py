"""Sessions end, and wrong passwords make a client wait."""

from restune_diffusion.studio.safety.sessions import Attempts, Sessions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_ends_after_a_week_or_when_it_is_closed():
    clock = Clock()
    sessions = Sessions(clock)
    first, second = sessions.open(), sessions.open()
    assert first != second
    assert sessions.is_open(first)
    assert not sessions.is_open(first + "x")
    sessions.close(first)
    assert not sessions.is_open(first)
    clock.now += 7 * 24 * 3600 + 1
    assert not sessions.is_open(second)


def test_waits_double_after_five_wrong_passwords():
    clock = Clock()
    attempts = Attempts(clock)
    waits = []
    for _ in range(8):
        attempts.note_wrong("192.0.2.1")
        waits.append(attempts.wait("192.0.2.1"))
        clock.now += waits[-1]
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8]
    assert attempts.wait("192.0.2.2") == 0
    attempts.note_right("192.0.2.1")
    assert attempts.wait("192.0.2.1") == 0


def test_addresses_of_one_ipv6_network_are_one_client_and_all_share_a_rate():
    attempts = Attempts(Clock())
    for number in range(6):
        attempts.note_wrong(f"2001:db8::{number}")
    assert attempts.wait("2001:db8::ffff") == 2
    for number in range(10):
        attempts.note_wrong(f"192.0.2.{number}")
    assert attempts.wait("198.51.100.7") == 1

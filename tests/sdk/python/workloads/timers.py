"""Descriptors of the kernel's, timers, and System V's objects."""

import ctypes
import os
import select
import signal
import struct
import time

from .ground import WAIT_S_MAX, call, libc, same, until


def timerfds_keep_their_ticks_and_the_time_that_is_left():
    late = os.timerfd_create(time.CLOCK_MONOTONIC)
    os.timerfd_settime(late, initial=3600)
    while True:
        early = os.timerfd_create(time.CLOCK_MONOTONIC)
        os.timerfd_settime(early, initial=0.001)
        assert select.select([early], [], [], WAIT_S_MAX)[0], "no tick before the pause"
        left = os.timerfd_gettime(late)[0]
        yield
        assert select.select([early], [], [], 0)[0], "the tick that nobody had read is lost"
        same(os.read(early, 8), struct.pack("Q", 1), "ticks")
        assert left - 60 < os.timerfd_gettime(late)[0] <= left, f"{os.timerfd_gettime(late)} s are left of {left}"
        left = os.timerfd_gettime(late)[0]
        until(lambda: os.timerfd_gettime(late)[0] < left, "the timer to go on")
        os.timerfd_settime(early, initial=0.01, interval=0.01)
        for _ in range(3):
            assert select.select([early], [], [], WAIT_S_MAX)[0], "it does not tick when set anew"
            os.read(early, 8)
        os.close(early)


def a_periodic_timerfd_goes_on_after_a_tick_that_nobody_had_read():
    ticking = os.timerfd_create(time.CLOCK_MONOTONIC)
    os.timerfd_settime(ticking, initial=0.01, interval=0.01)
    while True:
        assert select.select([ticking], [], [], WAIT_S_MAX)[0], "no tick before the pause"
        yield
        assert select.select([ticking], [], [], 0)[0], "the tick that nobody had read is lost"
        for _ in range(4):
            assert select.select([ticking], [], [], WAIT_S_MAX)[0], "it does not tick any more"
            os.read(ticking, 8)
        same(os.timerfd_gettime(ticking)[1], 0.01, "the interval")


def timerfds_set_to_a_moment_fire_then_and_not_again():
    over, late = (os.timerfd_create(time.CLOCK_MONOTONIC) for _ in range(2))
    os.timerfd_settime(over, flags=os.TFD_TIMER_ABSTIME, initial=time.monotonic())
    os.read(over, 8)
    moment = time.monotonic() + 3600
    os.timerfd_settime(late, flags=os.TFD_TIMER_ABSTIME, initial=moment)
    while True:
        yield
        same(select.select([over], [], [], 0.1)[0], [], "what fired again")
        off = os.timerfd_gettime(late)[0] - (moment - time.monotonic())
        # The time that a pause and a resume take on a busy machine comes on top.
        assert -0.05 < off < WAIT_S_MAX, f"it will fire {off} s after its moment"


def an_eventfd_that_is_a_semaphore_stays_one():
    event = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    while True:
        os.eventfd_write(event, 3)
        yield
        same([os.eventfd_read(event) for _ in range(3)], [1, 1, 1], "units, one a read")
        same(select.select([event], [], [], 0)[0], [], "what is left")


def an_eventfd_and_an_epoll_keep_counts_and_interests():
    event = os.eventfd(0, os.EFD_NONBLOCK)
    read, write = os.pipe()
    quiet, _quiet_end = os.pipe()
    epoll = select.epoll()
    for each in (event, read, quiet):
        epoll.register(each, select.EPOLLIN)
    while True:
        os.eventfd_write(event, 7)
        os.write(write, b"x")
        yield
        same(sorted(epoll.poll(WAIT_S_MAX)), sorted([(event, select.EPOLLIN), (read, select.EPOLLIN)]), "what is ready")
        same(os.eventfd_read(event), 7, "the count")
        os.read(read, 1)
        same(epoll.poll(0), [], "what is ready afterwards")


def a_signalfd_has_the_signal_that_was_pending():
    signals = {signal.SIGUSR1, signal.SIGRTMIN + 3}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    mask = ctypes.create_string_buffer(struct.pack("Q", sum(1 << (each - 1) for each in signals)).ljust(128, b"\0"))
    signalfd = call(libc.signalfd(-1, mask, 0), "signalfd")
    while True:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGRTMIN + 3)
        yield
        found = set()
        while len(found) < 2:
            assert select.select([signalfd], [], [], WAIT_S_MAX)[0], f"only {found} pending"
            found.add(struct.unpack_from("I", os.read(signalfd, 128))[0])
        same(found, {int(each) for each in signals}, "signals")
        same(signal.sigpending(), set(), "what is pending afterwards")


def an_interval_timer_goes_on_firing():
    fired = [0]

    def handler(*_):
        fired[0] += 1

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    while True:
        yield
        before = fired[0]
        until(lambda: fired[0] > before + 2, "SIGALRM")
        same(signal.getitimer(signal.ITIMER_REAL)[1], 0.02, "the interval")


def posix_timers_go_on_firing():
    fired = [0]

    def handler(*_):
        fired[0] += 1

    signal.signal(signal.SIGUSR2, handler)
    timers = []
    for first, interval in ((20_000_000, 20_000_000), (None, 0)):
        event = ctypes.create_string_buffer(struct.pack("Pii", 0, signal.SIGUSR2, 0), 64)
        timer = ctypes.c_void_p()
        call(libc.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)), "timer_create")
        seconds = 0 if first else 3600
        spec = struct.pack("llll", 0, interval, seconds, first or 0)
        call(libc.timer_settime(timer, 0, ctypes.create_string_buffer(spec), None), "timer_settime")
        timers.append(timer)
    while True:
        yield
        before = fired[0]
        until(lambda: fired[0] > before + 2, "SIGUSR2")
        left = ctypes.create_string_buffer(32)
        call(libc.timer_gettime(timers[1], left), "timer_gettime")
        seconds = struct.unpack("llll", left.raw)[2]
        assert 3000 < seconds <= 3600, f"the timer of an hour has {seconds} s left"


def system_v_memory_messages_and_semaphores_are_kept():
    shm = call(libc.shmget(0x5711, 8192, 0o1600), "shmget")
    address = call(libc.shmat(shm, None, 0), "shmat")
    messages = call(libc.msgget(0x5712, 0o1600), "msgget")
    semaphores = call(libc.semget(0x5713, 2, 0o1600), "semget")
    call(libc.semctl(semaphores, 0, 16, 5), "semctl")  # SETVAL
    call(libc.semctl(semaphores, 1, 16, 3), "semctl")
    cycle = 0
    while True:
        cycle += 1
        ctypes.memmove(address, b"segment %d" % cycle, 9)
        call(libc.msgsnd(messages, struct.pack("l", 4) + b"message", 7, 0), "msgsnd")
        yield
        same((libc.shmget(0x5711, 0, 0), libc.msgget(0x5712, 0), libc.semget(0x5713, 0, 0)), (shm, messages, semaphores), "ids")
        same(ctypes.string_at(address, 9), b"segment %d" % cycle, "the segment")
        buffer = ctypes.create_string_buffer(64)
        same(libc.msgrcv(messages, buffer, 50, 4, 0o4000), 7, "the length of the message")
        same(buffer.raw[8:15], b"message", "the message")
        same([libc.semctl(semaphores, number, 12) for number in (0, 1)], [5, 3], "semaphores")  # GETVAL

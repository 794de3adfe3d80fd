"""Threads and processes."""

import ctypes
import os
import pathlib
import platform
import resource
import select
import signal
import struct
import subprocess
import threading
import time

from .ground import POLL_S, WAIT_S_MAX, Asked, call, child, libc, same, state_of, until


def nine_threads_go_on_counting_under_one_lock():
    counts, lock, total = [0] * 9, threading.Lock(), [0]

    def count(number):
        while True:
            with lock:
                counts[number] += 1
                total[0] += 1
            time.sleep(POLL_S)

    threads = [threading.Thread(target=count, args=(number,), daemon=True) for number in range(9)]
    for thread in threads:
        thread.start()
    ids = sorted(int(task) for task in os.listdir("/proc/self/task"))
    while True:
        yield
        with lock:
            before = list(counts)
            same(total[0], sum(counts), "what the lock protects")
        until(lambda: all(now > then for now, then in zip(counts, before)), "all nine threads to count on")
        same(sorted(int(task) for task in os.listdir("/proc/self/task")), ids, "thread ids")


def multiprocessing_keeps_its_queues_semaphores_and_shared_memory():
    import multiprocessing
    from multiprocessing import shared_memory

    context = multiprocessing.get_context("fork")
    memory = shared_memory.SharedMemory(create=True, size=1 << 20)
    questions, answers, unread = context.Queue(), context.Queue(), context.Queue()
    semaphore = context.Semaphore(1)

    def work(number):
        while True:
            value = questions.get()
            with semaphore:
                memory.buf[0] += 1
            answers.put((number, value * value))

    workers = [context.Process(target=work, args=(number,), daemon=True) for number in range(3)]
    for worker in workers:
        worker.start()
    handled = 0
    while True:
        unread.put("kept")
        until(lambda: not unread.empty(), "the queue's feeder")
        yield
        same(unread.get(timeout=WAIT_S_MAX), "kept", "what nobody had read")
        for value in range(6):
            questions.put(value)
        handled += 6
        squares = sorted(answers.get(timeout=WAIT_S_MAX)[1] for _ in range(6))
        same(squares, [0, 1, 4, 9, 16, 25], "answers")
        same(memory.buf[0], handled, "the count in shared memory")
        assert all(worker.is_alive() for worker in workers), "a worker ended"


def a_tree_of_45_processes_keeps_its_parents_groups_and_sessions():
    def leaf(number):
        if number % 3 == 0:
            os.setpgid(0, 0)
        os.execvp("sleep", ["sleep", "infinity"])

    def lead():
        os.setsid()
        for number in range(10):
            child(lambda: leaf(number))
        while True:
            signal.pause()

    own = os.getpid()
    for _ in range(4):
        child(lead)

    def tree():
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    found[int(entry)] = tuple(int(field) for field in state_of(entry)[1:4])
                except OSError:
                    continue
        family = {own}
        while more := {pid for pid, (parent, _, _) in found.items() if parent in family} - family:
            family |= more
        return {pid: found[pid] for pid in family}

    def shape():
        now = tree()
        return len(now), len({group for _, group, _ in now.values()}), len({session for _, _, session in now.values()})

    until(lambda: shape() == (45, 1 + 4 + 16, 5), "45 processes in 21 groups and 5 sessions")
    before = tree()
    while True:
        yield
        same(tree(), before, "the tree")


def a_zombie_is_kept_until_it_is_waited_for():
    while True:
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        until(lambda: state_of(pid)[0] == "Z", "a zombie")
        yield
        same(state_of(pid)[0], "Z", "its state")
        same(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 7, "its exit code")


def a_stopped_process_stays_stopped_until_it_is_continued():
    while True:
        read, write = os.pipe()

        def work():
            while True:
                os.write(write, b".")
                time.sleep(POLL_S)

        pid = child(work)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state_of(pid)[0] == "T", "it to stop")
        if select.select([read], [], [], 0)[0]:
            os.read(read, 65536)
        yield
        same(state_of(pid)[0], "T", "its state")
        same(select.select([read], [], [], 0)[0], [], "what it wrote while stopped")
        os.kill(pid, signal.SIGCONT)
        assert select.select([read], [], [], WAIT_S_MAX)[0], "it did not go on"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def a_pidfd_still_names_its_process():
    while True:
        pid = child(signal.pause)
        pidfd = os.pidfd_open(pid)
        yield
        same(select.select([pidfd], [], [], 0)[0], [], "a pidfd that says that it ended")
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        assert select.select([pidfd], [], [], WAIT_S_MAX)[0], "the pidfd did not see the end"
        same(os.waitid(os.P_PIDFD, pidfd, os.WEXITED).si_pid, pid, "who ended")
        os.close(pidfd)


def limits_niceness_umask_and_uid_are_as_they_were():
    resource.setrlimit(resource.RLIMIT_NOFILE, (123, 456))
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 21))
    os.nice(5)
    os.umask(0o027)
    while True:
        yield
        same(resource.getrlimit(resource.RLIMIT_NOFILE), (123, 456), "open files")
        same(resource.getrlimit(resource.RLIMIT_CORE), (1 << 20, 1 << 21), "core size")
        same(os.nice(0), 5, "niceness")
        same(os.umask(0o027), 0o027, "umask")
        same((os.getresuid(), os.getresgid()), ((1000,) * 3, (1000,) * 3), "uid and gid")


def a_seccomp_filter_of_the_programs_own_goes_on_filtering():
    number = {"x86_64": 110, "aarch64": 173}[platform.machine()]  # getppid

    def prepare():
        # load the number; equal? → errno 99, else allow
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 99), (0x06, 0, 0, 0x7FFF0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
        header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
        call(libc.prctl(38, 1, 0, 0, 0), "no new privileges")
        call(libc.prctl(22, 2, header), "seccomp")

    def answer():
        result = libc.syscall(number)
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return [result, ctypes.get_errno(), [line for line in lines if line.startswith(("Seccomp", "NoNewPrivs"))]]

    filtered = Asked(prepare, answer)
    before = filtered.ask()
    same(before[:2], [-1, 99], "the filter before any pause")
    while True:
        yield
        same(filtered.ask(), before, "the filter")


def sudo_works_and_what_it_started_still_does():
    started = subprocess.Popen(["sudo", "-n", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while True:
        started.stdin.write(b"asked\n")
        started.stdin.flush()
        same(started.stdout.readline(), b"asked\n", "what sudo's child answers")
        yield
        same(subprocess.check_output(["sudo", "-n", "id", "-u"]), b"0\n", "a new sudo")

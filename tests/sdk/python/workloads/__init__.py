"""Runs inside a sandbox: programs that hold something of the kernel's across a pause and look for it afterwards.

usage: python3 -m workloads run <function>, in the folder that has this package. Each program is a generator: what
precedes its first `yield` sets up, and what follows a `yield` checks, after one more pause. Those of `refused` hold what
keeps a sandbox from being paused. Names are sentences, since they are the names of the tests.
"""

from . import files, mounts, processes, programs, refused, services, sockets, timers
from .ground import AS_ROOT

__all__ = ["AS_ROOT", "KEPT", "PROGRAMS", "REFUSED"]


def programs_of(*modules):
    """The generators of these modules, by name, in the order of their lines."""
    named = [item for module in modules for item in vars(module).items()]
    return {name: value for name, value in named if getattr(getattr(value, "__code__", None), "co_flags", 0) & 0x20}


KEPT = programs_of(processes, sockets, files, timers, mounts, programs)
REFUSED = programs_of(refused)
BROUGHT = programs_of(services)
PROGRAMS = KEPT | REFUSED | BROUGHT

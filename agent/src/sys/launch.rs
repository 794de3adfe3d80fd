//! Starts a program the way vfork(2) does: until it has been executed, the child runs in the agent's own memory, on a stack
//! of its own, while the thread that starts it waits.
//!
//! A fork copies the agent's page tables and makes it pay a page fault for all that it writes afterwards, a third of what
//! the agent spends on a command. What runs in the child allocates nothing, takes no lock and makes raw system calls only:
//! glibc's own would tell a change of user to all threads of the agent.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Pid, Uid, set_dumpable_behavior};

/// What is executed.
#[derive(Debug)]
pub(crate) struct Program {
    /// Relative to the working directory that the child will have.
    pub(crate) path: CString,
    /// With its own name first.
    pub(crate) arguments: Vec<CString>,
    /// `NAME=value` each.
    pub(crate) environment: Vec<CString>,
}

/// Becomes true of the child between fork and exec, in this order.
#[derive(Debug)]
pub(crate) struct ChildSetup {
    /// Take fd 0, already the slave of a PTY, as the controlling terminal.
    pub(crate) controls_terminal: bool,
    pub(crate) oom_score_adj: i32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) cwd: CString,
}

const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Best effort, level 4: what a process has that never asked.
const IOPRIO_BEST_EFFORT_4: libc::c_int = (2 << 13) | 4;

/// What a script without a first line that names its interpreter is run by, as execvp(3) does.
const SHELL: &CStr = c"/bin/sh";

/// 16 bytes each, which is how a stack is aligned: 64 KiB, of which a few are ever touched.
const STACK_WORDS: usize = 4096;

thread_local! {
    // For one child after the other: each is done with it when its start returns.
    static STACK: RefCell<Box<[u128]>> = RefCell::new(vec![0; STACK_WORDS].into_boxed_slice());
}

/// What the child reads, and where it says why it failed. Everything in it is made before the child is.
struct Plan<'a> {
    program: &'a Program,
    arguments: Vec<*const c_char>,
    shell_arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    stdio: [BorrowedFd<'a>; 3],
    setup: &'a ChildSetup,
    oom_score_adj: String,
    groups: Vec<Gid>,
    errno: AtomicI32,
}

/// Starts `program` with these descriptors as 0, 1 and 2, in a session of its own, as `setup` says. Returns when it has
/// been executed, or with the reason why it was not.
pub(crate) fn launch(program: &Program, stdio: &[OwnedFd; 3], setup: &ChildSetup) -> io::Result<(Pid, OwnedFd)> {
    use std::os::fd::AsFd as _;
    let path = program.path.as_ptr();
    let rest = program.arguments.iter().skip(1).map(|word| word.as_ptr());
    let plan = Plan {
        program,
        arguments: pointers(program.arguments.iter().map(|word| word.as_ptr())),
        shell_arguments: pointers([SHELL.as_ptr(), path].into_iter().chain(rest)),
        environment: pointers(program.environment.iter().map(|word| word.as_ptr())),
        stdio: [stdio[0].as_fd(), stdio[1].as_fd(), stdio[2].as_fd()],
        setup,
        oom_score_adj: setup.oom_score_adj.to_string(),
        groups: setup.groups.iter().map(|gid| Gid::from_raw(*gid)).collect(),
        errno: AtomicI32::new(0),
    };
    let started = with_signals_blocked(|| start(&plan));
    // The child's change of user took this from the memory that it shared with us: until then nobody of its new user
    // could look into that, and from now on it is ours alone again.
    let _ = set_dumpable_behavior(DumpableBehavior::Dumpable);
    let (pid, pidfd) = started?;
    match plan.errno.load(Ordering::Acquire) {
        0 => Ok((pid, pidfd)),
        errno => {
            // It has ended; nobody else may meet it.
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            Err(io::Error::from_raw_os_error(errno))
        }
    }
}

/// With the null pointer that ends them.
fn pointers(words: impl Iterator<Item = *const c_char>) -> Vec<*const c_char> {
    words.chain([std::ptr::null()]).collect()
}

/// A handler that ran in the child would run in our memory.
fn with_signals_blocked<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: a sigset_t is plain data, and all zeroes is a valid value of it.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: writes the set that it is given.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: reads one live set and writes the other.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    let done = work();
    // SAFETY: reads a live set, the one that was in force.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    done
}

fn start(plan: &Plan<'_>) -> io::Result<(Pid, OwnedFd)> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let argument = std::ptr::from_ref(plan).cast_mut().cast::<c_void>();
    let mut pidfd: c_int = -1;
    let pid = STACK.with_borrow_mut(|stack| {
        // It grows downwards, from the end of the slice.
        let top = stack.as_mut_ptr_range().end.cast::<c_void>();
        // SAFETY: the child has this stack to itself until it executes or ends, which is before the call returns
        // (CLONE_VFORK); `plan` and `pidfd` live as long. It runs `child`, which is made for sharing our memory.
        unsafe { libc::clone(child, top, flags, argument, &raw mut pidfd) }
    });
    let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// The child's whole life, if it comes to an end here.
extern "C" fn child(argument: *mut c_void) -> c_int {
    // SAFETY: `start` passes a plan that outlives the child's use of our memory, and changes nothing in it meanwhile.
    let plan = unsafe { &*argument.cast::<Plan<'_>>() };
    let Err(errno) = become_program(plan);
    plan.errno.store(errno.raw_os_error(), Ordering::Release);
    127
}

fn become_program(plan: &Plan<'_>) -> Result<Infallible, Errno> {
    let [stdin, stdout, stderr] = plan.stdio;
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    rustix::process::setsid()?;
    if plan.setup.controls_terminal {
        rustix::process::ioctl_tiocsctty(stdin)?;
    }
    set_scheduling(plan.oom_score_adj.as_bytes());
    rustix::thread::set_thread_groups(&plan.groups)?;
    let gid = Gid::from_raw(plan.setup.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    let uid = Uid::from_raw(plan.setup.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    rustix::process::chdir(plan.setup.cwd.as_c_str())?;
    reset_signals_of_child();
    match execute(plan.program.path.as_c_str(), &plan.arguments, &plan.environment) {
        Errno::NOEXEC => Err(execute(SHELL, &plan.shell_arguments, &plan.environment)),
        errno => Err(errno),
    }
}

/// Returns only when it fails. Both lists end with a null pointer.
fn execute(path: &CStr, arguments: &[*const c_char], environment: &[*const c_char]) -> Errno {
    // SAFETY: a terminated path and two lists of terminated words that end with a null pointer, all alive.
    unsafe { libc::syscall(libc::SYS_execve, path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The agent ignores SIGPIPE, and everything is blocked now; a program begins with neither.
fn reset_signals_of_child() {
    // The kernel's struct sigaction, all zeroes: default handler, no flags, no mask.
    let default = [0u64; 4];
    // SAFETY: the kernel reads one live sigaction and writes nothing; the handlers of a child that shares our memory are
    // still its own.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, libc::SIGPIPE, &raw const default, std::ptr::null_mut::<u64>(), size_of::<u64>()) };
    let none = 0u64;
    // SAFETY: the kernel reads one live set of 64 bits and writes nothing.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, std::ptr::null_mut::<u64>(), size_of::<u64>()) };
}

/// Undoes whatever the agent's own priority is. Best effort: a sandbox may deny any of it, and the process still runs.
fn set_scheduling(oom_score_adj: &[u8]) {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", flags, rustix::fs::Mode::empty()) {
        let _ = rustix::io::write(&file, oom_score_adj);
    }
    let _ = rustix::process::setpriority_process(None, 0);
    // SAFETY: takes three integers and touches no memory.
    unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_BEST_EFFORT_4) };
}

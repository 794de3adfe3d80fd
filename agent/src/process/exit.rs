//! How a process ended, in the words of envd (which are Go's).

use rustix::process::WaitStatus;

const CORE_DUMPED: i32 = 0x80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal { number: i32, core_dumped: bool },
}

impl Exit {
    /// None for a status that is no end: a stop or a continuation.
    pub(crate) fn from_status(status: WaitStatus) -> Option<Exit> {
        if let Some(code) = status.exit_status() {
            return Some(Exit::Code(code));
        }
        let number = status.terminating_signal()?;
        Some(Exit::Signal { number, core_dumped: status.as_raw() & CORE_DUMPED != 0 })
    }

    /// -1 after a signal.
    pub(crate) fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal { .. } => -1,
        }
    }

    pub(crate) fn is_normal(self) -> bool {
        matches!(self, Exit::Code(_))
    }

    pub(crate) fn status(self) -> String {
        match self {
            Exit::Code(code) => format!("exit status {code}"),
            Exit::Signal { number, core_dumped } => {
                format!("signal: {}{}", signal_name(number), if core_dumped { " (core dumped)" } else { "" })
            }
        }
    }
}

fn signal_name(number: i32) -> String {
    let name = match number {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        24 => "CPU time limit exceeded",
        25 => "file size limit exceeded",
        31 => "bad system call",
        _ => return format!("signal {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_reads_as_envd_writes_it() {
        let killed = Exit::Signal { number: 9, core_dumped: false };
        assert_eq!((killed.code(), killed.is_normal(), killed.status().as_str()), (-1, false, "signal: killed"));
        assert_eq!(Exit::Code(3).status(), "exit status 3");
        assert_eq!(Exit::Signal { number: 11, core_dumped: true }.status(), "signal: segmentation fault (core dumped)");
        assert_eq!(Exit::Signal { number: 40, core_dumped: false }.status(), "signal: signal 40");
    }
}

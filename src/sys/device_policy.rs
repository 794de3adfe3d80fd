//! Which devices a cgroup v2 may open: a BPF program of our own, since v2 has no file for it.

use super::checked;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Allows opening one character device, or all minors of a major.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CharDevice {
    /// Which driver.
    pub major: u32,
    /// Which device; `None` for all of the driver's.
    pub minor: Option<u32>,
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_DEVCG_DEV_CHAR: i32 = 2;

const LOAD_WORD: u8 = 0x61;
const AND_WORD: u8 = 0x54;
const SKIP_UNLESS_EQUAL: u8 = 0x55;
const MOVE: u8 = 0xb7;
const EXIT: u8 = 0x95;

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    prog_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Denies every device but `allowed` to the processes of the cgroup, now and after; it lasts as long as the cgroup.
pub fn restrict(cgroup: BorrowedFd<'_>, allowed: &[CharDevice]) -> io::Result<()> {
    let program = load(&compile(allowed)?)?;
    let attributes = AttachAttributes {
        target: u32::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?,
        program: u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attributes` outlives the call, and the size is its own.
    checked(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attributes, size_of::<AttachAttributes>()) })?;
    Ok(())
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadAttributes::default()
    };
    // SAFETY: `attributes` and what it points to outlive the call, and the size is its own.
    let fd = checked(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<LoadAttributes>()) })?;
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The context is `{ u32 access << 16 | type, u32 major, u32 minor }`; the result 1 allows and 0 denies.
fn compile(allowed: &[CharDevice]) -> io::Result<Vec<Instruction>> {
    let word = |value: u32| i32::try_from(value).map_err(io::Error::other);
    let mut program = vec![load_word(2, 0), op(AND_WORD, 2, 0xffff), load_word(3, 4), load_word(4, 8)];
    for device in allowed {
        let mut tests = vec![(2, BPF_DEVCG_DEV_CHAR), (3, word(device.major)?)];
        if let Some(minor) = device.minor {
            tests.push((4, word(minor)?));
        }
        for (position, (register, value)) in tests.iter().enumerate() {
            // Over the remaining tests, `r0 = 1` and `exit`.
            let skipped = i16::try_from(tests.len() - position - 1 + 2).map_err(io::Error::other)?;
            program.push(Instruction { offset: skipped, ..op(SKIP_UNLESS_EQUAL, *register, *value) });
        }
        program.extend([op(MOVE, 0, 1), op(EXIT, 0, 0)]);
    }
    program.extend([op(MOVE, 0, 0), op(EXIT, 0, 0)]);
    Ok(program)
}

fn op(code: u8, register: u8, immediate: i32) -> Instruction {
    Instruction { code, registers: register, offset: 0, immediate }
}

/// Loads a word of the context, which is in register 1.
fn load_word(register: u8, offset: i16) -> Instruction {
    Instruction { code: LOAD_WORD, registers: (1 << 4) | register, offset, immediate: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do with the program, for the few instructions that we use.
    fn run(program: &[Instruction], kind: u32, major: u32, minor: u32) -> u32 {
        let context = [kind, major, minor];
        let mut registers = [0u32; 5];
        let mut at = 0;
        loop {
            let Instruction { code, registers: which, offset, immediate } = program[at];
            let target = usize::from(which & 0xf);
            at += 1;
            match code {
                LOAD_WORD => registers[target] = context[usize::try_from(offset).unwrap() / 4],
                AND_WORD => registers[target] &= immediate.cast_unsigned(),
                SKIP_UNLESS_EQUAL if registers[target] != immediate.cast_unsigned() => at += usize::try_from(offset).unwrap(),
                SKIP_UNLESS_EQUAL => {}
                MOVE => registers[target] = immediate.cast_unsigned(),
                EXIT => return registers[0],
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn only_the_listed_character_devices_are_allowed() {
        let null = CharDevice { major: 1, minor: Some(3) };
        let terminals = CharDevice { major: 136, minor: None };
        let program = compile(&[null, terminals]).unwrap();
        let (block, char, read) = (1, 2, 2 << 16);
        assert_eq!(run(&program, read | char, 1, 3), 1);
        assert_eq!(run(&program, read | char, 136, 77), 1);
        assert_eq!(run(&program, read | char, 1, 1), 0, "/dev/mem");
        assert_eq!(run(&program, read | block, 1, 3), 0);
        assert_eq!(run(&program, read | block, 7, 0), 0, "a loop device");
    }

    #[test]
    fn the_kernel_takes_the_program() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        load(&compile(&[CharDevice { major: 1, minor: Some(3) }]).unwrap()).unwrap();
    }
}

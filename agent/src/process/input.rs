//! The way of input to a process: a pipe that may be closed, a PTY, or none.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::unix::pipe;
use tokio::sync::Mutex;

use super::spawn::{Size, resize};

#[derive(Debug)]
pub(crate) enum Input {
    /// None once closed.
    Pipe(Mutex<Option<pipe::Sender>>),
    /// Started with `stdin: false`.
    Null,
    Pty {
        master: Arc<AsyncFd<OwnedFd>>,
        writing: Mutex<()>,
    },
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error("stdin not enabled or closed")]
    NoStdin,
    #[error("tty assigned to process; input should be written to the pty, not the stdin")]
    StdinOfPty,
    #[error("tty not assigned to process")]
    NoPty,
    #[error("cannot close stdin for PTY process; send Ctrl+D (0x04) instead")]
    CloseOfPty,
    #[error("the process does not take the input: {0}")]
    Write(#[from] io::Error),
}

impl Input {
    pub(super) fn pipe(stdin: OwnedFd) -> io::Result<Input> {
        rustix::io::ioctl_fionbio(&stdin, true)?;
        Ok(Input::Pipe(Mutex::new(Some(pipe::Sender::from_owned_fd(stdin)?))))
    }

    pub(super) fn pty(master: Arc<AsyncFd<OwnedFd>>) -> Input {
        Input::Pty { master, writing: Mutex::new(()) }
    }

    /// Returns when the process's pipe has taken all of it. Writers take turns, whole inputs at a time.
    ///
    /// Not cancel-safe: a caller that gives up may leave a part of its bytes written.
    pub(crate) async fn write_stdin(&self, bytes: &[u8]) -> Result<(), InputError> {
        match self {
            Input::Pipe(pipe) => match pipe.lock().await.as_mut() {
                Some(pipe) => Ok(pipe.write_all(bytes).await?),
                None => Err(InputError::NoStdin),
            },
            Input::Null => Err(InputError::NoStdin),
            Input::Pty { .. } => Err(InputError::StdinOfPty),
        }
    }

    /// As [`Input::write_stdin`], for a PTY.
    pub(crate) async fn write_pty(&self, bytes: &[u8]) -> Result<(), InputError> {
        let Input::Pty { master, writing } = self else { return Err(InputError::NoPty) };
        let _turn = writing.lock().await;
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = master.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, rest)?)).await?;
            rest = &rest[written..];
        }
        Ok(())
    }

    /// The process reads an end of file after what was written. Closing twice is fine.
    pub(crate) async fn close(&self) -> Result<(), InputError> {
        match self {
            Input::Pipe(pipe) => {
                pipe.lock().await.take();
                Ok(())
            }
            Input::Null => Ok(()),
            Input::Pty { .. } => Err(InputError::CloseOfPty),
        }
    }

    pub(crate) fn resize(&self, size: Size) -> Result<(), InputError> {
        match self {
            Input::Pty { master, .. } => Ok(resize(master.get_ref().as_fd(), size)?),
            Input::Pipe(_) | Input::Null => Err(InputError::NoPty),
        }
    }
}

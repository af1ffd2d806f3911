//! The terminal of the person who uses a guest's shell.
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// How soon a line of the guest shows.
const INTERVAL: Duration = Duration::from_millis(20);
/// How often the end of the input is repeated.
const AGAIN: Duration = Duration::from_millis(500);
/// What a person types to leave a shell: the guest's terminal takes it for the end of the input.
const END_OF_INPUT: &[u8] = b"\x04";

/// Standard input and output, in raw mode so that every key reaches the guest; restored when dropped.
pub(super) struct Terminal {
    /// The settings to go back to; `None` when the input is no terminal.
    before: Option<Termios>,
    at_end: bool,
}

impl Terminal {
    pub(super) fn enter() -> io::Result<Self> {
        let input = io::stdin();
        if !isatty(input.as_fd()) {
            return Ok(Self { before: None, at_end: false });
        }
        let before = tcgetattr(&input)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Flush, &raw)?;
        Ok(Self { before: Some(before), at_end: false })
    }

    /// What was typed, which is nothing most of the time.
    pub(super) fn keys(&mut self) -> io::Result<Vec<u8>> {
        if self.at_end {
            // Said again and again: a program of the guest that changes its terminal's mode loses what came before.
            std::thread::sleep(AGAIN);
            return Ok(END_OF_INPUT.to_vec());
        }
        let input = io::stdin();
        let timeout = Timespec { tv_sec: 0, tv_nsec: INTERVAL.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        // Not through the standard library's buffer: what it holds back, `poll` does not tell of.
        let mut keys = vec![0; 1024];
        let length = rustix::io::read(&input, &mut keys)?;
        keys.truncate(length);
        if length == 0 {
            self.at_end = true;
            keys.extend_from_slice(END_OF_INPUT);
        }
        Ok(keys)
    }
}

/// Shows what the guest wrote.
pub(super) fn show(text: &str) -> io::Result<()> {
    let mut output = io::stdout();
    output.write_all(text.as_bytes())?;
    output.flush()
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // Nothing better can be done about a terminal that went away.
            let _ = tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }
}

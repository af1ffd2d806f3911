//! The channel from the back end to the front end (vhost-user text, "Back-end message types").

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::Message;
use crate::{sys, warn_limited};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;
/// How often [`ConfigNotifier::flush`] looks.
const PACE: Duration = Duration::from_millis(1);

/// Tells the front end that the configuration space changed, so that the guest's driver reads it again: the new size
/// of a disk, the new target of a balloon.
///
/// This goes out only while a driver uses the device: QEMU's `vhost-user-test-device-pci` (11.1) ends by a segmentation
/// fault when it comes while the guest is paused, or has no driver yet. What was not sent then is sent when the first
/// ring starts.
///
/// Clones share the channel, which comes and goes with the front end.
#[derive(Clone, Debug, Default)]
pub struct ConfigNotifier(Arc<Mutex<Channel>>);

#[derive(Debug, Default)]
struct Channel {
    stream: Option<UnixStream>,
    /// A driver uses the device.
    running: bool,
    /// A notification waits for that.
    is_due: bool,
    /// The front end was waited for in vain, and has not read since.
    is_deaf: bool,
    sent: u64,
}

impl ConfigNotifier {
    /// Sends the notification, without waiting for an answer: some front ends serve this channel only now and then. One
    /// that is not read yet does for this, too.
    ///
    /// `Ok(false)` when no driver can be told now, or the front end never gave a channel; it is told when it starts or
    /// goes on. Fails when the front end has closed its end.
    pub fn notify(&self) -> io::Result<bool> {
        let mut channel = self.lock();
        channel.is_due = true;
        channel.send()
    }

    /// Waits until the front end has read what was sent, but no longer than `limit`; whether it has. A front end that was
    /// waited for in vain is not waited for again until it has read.
    ///
    /// Front ends read this channel in the thread that also pauses the guest. What they have not read by then is what
    /// QEMU dies of, so who asked for a change should hear that it is done only afterwards.
    pub fn flush(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        // The lock is not held while it sleeps: the front end may send a message that needs it before it reads.
        while !self.lock().is_read()? {
            if self.lock().is_deaf || Instant::now() >= deadline {
                self.lock().is_deaf = true;
                return Ok(false);
            }
            thread::sleep(PACE);
        }
        self.lock().is_deaf = false;
        Ok(true)
    }

    /// How many notifications were sent.
    pub fn sent(&self) -> u64 {
        self.lock().sent
    }

    /// Takes over the channel of a new front end, or forgets it.
    pub(super) fn set(&self, stream: Option<UnixStream>) {
        let mut channel = self.lock();
        (channel.stream, channel.is_deaf) = (stream, false);
    }

    /// A driver uses the device, or does not any more.
    pub(super) fn set_running(&self, running: bool) {
        let mut channel = self.lock();
        channel.running = running;
        if let Err(error) = channel.send() {
            warn_limited!("The front end cannot be told that the configuration has changed: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Channel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Channel {
    /// Sends what is due if it can be sent now.
    fn send(&mut self) -> io::Result<bool> {
        let Some(stream) = self.stream.as_ref().filter(|_| self.running && self.is_due) else {
            return Ok(false);
        };
        if self.is_read()? {
            Message::new(CONFIG_CHANGE_MSG, []).send(stream)?;
            self.sent += 1;
            self.is_deaf = false;
        }
        self.is_due = false;
        Ok(true)
    }

    /// Whether the front end has nothing left to read.
    fn is_read(&self) -> io::Result<bool> {
        self.stream.as_ref().map_or(Ok(true), |stream| Ok(sys::unread_bytes(stream)? == 0))
    }
}

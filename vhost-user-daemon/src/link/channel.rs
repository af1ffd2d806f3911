//! The channel from the back end to the front end (vhost-user text, "Back-end message types").
//!
//! QEMU's `vhost-user-test-device-pci` (11.1) ends by a segmentation fault when `CONFIG_CHANGE_MSG` comes while the guest is
//! paused or no driver uses the device. Not to send it then is not enough: QEMU reads this channel in its main loop, and
//! what was sent to a running device may be read when that has been stopped.
//!
//! So the message goes to QEMU in two parts. It waits for the rest of what it has begun to read, under the lock that it
//! needs to stop or start a device. Once the first byte is read, nothing can change any more, and all that was changed
//! before is known here, as QEMU stops a ring by a message that it awaits the answer of. The rest makes the message the
//! one that was meant, or, if the device was stopped meanwhile, one that QEMU does not know and does nothing about but
//! say so.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::wire::Message;
use crate::{sys, warn_limited};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;
/// No message: the highest number that begins with the same byte.
const VOID_MSG: u32 = u32::from_le_bytes([CONFIG_CHANGE_MSG as u8, 0xff, 0xff, 0x7f]);
/// How often it is looked whether the front end has read, at first and at last. QEMU stands still meanwhile.
const PACE: [Duration; 2] = [Duration::from_micros(50), Duration::from_millis(2)];

/// Tells the front end that the configuration space changed, so that the guest's driver reads it again: the new size
/// of a disk, the new target of a balloon.
///
/// This goes out only while a driver uses the device. What was not sent then is sent when the first ring starts.
///
/// Clones share the channel, which comes and goes with the front end.
#[derive(Clone, Debug, Default)]
pub struct ConfigNotifier(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    channel: Mutex<Channel>,
    /// Something of the channel is another than before.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Channel {
    stream: Option<Arc<UnixStream>>,
    /// A driver uses the device.
    running: bool,
    /// The front end waits for the rest of a message when it has read the first part.
    in_parts: bool,
    /// A notification is to be sent.
    is_due: bool,
    sent: u64,
}

impl ConfigNotifier {
    /// Has the notification sent. Waits for nothing: some front ends serve this channel only now and then. One that is not
    /// read yet does for this, too, and if no driver uses the device it is told when one does.
    pub fn notify(&self) {
        self.change(|channel| channel.is_due = true);
    }

    /// How many notifications were sent.
    pub fn sent(&self) -> u64 {
        self.0.lock().sent
    }

    /// Takes over the channel of a new front end.
    pub(super) fn open(&self, stream: UnixStream) -> io::Result<()> {
        let stream = Arc::new(stream);
        let (shared, its) = (Arc::clone(&self.0), Arc::clone(&stream));
        self.change(|channel| channel.stream = Some(stream));
        thread::Builder::new().name("notifier".into()).spawn(move || {
            if let Err(error) = shared.serve(&its) {
                warn_limited!("The front end cannot be told that the configuration has changed: {error}");
            }
        })?;
        Ok(())
    }

    /// Forgets the channel.
    pub(super) fn close(&self) {
        self.change(|channel| (channel.stream, channel.running) = (None, false));
    }

    /// A driver uses the device. `in_parts`: the front end waits for the rest of a message when it has read a part.
    pub(super) fn start(&self, in_parts: bool) {
        self.change(|channel| (channel.running, channel.in_parts) = (true, in_parts));
    }

    /// No driver uses the device any more. To be called before the front end hears that it was stopped.
    pub(super) fn stop(&self) {
        self.change(|channel| channel.running = false);
    }

    fn change(&self, change: impl FnOnce(&mut Channel)) {
        change(&mut self.0.lock());
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Channel> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is due until the channel is another one, or closed.
    fn serve(&self, stream: &Arc<UnixStream>) -> io::Result<()> {
        while let Some(in_parts) = self.wait_due(stream) {
            let message = Message::new(CONFIG_CHANGE_MSG, []).to_bytes();
            let (first, rest) = message.split_at(usize::from(in_parts));
            Message::send_part(stream, first)?;
            if !self.wait_read(stream)? {
                break;
            }
            let mut channel = self.lock();
            if channel.running {
                channel.is_due = false;
                channel.sent += 1;
                Message::send_part(stream, rest)?;
            } else if in_parts {
                let void = Message::new(VOID_MSG, []).to_bytes();
                // It may have closed the channel.
                let _ = Message::send_part(stream, &void[first.len()..]);
            }
        }
        Ok(())
    }

    /// Waits until something is to be sent; `None` if this channel is not the one any more.
    fn wait_due(&self, stream: &Arc<UnixStream>) -> Option<bool> {
        let mut channel = self.lock();
        while channel.has(stream) {
            if channel.running && channel.is_due {
                return Some(channel.in_parts);
            }
            channel = self.changed.wait(channel).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Waits until the front end has read all; `false` if this channel is not the one any more.
    fn wait_read(&self, stream: &Arc<UnixStream>) -> io::Result<bool> {
        let [mut pace, longest] = PACE;
        while sys::unread_bytes(&**stream)? > 0 {
            if !self.lock().has(stream) {
                return Ok(false);
            }
            thread::sleep(pace);
            pace = longest.min(2 * pace);
        }
        Ok(true)
    }
}

impl Channel {
    fn has(&self, stream: &Arc<UnixStream>) -> bool {
        self.stream.as_ref().is_some_and(|own| Arc::ptr_eq(own, stream))
    }
}

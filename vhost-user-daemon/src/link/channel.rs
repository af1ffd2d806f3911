//! The channel from the back end to the front end (vhost-user text, "Back-end message types").

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use super::wire::Message;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;

/// Tells the front end that the configuration space changed, so that the guest's driver reads it again: the new size
/// of a disk, the new target of a balloon.
///
/// Clones share the channel, which comes and goes with the front end.
#[derive(Clone, Debug, Default)]
pub struct ConfigNotifier(Arc<Mutex<Option<UnixStream>>>);

impl ConfigNotifier {
    /// Sends the notification, without waiting for an answer: some front ends serve this channel only now and then.
    ///
    /// `Ok(false)` when no front end is there, or it never gave a channel; the driver will read the new configuration
    /// when it starts. Fails when the front end does not read its channel.
    pub fn notify(&self) -> io::Result<bool> {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(false),
            Some(stream) => Message::new(CONFIG_CHANGE_MSG, []).send(stream).map(|()| true),
        }
    }

    /// Takes over the channel of a new front end, or forgets it.
    pub(super) fn set(&self, stream: Option<UnixStream>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

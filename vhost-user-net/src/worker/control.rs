//! The control queue: what the driver wants to receive, and how (virtio 1.3 text, section 5.1.6.5).

use std::num::NonZeroU64;
use std::time::Instant;

use vhost_user_daemon::throttle::{Limits, Rate, Throttle};
use vhost_user_daemon::{Chain, Ring};

use crate::control::{ACK_ERROR, ACK_OK, Command, MAX_LEN, parse};
use crate::device::Nic;
use crate::features::Features;

/// Commands carried out before data has its turn.
const BUDGET: usize = 16;

/// Commands in a second: to switch offloads or queues takes locks that all interfaces of the host share. A driver sends
/// some when the interface is brought up, and then hardly any.
pub(super) const LIMITS: Limits =
    Limits { bytes: None, operations: Some(Rate { per_second: HUNDRED, burst: HUNDRED }) };

const HUNDRED: NonZeroU64 = NonZeroU64::new(100).unwrap();

/// Carries out the commands in `ring`, and says whether there were any. Fails with the time when there may be more.
pub(super) fn serve(ring: &mut Ring, nic: &Nic, throttle: &mut Throttle) -> Result<bool, Instant> {
    let mut any = false;
    let mut limit = Ok(());
    for _ in 0..BUDGET {
        let mut chain = Chain::default();
        let Some(followed) = ring.batch().and_then(|mut batch| batch.pop(&mut chain)) else { break };
        limit = throttle.admit(0, Instant::now());
        if limit.is_err() {
            ring.unpop(1);
            break;
        }
        let done = followed.is_ok() && chain.take_last_byte().is_ok() && carry_out(&chain, nic);
        // Also of a chain that cannot be followed, the last byte may be known.
        let written = chain.write_last_byte(if done { ACK_OK } else { ACK_ERROR }, ring.dirty_log());
        ring.complete(chain.head(), written.into());
        any = true;
    }
    ring.publish();
    limit.map(|()| any)
}

fn carry_out(chain: &Chain, nic: &Nic) -> bool {
    let len = chain.readable_len() as usize;
    if len > MAX_LEN {
        return false;
    }
    let mut bytes = vec![0; len];
    chain.source().read(&mut bytes);
    let Ok(command) = parse(&bytes) else { return false };
    if !nic.acked().has(command.feature()) {
        return false;
    }
    match command {
        Command::Pairs(pairs) => nic.set_active_pairs(pairs),
        Command::Offloads(bits) => nic.set_receivable(Features(bits)),
        Command::AnnounceAck => {
            nic.announced();
            true
        }
        _ => nic.update_filter(|filter| filter.apply(&command)),
    }
}

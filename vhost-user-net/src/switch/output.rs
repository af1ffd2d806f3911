//! Where a frame leaves the switch, locked for the thread that has some.

use std::sync::{Arc, MutexGuard};

use vhost_user_daemon::Source;

use super::member::{Lane, Member};
use super::uplink::{Uplink, UplinkLane};
use super::{NO_VLAN, PortOptions};
use crate::ethernet::{self, ADDRESSES_LEN, START_LEN, Start, TAG_LEN};
use crate::offload::checksum;
use crate::offload::segment::Segments;
use crate::receive::MAX_FRAME;
use crate::vnet::{FLAG_NEEDS_CSUM, GSO_NONE, Offloads, VnetHeader};

/// What is behind a port.
pub(super) enum Output {
    /// A guest.
    Member(Arc<Member>),
    /// The outside.
    Uplink(Arc<Uplink>),
}

/// An output in the hands of one thread.
pub(super) enum Locked<'a> {
    Member(&'a Member, MutexGuard<'a, Lane>),
    Uplink(UplinkLane<'a>),
}

/// A frame inside the switch.
#[derive(Clone, Copy)]
pub(super) struct Frame<'a> {
    /// What is left undone in it.
    pub header: VnetHeader,
    /// Its beginning.
    pub start: Start,
    /// All of it.
    pub bytes: Source<'a>,
    /// The VLAN that it belongs to.
    pub vlan: u16,
}

/// Private memory for frames that have to be changed before they leave.
pub(super) struct Scratch(Box<[u8]>);

impl Default for Scratch {
    fn default() -> Self {
        Self(vec![0; MAX_FRAME + TAG_LEN].into())
    }
}

impl Output {
    /// Locks the output; `None` if nothing can leave here. Frames with the same `hint` keep their order.
    pub(super) fn lock(&self, hint: usize) -> Option<Locked<'_>> {
        match self {
            Self::Member(member) => {
                let mut lane = member.lane(hint)?;
                lane.begin();
                Some(Locked::Member(member, lane))
            }
            Self::Uplink(uplink) => Some(Locked::Uplink(uplink.lock())),
        }
    }
}

impl Locked<'_> {
    /// Lets a frame leave, with or without a tag as the port wants it, and with what its receiver cannot do done. Returns
    /// how many it has become.
    pub(super) fn put(&mut self, frame: &Frame<'_>, options: &PortOptions, scratch: &mut Scratch) -> usize {
        let Frame { mut header, start, mut bytes, vlan } = *frame;
        let wants_tag = options.vlan.is_none() && vlan != NO_VLAN;
        let tagged = start.with_tag(vlan);
        let pieces = match (start.is_tagged() && start.vlan() != NO_VLAN, wants_tag) {
            (true, false) => {
                bytes.skip(ADDRESSES_LEN + TAG_LEN);
                shift(&mut header, -(TAG_LEN as i16));
                [Source::new(&tagged[..ADDRESSES_LEN]), bytes]
            }
            (false, true) => {
                // A tag that only has a priority is replaced.
                let had = if start.is_tagged() { TAG_LEN } else { 0 };
                bytes.skip(ADDRESSES_LEN + had);
                shift(&mut header, (TAG_LEN - had) as i16);
                [Source::new(&tagged), bytes]
            }
            _ => {
                // What was looked at is what leaves, whatever the guest has made of it since.
                let looked_at = &start.bytes()[..bytes.len().min(START_LEN)];
                bytes.skip(looked_at.len());
                return self.put_pieces(&header, start.bytes(), [Source::new(looked_at), bytes], scratch);
            }
        };
        // It is not the frame any more that was checked when it came.
        let len = pieces[0].len() + pieces[1].len();
        if len < ethernet::HEADER_LEN || header.check(len).is_err() {
            self.refuse();
            return 1;
        }
        self.put_pieces(&header, &start_of(pieces), pieces, scratch)
    }

    /// Lets a frame leave that consists of `pieces` and begins with `start`.
    fn put_pieces(
        &mut self,
        header: &VnetHeader,
        start: &[u8; START_LEN],
        pieces: [Source<'_>; 2],
        scratch: &mut Scratch,
    ) -> usize {
        if self.receivable().contains(header.needs(start)) {
            self.send(header, start, pieces);
            return 1;
        }
        self.send_done(header, pieces, scratch).unwrap_or_else(|| {
            self.refuse();
            1
        })
    }

    /// Does in software what is left undone, and returns how many frames it has become. `None` if that is not possible.
    fn send_done(
        &mut self,
        header: &VnetHeader,
        pieces: [Source<'_>; 2],
        scratch: &mut Scratch,
    ) -> Option<usize> {
        let mut len = 0;
        for mut piece in pieces {
            len += piece.read(&mut scratch.0[len..]);
        }
        let whole = scratch.0.get_mut(..len)?;
        if header.gso_type == GSO_NONE {
            checksum::complete(whole, header).ok()?;
            self.send_whole(&[], whole);
            return Some(1);
        }
        let mut segments = Segments::new(whole, header).ok()?;
        let mut count = 0;
        while let Some((headers, payload)) = segments.next_parts() {
            self.send_whole(headers, payload);
            count += 1;
        }
        Some(count)
    }

    /// Sends a frame in two parts, in which nothing is left undone.
    fn send_whole(&mut self, front: &[u8], rest: &[u8]) {
        let pieces = [Source::new(front), Source::new(rest)];
        self.send(&VnetHeader::default(), &start_of(pieces), pieces);
    }

    fn receivable(&self) -> Offloads {
        match self {
            Self::Member(_, lane) => lane.receivable(),
            Self::Uplink(lane) => lane.receivable(),
        }
    }

    fn send(&mut self, header: &VnetHeader, start: &[u8; START_LEN], pieces: [Source<'_>; 2]) {
        match self {
            Self::Member(_, lane) => lane.receive(header, start, pieces),
            Self::Uplink(lane) => lane.send(header, pieces),
        }
    }

    fn refuse(&mut self) {
        match self {
            Self::Member(_, lane) => lane.refuse(),
            Self::Uplink(lane) => lane.refuse(),
        }
    }

    /// Hands over what was put.
    pub(super) fn end(&mut self) {
        match self {
            Self::Member(member, lane) => lane.end(member.counters()),
            Self::Uplink(lane) => lane.end(),
        }
    }
}

/// The first bytes of a frame that consists of `pieces`.
fn start_of(pieces: [Source<'_>; 2]) -> [u8; START_LEN] {
    let mut start = [0; START_LEN];
    let mut read = 0;
    for mut piece in pieces {
        read += piece.read(&mut start[read..]);
    }
    start
}

/// Adjusts offsets in a frame that has become longer or shorter at its beginning.
fn shift(header: &mut VnetHeader, by: i16) {
    if header.flags & FLAG_NEEDS_CSUM != 0 {
        header.csum_start = header.csum_start.get().saturating_add_signed(by).into();
    }
    if header.gso_type != GSO_NONE {
        header.hdr_len = header.hdr_len.get().saturating_add_signed(by).into();
    }
}

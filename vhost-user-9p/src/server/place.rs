//! Which thread a request is executed by.
//!
//! A hand-over to another thread and back costs 10 to 20 us, most requests take less than 2. So the thread that has the
//! queue executes what cannot keep it waiting, and hands over:
//!
//! | request | when |
//! |---|---|
//! | any | the file system is on another machine, or is another process |
//! | Tfsync | unless the file system is in memory |
//! | Tread | what is read is not in the page cache |
//! | Tread, Twrite of 64 KiB or more | others wait behind it: copying then uses another core |
//! | what may have to look at the disk, or to write a journal | one that did was slow, a moment ago |
//!
//! A lock that is not free waits in a thread of its own.

use super::fid::{Fid, Role};
use super::session::Call;
use crate::protocol::Request;

/// Bytes from which on copying takes longer than handing over.
pub const LARGE: u32 = 64 << 10;

/// Which thread executes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The one that has the queue.
    Here,
    /// The one that has the queue, which is to note how long it takes.
    HereTimed,
    /// Another one.
    Elsewhere,
}

/// Where a request is to be executed. `others_wait`: more requests are in the queue.
pub fn place(request: &Request<'_>, call: &Call, others_wait: bool) -> Place {
    let Some(fid) = &call.fid else {
        return Place::Here;
    };
    let pace = fid.node.pace();
    let in_memory = pace.is_memory() && !is_large(request)
        || matches!(fid.role, Role::XattrRead(_))
            && matches!(request, Request::Read { .. } | Request::Clunk { .. });
    if in_memory {
        return Place::Here;
    }
    if pace.is_remote() {
        return Place::Elsewhere;
    }
    match request {
        _ if is_large(request) => {
            if others_wait {
                Place::Elsewhere
            } else {
                Place::Here
            }
        }
        Request::Fsync { .. } => Place::Elsewhere,
        Request::Getattr { .. } | Request::Statfs { .. } | Request::Lock { .. } | Request::Getlock { .. } => {
            Place::Here
        }
        Request::Read { .. } if pace.knows_nowait() => Place::Here,
        Request::Walk { names, .. } if names.is_empty() => Place::Here,
        Request::Clunk { .. } if !has_effect(fid) => Place::Here,
        _ if pace.may_wait() => Place::Elsewhere,
        _ => Place::HereTimed,
    }
}

/// Whether the end of a fid is more than that of a name.
fn has_effect(fid: &Fid) -> bool {
    matches!(fid.role, Role::File(_) | Role::XattrWrite(_))
}

fn is_large(request: &Request<'_>) -> bool {
    matches!(request, Request::Read { count, .. } | Request::Write { count, .. } if *count >= LARGE)
}

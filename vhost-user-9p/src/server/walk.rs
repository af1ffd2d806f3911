//! Tattach, Twalk, Tclunk: how fids come and go.

use std::sync::Arc;

use rustix::io::Errno;

use super::fid::{Fid, Role};
use super::session::{Call, Session};
use crate::host::{Caller, Name, Node, Stat};
use crate::protocol::request::Names;
use crate::protocol::{NO_FID, Qid, Reply, kind};

impl Session {
    /// Tattach: a fid for a share, or for a directory in it.
    ///
    /// The name is that of a share, or empty or `/` for the default one, or a path in the default one.
    pub(super) fn attach(
        &self,
        fid: u32,
        afid: u32,
        aname: &[u8],
        uid: u32,
        call: &Call,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        if afid != NO_FID {
            return Err(Errno::BADF);
        }
        self.claim(fid, call)?;
        let caller = Caller { uid, gid: 0 };
        for share in self.server.shares() {
            share.host().enter(caller, &[])?;
        }
        let (node, stat) = self.resolve(aname)?;
        let qid = node.share().host().qids().qid(&stat);
        self.fids.insert(fid, Fid { root: Arc::clone(&node), node, uid, role: Role::Path })?;
        reply.begin(kind::TATTACH).qid(qid);
        Ok(())
    }

    fn resolve(&self, aname: &[u8]) -> Result<(Arc<Node>, Stat), Errno> {
        let shares = self.server.shares();
        if let Some(share) = shares.iter().find(|share| share.name() == aname) {
            return share.attach();
        }
        let share = shares.iter().find(|share| share.name().is_empty()).ok_or(Errno::NOENT)?;
        let mut at = share.attach()?;
        let path = aname.strip_prefix(b"/").ok_or(Errno::NOENT)?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            at = at.0.child(Name::lookup(name)?)?;
        }
        // What is no directory is no root.
        if at.1.is_dir() { Ok(at) } else { Err(Errno::NOTDIR) }
    }

    /// Twalk: a fid for what is found by following names from another one. Names that are found before one that is not
    /// are answered, but then no fid is made.
    pub(super) fn walk(
        &self,
        fid: u32,
        newfid: u32,
        names: Names<'_>,
        call: &Call,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let from = call.fid()?;
        if matches!(from.role, Role::XattrRead(_) | Role::XattrWrite(_) | Role::Lost(_)) {
            return Err(Errno::BADF);
        }
        if newfid != fid {
            self.claim(newfid, call)?;
        }
        reply.begin(kind::TWALK).u16(0);
        let mut node: Option<Arc<Node>> = None;
        let mut found = 0;
        for name in names.iter() {
            let here = node.as_ref().unwrap_or(&from.node);
            let step = match name {
                b".." => here.parent(&from.root),
                _ => Name::lookup(name).and_then(|name| here.child(name)),
            };
            match step {
                Ok((next, stat)) => {
                    reply.qid(next.share().host().qids().qid(&stat));
                    node = Some(next);
                    found += 1;
                }
                Err(error) if found == 0 => return Err(error),
                Err(_) => break,
            }
        }
        if usize::from(found) < names.len() {
            reply.set_walked(found);
            return Ok(());
        }
        let node = node.unwrap_or_else(|| Arc::clone(&from.node));
        if newfid == fid {
            self.fids.replace(fid, from, from.at(node))?;
        } else {
            self.fids.insert(newfid, from.at(node))?;
        }
        reply.set_walked(found);
        Ok(())
    }

    /// Tclunk: the fid is gone already. The last who uses it closes it.
    pub(super) fn clunk(&self, fid: &Fid, reply: &mut Reply) -> Result<(), Errno> {
        match &fid.role {
            Role::XattrWrite(write) => self.finish_xattr(fid, write)?,
            Role::Lost(true) => return Err(Errno::IO),
            _ => {}
        }
        reply.begin(kind::TCLUNK);
        Ok(())
    }

    /// The qid of a file with these attributes.
    pub(super) fn qid(fid: &Fid, stat: &Stat) -> Qid {
        fid.node.share().host().qids().qid(stat)
    }
}

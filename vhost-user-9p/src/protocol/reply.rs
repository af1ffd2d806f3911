//! Encoding of R-messages.

use super::{
    Attributes, ERROR_SIZE, HEADER_SIZE, LockRange, LockStatus, Qid, READ_HEADER_SIZE, Statfs, Time, kind,
};

#[cfg(test)]
mod tests;

/// A reply being written: header and fields in memory of our own, and the number of data bytes behind them that were
/// written to the client's buffers directly.
///
/// Meant to be used again and again, so that its vector is allocated once. A fresh one is no reply yet: each begins with
/// one of the functions named after its message.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
    data: usize,
}

impl Reply {
    /// The reply's bytes without the data that is in the client's buffers already.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of the whole message.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.data
    }

    /// Whether nothing was written since the last [`Reply::clear`].
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.data = 0;
    }

    /// Forgets everything, and gives memory back that is beyond `keep` bytes.
    pub fn shrink(&mut self, keep: usize) {
        self.clear();
        self.bytes.shrink_to(keep);
    }

    /// Begins the reply to a request of type `request`.
    pub fn begin(&mut self, request: u8) -> &mut Self {
        self.clear();
        self.bytes.extend_from_slice(&[0; HEADER_SIZE]);
        self.bytes[4] = request.wrapping_add(1);
        self
    }

    /// Fills the header in: nothing can be added after that.
    pub fn finish(&mut self, tag: u16) {
        if self.bytes.len() >= HEADER_SIZE {
            let size = (self.len() as u32).to_le_bytes();
            self.bytes[..4].copy_from_slice(&size);
            self.bytes[5..HEADER_SIZE].copy_from_slice(&tag.to_le_bytes());
        }
    }

    /// Rlerror with a number of errno(3).
    pub fn error(&mut self, errno: u32) {
        self.begin(kind::RLERROR - 1).u32(errno);
        debug_assert_eq!(self.bytes.len(), ERROR_SIZE);
    }

    /// Whether this is an Rlerror.
    pub fn is_error(&self) -> bool {
        self.bytes.get(4) == Some(&kind::RLERROR)
    }

    /// Appends a byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Appends 16 bits.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends 32 bits.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends 64 bits.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a string of at most 65,535 bytes; what is longer is cut.
    pub fn string(&mut self, value: &[u8]) -> &mut Self {
        let value = &value[..value.len().min(usize::from(u16::MAX))];
        self.u16(value.len() as u16);
        self.bytes.extend_from_slice(value);
        self
    }

    /// Appends a qid.
    pub fn qid(&mut self, qid: Qid) -> &mut Self {
        self.u8(qid.kind).u32(qid.version).u64(qid.path)
    }

    fn time(&mut self, time: Time) -> &mut Self {
        self.u64(time.sec).u64(time.nsec)
    }

    /// Writes the body of an Rgetattr.
    pub fn attributes(&mut self, attributes: &Attributes) -> &mut Self {
        let a = attributes;
        self.u64(a.valid.bits()).qid(a.qid).u32(a.mode).u32(a.uid).u32(a.gid);
        self.u64(a.nlink).u64(a.rdev).u64(a.size).u64(a.blksize).u64(a.blocks);
        self.time(a.atime).time(a.mtime).time(a.ctime).time(a.btime);
        self.u64(a.generation).u64(a.data_version)
    }

    /// Writes the body of an Rstatfs.
    pub fn statfs(&mut self, statfs: &Statfs) -> &mut Self {
        let s = statfs;
        self.u32(s.kind).u32(s.bsize).u64(s.blocks).u64(s.bfree).u64(s.bavail);
        self.u64(s.files).u64(s.ffree).u64(s.fsid).u32(s.namelen)
    }

    /// Writes the body of an Rlock.
    pub fn lock_status(&mut self, status: LockStatus) -> &mut Self {
        self.u8(status as u8)
    }

    /// Writes the body of an Rgetlock.
    pub fn lock_range(&mut self, range: &LockRange<'_>) -> &mut Self {
        self.u8(range.kind).u64(range.start).u64(range.length).u32(range.proc_id).string(range.client_id)
    }

    /// Writes the count of an Rread whose `count` bytes of data are in the client's buffers already.
    pub fn data_in_place(&mut self, count: usize) {
        self.u32(count as u32);
        self.data = count;
        debug_assert_eq!(self.bytes.len(), READ_HEADER_SIZE);
    }

    /// Sets the number of qids in an Rwalk, which stands before them.
    pub fn set_walked(&mut self, count: u16) {
        self.bytes[HEADER_SIZE..HEADER_SIZE + 2].copy_from_slice(&count.to_le_bytes());
    }

    /// Writes the count and the data of an Rread.
    pub fn data(&mut self, data: &[u8]) {
        self.u32(data.len() as u32);
        self.bytes.extend_from_slice(data);
    }

    /// Leaves room for the count of an Rreaddir, whose entries follow.
    pub fn begin_entries(&mut self) {
        self.u32(0);
    }

    /// Bytes of an entry of an Rreaddir with this name.
    pub fn entry_size(name: &[u8]) -> usize {
        Qid::SIZE + 8 + 1 + 2 + name.len()
    }

    /// Appends an entry of an Rreaddir. `offset` is where the next one is asked for; `kind` is that of readdir(3).
    pub fn entry(&mut self, qid: Qid, offset: u64, kind: u8, name: &[u8]) {
        self.qid(qid).u64(offset).u8(kind).string(name);
    }

    /// Writes the count of the entries.
    pub fn end_entries(&mut self) {
        let count = (self.bytes.len() - READ_HEADER_SIZE) as u32;
        self.bytes[HEADER_SIZE..READ_HEADER_SIZE].copy_from_slice(&count.to_le_bytes());
    }
}

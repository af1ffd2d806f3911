//! What can be asked of an image.

use libc::iovec;

/// A range of an image, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// When zeroing: the space may be given back to the host.
    pub unmap: bool,
}

/// One request to an image. Offsets and lengths are in bytes, lie within the image, and are multiples of its logical
/// block size.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Fill the buffers from `offset` on.
    Read {
        /// First byte in the image.
        offset: u64,
        /// Guest memory.
        buffers: &'a [iovec],
    },
    /// Write the buffers to `offset`.
    Write {
        /// First byte in the image.
        offset: u64,
        /// Guest memory.
        buffers: &'a [iovec],
        /// Done only once it would survive a power cut.
        durable: bool,
    },
    /// All that was written before survives a power cut.
    Flush,
    /// The ranges are not needed any more: what they read as afterwards is undefined.
    Discard {
        /// Where.
        ranges: &'a [Range],
        /// As for a write.
        durable: bool,
    },
    /// The ranges read as zeroes afterwards.
    WriteZeroes {
        /// Where, and whether the space may be given back.
        ranges: &'a [Range],
        /// As for a write.
        durable: bool,
    },
}

impl Operation<'_> {
    /// Whether its success promises that something survives a power cut.
    pub(super) fn is_durable(self) -> bool {
        match self {
            Self::Flush => true,
            Self::Write { durable, .. }
            | Self::Discard { durable, .. }
            | Self::WriteZeroes { durable, .. } => durable,
            Self::Read { .. } => false,
        }
    }
}

/// A request that an [`Engine`](super::Engine) holds until it is done, together with all that it points to.
///
/// # Safety
/// As long as the job exists, also when it is moved, [`Job::operation`] gives the same answer, the slices in it stay where
/// they are, and the buffers that they name stay mapped.
#[expect(unsafe_code, reason = "the kernel is given the pointers")]
pub unsafe trait Job {
    /// What is to be done.
    fn operation(&self) -> Operation<'_>;
}

/// Bytes in all of `buffers`.
pub(super) fn total_len(buffers: &[iovec]) -> usize {
    buffers.iter().map(|buffer| buffer.iov_len).sum()
}

/// What is left of `buffers` after `done` bytes.
pub(super) fn rest(buffers: &[iovec], done: usize) -> Vec<iovec> {
    let mut skip = done;
    buffers
        .iter()
        .filter_map(|buffer| {
            let skipped = skip.min(buffer.iov_len);
            skip -= skipped;
            (skipped < buffer.iov_len).then(|| iovec {
                iov_base: buffer.iov_base.cast::<u8>().wrapping_add(skipped).cast(),
                iov_len: buffer.iov_len - skipped,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_starts_in_the_middle_of_a_buffer() {
        let buffers = [(0x1000, 3), (0x2000, 5)]
            .map(|(base, iov_len)| iovec { iov_base: base as *mut libc::c_void, iov_len });
        let rest =
            |done| rest(&buffers, done).iter().map(|b| (b.iov_base as usize, b.iov_len)).collect::<Vec<_>>();
        assert_eq!(rest(0), [(0x1000, 3), (0x2000, 5)]);
        assert_eq!(rest(2), [(0x1002, 1), (0x2000, 5)]);
        assert_eq!(rest(3), [(0x2000, 5)]);
        assert_eq!(rest(8), []);
    }
}

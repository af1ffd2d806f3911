//! Bytes on their way from one place to another, of which at least one is guest memory.

use libc::iovec;

use super::total_len;

/// Bytes to be copied: the device-readable part of a chain, or private memory. Copying takes them off the front.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The front, in part used up.
    first: iovec,
    rest: &'a [iovec],
    /// Bytes in both.
    left: usize,
}

// SAFETY: a source only reads what its lifetime keeps alive; chains and byte slices may both be sent.
unsafe impl Send for Source<'_> {}

impl<'a> Source<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        let first = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        Self { first, rest: &[], left: bytes.len() }
    }

    /// All bytes of `iovecs`, which the owner of the lifetime keeps mapped.
    pub(super) fn of(iovecs: &'a [iovec]) -> Self {
        let (first, rest) =
            iovecs.split_first().map_or_else(|| (Self::new(&[]).first, &[][..]), |(f, r)| (*f, r));
        Self { first, rest, left: total_len(iovecs) as usize }
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.left
    }

    /// Whether none are left.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// What is left, as iovecs to be read from.
    pub fn iovecs(&self) -> impl Iterator<Item = iovec> + use<'a> {
        let mut left = self.left;
        let clip = move |mut iovec: iovec| {
            iovec.iov_len = iovec.iov_len.min(left);
            left -= iovec.iov_len;
            iovec
        };
        std::iter::once(self.first)
            .chain(self.rest.iter().copied())
            .map(clip)
            .filter(|iovec| iovec.iov_len > 0)
    }

    /// Takes `count` bytes off, or all that are left.
    pub fn skip(&mut self, count: usize) {
        let mut count = count.min(self.left);
        while count > 0 {
            let step = count.min(self.first.iov_len);
            self.advance(step);
            count -= step;
        }
    }

    /// Ends the source after `len` bytes, if it is longer.
    #[must_use]
    pub fn limit(mut self, len: usize) -> Self {
        self.left = self.left.min(len);
        self
    }

    /// Fills `buf` from the front as far as there is something, and returns how many bytes it were.
    pub fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buf.len() && self.left > 0 {
            // SAFETY: the rest of `buf` has this many bytes.
            done += unsafe { self.copy_to(buf[done..].as_mut_ptr(), buf.len() - done) };
        }
        done
    }

    /// Copies up to `room` bytes to `to`, and returns how many there were.
    ///
    /// # Safety
    /// `room` bytes at `to` must be mapped and writable.
    pub(super) unsafe fn copy_to(&mut self, to: *mut u8, room: usize) -> usize {
        let mut done = 0;
        while done < room && self.left > 0 {
            let len = self.first.iov_len.min(room - done).min(self.left);
            // SAFETY: `len` bytes are left at `first`, which is kept mapped for 'a, and at `to` as the caller promises.
            // They cannot overlap: a chain that is read and one that is written belong to different connections, which
            // map their guests' memory each for itself.
            unsafe { std::ptr::copy_nonoverlapping(self.first.iov_base.cast(), to.add(done), len) };
            self.advance(len);
            done += len;
        }
        done
    }

    /// Takes `len` bytes off, of which `first` has at least as many.
    fn advance(&mut self, len: usize) {
        self.first.iov_base = self.first.iov_base.cast::<u8>().wrapping_add(len).cast();
        self.first.iov_len -= len;
        self.left -= len;
        while self.first.iov_len == 0
            && let Some((next, rest)) = self.rest.split_first()
        {
            (self.first, self.rest) = (*next, rest);
        }
    }
}

//! The configuration space and the feature bits of a balloon (virtio 1.3 text, sections 5.5.3 and 5.5.4).

use bitflags::bitflags;

bitflags! {
    /// The feature bits of the device type.
    ///
    /// `VIRTIO_BALLOON_F_FREE_PAGE_HINT` (3) is missing: Linux takes hinted pages back before the device is done with them,
    /// so that they can be used for nothing but leaving them out of a migration, which the front end does.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The driver asks for a page before it uses it again.
        const MUST_TELL_HOST = 1 << 0;
        /// There is a queue for statistics.
        const STATISTICS = 1 << 1;
        /// The driver takes pages back when the guest is short of memory.
        const DEFLATE_ON_OOM = 1 << 2;
        /// The driver says what it fills free pages with.
        const PAGE_POISON = 1 << 4;
        /// There is a queue for reports of free pages.
        const REPORTING = 1 << 5;
    }
}

impl Features {
    /// What the features are called on the control socket.
    pub fn names(self) -> Vec<String> {
        let names = [
            (Self::MUST_TELL_HOST, "must-tell-host"),
            (Self::STATISTICS, "statistics"),
            (Self::DEFLATE_ON_OOM, "deflate-on-oom"),
            (Self::PAGE_POISON, "page-poison"),
            (Self::REPORTING, "reporting"),
        ];
        names.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, name)| (*name).to_owned()).collect()
    }
}

/// The configuration space. All fields are little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Pages that the driver is asked to give. Written by the device.
    pub num_pages: u32,
    /// Pages that it has given. Written by the driver.
    pub actual: u32,
    /// What the driver fills free pages with, if it does: a byte, four times. Written by the driver.
    pub poison_val: u32,
}

/// Where `actual` is.
const ACTUAL: usize = 4;
/// Where `poison_val` is, after the field of free page hints.
const POISON_VAL: usize = 12;
const FIELD: usize = 4;

impl Config {
    /// Bytes of the configuration space.
    pub const SIZE: usize = 16;

    /// As the driver reads it.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..FIELD].copy_from_slice(&self.num_pages.to_le_bytes());
        bytes[ACTUAL..ACTUAL + FIELD].copy_from_slice(&self.actual.to_le_bytes());
        bytes[POISON_VAL..].copy_from_slice(&self.poison_val.to_le_bytes());
        bytes
    }

    /// Takes over what the driver may write of `data`, written at `offset`; `false` if there is nothing of that kind in it.
    /// Some front ends relay one field, others all of what they have cached, and legacy drivers write single bytes.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let mut any = false;
        for (at, field) in [(ACTUAL, &mut self.actual), (POISON_VAL, &mut self.poison_val)] {
            let mut bytes = field.to_le_bytes();
            for (index, byte) in bytes.iter_mut().enumerate() {
                if let Some(new) = (at + index).checked_sub(offset).and_then(|index| data.get(index)) {
                    *byte = *new;
                    any = true;
                }
            }
            *field = u32::from_le_bytes(bytes);
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any write changes the bytes of `actual` and `poison_val` that it covers, and nothing else.
        #[test]
        fn a_write_changes_what_the_driver_may_write(
            old in proptest::array::uniform3(any::<u32>()),
            offset in 0usize..24,
            data in proptest::collection::vec(any::<u8>(), 0..24),
        ) {
            let mut config = Config { num_pages: old[0], actual: old[1], poison_val: old[2] };
            let mut expected = config.to_bytes();
            let mut any = false;
            for (index, byte) in data.iter().enumerate() {
                if matches!(offset + index, 4..8 | 12..16) {
                    expected[offset + index] = *byte;
                    any = true;
                }
            }
            prop_assert_eq!(config.write(offset, &data), any);
            prop_assert_eq!(config.to_bytes(), expected);
        }
    }
}

//! What a sender left undone, done in software, for a receiver that cannot: checksums and segmentation.

pub mod checksum;
pub mod segment;

pub use self::checksum::Checksum;
pub use self::segment::Segments;

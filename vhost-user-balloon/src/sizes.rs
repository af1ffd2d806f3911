//! Sizes of memory on the command line.

use vhost_user_daemon::cli;

use crate::memory::PAGE;

/// A number without a unit that is smaller is a mistake: nobody wants so little.
const LEAST_WITHOUT_UNIT: u64 = 1 << 20;

/// The largest balloon that the configuration space can express, bytes.
pub const LARGEST: u64 = (1 << 44) - PAGE;

/// Bytes, or a number with a unit such as 512M (powers of 1024).
///
/// # Errors
/// What to write instead, for a person: if it is something else, more than a balloon can have, or a small number that
/// lacks its unit.
pub fn parse(text: &str) -> Result<u64, String> {
    let bytes = cli::parse_bytes(text)?;
    let has_unit = text.bytes().any(|byte| byte.is_ascii_alphabetic());
    if !has_unit && (1..LEAST_WITHOUT_UNIT).contains(&bytes) {
        return Err(format!("that is {bytes} bytes: for MiB write {bytes}M"));
    }
    if bytes > LARGEST {
        return Err("a balloon can have 16 TiB less a page at most".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_likely_mistakes_are_refused() {
        for (text, bytes) in [("0", 0), ("512M", 512 << 20), ("4K", 4096), ("1048576", 1 << 20)] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse(&LARGEST.to_string()), Ok(LARGEST));
        for (text, word) in
            [("512", "512M"), ("4096", "4096M"), ("16T", "16 TiB"), ("x", "suffix"), ("", "suffix")]
        {
            assert!(parse(text).unwrap_err().contains(word), "{text}");
        }
    }
}

//! Sizes and times, as people write and read them.

use std::time::Duration;

use vhost_user_daemon::cli::parse_bytes;

/// Bytes with a unit of 1024, as [`parse_bytes`] reads them. A number without a unit is KiB, as virsh has it.
pub(super) fn parse_kib(text: &str) -> Result<u64, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok().and_then(|kib: u64| kib.checked_mul(1024)).ok_or_else(|| "that is too much".into())
    } else {
        parse_bytes(text)
    }
}

/// Seconds, possibly with a fraction, more than none and at most a day.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|seconds| *seconds > 0.0 && *seconds <= 86_400.0)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "a number of seconds is needed".into())
}

/// A size in the largest unit of which there is at least one, with about three digits.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    if unit == 0 {
        return format!("{bytes} B");
    }
    // In hundredths, rounded down: a balloon that is not full does not look so.
    let hundredths = (u128::from(bytes) * 100) >> (10 * unit);
    let (whole, part) = (hundredths / 100, hundredths % 100);
    let name = UNITS[unit];
    match whole {
        0..10 => format!("{whole}.{part:02} {name}"),
        10..100 => format!("{whole}.{} {name}", part / 10),
        _ => format!("{whole} {name}"),
    }
}

/// How long ago something was.
pub(super) fn ago(ms: u64) -> String {
    match ms / 1000 {
        0..10 => format!("{}.{} s ago", ms / 1000, ms % 1000 / 100),
        seconds @ 10..120 => format!("{seconds} s ago"),
        seconds @ 120..7200 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("1g", 1 << 30)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_kib("1048576"), Ok(1 << 30));
        assert_eq!(parse_kib("512M"), Ok(512 << 20));
        for text in ["", "x", "-1", "1X"] {
            assert!(parse_bytes(text).is_err() && parse_kib(text).is_err(), "{text}");
        }
        assert!(parse_kib("18446744073709551615").is_err());
    }

    #[test]
    fn times_are_read() {
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
        for text in ["0", "-1", "nan", "inf", "1e9", "x", ""] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 20, "1.50 GiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (20 << 20, "20.0 MiB"),
            (300 << 20, "300 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_are_shown() {
        for (ms, text) in [
            (0, "0.0 s ago"),
            (2345, "2.3 s ago"),
            (12_000, "12 s ago"),
            (180_000, "3 min ago"),
            (7_200_000, "2 h ago"),
        ] {
            assert_eq!(ago(ms), text);
        }
    }
}

//! What a guest writes to its channel: the script's output, and records between two bytes 0x1e (the ASCII record
//! separator), which no shell command prints by accident.
use std::collections::BTreeMap;

const SEPARATOR: u8 = 0x1e;

/// A guest's output so far.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Transcript {
    /// How many bytes were understood: all but a record that is not complete yet.
    pub(super) length: usize,
    /// The script's standard output.
    pub(super) stdout: String,
    /// Whether the script was started.
    pub(super) up: bool,
    /// What the script reported; a key that was reported twice has its last value.
    pub(super) values: BTreeMap<String, String>,
    /// What the script announced, in order.
    pub(super) announced: Vec<String>,
    /// The script's exit status.
    pub(super) exit: Option<i32>,
    /// Why the script could not be started.
    pub(super) failure: Option<String>,
}

impl Transcript {
    /// Reads a whole channel. A record that is not complete yet is left out.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut transcript = Self::default();
        let mut stdout = Vec::new();
        let mut rest = bytes;
        let mut unfinished = 0;
        while let Some(start) = rest.iter().position(|&byte| byte == SEPARATOR) {
            stdout.extend_from_slice(&rest[..start]);
            let body = &rest[start + 1..];
            let Some(end) = body.iter().position(|&byte| byte == SEPARATOR) else {
                unfinished = rest.len() - start;
                rest = &[];
                break;
            };
            if transcript.record(&String::from_utf8_lossy(&body[..end])) {
                rest = &body[end + 1..];
                rest = rest.strip_prefix(b"\n").unwrap_or(rest);
            } else {
                // The byte belongs to binary data in the output.
                stdout.push(SEPARATOR);
                rest = body;
            }
        }
        stdout.extend_from_slice(rest);
        transcript.length = bytes.len() - unfinished;
        transcript.stdout = String::from_utf8_lossy(&stdout).into_owned();
        transcript
    }

    fn record(&mut self, record: &str) -> bool {
        let (verb, rest) = record.split_once(' ').unwrap_or((record, ""));
        match verb {
            "up" => self.up = true,
            "report" => {
                let (key, value) = rest.split_once(' ').unwrap_or((rest, ""));
                self.values.insert(key.to_owned(), value.to_owned());
            }
            "announce" => self.announced.push(rest.to_owned()),
            "failure" => self.failure = Some(rest.to_owned()),
            "exit" => match rest.parse() {
                Ok(status) => self.exit = Some(status),
                Err(_) => return false,
            },
            _ => return false,
        }
        true
    }

    /// Whether nothing more will come.
    pub(super) fn is_complete(&self) -> bool {
        self.exit.is_some() || self.failure.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_separated_from_output() {
        let text = b"\x1eup\x1e\nhello\n\x1ereport size 42 MiB\x1e\nno newline\x1eannounce half way\x1e\n\x1eexit 3\x1e\n";
        let transcript = Transcript::parse(text);
        assert_eq!(transcript.stdout, "hello\nno newline");
        assert!(transcript.up && transcript.is_complete());
        assert_eq!(transcript.values["size"], "42 MiB");
        assert_eq!(transcript.announced, ["half way"]);
        assert_eq!(transcript.exit, Some(3));
    }

    #[test]
    fn values_may_be_empty_or_have_several_lines() {
        let transcript = Transcript::parse(b"\x1ereport list a\nb\x1e\n\x1ereport empty \x1e\n");
        assert_eq!(transcript.values["list"], "a\nb");
        assert_eq!(transcript.values["empty"], "");
    }

    #[test]
    fn an_unfinished_record_is_not_seen_yet() {
        let transcript = Transcript::parse(b"out\x1eexit 1");
        assert_eq!((transcript.stdout.as_str(), transcript.exit, transcript.length), ("out", None, 3));
    }

    #[test]
    fn binary_output_is_no_record() {
        let transcript = Transcript::parse(b"\x1e\x00\x1e\x1eexit x\x1e\x1eexit 0\x1e\n");
        assert_eq!(transcript.stdout, "\x1e\x00\x1e\x1eexit x\x1e");
        assert_eq!(transcript.exit, Some(0));
    }

    /// The reader sees every prefix of what a guest writes.
    #[test]
    fn no_prefix_ends_early() {
        let text = b"a\x1eannounce x\x1e\nb\x1eexit 12\x1e\n";
        for end in 0..text.len() - 1 {
            assert!(!Transcript::parse(&text[..end]).is_complete(), "{end}");
        }
    }
}

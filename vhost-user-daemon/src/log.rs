//! The logger of a daemon: one line per event on stderr, as text or JSON, and rate limits for untrusted causes.
//!
//! Use the macros of the `log` crate for what the operator or the daemon itself causes, and
//! [`error_limited!`](crate::error_limited), [`warn_limited!`](crate::warn_limited) and
//! [`info_limited!`](crate::info_limited) for whatever a guest or a front end can cause: both are untrusted, and
//! a log that they can flood fills the host's disk.
//!
//! Control characters in a message are escaped, so a name that a guest chose can neither forge a second line nor
//! send escape sequences to the operator's terminal.

pub mod limit;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::{env, panic, thread};

use env_logger::Builder;
use log::{Level, LevelFilter, Record};
use serde::Serialize;

#[doc(hidden)]
pub use ::log as __log;

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `2026-05-01T12:00:00.000Z WARN message`. Under systemd the journal keeps the time, so the line begins with
    /// the priority that it understands (`<4>`) instead.
    #[default]
    Text,
    /// `{"ts":"2026-05-01T12:00:00.000Z","level":"warn","target":"module::path","message":"..."}`
    Json,
}

/// How lines are written: a [`Format`], refined by where stderr goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Text,
    Journal,
    Json,
}

/// Starts the logger, and sends panics to it as well.
///
/// `level` is the most detailed level that is logged. `None` lets the `RUST_LOG` environment variable decide
/// (syntax of the `env_logger` crate, e.g. `info,vhost_user_blk=debug`), or `info` where that is unset or empty.
///
/// Call it once, before any thread is started; a later call has no effect.
pub fn init(level: Option<LevelFilter>, format: Format) {
    let style = match format {
        Format::Json => Style::Json,
        Format::Text if stderr_is_journal() => Style::Journal,
        Format::Text => Style::Text,
    };
    let mut builder = Builder::new();
    match (level, env::var("RUST_LOG")) {
        (Some(level), _) => builder.filter_level(level),
        (None, Ok(filters)) if !filters.is_empty() => builder.parse_filters(&filters),
        (None, _) => builder.filter_level(LevelFilter::Info),
    };
    builder.format(move |buf, record| {
        let ts = buf.timestamp_millis();
        write_line(buf, style, &ts, record)
    });
    if builder.try_init().is_ok() {
        let default_hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // `--log-level off` silences the logger, but a daemon must not die without a word.
            if log::log_enabled!(Level::Error) {
                log_panic(info);
            } else {
                default_hook(info);
            }
        }));
    }
}

/// Whether stderr is the systemd journal: the device and inode in `JOURNAL_STREAM` are those of stderr
/// (systemd.exec(5)). The variable alone says nothing, for it is inherited by programs whose stderr goes elsewhere.
fn stderr_is_journal() -> bool {
    env::var("JOURNAL_STREAM").is_ok_and(|stream| is_journal(&stream, io::stderr()))
}

fn is_journal(stream: &str, fd: impl AsFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(fd) else {
        return false;
    };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// Writes one record as one line.
fn write_line(out: &mut impl Write, style: Style, ts: &impl fmt::Display, record: &Record) -> io::Result<()> {
    let (level, message) = (record.level(), record.args());
    match style {
        Style::Text => writeln!(out, "{ts} {level} {}", Escaped(message)),
        Style::Journal => writeln!(out, "<{}>{level} {}", syslog_priority(level), Escaped(message)),
        Style::Json => {
            let line =
                JsonLine { ts: format_args!("{ts}"), level, target: record.target(), message: *message };
            serde_json::to_writer(&mut *out, &line)?;
            writeln!(out)
        }
    }
}

/// The priorities of syslog(3), which sd-daemon(3) puts in front of a line.
fn syslog_priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A line of [`Format::Json`].
#[derive(Serialize)]
struct JsonLine<'a> {
    ts: fmt::Arguments<'a>,
    #[serde(serialize_with = "lower_case")]
    level: Level,
    target: &'a str,
    message: fmt::Arguments<'a>,
}

/// Spells a level as `--log-level` does.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn lower_case<S: serde::Serializer>(level: &Level, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    })
}

/// Displays a value with its control characters escaped (a newline becomes `\n`).
struct Escaped<T>(T);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaper(f), "{}", self.0)
    }
}

struct Escaper<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escaper<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(char::is_control) {
            let (clean, tail) = rest.split_at(at);
            self.0.write_str(clean)?;
            let mut chars = tail.chars();
            if let Some(control) = chars.next() {
                write!(self.0, "{}", control.escape_default())?;
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

/// Logs a panic: one line that says where and why, then the backtrace if `RUST_BACKTRACE` asks for it.
fn log_panic(info: &PanicHookInfo) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("?");
    let payload = info.payload();
    let reason = payload.downcast_ref::<&str>().copied();
    let reason =
        reason.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)");
    match info.location() {
        Some(location) => log::error!(target: "panic", "Panic in thread {name} at {location}: {reason}"),
        None => log::error!(target: "panic", "Panic in thread {name}: {reason}"),
    }
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        // A line each, for a log that is made of lines.
        for line in backtrace.to_string().lines() {
            log::error!(target: "panic", "{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn line(style: Style, level: Level, message: fmt::Arguments) -> String {
        let record = Record::builder().level(level).target("a::b").args(message).build();
        let mut out = Vec::new();
        write_line(&mut out, style, &"2026-05-01T12:00:00.000Z", &record).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_lines_carry_time_level_and_message() {
        let text = line(Style::Text, Level::Warn, format_args!("Queue {} stalled", 3));
        assert_eq!(text, "2026-05-01T12:00:00.000Z WARN Queue 3 stalled\n");
    }

    #[test]
    fn journal_lines_carry_a_priority_instead_of_a_time() {
        let text = line(Style::Journal, Level::Error, format_args!("Bad"));
        assert_eq!(text, "<3>ERROR Bad\n");
    }

    #[test]
    fn json_lines_are_objects() {
        let text = line(Style::Json, Level::Info, format_args!("a \"b\"\nc"));
        assert_eq!(text.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            value,
            serde_json::json!({
                "ts": "2026-05-01T12:00:00.000Z", "level": "info", "target": "a::b", "message": "a \"b\"\nc"
            })
        );
    }

    #[test]
    fn a_guest_cannot_forge_lines_or_escape_sequences() {
        let name = "x\n2026 ERROR forged\r\x1b[2J\u{9b}é";
        let text = line(Style::Text, Level::Info, format_args!("File {name}"));
        assert_eq!(text, "2026-05-01T12:00:00.000Z INFO File x\\n2026 ERROR forged\\r\\u{1b}[2J\\u{9b}é\n");
    }

    #[test]
    fn journal_is_recognised_by_device_and_inode() {
        let file = tempfile::tempfile().unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        assert!(is_journal(&format!("{}:{}", stat.st_dev, stat.st_ino), &file));
        assert!(!is_journal(&format!("{}:{}", stat.st_dev, stat.st_ino + 1), &file));
        assert!(!is_journal("", &file));
    }

    /// Not a test of its own: runs in a child process of the tests below, which sets the environment.
    #[test]
    #[ignore = "child of other tests"]
    fn child() {
        let level = env::var("TEST_LEVEL").ok().map(|level| level.parse().unwrap());
        let format =
            if env::var("TEST_FORMAT").as_deref() == Ok("json") { Format::Json } else { Format::Text };
        init(level, format);
        init(Some(LevelFilter::Trace), Format::Json);
        log::debug!("at debug");
        for i in 0..2 * limit::BURST {
            crate::warn_limited!("limited {i}");
        }
        for i in 0..2 * limit::BURST {
            crate::info_limited!("quiet {i}");
        }
        for site in limit::sites() {
            eprintln!("suppressed {}", site.suppressed());
        }
        // A panic under the test harness would be caught, so it is enough to see what the hook prints.
        thread::Builder::new()
            .name("worker".into())
            .spawn(|| panic!("on\npurpose"))
            .unwrap()
            .join()
            .unwrap_err();
    }

    /// Runs [`child`] with an environment of its own and returns its stderr.
    fn run_child(variables: &[(&str, &str)]) -> String {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", "log::tests::child", "--ignored", "--nocapture"])
            .env_remove("RUST_LOG")
            .env_remove("RUST_BACKTRACE")
            .env_remove("JOURNAL_STREAM")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    #[test]
    fn info_is_the_default_level_and_the_first_init_wins() {
        let log = run_child(&[]);
        assert!(!log.contains("at debug"), "{log}");
        assert!(log.contains(" WARN limited 0\n"), "{log}");
    }

    #[test]
    fn rust_log_counts_unless_a_level_is_given() {
        assert!(run_child(&[("RUST_LOG", "debug")]).contains("at debug"));
        assert!(!run_child(&[("RUST_LOG", "debug"), ("TEST_LEVEL", "warn")]).contains("at debug"));
        assert!(run_child(&[("RUST_LOG", "")]).contains("quiet 0"));
    }

    #[test]
    fn limited_macros_suppress_and_count() {
        let log = run_child(&[]);
        let seen = log.lines().filter(|line| line.contains("limited ")).count() as u64;
        assert_eq!(seen, limit::BURST, "{log}");
        let suppressed = format!("suppressed {}", limit::BURST);
        assert_eq!(log.lines().filter(|line| *line == suppressed).count(), 2, "{log}");
    }

    #[test]
    fn a_level_that_is_off_uses_up_no_burst() {
        let log = run_child(&[("TEST_LEVEL", "warn")]);
        assert!(!log.contains("quiet"), "{log}");
        assert_eq!(log.lines().filter(|line| line.starts_with("suppressed ")).count(), 1, "{log}");
    }

    #[test]
    fn panics_are_logged_as_json_too() {
        let log = run_child(&[("TEST_FORMAT", "json")]);
        let panic = log.lines().find(|line| line.contains("purpose")).unwrap();
        let value: serde_json::Value = serde_json::from_str(panic).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["target"], "panic");
        let message = value["message"].as_str().unwrap();
        assert!(message.starts_with("Panic in thread worker at "), "{message}");
        assert!(message.ends_with("on\npurpose"), "{message}");
    }

    #[test]
    fn panics_are_printed_even_when_the_log_is_off() {
        assert!(run_child(&[("TEST_LEVEL", "off")]).contains("purpose"));
    }

    #[test]
    fn backtraces_are_logged_on_request() {
        let log = run_child(&[("TEST_FORMAT", "json"), ("RUST_BACKTRACE", "1")]);
        let lines = log.lines().filter(|line| line.contains(r#""target":"panic""#)).count();
        assert!(lines > 2, "{log}");
    }
}

//! The manager's configuration: a TOML file whose every key has a default, and which may be missing altogether.
//!
//! ```toml
//! [policy]
//! headroom = 1.25           # what a guest needs is what it uses, times this,
//! cushion = "128M"          # plus this
//!
//! [host]
//! memory = "auto"           # or "48G", or a cgroup: "/sys/fs/cgroup/machine.slice"
//!
//! [guests.defaults]
//! min = "512M"
//!
//! [guests."database"]
//! shares = 4000
//!
//! [script]
//! file = "own.rhai"         # instead of the built-in policy
//! ```
//!
//! Sizes are bytes, or strings with a unit, of which "M" and "MiB" mean the same: 2^20 bytes, as memory is sold.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, Deserializer, IgnoredAny, Visitor};
use serde::{Deserialize, Serialize};
use vhost_user_daemon::cli;

/// The guest's name that stands for all that are not named.
const DEFAULTS: &str = "defaults";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("Cannot read the configuration {path:?}: check that it exists and who may read it")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file's text is not TOML, or not this TOML.
    #[error("The configuration has a mistake in line {line}, `{text}`: {problem}")]
    Text {
        /// Number of the line, from 1.
        line: usize,
        /// What it says.
        text: String,
        /// What is wrong and what is possible.
        problem: String,
    },
    /// Values that are possible by themselves do not fit together.
    #[error("The configuration's {key} is wrong{}: {problem}", .line.map(|line| format!(" (line {line})")).unwrap_or_default())]
    Value {
        /// The key, with its table.
        key: String,
        /// Number of the line, from 1, if the key comes from a file's text.
        line: Option<usize>,
        /// What is wrong and what to change.
        problem: String,
    },
}

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How memory is shared.
    pub policy: Parameters,
    /// What there is to share.
    pub host: HostConfig,
    /// What is wanted of single guests, by name. The name `defaults` stands for all others.
    pub guests: BTreeMap<String, GuestConfig>,
    /// A policy to use in place of the built-in one.
    pub script: Option<ScriptConfig>,
}

/// The parameters of the built-in policy, and of the rails that every policy runs on.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Parameters {
    /// What a guest needs is what it uses times this, plus [`cushion`](Self::cushion). 1.25.
    #[serde(deserialize_with = "headroom")]
    pub headroom: f64,
    /// See [`headroom`](Self::headroom). Bytes; 128 MiB.
    #[serde(deserialize_with = "size")]
    pub cushion: u64,
    /// What is never given to guests, percent of the host's memory. 5.
    #[serde(deserialize_with = "percent")]
    pub reserve_percent: f64,
    /// Nothing is taken from any guest while this much of the host's memory is available, percent. 15.
    #[serde(deserialize_with = "percent")]
    pub comfortable_percent: f64,
    /// And while tasks wait for memory no longer than this, percent of the time (PSI, `some avg10`). 1.
    #[serde(deserialize_with = "percent")]
    pub comfortable_psi: f64,
    /// Balloons grow no faster than this, percent of the guest's memory a second. 5.
    #[serde(deserialize_with = "rate")]
    pub inflate_percent: f64,
    /// The same when the host is about to run out of memory. 25.
    #[serde(deserialize_with = "rate")]
    pub emergency_inflate_percent: f64,
    /// A guest is given memory only if it is at least so much. Bytes; 16 MiB.
    #[serde(deserialize_with = "size")]
    pub grow_step: u64,
    /// Memory is taken from a guest only if it is at least so much, percent of its memory. 1.
    #[serde(deserialize_with = "percent")]
    pub shrink_step_percent: f64,
    /// What a guest has used at its peak is forgotten at this pace: after so many seconds a third is left of the
    /// difference. 50.
    #[serde(deserialize_with = "seconds")]
    pub peak_seconds: f64,
    /// A guest that swaps or kills is given more than it seems to need, at most so much. Bytes; 2 GiB.
    #[serde(deserialize_with = "size")]
    pub boost_max: u64,
    /// Tax on memory that a guest has and does not use, when memory is scarce: 0 is none, and of 0.75 an unused byte
    /// counts as four used ones. 0.
    #[serde(deserialize_with = "tau")]
    pub tau: f64,
    /// How often everything is looked at and decided, seconds. 1.
    #[serde(deserialize_with = "seconds")]
    pub period_seconds: f64,
    /// Statistics of guests that are older are not believed, seconds. 5.
    #[serde(deserialize_with = "seconds")]
    pub stale_seconds: f64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            headroom: 1.25,
            cushion: 128 << 20,
            reserve_percent: 5.0,
            comfortable_percent: 15.0,
            comfortable_psi: 1.0,
            inflate_percent: 5.0,
            emergency_inflate_percent: 25.0,
            grow_step: 16 << 20,
            shrink_step_percent: 1.0,
            peak_seconds: 50.0,
            boost_max: 2 << 30,
            tau: 0.0,
            period_seconds: 1.0,
            stale_seconds: 5.0,
        }
    }
}

/// What there is to share.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// The memory that the guests and everything else have.
    pub memory: Budget,
}

/// The memory that the guests and everything else have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Budget {
    /// All of the host's.
    #[default]
    Auto,
    /// So many bytes of it.
    Bytes(u64),
    /// What this cgroup (version 2) may use, by its folder. Its pressure counts, not the host's.
    Cgroup(PathBuf),
}

impl Serialize for Budget {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Bytes(bytes) => serializer.serialize_u64(*bytes),
            Self::Cgroup(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl Visitor<'_> for Words {
            type Value = Budget;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("\"auto\", a size such as \"48G\", or the folder of a cgroup such as \"/sys/fs/cgroup/x\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Budget, E> {
                match text {
                    "auto" => Ok(Budget::Auto),
                    path if path.starts_with('/') => Ok(Budget::Cgroup(path.into())),
                    size => match cli::parse_bytes(size).ok() {
                        Some(bytes) if bytes > 0 => Ok(Budget::Bytes(bytes)),
                        _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                    },
                }
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Budget, E> {
                match u64::try_from(number) {
                    Ok(bytes) if bytes > 0 => Ok(Budget::Bytes(bytes)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
                }
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Budget, E> {
                Ok(Budget::Bytes(number))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

/// What is wanted of a guest. What is missing is as in `[guests.defaults]`, and what is missing there too is as in
/// [`GuestSettings::default`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestConfig {
    /// See [`GuestSettings::shares`].
    #[serde(deserialize_with = "shares")]
    pub shares: Option<u32>,
    /// See [`GuestSettings::min`].
    #[serde(deserialize_with = "optional_size")]
    pub min: Option<u64>,
    /// See [`GuestSettings::max`].
    #[serde(deserialize_with = "optional_size")]
    pub max: Option<u64>,
    /// See [`GuestSettings::ignore`].
    pub ignore: Option<bool>,
}

/// What is wanted of a guest, with nothing missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSettings {
    /// Its weight when memory is short, against those of the others. 1000.
    pub shares: u32,
    /// Less than this it is never left, bytes. 256 MiB.
    pub min: u64,
    /// More than this it never gets, bytes. No limit but its memory.
    pub max: u64,
    /// It is none of the manager's business. False.
    pub ignore: bool,
}

impl Default for GuestSettings {
    fn default() -> Self {
        Self { shares: 1000, min: 256 << 20, max: u64::MAX, ignore: false }
    }
}

/// A policy as a script.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptConfig {
    /// The script. In a file, a relative name begins at the folder of the configuration.
    pub file: PathBuf,
    /// The script is stopped after so many operations in a tick, and after half a second of processor time in any case.
    /// 200000: some milliseconds.
    #[serde(default = "default_operations")]
    pub operations: u64,
}

impl ScriptConfig {
    /// This script, with the usual limit.
    pub fn new(file: PathBuf) -> Self {
        Self { file, operations: default_operations() }
    }
}

fn default_operations() -> u64 {
    200_000
}

impl Config {
    /// Reads a configuration from a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let mut config = Self::parse(&text)?;
        if let (Some(script), Some(folder)) = (&mut config.script, path.parent()) {
            script.file = folder.join(&script.file);
        }
        Ok(config)
    }

    /// Reads a configuration from a text.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = line_at(text, error.span().map_or(0, |span| span.start));
            Error::Text {
                line,
                text: text.lines().nth(line - 1).unwrap_or_default().trim().to_owned(),
                problem: error.message().to_owned(),
            }
        })?;
        config.validate().map_err(|error| match error {
            Error::Value { key, line: None, problem } => {
                let line = line_of(text, &key);
                Error::Value { key, line, problem }
            }
            error => error,
        })?;
        Ok(config)
    }

    /// Checks what no key can say by itself.
    pub fn validate(&self) -> Result<(), Error> {
        let wrong = |key: String, problem: String| Err(Error::Value { key, line: None, problem });
        let policy = &self.policy;
        if policy.reserve_percent >= policy.comfortable_percent {
            return wrong(
                "policy.reserve-percent".into(),
                format!(
                    "{} is not less than comfortable-percent, {}: the reserve would be used before anything is done",
                    policy.reserve_percent, policy.comfortable_percent
                ),
            );
        }
        if policy.emergency_inflate_percent < policy.inflate_percent {
            return wrong(
                "policy.emergency-inflate-percent".into(),
                format!(
                    "{} is less than inflate-percent, {}: in an emergency balloons must not become slower",
                    policy.emergency_inflate_percent, policy.inflate_percent
                ),
            );
        }
        if self.script.as_ref().is_some_and(|script| script.operations == 0) {
            return wrong(
                "script.operations".into(),
                "0 would let it do nothing: leave it out for 200000".into(),
            );
        }
        for name in self.guests.keys() {
            let settings = self.guest(name);
            if settings.min > settings.max {
                return wrong(
                    format!("guests.{name}"),
                    format!(
                        "its min, {} bytes, is more than its max, {} bytes, where those of guests.defaults count too",
                        settings.min, settings.max
                    ),
                );
            }
        }
        Ok(())
    }

    /// What is wanted of the guest of this name.
    pub fn guest(&self, name: &str) -> GuestSettings {
        let none = GuestConfig::default();
        let defaults = self.guests.get(DEFAULTS).unwrap_or(&none);
        let own = self.guests.get(name).unwrap_or(&none);
        let fallback = GuestSettings::default();
        GuestSettings {
            shares: own.shares.or(defaults.shares).unwrap_or(fallback.shares),
            min: own.min.or(defaults.min).unwrap_or(fallback.min),
            max: own.max.or(defaults.max).unwrap_or(fallback.max),
            ignore: own.ignore.or(defaults.ignore).unwrap_or(fallback.ignore),
        }
    }
}

/// Number of the line, from 1, that this offset is in.
fn line_at(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// Number of the line that holds this key, which is `table.name`.
fn line_of(text: &str, key: &str) -> Option<usize> {
    type Tables = BTreeMap<String, BTreeMap<String, toml::Spanned<IgnoredAny>>>;
    let (table, name) = key.split_once('.')?;
    let tables: Tables = toml::from_str(text).ok()?;
    Some(line_at(text, tables.get(table)?.get(name)?.span().start))
}

struct Size;

impl Visitor<'_> for Size {
    type Value = u64;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a size such as \"512M\", or a number of bytes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
        cli::parse_bytes(text).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<u64, E> {
        u64::try_from(number).map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<u64, E> {
        Ok(number)
    }
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    deserializer.deserialize_any(Size)
}

/// A size that can be missing. JSON's null is a missing one too.
fn optional_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    struct Wrapped(u64);
    impl<'de> Deserialize<'de> for Wrapped {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            size(deserializer).map(Self)
        }
    }
    Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|size| size.0))
}

fn shares<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match Option::<i64>::deserialize(deserializer)? {
        None => Ok(None),
        Some(number @ 1..=1_000_000) => Ok(Some(number as u32)),
        Some(number) => Err(de::Error::invalid_value(
            de::Unexpected::Signed(number),
            &"1 to 1000000 shares (`ignore = true` leaves a guest alone)",
        )),
    }
}

/// A number between two bounds, which are possible too.
fn bounded<'de, D: Deserializer<'de>>(deserializer: D, low: f64, high: f64) -> Result<f64, D::Error> {
    let number = f64::deserialize(deserializer)?;
    if (low..=high).contains(&number) {
        Ok(number)
    } else {
        let expected = format!("a number from {low} to {high}");
        Err(de::Error::invalid_value(de::Unexpected::Float(number), &expected.as_str()))
    }
}

fn headroom<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    bounded(deserializer, 1.0, 10.0)
}

fn percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    bounded(deserializer, 0.0, 100.0)
}

/// A percentage that is no standstill.
fn rate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    bounded(deserializer, 0.1, 100.0)
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    bounded(deserializer, 0.1, 86400.0)
}

/// A tax that leaves something.
fn tau<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    bounded(deserializer, 0.0, 0.99)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said about a text with a mistake.
    fn mistake(text: &str) -> String {
        Config::parse(text).expect_err("this text has a mistake").to_string()
    }

    #[test]
    fn nothing_is_all_defaults() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.policy, Parameters::default());
        assert_eq!(config.guest("any"), GuestSettings::default());
    }

    #[test]
    fn the_example_is_the_defaults() {
        let text = include_str!("../../manage.example.toml");
        let config = Config::parse(text).unwrap();
        assert_eq!(config.policy, Parameters::default());
        assert_eq!(config.host, HostConfig::default());
        assert_eq!(config.guest("any"), GuestSettings::default());
        // Every parameter is in it.
        let parameters = serde_json::to_value(Parameters::default()).unwrap();
        for key in parameters.as_object().unwrap().keys() {
            assert!(text.contains(&format!("\n{key} = ")), "{key}");
        }
        // What is commented out is right too.
        let uncommented: String = text
            .lines()
            .map(|line| {
                if line.contains("# [") || line.contains(" = ") {
                    line.trim_start_matches("# ")
                } else {
                    line
                }
            })
            .fold(String::new(), |text, line| text + line + "\n");
        let config = Config::parse(&uncommented).unwrap();
        assert_eq!(config.guest("database").max, 12 << 30);
        assert_eq!(config.script.unwrap().operations, 200_000);
    }

    #[test]
    fn everything_can_be_said() {
        let config = Config::parse(
            r#"
            [policy]
            headroom = 1.5
            cushion = "64M"
            reserve-percent = 4
            tau = 0.75
            [host]
            memory = "/sys/fs/cgroup/machine.slice"
            [guests.defaults]
            min = "1G"
            [guests.database]
            shares = 4000
            max = 8589934592
            [guests."web 1"]
            ignore = true
            [script]
            file = "own.rhai"
            "#,
        )
        .unwrap();
        assert_eq!(config.policy.cushion, 64 << 20);
        assert!((config.policy.reserve_percent - 4.0).abs() < f64::EPSILON);
        assert_eq!(config.host.memory, Budget::Cgroup("/sys/fs/cgroup/machine.slice".into()));
        assert_eq!(
            config.guest("database"),
            GuestSettings { shares: 4000, min: 1 << 30, max: 8 << 30, ignore: false }
        );
        assert!(config.guest("web 1").ignore);
        assert_eq!(config.guest("other").min, 1 << 30);
        assert_eq!(config.script.as_ref().unwrap().operations, 200_000);
        // A record holds it as JSON.
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
    }

    #[test]
    fn budgets_have_three_forms() {
        let memory =
            |text: &str| Config::parse(&format!("host.memory = {text}")).map(|config| config.host.memory);
        assert_eq!(memory("\"auto\"").unwrap(), Budget::Auto);
        assert_eq!(memory("\"48G\"").unwrap(), Budget::Bytes(48 << 30));
        assert_eq!(memory("1048576").unwrap(), Budget::Bytes(1 << 20));
        for wrong in ["\"many\"", "0", "-1", "\"0\"", "true"] {
            memory(wrong).expect_err(wrong);
        }
    }

    #[test]
    fn mistakes_are_named_with_line_and_remedy() {
        let text = mistake("[policy]\nheadroom = 0.5\n");
        assert!(text.contains("line 2, `headroom = 0.5`"), "{text}");
        assert!(text.contains("a number from 1 to 10"), "{text}");

        let text = mistake("[policy]\n\nheadrom = 1.5\n");
        assert!(text.contains("line 3") && text.contains("`headroom`"), "{text}");

        let text = mistake("[guests.a]\nmin = \"much\"\n");
        assert!(text.contains("line 2, `min = \"much\"`") && text.contains("\"512M\""), "{text}");

        let text = mistake("[guests.a]\nshares = 0\n");
        assert!(text.contains("line 2") && text.contains("ignore = true"), "{text}");

        let text = mistake("[policy\n");
        assert!(text.contains("line 1"), "{text}");

        let text = mistake("[guests.defaults]\nmin = \"4G\"\n\n[guests.small]\nmax = \"2G\"\n");
        assert!(text.contains("guests.small") && text.contains("line 4"), "{text}");

        let text = mistake("[policy]\ncushion = 0\nreserve-percent = 20\n");
        assert!(text.contains("policy.reserve-percent") && text.contains("line 3"), "{text}");

        let text = mistake("[script]\nfile = \"a\"\noperations = 0\n");
        assert!(text.contains("script.operations") && text.contains("line 3"), "{text}");

        let text = mistake("[policy]\ninflate-percent = 50\n");
        assert!(text.contains("policy.emergency-inflate-percent"), "{text}");
    }

    #[test]
    fn a_script_is_beside_its_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manage.toml");
        std::fs::write(&path, "[script]\nfile = \"own.rhai\"\noperations = 1000\n").unwrap();
        let script = Config::load(&path).unwrap().script.unwrap();
        assert_eq!(script, ScriptConfig { file: folder.path().join("own.rhai"), operations: 1000 });
        std::fs::remove_file(&path).unwrap();
        let text = Config::load(&path).unwrap_err().to_string();
        assert!(text.contains("manage.toml"), "{text}");
    }
}

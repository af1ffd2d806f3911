//! What a suite of many small tests says, and how that compares with what it says elsewhere.
use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Result, bail, ensure};

/// How one test of a suite ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Passed,
    /// It was not run.
    Skipped,
    /// Otherwise.
    Failed,
}

/// A test that cannot pass in a guest, and the reason.
pub type Limit = (&'static str, &'static str);

/// The outcomes of a suite's tests, by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcomes {
    tests: BTreeMap<String, Outcome>,
    text: String,
}

impl Outcomes {
    /// Reads lines with a test's name and `ok`, `skipped` or `FAILED`; the lines behind it tell more.
    pub fn parse(text: &str) -> Self {
        let outcome = |line: &str| {
            let mut words = line.split_whitespace();
            let (Some(name), Some(word), None) = (words.next(), words.next(), words.next()) else {
                return None;
            };
            let outcome = match word {
                "ok" => Outcome::Passed,
                "skipped" => Outcome::Skipped,
                "FAILED" => Outcome::Failed,
                _ => return None,
            };
            Some((name.to_owned(), outcome))
        };
        Self { tests: text.lines().filter_map(outcome).collect(), text: text.to_owned() }
    }

    /// How many tests ended like this.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.tests.values().filter(|&&other| other == outcome).count()
    }

    /// The names of the tests that ended like this.
    pub fn names(&self, outcome: Outcome) -> Vec<&str> {
        let found = self.tests.iter().filter(|&(_, &other)| other == outcome);
        found.map(|(name, _)| name.as_str()).collect()
    }

    /// What the suite said about a test.
    fn words_about(&self, name: &str) -> String {
        let is_it = |line: &&str| line.split_whitespace().next() == Some(name);
        let mut lines = self.text.lines().skip_while(|line| !is_it(line));
        let first = lines.next();
        let more = lines.take_while(|line| line.starts_with(char::is_whitespace));
        first.into_iter().chain(more).collect::<Vec<_>>().join("\n")
    }

    /// Checks that everything that passes on the host passes here, but for `limits`, and that nothing fails that the host
    /// could not even try.
    pub fn check_against(&self, host: &Self, limits: &[Limit]) -> Result<()> {
        ensure!(!host.tests.is_empty(), "The suite said nothing on the host:\n{}", host.text);
        let mut complaints = String::new();
        for (name, &on_host) in &host.tests {
            if limits.iter().any(|(limit, _)| limit == name) || on_host == Outcome::Failed {
                continue;
            }
            match self.tests.get(name) {
                Some(Outcome::Passed) => {}
                Some(Outcome::Skipped) if on_host == Outcome::Skipped => {}
                Some(_) => writeln!(complaints, "{}", self.words_about(name))?,
                None => writeln!(complaints, "{name} was not run")?,
            }
        }
        if !complaints.is_empty() {
            bail!(
                "{} tests passed, {} were skipped, {} failed; on the host {}, {}, {}. These should have passed:\n{}",
                self.count(Outcome::Passed),
                self.count(Outcome::Skipped),
                self.count(Outcome::Failed),
                host.count(Outcome::Passed),
                host.count(Outcome::Skipped),
                host.count(Outcome::Failed),
                complaints
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "a ok\nb::c   ok\nd skipped\n\tfor a reason\ne FAILED\n\tleft\nSummary: 1 failed";

    #[test]
    fn lines_of_three_words_and_more_are_no_outcomes() {
        let outcomes = Outcomes::parse(HOST);
        assert_eq!(outcomes.names(Outcome::Passed), ["a", "b::c"]);
        assert_eq!((outcomes.count(Outcome::Skipped), outcomes.count(Outcome::Failed)), (1, 1));
    }

    #[test]
    fn only_what_is_worse_than_on_the_host_counts() {
        let host = Outcomes::parse(HOST);
        let check = |text| Outcomes::parse(text).check_against(&host, &[("a", "it is so")]);
        check("a FAILED\nb::c ok\nd ok\ne FAILED").unwrap();
        let error = check("b::c FAILED\n\tleft 1\n\tright 2\nd skipped").unwrap_err().to_string();
        assert!(error.contains("b::c FAILED\n\tleft 1\n\tright 2\n"), "{error}");
        assert!(check("b::c skipped\nd ok\ne ok").is_err());
        assert!(check("d ok").unwrap_err().to_string().contains("b::c was not run"));
        assert!(check("b::c ok\nd FAILED").is_err());
    }
}

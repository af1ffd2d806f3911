//! Who decides: the built-in policy, or a script with the built-in policy behind it; and in any case the rails.
#![expect(clippy::cast_precision_loss, reason = "memory is far from having 2^52 bytes")]

pub mod builtin;
mod comfort;
pub mod demand;
pub mod script;

use serde::{Deserialize, Serialize};

pub use self::builtin::{Assessment, Builtin, Mode};
pub use self::script::Script;
use super::config::{Config, Parameters};
use super::model::{Policy, Snapshot, Wishes};
use super::rails::{Order, Rails};

/// Something that an administrator may want to know.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The built-in policy sees the host in another state than before.
    Mode {
        /// The new state.
        mode: Mode,
        /// The one before.
        before: Mode,
    },
    /// The script has failed, and the built-in policy decides in its place. Once for each reason.
    PolicyFailed {
        /// Why, for a person.
        reason: String,
    },
    /// The script works again.
    PolicyRecovered,
    /// The host is about to run out of memory.
    HostCritical,
    /// It no longer is.
    HostRecovered,
    /// There is more in use than the budget, and no guest can be taken anything from.
    OverBudget {
        /// So much is missing, bytes.
        missing: u64,
    },
    /// A guest is out of memory.
    GuestEmergency {
        /// Its name.
        guest: String,
    },
    /// A guest's balloon does not get where it should. It is asked for nothing more for a minute.
    NoProgress {
        /// Its name.
        guest: String,
        /// What its balloon was asked to be, bytes.
        target: u64,
        /// What it is, bytes.
        balloon: u64,
    },
}

/// What was decided about a snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// What is to be sent to balloons.
    pub orders: Vec<Order>,
    /// What has happened.
    pub events: Vec<Event>,
    /// What the policy wished for, before the rails.
    pub wishes: Wishes,
    /// What the built-in policy thinks of the host and the guests, whoever decided.
    pub assessment: Assessment,
    /// A script should have decided, and could not: the wishes are the built-in policy's.
    pub fallback: bool,
}

/// Decides: a policy and its rails.
#[derive(Debug)]
pub struct Decider {
    builtin: Builtin,
    script: Option<Script>,
    rails: Rails,
    parameters: Parameters,
    failure: Option<String>,
}

impl Decider {
    /// Decides as a configuration says. The script is read now; if that fails, the built-in policy decides, and an event
    /// says so. [`Script::check`] says it before.
    pub fn new(config: &Config) -> Self {
        let script = config.script.as_ref().map(|script| Script::load(script, &config.policy));
        Self::with(config.policy.clone(), script)
    }

    /// Decides by these parameters, and by this script if there is one.
    pub fn with(parameters: Parameters, script: Option<Script>) -> Self {
        let builtin = Builtin::new(parameters.clone());
        Self { builtin, script, rails: Rails::default(), parameters, failure: None }
    }

    /// From here on, another configuration decides. What is known of the guests is kept; the script and what it has kept
    /// begin anew.
    pub fn configure(&mut self, config: &Config) {
        self.builtin.configure(config.policy.clone());
        self.script = config.script.as_ref().map(|script| Script::load(script, &config.policy));
        self.parameters = config.policy.clone();
        self.failure = None;
    }

    /// Decides about a snapshot. To be called once for each, in order of time.
    pub fn decide(&mut self, snapshot: &Snapshot) -> Decision {
        let mut events = Vec::new();
        let before = self.builtin.assessment().mode;
        // It is asked in any case: for what it sees, and so that it knows the guests when a script fails.
        let builtin = self.builtin.wishes(snapshot);
        let assessment = self.builtin.assessment().clone();
        if assessment.mode != before {
            events.push(Event::Mode { mode: assessment.mode, before });
        }
        let mut fallback = false;
        let wishes = match self.script.as_mut().map(|script| script.decide(snapshot)) {
            None => builtin,
            Some(Ok(wishes)) => {
                if self.failure.take().is_some() {
                    events.push(Event::PolicyRecovered);
                }
                wishes
            }
            Some(Err(reason)) => {
                fallback = true;
                if self.failure.as_ref() != Some(&reason) {
                    events.push(Event::PolicyFailed { reason: reason.clone() });
                    self.failure = Some(reason);
                }
                builtin
            }
        };
        let outcome = self.rails.apply(snapshot, &wishes, &self.parameters);
        events.extend(outcome.events);
        Decision { orders: outcome.orders, events, wishes, assessment, fallback }
    }
}

#[cfg(test)]
mod tests;

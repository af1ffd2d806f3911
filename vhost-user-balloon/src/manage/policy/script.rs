//! A policy that an administrator has written, as a script in the language of rhai (<https://rhai.rs/book>).
//!
//! ```text
//! fn decide(host, guests, config, state) {
//!     let wishes = #{};
//!     for guest in guests {
//!         if guest.active { wishes[guest.name] = guest.used * 3 / 2; }
//!     }
//!     wishes
//! }
//! ```
//!
//! The function `decide` is called once for each snapshot, and returns a map from names of guests to the memory in bytes
//! that they should have. Guests that are not in it stay as they are. The last parameter may be left out: it is a map that
//! is empty at first, and keeps whatever the script puts into it.
//!
//! | of | there is |
//! |---|---|
//! | `host` | `now` (seconds), `total`, `available`, `reserved`, `budget` (bytes), `swap_in`, `swap_out` (bytes a second), `psi_some`, `psi_full` (percent), `comfortable` (nothing need be taken, and that for a while) |
//! | each of `guests` | `name`, `memory`, `held` (memory without balloon), `balloon`, `target`, `resident`, `min`, `max` (bytes), `shares`, `inactive`, `active` |
//! | and if it is `active` | `total`, `used`, `available`, `free` (bytes), `swap_in`, `swap_out` (bytes a second), `major_faults` (a second), `oom_kills` |
//! | `config` | the keys of `[policy]`, with `_` for `-`; percentages and seconds as floating point |
//!
//! Memory can be taken only from guests that are active: they say what they use, and their balloons obey. Sizes are
//! integers. A script cannot read or write anything but these, and is stopped if it takes too long. `print` and `debug` go
//! to the log, a few lines at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rhai::{AST, Dynamic, Engine, EvalAltResult, FLOAT, INT, Map, Scope};
use rustix::time::{ClockId, clock_gettime};

use super::comfort::Comfort;
use crate::manage::account::{budget, ceiling, floor, held, managed, used};
use crate::manage::config::{Parameters, ScriptConfig};
use crate::manage::model::{Guest, Policy, Snapshot, Wishes};

/// The function that decides.
const DECIDE: &str = "decide";
/// Bytes that a string can have.
const STRING: usize = 64 << 10;
/// Elements that an array or a map can have.
const ELEMENTS: usize = 16 << 10;
/// How deep functions may call each other.
const CALLS: usize = 32;
/// How deep expressions may be nested.
const DEPTH: usize = 64;
/// Variables that a script can have at a time.
const VARIABLES: usize = 256;
/// Functions that a script can have.
const FUNCTIONS: usize = 128;
/// How long a decision may take, milliseconds: a single operation on a large array takes much longer than others. Of the
/// thread's own time, as a decision is needed most where others have the processor.
const LONGEST_MS: u64 = 500;
/// The clock is looked at after so many operations.
const LOOK: u64 = 64;
/// Lines that a script can print in a decision.
const LINES: u32 = 16;

/// A policy as a script.
#[derive(Debug)]
pub struct Script {
    engine: Engine,
    /// The script and whether its function has the parameter for the state, or why there is none.
    compiled: Result<(AST, bool), String>,
    parameters: Parameters,
    state: Dynamic,
    comfort: Comfort,
    call: Arc<Call>,
}

/// What a call of the script has done so far.
#[derive(Debug)]
struct Call {
    /// When it began, by the clock of its thread, milliseconds.
    began: AtomicU64,
    /// Lines that it has printed.
    lines: AtomicU32,
}

impl Call {
    fn new() -> Arc<Self> {
        Arc::new(Self { began: AtomicU64::new(0), lines: AtomicU32::new(0) })
    }

    fn now() -> u64 {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
    }

    fn begin(&self) {
        self.began.store(Self::now(), Ordering::Relaxed);
        self.lines.store(0, Ordering::Relaxed);
    }

    fn is_too_long(&self) -> bool {
        Self::now().saturating_sub(self.began.load(Ordering::Relaxed)) > LONGEST_MS
    }

    /// Whether one more line may be printed.
    fn may_print(&self) -> bool {
        self.lines.fetch_add(1, Ordering::Relaxed) < LINES
    }
}

impl Script {
    /// Reads a script from its file. If that is not possible, [`Self::check`] and each decision say why.
    pub fn load(config: &ScriptConfig, parameters: &Parameters) -> Self {
        match std::fs::read_to_string(&config.file) {
            Ok(text) => Self::new(&text, config.operations, parameters),
            Err(error) => {
                let mut script = Self::new("", config.operations, parameters);
                script.compiled = Err(format!(
                    "Cannot read the script {}, check that it exists and who may read it: {error}",
                    config.file.display()
                ));
                script
            }
        }
    }

    /// A script of this text, that is stopped after so many operations in a decision.
    pub fn new(text: &str, operations: u64, parameters: &Parameters) -> Self {
        let call = Call::new();
        let engine = engine(operations, &call);
        let compiled = compile(&engine, text);
        let state = Dynamic::from_map(Map::new()).into_shared();
        let (parameters, comfort) = (parameters.clone(), Comfort::default());
        Self { engine, compiled, parameters, state, comfort, call }
    }

    /// Fails with the reason, for a person, if the text is no script.
    pub fn check(&self) -> Result<(), String> {
        self.compiled.as_ref().map(|_| ()).map_err(Clone::clone)
    }
}

impl Policy for Script {
    fn decide(&mut self, snapshot: &Snapshot) -> Result<Wishes, String> {
        let (ast, with_state) = self.compiled.as_ref().map_err(Clone::clone)?;
        let mut guests: Vec<&Guest> = snapshot.guests.iter().filter(|guest| guest.memory > 0).collect();
        guests.sort_by(|one, other| one.name.cmp(&other.name));
        let comfortable = self.comfort.watch(snapshot, &self.parameters);
        let host = describe_host(snapshot, comfortable, &self.parameters);
        let described: rhai::Array =
            guests.iter().map(|guest| Dynamic::from_map(describe_guest(guest))).collect();
        let config = describe_parameters(&self.parameters);
        let mut arguments =
            vec![Dynamic::from_map(host), Dynamic::from_array(described), Dynamic::from_map(config)];
        if *with_state {
            arguments.push(self.state.clone());
        }
        self.call.begin();
        let answer =
            self.engine.call_fn::<Dynamic>(&mut Scope::new(), ast, DECIDE, arguments).map_err(|error| {
                match error.unwrap_inner() {
                    EvalAltResult::ErrorTerminated(..) => {
                        format!("The script was stopped: it takes longer than {LONGEST_MS} ms for a decision")
                    }
                    _ => format!("The script failed: {error}"),
                }
            })?;
        read_answer(answer, &guests)
    }
}

/// An engine that can do nothing but compute.
fn engine(operations: u64, call: &Arc<Call>) -> Engine {
    let mut engine = Engine::new();
    let [clock, print, debug] = [(); 3].map(|()| Arc::clone(call));
    engine
        // Of 0, the engine thinks that there is no limit.
        .set_max_operations(operations.max(1))
        .on_progress(move |done| (done % LOOK == 0 && clock.is_too_long()).then_some(Dynamic::UNIT))
        .set_max_call_levels(CALLS)
        .set_max_expr_depths(DEPTH, DEPTH)
        .set_max_string_size(STRING)
        .set_max_array_size(ELEMENTS)
        .set_max_map_size(ELEMENTS)
        .set_max_variables(VARIABLES)
        .set_max_functions(FUNCTIONS)
        .disable_symbol("eval")
        // It would hold up the manager, and costs no operations.
        .register_fn("sleep", |_: INT| no_sleep())
        .register_fn("sleep", |_: FLOAT| no_sleep())
        .on_print(move |text| {
            if print.may_print() {
                log::info!("Script: {text}");
            }
        })
        .on_debug(move |text, _, position| {
            if debug.may_print() {
                log::debug!("Script, {position}: {text}");
            }
        });
    engine
}

fn no_sleep() -> Result<(), Box<EvalAltResult>> {
    Err("a policy cannot sleep: it is called again in a moment".into())
}

fn compile(engine: &Engine, text: &str) -> Result<(AST, bool), String> {
    let ast = engine.compile(text).map_err(|error| format!("The script is not one: {error}"))?;
    let parameters = |count: usize| {
        ast.iter_functions().any(|function| function.name == DECIDE && function.params.len() == count)
    };
    let with_state = parameters(4);
    if with_state || parameters(3) {
        // What stands outside of functions would run at each call, and means nothing.
        return Ok((ast.clone_functions_only(), with_state));
    }
    Err("The script has no `fn decide(host, guests, config)` or `fn decide(host, guests, config, state)`"
        .into())
}

/// A size as scripts have them. None is as large as 2^63.
fn size(bytes: u64) -> Dynamic {
    Dynamic::from_int(INT::try_from(bytes).unwrap_or(INT::MAX))
}

fn describe_host(snapshot: &Snapshot, comfortable: bool, parameters: &Parameters) -> Map {
    let host = &snapshot.host;
    Map::from_iter([
        ("now".into(), Dynamic::from_float(snapshot.now)),
        ("total".into(), size(host.total)),
        ("available".into(), size(host.available)),
        ("reserved".into(), size(snapshot.reserved)),
        ("budget".into(), size(budget(snapshot, parameters))),
        ("swap_in".into(), Dynamic::from_float(host.swap_in)),
        ("swap_out".into(), Dynamic::from_float(host.swap_out)),
        ("psi_some".into(), Dynamic::from_float(host.psi_some)),
        ("psi_full".into(), Dynamic::from_float(host.psi_full)),
        ("comfortable".into(), Dynamic::from_bool(comfortable)),
    ])
}

fn describe_guest(guest: &Guest) -> Map {
    let mut map = Map::from_iter([
        ("name".into(), Dynamic::from(guest.name.clone())),
        ("memory".into(), size(guest.memory)),
        ("held".into(), size(held(guest))),
        ("balloon".into(), size(guest.balloon)),
        ("target".into(), size(guest.target)),
        ("resident".into(), size(guest.resident)),
        ("min".into(), size(floor(guest))),
        ("max".into(), size(ceiling(guest))),
        ("shares".into(), Dynamic::from_int(INT::from(guest.shares))),
        ("inactive".into(), Dynamic::from_bool(guest.inactive)),
        ("active".into(), Dynamic::from_bool(managed(guest))),
    ]);
    if let (Some(usage), Some(used)) = (&guest.usage, used(guest)) {
        map.extend([
            ("total".into(), size(usage.total)),
            ("used".into(), size(used)),
            ("available".into(), size(usage.available)),
            ("free".into(), size(usage.free)),
            ("swap_in".into(), Dynamic::from_float(usage.swap_in)),
            ("swap_out".into(), Dynamic::from_float(usage.swap_out)),
            ("major_faults".into(), Dynamic::from_float(usage.major_faults)),
            ("oom_kills".into(), size(usage.oom_kills)),
        ]);
    }
    map
}

fn describe_parameters(parameters: &Parameters) -> Map {
    Map::from_iter([
        ("headroom".into(), Dynamic::from_float(parameters.headroom)),
        ("cushion".into(), size(parameters.cushion)),
        ("reserve_percent".into(), Dynamic::from_float(parameters.reserve_percent)),
        ("comfortable_percent".into(), Dynamic::from_float(parameters.comfortable_percent)),
        ("comfortable_psi".into(), Dynamic::from_float(parameters.comfortable_psi)),
        ("inflate_percent".into(), Dynamic::from_float(parameters.inflate_percent)),
        ("emergency_inflate_percent".into(), Dynamic::from_float(parameters.emergency_inflate_percent)),
        ("grow_step".into(), size(parameters.grow_step)),
        ("shrink_step_percent".into(), Dynamic::from_float(parameters.shrink_step_percent)),
        ("peak_seconds".into(), Dynamic::from_float(parameters.peak_seconds)),
        ("boost_max".into(), size(parameters.boost_max)),
        ("tau".into(), Dynamic::from_float(parameters.tau)),
        ("period_seconds".into(), Dynamic::from_float(parameters.period_seconds)),
        ("stale_seconds".into(), Dynamic::from_float(parameters.stale_seconds)),
    ])
}

/// What the script wishes, if that makes sense.
fn read_answer(answer: Dynamic, guests: &[&Guest]) -> Result<Wishes, String> {
    let kind = answer.type_name();
    let map = answer
        .try_cast::<Map>()
        .ok_or_else(|| format!("The script returned {kind}, not a map from names to bytes"))?;
    let mut wishes = Wishes::new();
    for (name, value) in map {
        if guests.binary_search_by(|guest| guest.name.as_str().cmp(&name)).is_err() {
            return Err(format!("The script wishes memory for {name:?}, and there is no such guest"));
        }
        let bytes = match (value.as_int(), value.as_float()) {
            (Ok(int), _) => u64::try_from(int).ok(),
            (_, Ok(float)) if (0.0..u64::MAX as f64).contains(&float) => Some(float as u64),
            _ => None,
        };
        let bytes = bytes.ok_or_else(|| {
            format!("The script wishes {value} ({}) for {name:?}, not a number of bytes", value.type_name())
        })?;
        wishes.insert(name.into(), bytes);
    }
    Ok(wishes)
}

#[cfg(test)]
mod tests;

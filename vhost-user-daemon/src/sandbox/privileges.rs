//! Capabilities, and the other attributes of a process by which it could gain rights.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::SandboxError;

/// What the process may do now.
pub(super) fn held() -> Result<CapabilitySet, SandboxError> {
    capabilities(None)
        .map(|sets| sets.permitted)
        .map_err(|error| SandboxError::Privileges { step: "read the capabilities", source: error.into() })
}

/// Gives up all capabilities but `keep`, which the process must hold, and any way to get them back.
pub(super) fn drop_all_but(keep: CapabilitySet) -> Result<(), SandboxError> {
    let failed = |step| move |error: Errno| SandboxError::Privileges { step, source: error.into() };
    set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    // While CAP_SETPCAP is there. Without it the bounding set stays, and says nothing: no program that is executed
    // gains anything under no_new_privs.
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if keep.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number that the kernel does not know, or no permission.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(error) => return Err(failed("bounding set")(error)),
        }
    }
    clear_ambient_capability_set().map_err(failed("ambient capabilities"))?;
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("capabilities"))
}

/// Keeps other processes of the same user from tracing this one, and its memory, which is the guest's, out of core
/// dumps.
///
/// `/proc/self` belongs to root from here on. Threads of the process itself may use its `fd` directory all the same.
pub(super) fn hide() -> Result<(), SandboxError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| SandboxError::Privileges { step: "core dumps", source: error.into() })
}

/// The names of capabilities for a message, "none" without any.
pub(super) fn names(capabilities: CapabilitySet) -> String {
    let names: Vec<_> = capabilities.iter_names().map(|(name, _)| name).collect();
    if names.is_empty() { "none".into() } else { names.join(" ") }
}

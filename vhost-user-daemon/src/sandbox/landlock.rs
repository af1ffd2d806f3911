//! Landlock: the kernel refuses to open, make or remove files anywhere but beneath given directories.
//!
//! It needs no privilege and no namespace, and it does not care how a file is reached: a descriptor of a directory
//! outside, left open by mistake, is of no use. It says nothing about a file's attributes (`stat`, `chmod`, `utimes`,
//! extended attributes), and nothing about descriptors that were open before.
//!
//! A directory that the host moves out of a shared one stays known to those who have it open, but nothing can be
//! opened in it any more (EACCES). Files that `open_by_handle_at` finds may have no known place in the tree at all,
//! and are refused for that.
//!
//! Opening a file takes longer: each time, the kernel looks for rules in the directories on its way up to the shared
//! one. This is why there are no such rules inside of namespaces, where the other files cannot even be named.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

/// The first version that can allow renames and links between directories. Without them a file server is broken.
const OLDEST: ABI = ABI::V2;

/// The newest version whose access rights are known to be right here.
const NEWEST: ABI = ABI::V9;

/// A directory and what is allowed beneath it.
pub(super) struct Rule<'a> {
    pub directory: BorrowedFd<'a>,
    pub access: BitFlags<AccessFs>,
}

/// All that can be done to files, and to the tree they are in.
pub(super) fn read_write() -> BitFlags<AccessFs> {
    // Guests run their programs and use their devices, not the host's.
    AccessFs::from_all(NEWEST) & !(AccessFs::Execute | AccessFs::IoctlDev | AccessFs::ResolveUnix)
}

/// Reading of files and directories.
pub(super) fn read_only() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

/// The rules as far as the kernel knows them; an error if it lacks what makes them worth having.
pub(super) fn prepare(rules: &[Rule<'_>]) -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(OLDEST))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rules(
            rules.iter().map(|rule| Ok::<_, RulesetError>(PathBeneath::new(rule.directory, rule.access))),
        )
}

/// No rules for files, but no signals to processes outside either: what namespaces leave open, and costs nothing.
pub(super) fn prepare_scope() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default().set_compatibility(CompatLevel::BestEffort).scope(Scope::from_all(NEWEST))?.create()
}

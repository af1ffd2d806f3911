//! Which extended attributes a guest may see and set, and under which name the host keeps them.

use std::borrow::Cow;
use std::str::FromStr;

use rustix::io::Errno;
use thiserror::Error;

/// The attributes of the mapped-xattr model, in QEMU's words: `user.virtfs.`.
pub(in crate::host) const MAPPED_PREFIX: &[u8] = b"user.virtfs.";
/// The access control lists of POSIX.
const ACL_PREFIX: &[u8] = b"system.posix_acl_";

/// The attributes that guests see: `--xattr`.
///
/// Parsed from a list of prefixes with commas between, or `none`, or `all`. The default is `user.`, `security.` and
/// `system.posix_acl_`; `trusted.` is the host administrator's and has to be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrPolicy {
    /// An empty prefix is one of every name.
    prefixes: Vec<Vec<u8>>,
    mapped: bool,
    no_acls: bool,
}

/// What a name is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read the attribute.
    Read,
    /// To set or remove it.
    Write,
}

/// Why a text is no list of prefixes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PolicyError {
    /// Nothing between two commas.
    #[error("The list of extended attributes has an empty prefix; write all to allow every attribute")]
    Empty,
    /// A prefix that is in no namespace of xattr(7).
    #[error(
        "'{0}' is no prefix of extended attributes: write one that begins with user., system., security. or trusted., \
         with the dot"
    )]
    Namespace(String),
}

impl Default for XattrPolicy {
    fn default() -> Self {
        let prefixes = [b"user.", &b"security."[..], ACL_PREFIX].map(<[u8]>::to_vec);
        Self { prefixes: prefixes.into(), mapped: false, no_acls: false }
    }
}

impl FromStr for XattrPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let prefixes = match text {
            "none" => vec![],
            "all" => vec![vec![]],
            list => list.split(',').map(parse_prefix).collect::<Result<_, _>>()?,
        };
        Ok(Self { prefixes, mapped: false, no_acls: false })
    }
}

fn parse_prefix(prefix: &str) -> Result<Vec<u8>, PolicyError> {
    if prefix.is_empty() {
        return Err(PolicyError::Empty);
    }
    let known = ["user.", "system.", "security.", "trusted."];
    if !known.iter().any(|namespace| prefix.starts_with(namespace)) {
        return Err(PolicyError::Namespace(prefix.to_owned()));
    }
    Ok(prefix.as_bytes().to_vec())
}

impl XattrPolicy {
    /// The same list in the mapped-xattr model: `user.virtfs.` is kept for the model itself, and the access control lists
    /// are stored there, so that the host does not apply them.
    #[must_use]
    pub fn mapped(self) -> Self {
        Self { mapped: true, ..self }
    }

    /// The same list without access control lists: they name users, which are others on the host.
    #[must_use]
    pub fn without_acls(self) -> Self {
        Self { no_acls: true, ..self }
    }

    /// Whether the guest may have attributes of this name at all.
    pub fn allows(&self, name: &[u8]) -> bool {
        self.prefixes.iter().any(|prefix| name.starts_with(prefix))
            && !(self.mapped && name.starts_with(MAPPED_PREFIX))
            && !(self.no_acls && name.starts_with(ACL_PREFIX))
    }

    /// The name under which the host keeps the guest's attribute `name`.
    ///
    /// `EOPNOTSUPP`: the guest may not have it, as on a file system without such attributes. Names of the mapped-xattr
    /// model do not exist for it: `ENODATA` when read and `EACCES` when written.
    pub fn host_name<'a>(&self, name: &'a [u8], access: Access) -> Result<Cow<'a, [u8]>, Errno> {
        if self.mapped && name.starts_with(MAPPED_PREFIX) {
            return Err(match access {
                Access::Read => Errno::NODATA,
                Access::Write => Errno::ACCESS,
            });
        }
        if !self.allows(name) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(if self.mapped && name.starts_with(ACL_PREFIX) {
            Cow::Owned([MAPPED_PREFIX, name].concat())
        } else {
            Cow::Borrowed(name)
        })
    }

    /// Whether removing the attribute that the host calls `host_name` is no error (`ENODATA`) where there is none: so it is
    /// with the host's access control lists, and what is stored in their place behaves like them.
    pub fn removes_quietly(&self, host_name: &[u8]) -> bool {
        let rest = host_name.strip_prefix(MAPPED_PREFIX);
        self.mapped && rest.is_some_and(|rest| rest.starts_with(ACL_PREFIX))
    }

    /// Takes out of a list of names, each followed by a NUL, what the guest does not see, and gives the rest the guest's
    /// names.
    pub fn filter_list(&self, list: &[u8]) -> Vec<u8> {
        let mut seen = Vec::with_capacity(list.len());
        for name in list.split(|byte| *byte == 0) {
            let acl = name.strip_prefix(MAPPED_PREFIX).filter(|rest| rest.starts_with(ACL_PREFIX));
            let guest_name = match acl {
                Some(acl) if self.mapped => acl,
                // The host's own lists do not hold for the guest.
                _ if self.mapped && name.starts_with(ACL_PREFIX) => continue,
                _ => name,
            };
            if !name.is_empty() && self.allows(guest_name) {
                seen.extend_from_slice(guest_name);
                seen.push(0);
            }
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> XattrPolicy {
        text.parse().unwrap()
    }

    #[test]
    fn the_default_leaves_trusted_out() {
        let policy = XattrPolicy::default();
        for name in ["user.a", "security.capability", "system.posix_acl_access", "system.posix_acl_default"] {
            assert!(policy.allows(name.as_bytes()), "{name}");
        }
        for name in ["trusted.a", "system.nfs4_acl", "user", "", "os2.a"] {
            assert!(!policy.allows(name.as_bytes()), "{name}");
        }
        assert_eq!(policy, super::tests::policy("user.,security.,system.posix_acl_"));
    }

    #[test]
    fn lists_are_parsed() {
        assert!(policy("all").allows(b"trusted.a"));
        assert!(!policy("none").allows(b"user.a"));
        assert!(policy("trusted.overlay.,user.").allows(b"trusted.overlay.opaque"));
        assert!(!policy("trusted.overlay.,user.").allows(b"trusted.a"));
        assert_eq!("".parse::<XattrPolicy>(), Err(PolicyError::Empty));
        assert_eq!("user.,".parse::<XattrPolicy>(), Err(PolicyError::Empty));
        assert_eq!("all,user.".parse::<XattrPolicy>(), Err(PolicyError::Namespace("all".into())));
        assert_eq!("user".parse::<XattrPolicy>(), Err(PolicyError::Namespace("user".into())));
    }

    #[test]
    fn names_are_refused_or_kept() {
        let policy = XattrPolicy::default();
        assert_eq!(policy.host_name(b"user.a", Access::Read).unwrap(), &b"user.a"[..]);
        assert_eq!(policy.host_name(b"trusted.a", Access::Write), Err(Errno::OPNOTSUPP));
        // Without the model they are attributes like others.
        assert_eq!(policy.host_name(b"user.virtfs.uid", Access::Write).unwrap(), &b"user.virtfs.uid"[..]);
        let list = b"user.a\0trusted.b\0user.virtfs.uid\0system.posix_acl_access\0";
        assert_eq!(policy.filter_list(list), b"user.a\0user.virtfs.uid\0system.posix_acl_access\0");
        assert_eq!(policy.filter_list(b""), b"");
        assert_eq!(super::tests::policy("none").filter_list(list), b"");
        assert_eq!(super::tests::policy("all").filter_list(list), list);
    }

    #[test]
    fn the_mapped_model_keeps_its_own_names() {
        for policy in [XattrPolicy::default(), policy("all")].map(XattrPolicy::mapped) {
            for name in [&b"user.virtfs.uid"[..], b"user.virtfs.", b"user.virtfs.system.posix_acl_access"] {
                assert!(!policy.allows(name));
                assert_eq!(policy.host_name(name, Access::Read), Err(Errno::NODATA));
                assert_eq!(policy.host_name(name, Access::Write), Err(Errno::ACCESS));
            }
            assert_eq!(
                policy.host_name(b"system.posix_acl_default", Access::Write).unwrap(),
                &b"user.virtfs.system.posix_acl_default"[..]
            );
            let list = b"user.virtfs.uid\0user.a\0user.virtfs.system.posix_acl_access\0\
                system.posix_acl_access\0user.virtfs.system.x\0";
            assert_eq!(policy.filter_list(list), b"user.a\0system.posix_acl_access\0");
        }
        let mapped = XattrPolicy::default().mapped();
        let acl = mapped.host_name(b"system.posix_acl_access", Access::Write).unwrap();
        assert!(mapped.removes_quietly(&acl) && !mapped.removes_quietly(b"user.a"));
        assert!(!XattrPolicy::default().removes_quietly(&acl));
        let none = policy("user.").mapped();
        assert_eq!(none.host_name(b"system.posix_acl_access", Access::Read), Err(Errno::OPNOTSUPP));
        assert_eq!(none.filter_list(b"user.virtfs.system.posix_acl_access\0"), b"");
    }
}

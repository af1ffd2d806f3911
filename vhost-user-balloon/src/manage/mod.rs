//! `vhost-user-balloon manage`: shares a host's memory among its guests by their balloons.
//!
//! Once a second, and when the kernel reports pressure, the host and all balloons are looked at ([`model::Snapshot`]), a
//! policy says how much memory each guest should have, rails that no policy can break make targets of that, and the
//! targets are sent to the balloons.
//!
//! KSM, the kernel's merging of equal pages, is no part of this: it merges private memory only, and the memory of a
//! guest with a vhost-user device is shared. Switching it on costs time, and saves nothing of such guests.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line; [`run`] does what it says |
//! | [`runtime`] | the loop: looks, decides, sends |
//! | [`host`], [`guests`] | what is looked at: /proc or a cgroup, and the balloons' control sockets |
//! | [`model`] | what a policy sees and says |
//! | [`config`] | the file with all parameters |
//! | [`account`] | what the numbers of a snapshot mean, and how an amount is divided |
//! | [`policy`] | the built-in policy, scripts, and who of them decides |
//! | [`rails`] | what no policy can break |
//! | [`admission`] | memory for virtual machines that are about to start |
//! | [`desk`], [`api`] | the manager's own control socket, and the JSON that is spoken on it |
//! | [`event`], [`metrics`] | what the manager tells of |
//! | [`record`], [`replay`] | what was seen and decided, and what another policy would have made of it |
//! | [`simulation`] | a host and guests that do not exist, to compare policies |

pub mod account;
pub mod admission;
pub mod api;
pub mod args;
mod commands;
pub mod config;
pub mod desk;
pub mod event;
pub mod guests;
pub mod host;
pub mod metrics;
pub mod model;
pub mod policy;
pub mod rails;
pub mod record;
pub mod replay;
pub mod runtime;
pub mod simulation;

pub use self::args::ManageArgs;
pub use self::commands::run;

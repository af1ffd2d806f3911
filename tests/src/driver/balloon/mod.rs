//! A balloon's front end and driver without a guest, which does what any driver might do, and what none should.
//!
//! * [`memory`] is a guest's memory of several makes, and what the host holds of it, page by page.
//! * [`driver`] has the queues: it inflates, deflates, reports and answers for statistics; [`life`] stops, resets and
//!   reconnects it; [`follower`] lets it live by itself.
//! * [`fixture`] starts `vhost-user-balloon`; [`control`] talks to its control socket.
//! * [`huge`] lends huge pages to a test.

pub mod control;
pub mod driver;
pub mod fixture;
pub mod follower;
pub mod huge;
pub mod life;
pub mod memory;

pub use driver::{Driver, Numbering, Options, Role};
pub use fixture::BalloonFixture;
pub use follower::Follower;
pub use memory::{BLOCK, Backing, PAGE, Pages, Shape};

/// The driver waits for the acknowledgement of a deflation before it uses the pages.
pub const MUST_TELL_HOST: u32 = 0;
/// There is a queue for statistics.
pub const STATS_VQ: u32 = 1;
/// The driver takes pages back when the guest is short of memory.
pub const DEFLATE_ON_OOM: u32 = 2;
/// There is a queue to hint at free pages, which the daemon never offers.
pub const FREE_PAGE_HINT: u32 = 3;
/// The driver says with what free pages are filled.
pub const PAGE_POISON: u32 = 4;
/// There is a queue to report free pages.
pub const REPORTING: u32 = 5;

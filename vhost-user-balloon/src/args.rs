//! The command line.

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand, ValueEnum, value_parser};
use vhost_user_daemon::cli::{self, Capabilities, CommonArgs, ControlArgs, DeviceType};

use crate::ctl::CtlArgs;
use crate::device::BalloonOptions;
use crate::manage::ManageArgs;
use crate::memory::{Granularity, PAGE};
use crate::sizes;

/// What `--print-capabilities` prints.
pub const CAPABILITIES: Capabilities = Capabilities { device_type: DeviceType::Balloon, features: &[] };

/// Takes memory from a virtual machine that does not need it, and gives it back to the host: a virtio memory balloon over
/// vhost-user.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_long_help = cli::qemu_example(
        "vhost-user-balloon",
        "--control-socket balloon.control",
        "-device vhost-user-test-device-pci,chardev=vu0,virtio-id=5,num_vqs=5,vq_size=128,config_size=16",
    )
)]
pub struct Args {
    #[command(subcommand)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub command: Option<Command>,

    /// Size of the balloon at first: memory that the guest is asked to do without
    ///
    /// A number of bytes, or with a suffix such as 512M or 4G (powers of 1024). It is a wish: the guest gives what it can. A
    /// balloon whose --state-file has a size goes on with that one.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = sizes::parse, help_heading = "Balloon")]
    pub size: u64,

    /// Memory that the guest keeps, however large the balloon is asked to be
    ///
    /// So that a mistyped size does not hurt. It is measured from all of the guest's memory, of which its kernel needs some:
    /// give what the guest needs to work, not what it needs to boot.
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = sizes::parse, help_heading = "Balloon")]
    pub min_guest_memory: u64,

    /// Ask the guest for statistics every so many seconds; 0: only when somebody wants them
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = value_parser!(u64).range(..=86_400), help_heading = "Balloon")]
    pub stats_interval: u64,

    /// Let the guest report free pages, which go back to the host within seconds and without a target
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Switch::On, num_args = 0..=1, default_missing_value = "on", help_heading = "Balloon")]
    pub free_page_reporting: Switch,

    /// Let the guest take pages out of the balloon when it is short of memory
    ///
    /// Otherwise it kills processes while the balloon has memory. With it, a guest can empty its balloon by using memory, and
    /// what it sees as its total does not become less. Linux does it, Windows does not.
    #[arg(long, value_name = "WHETHER", value_enum, default_value_t = Switch::On, num_args = 0..=1, default_missing_value = "on", help_heading = "Balloon")]
    pub deflate_on_oom: Switch,

    /// Give nothing back to the host: for virtual machines whose memory a device has pinned
    ///
    /// With VFIO or vDPA a device writes to the guest's pages by their place in the host's memory. A page that is given back
    /// has another place when the guest uses it again, and the device would write to the old one: silent corruption. QEMU
    /// knows nothing of this balloon and does not prevent it. The guest still gives pages, which limits what it uses.
    #[arg(long, action = ArgAction::SetTrue, help_heading = "Memory")]
    pub no_discard: bool,

    /// Give memory back in pieces of at least this size, a power of two
    ///
    /// Larger pieces, 2M in particular, keep the huge pages of a guest whole, and cost less; what does not fill one stays
    /// with the guest's process. `auto` takes the page size of the file that the memory is in: 4096, or that of its huge
    /// pages.
    #[arg(long, value_name = "auto|BYTES", default_value = "auto", value_parser = parse_granularity, conflicts_with = "no_discard", help_heading = "Memory")]
    pub granularity: Granularity,

    /// Share of one processor that the guest may make the daemon use for long
    ///
    /// What is not used is saved up for 40 seconds, so that only a guest that moves memory to and fro without end gets
    /// there. 100 is no limit.
    #[arg(long, value_name = "PERCENT", default_value_t = 25, value_parser = value_parser!(u32).range(1..=100), help_heading = "Memory")]
    pub max_cpu: u32,

    /// Keep the target in this file, for a daemon that is restarted
    ///
    /// Together with what the guest has said of its balloon's size. Which pages are in it need not be known. The file is
    /// for one daemon, and is made if it is missing; it need not outlive the host.
    #[arg(long, value_name = "PATH", help_heading = "Balloon")]
    pub state_file: Option<PathBuf>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub control: ControlArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would print it as help text")]
    pub common: CommonArgs,
}

/// What else the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ask a running balloon how it is, and tell it what to be
    Ctl(CtlArgs),
    /// Share the host's memory among all guests with a balloon
    Manage(Box<ManageArgs>),
}

/// Whether something is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "they say it")]
pub enum Switch {
    On,
    Off,
}

fn parse_granularity(text: &str) -> Result<Granularity, String> {
    if text == "auto" {
        return Ok(Granularity::Auto);
    }
    let size = cli::parse_bytes(text)?;
    if !size.is_power_of_two() || !(PAGE..=1 << 30).contains(&size) {
        return Err("give auto, or a power of two from 4096 to 1G".into());
    }
    Ok(Granularity::AtLeast(size))
}

impl Args {
    /// The balloon that is asked for.
    pub fn balloon_options(&self) -> BalloonOptions {
        BalloonOptions {
            size: self.size,
            min_guest_memory: self.min_guest_memory,
            statistics_interval: self.stats_interval,
            reporting: self.free_page_reporting == Switch::On,
            deflate_on_oom: self.deflate_on_oom == Switch::On,
            granularity: if self.no_discard { Granularity::Nothing } else { self.granularity },
            max_cpu: self.max_cpu,
        }
    }
}

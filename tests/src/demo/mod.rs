//! The demo: starts the daemons, boots one guest on all of them, and tells what happens, a chapter per daemon.
mod balloon;
mod blk;
mod net;
mod ninep;
mod outside;

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};

use crate::guest::{Guest, Running, Vmm};

/// A guest under emulation on a slow machine needs most of it for its checksums.
const TIME_LIMIT: Duration = Duration::from_secs(300);
/// Nobody should be thrown out of a shell; a forgotten one ends some day.
const SHELL_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Boots a Linux guest on the daemons of this workspace and shows what it does with them.
///
/// Needs no root, no KVM and no installed QEMU: on a Debian host it fetches what it needs once (about 250 MB) and
/// keeps it in the user's cache folder, where the tests find it as well.
#[derive(Debug, Parser)]
#[command(name = "cargo demo")]
pub struct Args {
    /// What to show [default: all]
    #[arg(value_enum, value_name = "CHAPTER")]
    chapters: Vec<ChapterArg>,
    /// What runs the guest
    #[arg(long, value_enum, default_value_t = VmmArg::Qemu)]
    vmm: VmmArg,
    /// Gives you the guest's shell at the end; `exit` leaves it
    #[arg(long)]
    shell: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ChapterArg {
    /// vhost-user-blk: a disk
    Blk,
    /// vhost-user-net: a way out through passt, and a switch between two guests
    Net,
    /// vhost-user-9p: a directory of the host. Not with User Mode Linux, which has no 9p over virtio
    #[value(name = "9p")]
    Ninep,
    /// vhost-user-balloon: memory that goes back to the host
    Balloon,
}

impl ChapterArg {
    /// What makes it impossible with this monitor.
    fn obstacle(self, vmm: Vmm) -> Option<&'static str> {
        (self == Self::Ninep && vmm == Vmm::Uml)
            .then_some("vhost-user-9p: Debian's User Mode Linux has no 9p over virtio; QEMU's guest has")
    }

    /// Starts the chapter's daemons.
    fn start(self, vmm: Vmm) -> Result<Box<dyn Chapter>> {
        Ok(match self {
            Self::Blk => Box::new(blk::Blk::start(vmm)?),
            Self::Net => Box::new(net::Net::start(vmm)?),
            Self::Ninep => Box::new(ninep::Ninep::start()?),
            Self::Balloon => Box::new(balloon::Balloon::start()?),
        })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum VmmArg {
    /// QEMU: a whole virtual machine with PCI devices
    Qemu,
    /// User Mode Linux: a Linux kernel as an ordinary process, boots in a second
    Uml,
}

/// What one daemon contributes.
trait Chapter {
    /// Its name: a word that its script's announcements begin with.
    fn name(&self) -> &'static str;

    /// Attaches its device, and what its script needs, to the guest.
    fn attach(&self, guest: Guest) -> Guest;

    /// What the guest does. It may announce steps that [`Chapter::follow`] waits for; its end is announced for it.
    fn script(&self) -> String;

    /// Tells the story while the guest acts.
    fn follow(&self, guest: &mut Running) -> Result<()>;

    /// Checks at the end what only the host can see.
    fn finish(&mut self) -> Result<()>;
}

/// Runs the demo.
pub fn run(args: &Args) -> Result<()> {
    let vmm = match args.vmm {
        VmmArg::Qemu => Vmm::Qemu,
        VmmArg::Uml => Vmm::Uml,
    };
    let wanted = |chapter: &&ChapterArg| args.chapters.is_empty() || args.chapters.contains(chapter);
    let mut chapters = Vec::new();
    for chapter in ChapterArg::value_variants().iter().filter(wanted) {
        match chapter.obstacle(vmm) {
            Some(why) if !args.chapters.is_empty() => bail!("{why}"),
            Some(why) => say("skipped", why),
            None => chapters.push(chapter.start(vmm)?),
        }
    }
    let limit = if args.shell { SHELL_LIMIT } else { TIME_LIMIT };
    let mut guest = Guest::new(vmm).cpus(processors(vmm)).timeout(limit);
    let mut script = "report kernel \"$(uname -sr)\"\nannounce up\n".to_owned();
    for chapter in &chapters {
        guest = chapter.attach(guest);
        script.extend([&chapter.script(), "announce ", chapter.name(), " done\n"]);
    }
    if args.shell {
        script.push_str("await shell\nshell\n");
    }
    let start = Instant::now();
    let mut running = guest.script(script).spawn()?;
    wait(&mut running, "up")?;
    say(
        "guest",
        format!("{} in {vmm} is up after {:.1} s", value(&running, "kernel")?, start.elapsed().as_secs_f64()),
    );
    for chapter in &chapters {
        chapter.follow(&mut running)?;
        wait(&mut running, &format!("{} done", chapter.name()))?;
    }
    if args.shell {
        println!("\nThis is the guest's shell; `exit` powers it off.");
        running.send("shell")?;
        running.interact()?;
        println!();
    }
    running.wait()?.check()?;
    for chapter in &mut chapters {
        chapter.finish()?;
    }
    say("end", format!("all is well after {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

/// How many processors the guest has: more than one queue makes sense only with more than one.
fn processors(vmm: Vmm) -> u32 {
    match vmm {
        Vmm::Qemu => 2,
        Vmm::Uml => 1,
    }
}

fn say(what: &str, text: impl Display) {
    println!("{what:<12}{text}");
}

fn wait(guest: &mut Running, text: &str) -> Result<()> {
    guest.wait_for(text, TIME_LIMIT)
}

fn value(guest: &Running, key: &str) -> Result<String> {
    guest.values().remove(key).with_context(|| format!("The guest did not report {key}"))
}

fn number(guest: &Running, key: &str) -> Result<f64> {
    let value = value(guest, key)?;
    let number: f64 = value.parse().with_context(|| format!("The guest reported {key} as {value:?}"))?;
    ensure!(number.is_finite(), "The guest reported {key} as {value:?}");
    Ok(number)
}

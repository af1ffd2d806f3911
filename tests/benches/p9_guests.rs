//! One Linux guest and the same work on four kinds of shared directory: `vhost-user-9p`, QEMU's own virtio-9p, virtiofsd,
//! and NFS 4.2 from a server on the host (nfs-ganesha), which the guest reaches by `vhost-user-net` and a tap.
//!
//! All of them are attached at once, each with a directory of its own on the same file system, and are mounted in turns. The
//! guest has one processor, which is mostly emulated here: its own share of the work is the larger one, so look at the
//! requests and at the host's CPU time as well as at the wall time. The CPU time is that of the server's processes and of
//! all of QEMU but the guest's processor, so QEMU's own server and the relaying of the others are in it.
//!
//! Needs root: an NFS server opens files by their handles.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use tempfile::TempDir;
use tests::daemon::Daemon;
use tests::driver::fixture::scratch;
use tests::driver::lan::net_daemon;
use tests::driver::usage::cpu_time;
use tests::guest::{Guest, NetOptions, NinepOptions, Running, Vmm};
use tests::netns::Namespace;
use tests::process::Process;
use tests::provision;

/// Longest time that one command of the guest may take.
const STEP: Duration = Duration::from_secs(300);
const START_LIMIT: Duration = Duration::from_secs(20);
/// Where NFS listens, which is its usual port.
const NFS_PORT: u16 = 2049;
const OURS: &str = "vhost-user-9p";
const TAG: &str = "ours";
const QEMU_TAG: &str = "qemu";
const VIRTIOFS_TAG: &str = "virtiofs";

/// Measures the same work on vhost-user-9p, QEMU's virtio-9p, virtiofsd and NFS in one guest, in turns.
///
/// Prints medians of the wall time and of the host's CPU time in seconds, and how many requests the guest sent.
#[derive(Debug, Parser)]
#[command(name = "cargo bench -p tests --bench p9_guests --", max_term_width = 110)]
struct Args {
    /// How often to measure each
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Cache modes of the 9P mounts
    #[arg(long, value_delimiter = ',', default_value = "mmap,loose")]
    caches: Vec<String>,
    /// Where to put the directories; not on tmpfs, which the NFS server does not export [default: the build folder]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The size of the large file
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    size: u32,
    /// Run only subjects whose names contain one of these texts
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    only: Vec<String>,
    /// Do not count requests, which takes a round of its own
    #[arg(long)]
    no_counts: bool,
    /// More flags for vhost-user-9p, separated by spaces
    #[arg(long, default_value = "", allow_hyphen_values = true, value_name = "FLAGS")]
    flags: String,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// A piece of work: what is done before the clock starts, and what is measured. Both run in the Debian of the guest.
struct Work {
    name: &'static str,
    before: &'static str,
    measured: &'static str,
}

const WORKS: [Work; 7] = [
    Work {
        name: "write",
        before: "",
        measured: "dd if=/dev/zero of=/tmp/mnt/big bs=1M count=$SIZE conv=fsync status=none",
    },
    Work { name: "read", before: "", measured: "dd if=/tmp/mnt/big of=/dev/null bs=1M status=none" },
    Work { name: "untar", before: "", measured: "tar -xf /tmp/tree.tar -C /tmp/mnt && sync -f /tmp/mnt" },
    Work { name: "find", before: "", measured: "find /tmp/mnt/tree -type f -size +4k | wc -l" },
    Work { name: "grep -r", before: "", measured: "! grep -r a_word_that_is_nowhere_in_it /tmp/mnt/tree" },
    Work {
        // The first one after an untar reads every file, because none has the inode that the index knows.
        name: "git status",
        before: "git -C /tmp/mnt/tree status --short",
        measured: "git -C /tmp/mnt/tree status --short",
    },
    Work { name: "rm -rf", before: "", measured: "rm -rf /tmp/mnt/tree /tmp/mnt/big" },
];

/// Runs the lines that the host sends, one after the other, and says when each is done. A line is a number and a command.
const SCRIPT: &str = r#"
debian_up
mount -t tracefs trace /sys/kernel/tracing
net_up eth0 192.0.2.2/24
inside() {
    debian GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*' SIZE="$SIZE" \
        bash -ec "$1" </dev/null >&2
}
# A source tree with its history in one pack, as a clone has it.
inside '
cp -r /usr/include /tmp/tree
cd /tmp/tree
git init -q -b main
git -c core.looseCompression=1 add -A
git -c user.name=Bench -c user.email=bench@example.org commit -q -m tree
git gc -q
cd ..
tar -cf tree.tar tree
rm -rf tree
mkdir mnt
'
report files $(tar -tf /debian/tmp/tree.tar | wc -l)
report bytes $(stat -c %s /debian/tmp/tree.tar)
announce ready
while read -r number command; do
    [ "$number" != end ] || break
    eval "$command"
    announce "done $number"
done
"#;

/// A server that a guest can mount.
struct Subject {
    name: String,
    mount: String,
    /// The processes that serve it, QEMU excepted.
    pids: Vec<u32>,
    /// A command of the guest that prints how many requests it has sent so far, after one that starts to count.
    count: Count,
}

/// How the guest counts requests.
#[derive(Clone, Copy)]
enum Count {
    /// An event of the kernel's tracing, by its path.
    Event(&'static str),
    /// The kernel's statistics of NFS.
    Nfs,
}

impl Count {
    fn start(self) -> String {
        match self {
            Self::Event(event) => {
                format!("echo hist:keys=common_pid:size=65536 >/sys/kernel/tracing/events/{event}/trigger")
            }
            Self::Nfs => "before=$(awk '/^rpc/ { print $2 }' /proc/net/rpc/nfs)".to_owned(),
        }
    }

    fn stop(self, key: &str) -> String {
        match self {
            Self::Event(event) => format!(
                "report {key} $(awk '/Hits:/ {{ print $2 }}' /sys/kernel/tracing/events/{event}/hist); \
                 echo '!hist:keys=common_pid:size=65536' >/sys/kernel/tracing/events/{event}/trigger"
            ),
            Self::Nfs => {
                format!("report {key} $(( $(awk '/^rpc/ {{ print $2 }}' /proc/net/rpc/nfs) - before ))")
            }
        }
    }
}

/// What one run showed.
#[derive(Clone, Copy)]
struct Sample {
    wall: Duration,
    cpu: Duration,
}

/// The running guest.
struct Machine {
    guest: Running,
    asked: u32,
}

impl Machine {
    /// Runs a command in the guest and returns how long that took.
    fn ask(&mut self, command: &str) -> Result<Duration> {
        self.asked += 1;
        let number = self.asked;
        let start = Instant::now();
        self.guest.send(&format!("{number} {command}"))?;
        self.guest.wait_for(&format!("done {number}"), STEP).with_context(|| command.to_owned())?;
        Ok(start.elapsed())
    }

    fn inside(&mut self, command: &str) -> Result<Duration> {
        self.ask(&format!("inside {}", quote(command)))
    }

    /// The CPU time of QEMU without the guest's processor.
    fn other_threads(&self) -> Result<Duration> {
        let pid = self.guest.pid();
        let mut processors = Duration::ZERO;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // A thread that has just ended is no processor.
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            if name.starts_with("CPU ") {
                let stat = fs::read_to_string(task.join("schedstat"))?;
                let nanoseconds = stat.split_whitespace().next().context("An empty schedstat")?.parse()?;
                processors += Duration::from_nanos(nanoseconds);
            }
        }
        ensure!(!processors.is_zero(), "QEMU has no thread that is called a CPU");
        Ok(cpu_time(pid)?.saturating_sub(processors))
    }

    fn cpu(&self, subject: &Subject) -> Result<Duration> {
        let mut sum = self.other_threads()?;
        for &pid in &subject.pids {
            sum += cpu_time(pid)?;
        }
        Ok(sum)
    }
}

/// A word of the shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The processes below `pid`, and it.
fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        next += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    all
}

/// The servers, and what they need.
struct Servers {
    subjects: Vec<Subject>,
    machine: Machine,
    _daemons: Vec<Daemon>,
    _processes: Vec<Process>,
    _namespace: Namespace,
    _folders: [TempDir; 2],
}

fn virtiofsd(socket: &Path, share: &Path) -> Result<Process> {
    let mut command = provision::program("virtiofsd")?.command();
    command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(share).args(["--log-level", "error"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Process::spawn(command).context("Cannot start virtiofsd")?;
    let deadline = Instant::now() + START_LIMIT;
    while !socket.exists() {
        if process.wait(Duration::from_millis(5))?.is_some() || Instant::now() > deadline {
            bail!("virtiofsd does not listen: {}", process.stderr().text());
        }
    }
    Ok(process)
}

/// nfs-ganesha in the network of `namespace`, with everything that it needs in `folder`.
fn nfs_server(namespace: &Namespace, folder: &Path, share: &Path) -> Result<Process> {
    let (program, plugins) = provision::nfs_server()?;
    let (file, recovery, log) =
        (folder.join("ganesha.conf"), folder.join("recovery"), folder.join("nfs.log"));
    fs::create_dir(&recovery)?;
    let (plugins, recovery, share) = (plugins.display(), recovery.display(), share.display());
    fs::write(
        &file,
        format!(
            "NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {NFS_PORT}; Enable_NLM = false; Enable_RQUOTA = false;
  Enable_UDP = false; Plugins_Dir = \"{plugins}\"; Allow_Set_Io_Flusher_Fail = true; }}
DIRECTORY_SERVICES {{ DomainName = \"localdomain\"; Idmapping_Active = false; }}
NFSv4 {{ RecoveryBackend = fs; RecoveryRoot = \"{recovery}\"; Only_Numeric_Owners = true; Graceless = true; }}
NFS_KRB5 {{ Active_krb5 = false; }}
EXPORT {{ Export_Id = 1; Path = \"{share}\"; Pseudo = \"/share\"; Access_Type = RW; Squash = No_Root_Squash;
  SecType = sys; Protocols = 4; Transports = TCP; Filesystem_Id = 1.1; FSAL {{ Name = VFS; }} }}
LOG {{ Default_Log_Level = WARN; }}
"
        ),
    )?;
    let mut command = namespace.network().wrap(&program);
    command.arg("-F").arg("-f").arg(&file).arg("-L").arg(&log).arg("-p").arg(folder.join("nfs.pid"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Process::spawn(command).context("Cannot start ganesha.nfsd")?;
    let deadline = Instant::now() + START_LIMIT;
    let port = format!(":{NFS_PORT:04X} ");
    // State 0A is LISTEN.
    let is_listening = |table: &str| table.lines().any(|line| line.contains(&port) && line.contains(" 0A "));
    loop {
        let tables =
            ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/{}/net/{name}", process.pid())));
        if tables.iter().flatten().any(|table| is_listening(table)) {
            return Ok(process);
        }
        if process.wait(Duration::from_millis(20))?.is_some() || Instant::now() > deadline {
            let log = fs::read_to_string(&log).unwrap_or_default();
            bail!("ganesha.nfsd does not listen: {}{log}", process.stderr().text());
        }
    }
}

impl Servers {
    fn start(args: &Args) -> Result<Self> {
        let folder = match &args.dir {
            Some(dir) => TempDir::with_prefix_in("p9-", dir),
            None => scratch(),
        };
        let folder = folder.context("Cannot make a folder to share")?;
        // A socket's path is limited to 107 bytes, so this one lies in the short default place.
        let own = TempDir::with_prefix("p9-").context("Cannot make a folder for a socket")?;
        let share = |name: &str| -> Result<PathBuf> {
            let path = folder.path().join(name);
            fs::create_dir(&path).with_context(|| format!("Cannot make {}", path.display()))?;
            Ok(path)
        };
        let chosen = |name: &str| args.only.is_empty() || args.only.iter().any(|text| name.contains(text));
        let any_of_ours = args.caches.iter().any(|cache| chosen(&format!("{OURS} {cache}")));
        let ours = any_of_ours.then(|| {
            let ours = Daemon::builder("vhost-user-9p").arg("--shared-dir").arg(share("ours")?);
            ours.args(["--tag", TAG]).args(args.flags.split_whitespace()).start()
        });
        let ours = ours.transpose()?;
        let qemu = share("qemu")?;
        let virtiofs_socket = own.path().join("virtiofs");
        let virtiofs = virtiofsd(&virtiofs_socket, &share("virtiofs")?)?;
        let namespace = Namespace::new()?;
        namespace.add_tap("tap0", 1)?;
        namespace.ip("address add 192.0.2.1/24 dev tap0")?;
        namespace.ip("link set tap0 up")?;
        let net = net_daemon().inside(&namespace.root()).args(["--tap", "tap0"]).start()?;
        let nfs = nfs_server(&namespace, own.path(), &share("nfs")?)?;

        let mut guest = Guest::new(Vmm::Qemu).memory_mib(1024).debian();
        if let Some(ours) = &ours {
            guest = guest.ninep(ours.socket(), NinepOptions::default());
        }
        let guest = guest
            .ninep_in_process(&qemu, QEMU_TAG, "passthrough")
            .virtiofs(&virtiofs_socket, VIRTIOFS_TAG)
            .net(net.socket(), NetOptions::default())
            .module("nfsv4")
            .timeout(Duration::from_secs(2 * 60 * 60))
            .script(format!("export SIZE={}\n{SCRIPT}", args.size))
            .spawn()?;
        let ninep = Count::Event("9p/9p_client_req");
        let mut subjects = Vec::new();
        for cache in &args.caches {
            let ours = ours.as_ref().map_or_else(Vec::new, |ours| family(ours.pid()));
            for (name, tag, pids) in [(OURS, TAG, ours), ("QEMU 9p", QEMU_TAG, Vec::new())] {
                subjects.push(Subject {
                    name: format!("{name} {cache}"),
                    mount: format!("-t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache={cache} {tag}"),
                    pids,
                    count: ninep,
                });
            }
        }
        subjects.push(Subject {
            name: "virtiofsd".to_owned(),
            mount: format!("-t virtiofs {VIRTIOFS_TAG}"),
            pids: family(virtiofs.pid()),
            count: Count::Event("fuse/fuse_request_send"),
        });
        subjects.push(Subject {
            name: "NFS 4.2".to_owned(),
            mount:
                "-t nfs4 -o vers=4.2,proto=tcp,sec=sys,addr=192.0.2.1,clientaddr=192.0.2.2 192.0.2.1:/share"
                    .to_owned(),
            pids: vec![nfs.pid(), net.pid()],
            count: Count::Nfs,
        });
        subjects.retain(|subject| chosen(&subject.name));
        Ok(Self {
            subjects,
            machine: Machine { guest, asked: 0 },
            _daemons: ours.into_iter().chain([net]).collect(),
            _processes: vec![virtiofs, nfs],
            _namespace: namespace,
            _folders: [folder, own],
        })
    }
}

/// Does all works once on `subject`; `done` gets what each of them showed. `counting` counts requests instead of timing
/// them well.
fn turn(
    machine: &mut Machine,
    subject: &Subject,
    counting: bool,
    mut done: impl FnMut(usize, Sample),
) -> Result<()> {
    machine.ask(&format!("mount {} /debian/tmp/mnt", subject.mount))?;
    for (index, work) in WORKS.iter().enumerate() {
        if !work.before.is_empty() {
            machine.inside(work.before)?;
        }
        machine.ask("sync; echo 3 >/proc/sys/vm/drop_caches")?;
        if counting {
            machine.ask(&subject.count.start())?;
        }
        let before = machine.cpu(subject)?;
        let wall = machine.inside(work.measured)?;
        let cpu = machine.cpu(subject)?.saturating_sub(before);
        if counting {
            machine.ask(&subject.count.stop(&key(subject, index)))?;
        }
        done(index, Sample { wall, cpu });
    }
    machine.ask("umount /debian/tmp/mnt").map(drop)
}

fn key(subject: &Subject, work: usize) -> String {
    format!("{}-{work}", subject.name.replace(' ', "-"))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print_table(title: &str, subjects: &[Subject], mut cell: impl FnMut(usize, usize) -> String) {
    println!("\n{title}");
    print!("{:<12}", "");
    for subject in subjects {
        print!(" {:>19}", subject.name);
    }
    println!();
    for (index, work) in WORKS.iter().enumerate() {
        print!("{:<12}", work.name);
        for subject in 0..subjects.len() {
            print!(" {:>19}", cell(subject, index));
        }
        println!();
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        rustix::process::geteuid().is_root(),
        "Only root can run an NFS server that opens files by their handles"
    );
    let Servers { subjects, mut machine, _daemons, _processes, _namespace, _folders } =
        Servers::start(&args)?;
    machine.guest.wait_for("ready", STEP)?;
    let values = machine.guest.values();
    println!("The tree: {} entries, {} bytes", values["files"], values["bytes"]);
    for subject in subjects.iter().filter(|_| !args.no_counts) {
        turn(&mut machine, subject, true, |_, _| ()).with_context(|| subject.name.clone())?;
        eprintln!("{}: requests counted", subject.name);
    }
    let counts = machine.guest.values();
    print_table("Requests that the guest sent", &subjects, |subject, work| {
        counts.get(&key(&subjects[subject], work)).map_or("-", String::as_str).to_owned()
    });
    let mut samples: HashMap<(usize, usize), Vec<Sample>> = HashMap::new();
    for _ in 0..args.rounds {
        for (number, subject) in subjects.iter().enumerate() {
            let mut line = String::new();
            turn(&mut machine, subject, false, |work, sample| {
                let (wall, cpu) = (sample.wall.as_secs_f64(), sample.cpu.as_secs_f64());
                line = format!("{line} {} {wall:.2} / {cpu:.3}", WORKS[work].name);
                samples.entry((number, work)).or_default().push(sample);
            })
            .with_context(|| subject.name.clone())?;
            eprintln!("{}:{line}", subject.name);
        }
    }
    print_table("Seconds: wall / CPU of the host", &subjects, |subject, work| {
        let samples = &samples[&(subject, work)];
        let wall = median(samples.iter().map(|sample| sample.wall.as_secs_f64()));
        let cpu = median(samples.iter().map(|sample| sample.cpu.as_secs_f64()));
        format!("{wall:.2} / {cpu:.3}")
    });
    let ratio = |subject: usize, work: usize, field: fn(&Sample) -> Duration| {
        let pairs = samples[&(subject, work)].iter().zip(&samples[&(0, work)]);
        median(pairs.map(|(other, ours)| field(other).as_secs_f64() / field(ours).as_secs_f64()))
    };
    let title = format!("Times what \"{}\" takes: wall / CPU", subjects[0].name);
    print_table(&title, &subjects, |subject, work| {
        let (wall, cpu) =
            (ratio(subject, work, |sample| sample.wall), ratio(subject, work, |sample| sample.cpu));
        format!("{wall:.2} / {cpu:.2}")
    });
    machine.guest.send("end")?;
    machine.guest.wait()?.check()?;
    Ok(())
}

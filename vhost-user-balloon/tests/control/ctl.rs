//! `ctl`.

use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use clap::Parser;
use serde_json::Value;
use vhost_user_balloon::api::{Activity, Event, Statistics, Status, What};
use vhost_user_balloon::ctl::{self, CtlArgs};

use crate::fake::{Fixture, GIB, Guest, MIB, statistics};

#[derive(Parser)]
struct Program {
    #[command(flatten)]
    ctl: CtlArgs,
}

fn parse(socket: &Path, arguments: &[&str]) -> Result<CtlArgs, clap::Error> {
    let socket = socket.to_str().unwrap();
    let arguments = [&["ctl", "--socket", socket], arguments].concat();
    Program::try_parse_from(arguments).map(|program| program.ctl)
}

/// What the command prints.
fn run(fixture: &Fixture, arguments: &[&str]) -> anyhow::Result<String> {
    let mut output = Vec::new();
    ctl::run_to(&parse(&fixture.path, arguments)?, &mut output)?;
    Ok(String::from_utf8(output)?)
}

#[track_caller]
fn printed(fixture: &Fixture, arguments: &[&str]) -> String {
    run(fixture, arguments).unwrap()
}

#[track_caller]
fn failure(fixture: &Fixture, arguments: &[&str]) -> String {
    format!("{:#}", run(fixture, arguments).unwrap_err())
}

#[test]
fn the_status_is_a_table_or_json() {
    let fixture = Fixture::new(Guest::Follows);
    {
        let status = &mut fixture.fake.state().status;
        status.requested_bytes = 4 * GIB;
        status.target_bytes = 3 * GIB + GIB / 2;
        status.actual_bytes = GIB;
        status.activity = Activity::Stalled;
        status.released_bytes = 1000 * MIB;
        status.held_bytes = 24 * MIB;
        status.resident_bytes = 2 * GIB;
        status.counters.oom_deflated_bytes = MIB;
        status.statistics = Some(statistics());
    }
    let table = printed(&fixture, &["status"]);
    for line in [
        "Balloon     1.00 GiB of 3.50 GiB (4.00 GiB were asked for, but the guest keeps 512 MiB), stalled: the guest has \
         nothing to give",
        "Guest       connected, 3.00 GiB left to it of 4.00 GiB (at least 512 MiB)",
        "Resident    2.00 GiB of the host's memory, measured",
        "Returned    1000 MiB of the balloon, 24.0 MiB not, as the rest of the huge pages is in use",
        "Guest says  2.00 GiB available, 1.00 GiB free, 512 MiB caches, 4.00 GiB in all (1.5 s ago)",
        "Statistics  only on demand",
        "Features    statistics, deflate-on-oom",
        "Trouble     1.00 MiB taken back unasked",
        "Daemon      version 1.2.3, process 42",
    ] {
        assert!(table.lines().any(|candidate| candidate == line), "{line} is not in\n{table}");
    }
    let status: Status = serde_json::from_str(&printed(&fixture, &["--json", "status"])).unwrap();
    assert_eq!(status, fixture.fake.state().status);
    fixture.fake.state().status.guest_memory_bytes = 0;
    assert!(printed(&fixture, &["status"]).contains("its memory is not known yet"));
}

#[test]
fn a_target_is_set_in_either_sense() {
    let fixture = Fixture::new(Guest::Follows);
    let requested = || fixture.fake.state().status.requested_bytes;
    let text = printed(&fixture, &["target", "1G"]);
    assert_eq!(text, "The balloon is 0 B, and is asked to be 1.00 GiB\n");
    assert_eq!(requested(), GIB);
    printed(&fixture, &["target", "--guest", "3.5GiB"]);
    assert_eq!(requested(), GIB / 2);
    // As with virsh, KiB.
    printed(&fixture, &["setmem", "1048576"]);
    assert_eq!(requested(), 3 * GIB);
    printed(&fixture, &["setmem", "2G"]);
    assert_eq!(requested(), 2 * GIB);
    let text = printed(&fixture, &["target", "4G"]);
    assert!(text.contains("3.50 GiB (4.00 GiB were asked for, but the guest keeps 512 MiB)"), "{text}");
    let status: Status = serde_json::from_str(&printed(&fixture, &["target", "0", "--json"])).unwrap();
    assert_eq!(status.requested_bytes, 0);
    fixture.fake.state().status.guest_memory_bytes = 0;
    let text = printed(&fixture, &["target", "1G"]);
    assert_eq!(text, "The balloon will be 1.00 GiB when a driver uses it\n");
}

#[test]
fn a_target_can_be_waited_for() {
    let fixture = Fixture::new(Guest::Follows);
    let text = printed(&fixture, &["target", "1G", "--wait"]);
    assert_eq!(text, "The balloon is 1.00 GiB; the host holds 3.00 GiB of the guest's memory\n");
    let text = printed(&fixture, &["setmem", "4G", "--wait", "50"]);
    assert_eq!(text, "The balloon is 0 B; the host holds 4.00 GiB of the guest's memory\n");
    fixture.fake.state().guest = Guest::Silent;
    let text = failure(&fixture, &["target", "1G", "--wait", "0.05"]);
    assert_eq!(text, "The balloon has 0 B of 1.00 GiB: no driver uses it");
}

#[test]
fn statistics_are_shown() {
    let fixture = Fixture::new(Guest::Follows);
    let text = failure(&fixture, &["stats"]);
    assert!(text.starts_with("The guest has given no statistics yet: "), "{text}");
    let table = printed(&fixture, &["stats", "--fresh"]);
    assert!(table.starts_with("available_memory     2.00 GiB\nfree_memory          1.00 GiB\n"), "{table}");
    assert!(table.contains("\nmajor_faults         7\n"), "{table}");
    assert!(!table.contains("oom_kill"), "{table}");
    let json: Statistics = serde_json::from_str(&printed(&fixture, &["stats", "--json"])).unwrap();
    assert_eq!(json, statistics());
}

#[test]
fn virsh_users_find_what_they_know() {
    let fixture = Fixture::new(Guest::Follows);
    assert_eq!(printed(&fixture, &["dommemstat"]), "actual 4194304\nrss 4194304\n");
    let expected = [
        ("actual", 4_194_304_u64),
        ("swap_in", 8),
        ("swap_out", 4),
        ("major_fault", 7),
        ("minor_fault", 70),
        ("unused", 1_048_576),
        ("available", 4_194_304),
        ("usable", 2_097_152),
        ("last_update", 1_700_000_000),
        ("disk_caches", 524_288),
        ("hugetlb_pgalloc", 5),
        ("hugetlb_pgfail", 6),
        ("rss", 4_194_304),
    ];
    let text = printed(&fixture, &["dommemstat", "--fresh"]);
    let lines: Vec<_> = expected.iter().map(|(name, number)| format!("{name} {number}\n")).collect();
    assert_eq!(text, lines.concat());
    let json: Value = serde_json::from_str(&printed(&fixture, &["dommemstat", "--json"])).unwrap();
    assert!(expected.iter().all(|(name, number)| json[name] == *number), "{json}");
}

/// An output that fails when it has so many lines.
struct Lines {
    text: Vec<u8>,
    most: usize,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.split_inclusive(|byte| *byte == b'\n').count() >= self.most && self.text.ends_with(b"\n")
        {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.text.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An output that tells what is printed.
struct Told(mpsc::Sender<Vec<u8>>);

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn statistics_can_be_watched() {
    let fixture = Fixture::new(Guest::Follows);
    let args = parse(&fixture.path, &["stats", "--watch", "0.001", "--fresh"]).unwrap();
    let mut output = Lines { text: Vec::new(), most: 30 };
    let error = ctl::run_to(&args, &mut output).unwrap_err();
    assert_eq!(error.downcast::<io::Error>().unwrap().kind(), io::ErrorKind::BrokenPipe);
    let text = String::from_utf8(output.text).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].trim_start().starts_with("BALLOON"), "{text}");
    assert_eq!(lines[0], lines[21]);
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    // There is no rate before the second line.
    assert_eq!(words(lines[1]), "0 B 0 B 4.00 GiB 2.00 GiB 1.00 GiB 512 MiB - - - 1.5 s ago");
    assert_eq!(words(lines[2]), "0 B 0 B 4.00 GiB 2.00 GiB 1.00 GiB 512 MiB 0 B 0 B 0 1.5 s ago");
    assert_eq!(lines[0].len(), lines[1].len(), "{text}");
}

#[test]
fn events_are_printed_until_the_daemon_ends() {
    let mut fixture = Fixture::new(Guest::Follows);
    for what in [
        What::Connected,
        What::DriverStarted { guest_memory_bytes: 4 * GIB },
        What::Target { requested_bytes: 4 * GIB, target_bytes: 3 * GIB },
        What::Reached { actual_bytes: 3 * GIB, resident_bytes: GIB },
        What::OomDeflated { bytes: MIB, actual_bytes: GIB },
        What::ReleaseFailed { reason: "No".into() },
        What::Lost { events: 3 },
        What::DeflateResumed,
    ] {
        fixture.feed.publish(&Event::now(what));
    }
    let args = parse(&fixture.path, &["events", "--past", "7"]).unwrap();
    let mut output = Lines { text: Vec::new(), most: 6 };
    let error = ctl::run_to(&args, &mut output).unwrap_err();
    assert_eq!(error.downcast::<io::Error>().unwrap().kind(), io::ErrorKind::BrokenPipe);
    let text = String::from_utf8(output.text).unwrap();
    let said: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(
        said,
        [
            "A driver has started, in a guest of 4.00 GiB",
            "Target 3.00 GiB (4.00 GiB were asked for)",
            "Target reached: balloon 3.00 GiB, resident 1.00 GiB",
            "The guest is short of memory: it took 1.00 MiB back, balloon 1.00 GiB",
            "Memory could not be given to the host: No",
            "3 events are missing here: they came too fast",
        ]
    );

    let args = parse(&fixture.path, &["--json", "events", "--past", "1"]).unwrap();
    let (sender, printed) = mpsc::channel();
    let reader = thread::spawn(move || ctl::run_to(&args, &mut Told(sender)).unwrap_err());
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        line.extend(printed.recv().unwrap());
    }
    assert_eq!(serde_json::from_slice::<Event>(&line).unwrap().what, What::DeflateResumed);
    fixture.end();
    let error = reader.join().unwrap();
    assert!(error.to_string().contains(&*fixture.path.to_string_lossy()), "{error}");
}

#[test]
fn the_interval_is_set() {
    let fixture = Fixture::new(Guest::Follows);
    assert_eq!(printed(&fixture, &["interval", "7"]), "");
    assert_eq!(fixture.fake.state().status.statistics_interval_s, 7);
    assert!(failure(&fixture, &["interval", "70000"]).contains("at most 65535"));
}

#[test]
fn mistakes_are_explained() {
    let mut fixture = Fixture::new(Guest::Follows);
    for (arguments, word) in [
        (&["target"][..], "BYTES"),
        (&["target", "1G", "--guest", "1G"], "cannot be used with"),
        (&["target", "much"], "512M"),
        (&["target", "1G", "--wait", "x"], "seconds"),
        (&["stats", "--watch", "0"], "seconds"),
        (&["inflate"], "inflate"),
    ] {
        let error = parse(&fixture.path, arguments).unwrap_err().to_string();
        assert!(error.contains(word), "{arguments:?}: {error}");
    }
    let mut args = parse(&fixture.path, &["status"]).unwrap();
    args.socket = None;
    let error = ctl::run_to(&args, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("VHOST_USER_BALLOON_SOCKET"), "{error}");
    fixture.end();
    let error = failure(&fixture, &["status"]);
    assert!(error.contains("does not exist: start the daemon with this --control-socket"), "{error}");
}

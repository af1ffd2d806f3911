//! The guests themselves: without any device, everything that can end one is told as what it is.
use std::time::{Duration, Instant};

use tests::guest::{Guest, Vmm};

const STEP: Duration = Duration::from_secs(60);

fn values_and_output_come_back(vmm: Vmm) {
    let report = Guest::new(vmm)
        .memory_mib(192)
        .file("data/greeting", "hello")
        .script("cat /data/greeting\nreport sum $((40 + 2))\nreport lines \"$(printf 'a\\nb')\"\nreport empty ''\necho ' world'")
        .run()
        .unwrap()
        .check()
        .unwrap();
    assert_eq!(report.stdout, "hello world\n");
    assert_eq!(report.number("sum").unwrap(), 42);
    assert_eq!((report.value("lines").unwrap(), report.value("empty").unwrap()), ("a\nb", ""));
    assert!(report.boot <= report.total);
}

fn a_failing_script_is_reported(vmm: Vmm) {
    let report = Guest::new(vmm).script("echo before\nls /no-such-file\necho after").run().unwrap();
    assert_eq!((report.exit_status, report.stdout.as_str()), (1, "before\n"));
    let error = report.check().unwrap_err().to_string();
    assert!(error.contains("exit status 1") && error.contains("+ ls /no-such-file"), "{error}");
}

fn a_panic_is_reported(vmm: Vmm) {
    let error =
        Guest::new(vmm).script("echo so far\necho c >/proc/sysrq-trigger").run().unwrap_err().to_string();
    assert!(error.contains("Kernel panic") && error.contains("so far"), "{error}");
}

fn a_hang_is_reported(vmm: Vmm) {
    let start = Instant::now();
    let error =
        Guest::new(vmm).script("sleep 1000").timeout(Duration::from_secs(20)).run().unwrap_err().to_string();
    assert!(error.contains("its time was over") && error.contains("+ sleep 1000"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(90));
}

fn host_and_guest_take_turns(vmm: Vmm) {
    let script =
        "announce ready\nawait go on\nread -r word\nreport word \"$word\"\nannounce heard\nawait the end";
    let mut guest = Guest::new(vmm).script(script).spawn().unwrap();
    guest.wait_for("ready", STEP).unwrap();
    guest.send("go on").unwrap();
    guest.send("a word").unwrap();
    guest.wait_for("heard", STEP).unwrap();
    assert_eq!(guest.values()["word"], "a word");
    guest.send("the end").unwrap();
    guest.wait().unwrap().check().unwrap();
}

fn waiting_for_a_guest_that_has_ended_is_an_error(vmm: Vmm) {
    let mut guest = Guest::new(vmm).script("announce one\nexit 7").spawn().unwrap();
    let error = guest.wait_for("two", STEP).unwrap_err().to_string();
    assert!(error.contains("did not announce \"two\"") && error.contains("exit status 7"), "{error}");
}

tests::for_both_guests!(
    values_and_output_come_back,
    a_failing_script_is_reported,
    a_panic_is_reported,
    a_hang_is_reported,
    host_and_guest_take_turns,
    waiting_for_a_guest_that_has_ended_is_an_error,
);

#[test]
fn several_processors_are_seen() {
    let report = Guest::new(Vmm::Qemu).cpus(2).script("report cpus $(nproc)").run().unwrap().check().unwrap();
    assert_eq!(report.number("cpus").unwrap(), 2);
}

#[test]
fn what_user_mode_linux_cannot_do_is_refused() {
    let error = Guest::new(Vmm::Uml).cpus(2).run().unwrap_err();
    assert!(format!("{error:#}").contains("one processor"), "{error:#}");
}

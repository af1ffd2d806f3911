//! Tests in network namespaces of their own.

use std::process::{Command, Stdio};

/// Set in a process that runs one test in its namespace.
const INSIDE: &str = "VHOST_USER_NET_TEST_NAMESPACE";

/// Runs `body`, which is the body of the test function `name`, in a network namespace where it has all capabilities.
///
/// The threads of the test harness cannot change their user namespace, so the test executes itself through unshare(1).
pub fn isolated(name: &str, body: impl FnOnce()) {
    let new: &[&str] = if rustix::process::geteuid().is_root() {
        &["--net"]
    } else {
        &["--user", "--map-root-user", "--net"]
    };
    again("network", new, name, body);
}

/// Runs `body`, a part of the test function `name`, in the same network namespace but without
/// capabilities for it. To be called within [`isolated`].
pub fn unprivileged(name: &str, body: impl FnOnce()) {
    again("user", &["--user", "--map-root-user"], name, body);
}

fn again(level: &str, new: &[&str], name: &str, body: impl FnOnce()) {
    let marker = format!("{INSIDE}_{level}");
    if std::env::var_os(&marker).is_some() {
        body();
        return;
    }
    let output = Command::new("unshare")
        .args(new)
        .arg(std::env::current_exe().expect("the path of this program"))
        .args([name, "--exact", "--nocapture"])
        .env(marker, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare(1) of util-linux is needed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success(),
        "{name} failed in a new {level} namespace (`unshare {}` must be allowed, and /dev/net/tun be readable and \
         writable):\n{text}",
        new.join(" ")
    );
    assert!(text.contains("1 passed"), "{name} is not the name of the test:\n{text}");
}

/// Runs ip(8), which has to succeed.
pub fn ip(arguments: &str) {
    let output =
        Command::new("ip").args(arguments.split_whitespace()).output().expect("ip(8) of iproute2 is needed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Whether the user namespace has users beside the one who runs the test, whom only root can map.
pub fn has_other_users() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").expect("procfs is needed");
    map.split_whitespace().nth(2) != Some("1")
}

/// Whether the namespace has the interface.
pub fn exists(interface: &str) -> bool {
    Command::new("ip")
        .args(["link", "show", "dev", interface])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("ip(8) of iproute2 is needed")
        .success()
}

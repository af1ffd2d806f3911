//! The command line, as management software and people meet it.

use std::path::Path;
use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-user-blk")).args(args).output().expect("the daemon starts")
}

/// Runs the daemon with flags that it has to refuse, and gives the one line that it says.
fn refusal(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stderr).expect("text");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("vhost-user-blk: ")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    lines[0].to_owned()
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    for args in [&["--print-capabilities"][..], &["--nonsense", "--print-capabilities", "--fd", "x"]] {
        let output = run(args);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            r#"{"type":"block","features":["read-only","blk-file"]}"#
        );
    }
}

#[test]
fn help_names_every_flag() {
    let output = run(&["--help"]);
    assert!(output.status.success());
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    for flag in [
        "--blk-file",
        "--read-only",
        "--serial",
        "--logical-block-size",
        "--cache",
        "--io-engine",
        "--num-queues",
        "--queue-size",
        "--socket-path",
        "--fd",
        "--client",
        "--socket-group",
        "--exit-on-disconnect",
        "--log-level",
        "--log-format",
        "--print-capabilities",
        "--version",
    ] {
        assert!(help.contains(flag), "{flag} is missing in\n{help}");
    }
}

#[test]
fn mistakes_end_with_one_line_that_names_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let image = path("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let socket = path("socket");

    assert!(refusal(&["--socket-path", &socket]).contains("--blk-file"));
    assert!(refusal(&["--blk-file", &image]).contains("--socket-path"));
    let missing = path("missing.img");
    assert!(refusal(&["--blk-file", &missing, "--socket-path", &socket]).contains(&missing));
    let serial =
        refusal(&["--blk-file", &image, "--socket-path", &socket, "--serial", "123456789012345678901"]);
    assert!(serial.contains("--serial") && serial.contains("20"), "{serial}");
    assert!(
        refusal(&["--blk-file", &image, "--socket-path", &socket, "--cache", "none"])
            .contains("writethrough")
    );
    let directory = refusal(&["--blk-file", directory.path().to_str().unwrap(), "--socket-path", &socket]);
    assert!(directory.contains("a directory"), "{directory}");
    let fd = refusal(&["--blk-file", &image, "--fd", "4000"]);
    assert!(fd.contains("4000"), "{fd}");
    assert!(!Path::new(&socket).exists(), "nothing is left behind");
}

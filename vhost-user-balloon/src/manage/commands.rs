//! What the words of the command line do.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use vhost_user_daemon::control::Client;

use super::admission::LONGEST_SECONDS;
use super::api::{GuestStatus, ManagerStatus, Reservation, ReservationRequest};
use super::args::{
    ControlArgs, LiveArgs, ManageArgs, ManageCommand, ReplayArgs, ReserveArgs, SimulateArgs, StatusArgs,
};
use super::config::{Config, ScriptConfig};
use super::event::Size;
use super::guests::GuestsOptions;
use super::host::HostSampler;
use super::policy::Script;
use super::replay::Replay;
use super::runtime::{Manager, Options, load_config};
use super::simulation;

/// What a client waits longer than the manager does.
const SLACK: Duration = Duration::from_secs(10);

/// Runs `vhost-user-balloon manage`. The live manager starts the logger, and ends with SIGTERM or SIGINT.
pub fn run(args: &ManageArgs) -> Result<()> {
    // A reader that has seen enough is no failure.
    match execute(args) {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn execute(args: &ManageArgs) -> Result<()> {
    let out = &mut io::stdout().lock();
    match &args.command {
        None => manage(&args.live),
        Some(ManageCommand::Status(args)) => status(args, out),
        Some(ManageCommand::Events(args)) => events(args, out),
        Some(ManageCommand::Reserve(args)) => reserve(args, out),
        Some(ManageCommand::Check(args)) => {
            let config = load_config(Some(&args.config))?;
            // A cgroup has to be there.
            HostSampler::new(&config.host.memory)?;
            Ok(writeln!(out, "{} has no mistakes", args.config.display())?)
        }
        Some(ManageCommand::Replay(args)) => replay(args, out),
        Some(ManageCommand::Simulate(args)) => simulate(args, out),
    }
}

fn manage(args: &LiveArgs) -> Result<()> {
    args.init_log();
    if args.socket.is_empty() && args.directory.is_none() {
        bail!("There is nothing to manage: give --socket or --directory");
    }
    let options = Options {
        config: args.config.clone(),
        guests: GuestsOptions {
            sockets: args.socket.clone(),
            directory: args.directory.clone(),
            dry_run: args.dry_run,
        },
        control_socket: args.control_socket.clone(),
        metrics_listen: args.metrics_listen,
        record: args.record.clone().map(|path| (path, args.record_size)),
        release_on_exit: args.release_on_exit && !args.dry_run,
    };
    Manager::new(options)?.run()
}

fn print_json(out: &mut impl Write, value: &impl Serialize) -> Result<()> {
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    Ok(writeln!(out)?)
}

fn status(args: &StatusArgs, out: &mut impl Write) -> Result<()> {
    let status: ManagerStatus = Client::new(&args.control.control_socket).get("/v1/status")?;
    if args.json { print_json(out, &status) } else { Ok(print_status(out, &status)?) }
}

fn print_status(out: &mut impl Write, status: &ManagerStatus) -> io::Result<()> {
    let host = &status.host;
    writeln!(
        out,
        "Host: {} available of {}, pressure {:.1} % some, {:.1} % full; {}{}, {} policy{}",
        Size(host.available),
        Size(host.total),
        host.psi_some,
        host.psi_full,
        format!("{:?}", status.mode).to_lowercase(),
        if status.critical { " and critical" } else { "" },
        status.policy,
        if status.dry_run { ", a dry run" } else { "" },
    )?;
    writeln!(
        out,
        "Guests can have {}, miss {}; {} reserved",
        Size(status.budget_bytes),
        Size(status.overcommitted_bytes),
        Size(status.reserved_bytes)
    )?;
    writeln!(
        out,
        "{:<20} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}  STATE",
        "GUEST", "MEMORY", "BALLOON", "TARGET", "RESIDENT", "AVAILABLE", "WISH"
    )?;
    for of in &status.guests {
        let guest = &of.guest;
        let size = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| Size(bytes).to_string());
        writeln!(
            out,
            "{:<20} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}  {}",
            printable(&guest.name),
            Size(guest.memory),
            Size(guest.balloon),
            Size(guest.target),
            Size(guest.resident),
            size(guest.usage.map(|usage| usage.available)),
            size(of.wish_bytes),
            printable(state(of))
        )?;
    }
    Ok(())
}

/// Without what a terminal would obey: names are those of files, and reasons may come from a daemon.
fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

fn state(of: &GuestStatus) -> &str {
    match of {
        GuestStatus { ignored: true, .. } => "ignored",
        GuestStatus { failure: Some(reason), .. } => reason,
        GuestStatus { guest, .. } if guest.memory == 0 => "not running",
        GuestStatus { guest, .. } if guest.inactive => "left alone",
        GuestStatus { guest, .. } if guest.usage.is_none() => "no statistics",
        _ => "managed",
    }
}

fn events(args: &ControlArgs, out: &mut impl Write) -> Result<()> {
    for event in Client::new(&args.control_socket).stream::<serde_json::Value>("/v1/events")? {
        print_json(out, &event?)?;
        out.flush()?;
    }
    Ok(())
}

fn reserve(args: &ReserveArgs, out: &mut impl Write) -> Result<()> {
    let mut client = Client::new(&args.control.control_socket);
    let Some(bytes) = args.bytes else {
        client.delete::<()>(&format!("/v1/reservations/{}", escape(&args.name)))?;
        return Ok(writeln!(out, "Nothing is reserved for {} any more", args.name)?);
    };
    client.set_timeout(Duration::from_secs(args.timeout.min(LONGEST_SECONDS)) + SLACK);
    let request = ReservationRequest {
        name: args.name.clone(),
        bytes,
        timeout_s: args.timeout,
        expires_s: args.expires,
    };
    let reservation: Reservation = client.post("/v1/reservations", &request)?;
    Ok(writeln!(
        out,
        "{} is reserved for {}, which has {} s to start",
        Size(reservation.bytes),
        reservation.name,
        reservation.remaining_s
    )?)
}

/// A name as a part of a path.
fn escape(name: &str) -> String {
    name.bytes().fold(String::new(), |mut path, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => path.push(byte.into()),
            _ => {
                // Writing to a string cannot fail.
                let _ = std::fmt::Write::write_fmt(&mut path, format_args!("%{byte:02X}"));
            }
        }
        path
    })
}

/// A configuration with another script, if there is one.
fn with_script(config: Option<Config>, script: Option<&Path>) -> Result<Option<Config>> {
    let Some(file) = script else { return Ok(config) };
    let script = ScriptConfig::new(file.to_owned());
    let mut config = config.unwrap_or_default();
    Script::load(&script, &config.policy)
        .check()
        .map_err(anyhow::Error::msg)
        .with_context(|| format!("The script {} does not work", file.display()))?;
    config.script = Some(script);
    Ok(Some(config))
}

fn replay(args: &ReplayArgs, out: &mut impl Write) -> Result<()> {
    let config = match &args.config {
        Some(path) => Some(load_config(Some(path))?),
        None => None,
    };
    let config = with_script(config, args.script.as_deref())?;
    let mut printed = Ok(());
    let summary = Replay::new(config).run(&args.recording, |would| {
        if !args.decisions || printed.is_err() {
            return;
        }
        printed = if args.json {
            print_json(out, would)
        } else {
            let line = writeln!(
                out,
                "{} {}: {} instead of {}",
                would.ts_ms,
                would.guest,
                Size(would.balloon_bytes),
                Size(would.done_bytes)
            );
            line.map_err(Into::into)
        };
    })?;
    printed?;
    if args.json { print_json(out, &summary) } else { Ok(write!(out, "{summary}")?) }
}

fn simulate(args: &SimulateArgs, out: &mut impl Write) -> Result<()> {
    let config = load_config(args.config.as_deref())?;
    let script = args.script.as_ref().or(config.script.as_ref().map(|script| &script.file));
    let text = match script {
        Some(path) => Some(
            std::fs::read_to_string(path)
                .with_context(|| format!("The script {} cannot be read", path.display()))?,
        ),
        None => None,
    };
    let table =
        simulation::compare(args.seed, &config.policy, text.as_deref()).map_err(anyhow::Error::msg)?;
    Ok(write!(out, "{table}")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manage::model::Guest;

    #[test]
    fn a_status_is_a_table() {
        let guest = |name: &str, memory| GuestStatus {
            guest: Guest { name: name.into(), memory, ..Guest::default() },
            ..GuestStatus::default()
        };
        let lost = GuestStatus { failure: Some("gone".into()), ..guest("lost", 1 << 30) };
        let status = ManagerStatus {
            policy: "built-in".into(),
            guests: vec![guest("a\n\u{1b}", 3 << 30), lost, guest("off", 0)],
            ..ManagerStatus::default()
        };
        let mut out = Vec::new();
        print_status(&mut out, &status).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert!(
            lines[3].starts_with("a?? ")
                && lines[3].contains("3.0 GiB")
                && lines[3].ends_with("no statistics")
        );
        assert!(lines[4].ends_with("gone") && lines[5].ends_with("not running"), "{text}");
    }

    #[test]
    fn names_are_escaped_in_paths() {
        assert_eq!(escape("vm-7.a/b c%é"), "vm-7.a%2Fb%20c%25%C3%A9");
    }
}

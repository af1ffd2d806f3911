//! `vhost-user-net` on a tap that somebody else has opened.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::driver::lan::{Guest, check_idle, net_daemon, plain};
use tests::frames::{Header, mac, numbered};
use tests::netns::{Namespace, open};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

const LIMIT: Duration = Duration::from_secs(10);

fn one(mut fds: Vec<OwnedFd>) -> OwnedFd {
    fds.pop().expect("a tap has a queue")
}

#[test]
fn a_tap_may_be_inherited() -> Result<()> {
    let namespace = Namespace::new()?;
    let tap =
        one(open::tap(&namespace, "tap0", open::TapOptions { header_len: Some(10), ..Default::default() })?);
    namespace.sysctl("net.ipv6.conf.tap0.disable_ipv6", "1")?;
    namespace.ip("link set tap0 up")?;
    // Without any privilege, and with an interface that is not to be seen.
    let daemon = net_daemon().fd(7, tap).args(["--tap-fd", "7"]).start()?;
    for options in [plain(), plain().without(VIRTIO_F_VERSION_1)] {
        let guest = Guest::join(daemon.socket(), mac(1), &options)?;
        let socket = open::packet(&namespace, "tap0")?;
        let frame = numbered(mac(9), mac(1), 1, 1514);
        socket.send(Header::default(), &frame)?;
        let mut guest = guest;
        guest.expect(&frame)?;
        let frame = numbered(mac(1), mac(9), 2, 60);
        guest.send(&frame)?;
        let passed = socket.find(LIMIT, |passed| !passed.outgoing)?.context("A frame does not arrive")?;
        assert_eq!((passed.header, passed.frame), (Header::default(), frame));
        check_idle(&daemon)?;
    }
    Ok(())
}

#[test]
fn an_inherited_file_that_does_not_fit_is_refused_with_a_reason() -> Result<()> {
    let namespace = Namespace::new()?;
    let refused = |fds: Vec<OwnedFd>, args: &[&str]| -> String {
        let builder =
            (7..).zip(fds).fold(net_daemon().args(args), |builder, (number, fd)| builder.fd(number, fd));
        builder.start().expect_err("it starts").to_string()
    };
    let tap = |name: &str, options| open::tap(&namespace, name, options);
    let default = open::TapOptions::default();
    let text = refused(tap("a", open::TapOptions { header_len: None, ..default })?, &["--tap-fd", "7"]);
    ensure!(text.contains("IFF_VNET_HDR") && text.contains("without"), "{text}");
    let text = refused(tap("b", default)?, &["--tap-fd", "7", "--num-queue-pairs", "2"]);
    ensure!(text.contains("1 file descriptors for 2 queue pairs"), "{text}");
    let two = [tap("c", default)?, tap("d", default)?].concat_fds();
    let text = refused(two, &["--tap-fd", "7,8", "--num-queue-pairs", "2"]);
    ensure!(text.contains("IFF_MULTI_QUEUE"), "{text}");
    let text = refused(vec![File::open("/dev/null")?.into()], &["--tap-fd", "7"]);
    ensure!(text.contains("is not a tap"), "{text}");
    let multi = open::TapOptions { multi_queue: true, ..default };
    let two = [tap("e", multi)?, tap("f", multi)?].concat_fds();
    let text = refused(two, &["--tap-fd", "7,8", "--num-queue-pairs", "2"]);
    ensure!(text.contains("queues of one interface"), "{text}");
    Ok(())
}

/// Files of several taps in one list.
trait ConcatFds {
    fn concat_fds(self) -> Vec<OwnedFd>;
}

impl<const N: usize> ConcatFds for [Vec<OwnedFd>; N] {
    fn concat_fds(self) -> Vec<OwnedFd> {
        self.into_iter().flatten().collect()
    }
}

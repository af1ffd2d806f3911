//! Linux guests on the switch inside of vhost-user-net.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tests::driver::lan::{Guest as Port, counters, net_daemon, plain};
use tests::frames::{BROADCAST, mac, number, numbered};
use tests::guest::{Guest, NetOptions, Vmm};

const STEP: Duration = Duration::from_secs(120);

/// More frames than an index of a ring can count.
#[test]
fn indices_wrap() -> Result<()> {
    let daemon = net_daemon().arg("--switch").port("").port("").start()?;
    let [sender, listener] = daemon.sockets() else { unreachable!("two sockets") };
    let mut sender = Port::join(sender, mac(1), &plain())?;
    let mut listener = Port::join(listener, mac(2), &plain())?;
    for batch in 0..2200 {
        let frames: Vec<_> = (0..32).map(|n| numbered(mac(1), BROADCAST, batch * 32 + n, 60)).collect();
        sender.tx.send_all(&frames).with_context(|| format!("after {batch} batches"))?;
        for n in 0..32 {
            let received = listener.receive().with_context(|| format!("after {batch} batches"))?;
            assert_eq!(number(&received.frame), Some(batch * 32 + n));
        }
    }
    Ok(())
}

/// What a guest on the switch does: it waits for the other one, and each sends the other a file, one after the other.
fn exchange(own: u8, other: u8, is_first: bool) -> String {
    // Nobody listens until the other one is ready.
    let send = format!("until nc 192.0.2.{other} 7 </tmp/file; do sleep 0.1; done");
    let receive = "nc -l -p 7 -e /receive".to_owned();
    let [one, two] = if is_first { [send, receive] } else { [receive, send] };
    format!(
        "
net_up eth0 192.0.2.{own}/24
dd if=/dev/urandom of=/tmp/file bs=1M count=8
report sent $(sha256sum </tmp/file | head -c 64)
wait_ping 192.0.2.{other}
announce up
await go
{one}
{two}
report received $(sha256sum </tmp/other | head -c 64)
report bytes $(stat -c %s /tmp/other)
# The other one may still be asked for the end of its file.
announce done
await end
"
    )
}

/// Two guests exchange files while a third port floods all of them with as much as it is allowed to.
fn files_are_exchanged_in_a_flood(vmm: Vmm) {
    // Two guests that send 64 KiB at a time need far less.
    let mut daemon = net_daemon()
        .args(["--switch", "--rate-limit-tx", "packets=4k:200"])
        .port("")
        .port("")
        .port("")
        .start()
        .unwrap();
    let [first, second, third] = [0, 1, 2].map(|port| daemon.sockets()[port].clone());
    let guest = |vmm, socket: &Path, script: String| {
        let guest = Guest::new(vmm).net(socket, NetOptions::default());
        let guest = guest.file("receive", "#!/bin/sh\nexec cat >/tmp/other\n");
        guest.timeout(Duration::from_secs(240)).script(script).spawn().unwrap()
    };
    let mut left = guest(vmm, &first, exchange(1, 2, true));
    let mut right = guest(Vmm::Uml, &second, exchange(2, 1, false));
    left.wait_for("up", STEP).unwrap();
    right.wait_for("up", STEP).unwrap();
    let done = AtomicBool::new(false);
    let mut flooder = Port::join(&third, mac(3), &plain()).unwrap();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| -> Result<u64> {
            let frames: Vec<_> = (0..64).map(|number| numbered(mac(3), BROADCAST, number, 200)).collect();
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                flooder.tx.send_all(&frames)?;
                count += frames.len() as u64;
            }
            Ok(count)
        });
        right.send("go").unwrap();
        left.send("go").unwrap();
        let ended = left.wait_for("done", STEP).and_then(|()| right.wait_for("done", STEP));
        done.store(true, Ordering::Relaxed);
        let sent = flood.join().unwrap();
        ended.unwrap_or_else(|error| panic!("{error:#}\n{sent:?}\n{}", daemon.stderr()));
        let count = sent.unwrap();
        assert!(count > 1000, "{count} frames are no flood");
    });
    left.send("end").unwrap();
    right.send("end").unwrap();
    let (left, right) = (left.wait().unwrap().check().unwrap(), right.wait().unwrap().check().unwrap());
    assert_eq!((left.number("bytes").unwrap(), right.number("bytes").unwrap()), (8 << 20, 8 << 20));
    assert_eq!(left.value("sent").unwrap(), right.value("received").unwrap());
    assert_eq!(right.value("sent").unwrap(), left.value("received").unwrap());
    for socket in [first, second] {
        let counted = counters(&mut daemon, &socket.display().to_string()).unwrap();
        assert!(counted.contains_key("rx_large") && counted.contains_key("tx_large"), "{counted:?}");
    }
    assert!(daemon.terminate(STEP).unwrap().success());
}

tests::for_both_guests!(files_are_exchanged_in_a_flood);

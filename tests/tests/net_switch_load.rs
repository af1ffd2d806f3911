//! `vhost-user-net --switch` seen from rings: guests that are slow, gone, many or too fast, and none of them a burden to
//! another.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::daemon::Daemon;
use tests::driver::lan::{BUFFERS, Guest, RING_SIZE, check_idle, counters, net_daemon, plain, wait_counter};
use tests::driver::net::{RawNet, TIMEOUT};
use tests::driver::raw::RawOptions;
use tests::frames::{self, BROADCAST, Header, mac, numbered};
use vhost::VhostBackend;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

fn switch(ports: usize, args: &[&str]) -> Result<(Daemon, Vec<PathBuf>)> {
    let builder = (0..ports).fold(net_daemon().arg("--switch").args(args), |builder, _| builder.port(""));
    let daemon = builder.start()?;
    let sockets = daemon.sockets().to_vec();
    Ok((daemon, sockets))
}

fn wait(daemon: &mut Daemon, socket: &std::path::Path, name: &str, number: u64) -> Result<()> {
    wait_counter(daemon, &socket.display().to_string(), name, number)
}

#[test]
fn a_guest_without_buffers_loses_frames_and_holds_up_nobody() -> Result<()> {
    for options in [plain(), plain().with(VIRTIO_NET_F_MRG_RXBUF)] {
        let (mut daemon, sockets) = switch(3, &[])?;
        let mut slow = Guest::join_with(&sockets[2], mac(3), &options, 3, &[2048])?;
        let mut fine = Guest::join(&sockets[1], mac(2), &options)?;
        let mut sender = Guest::join(&sockets[0], mac(1), &options)?;
        for number in 0..10 {
            let frame = numbered(mac(1), BROADCAST, number, 100);
            sender.send(&frame)?;
            fine.expect(&frame)?;
        }
        wait(&mut daemon, &sockets[2], "rx_no_buffer", 7)?;
        // The first ones were for it, and so is what comes when it has buffers again.
        for number in 0..3 {
            let received = slow.receive_once()?;
            assert_eq!(received.frame, numbered(mac(1), BROADCAST, number, 100));
        }
        slow.post(1);
        let frame = numbered(mac(1), BROADCAST, 10, 100);
        sender.send(&frame)?;
        fine.expect(&frame)?;
        slow.expect(&frame)?;
        wait(&mut daemon, &sockets[2], "rx_frames", 4)?;
        wait(&mut daemon, &sockets[1], "rx_frames", 11)?;
    }
    Ok(())
}

/// A large frame for which there are too few buffers takes none of them.
#[test]
fn too_few_mergeable_buffers_are_left_for_the_next_frame() -> Result<()> {
    let (mut daemon, sockets) = switch(2, &[])?;
    let mut to = Guest::join_with(&sockets[1], mac(2), &plain().with(VIRTIO_NET_F_MRG_RXBUF), 4, &[256])?;
    let mut from = Guest::join(&sockets[0], mac(1), &plain())?;
    from.send(&numbered(mac(1), mac(2), 1, 1514))?;
    wait(&mut daemon, &sockets[1], "rx_no_buffer", 1)?;
    let frame = numbered(mac(1), mac(2), 2, 4 * 256 - 12);
    from.send(&frame)?;
    let received = to.receive()?;
    assert_eq!((received.frame, received.num_buffers), (frame, Some(4)));
    Ok(())
}

#[test]
fn nobody_works_while_nothing_passes() -> Result<()> {
    let (daemon, sockets) = switch(2, &[])?;
    let starved = Guest::join_with(&sockets[1], mac(2), &plain(), 0, &[2048])?;
    let mut sender = Guest::join(&sockets[0], mac(1), &plain())?;
    for number in 0..10 {
        sender.send(&numbered(mac(1), mac(2), number, 60))?;
    }
    check_idle(&daemon)?;
    drop(starved);
    check_idle(&daemon)
}

/// All frames of a sender arrive in its order, as long as its receiver has buffers for all of them.
#[test]
fn several_senders_at_once_keep_their_order() -> Result<()> {
    const SENDERS: u8 = 4;
    const FRAMES: u64 = 2000;
    /// Frames of each sender on the way at once, so that no buffer is missing.
    const WINDOW: u64 = RING_SIZE as u64 / 2 / SENDERS as u64;

    let (_daemon, sockets) = switch(1 + usize::from(SENDERS), &[])?;
    let mut target = Guest::join_with(&sockets[0], mac(100), &plain(), RING_SIZE / 2, &[2048])?;
    let hello = numbered(mac(100), BROADCAST, 0, 60);
    let senders: Result<Vec<_>> = (1..=SENDERS)
        .map(|number| Guest::join(&sockets[usize::from(number)], mac(number), &plain()))
        .collect();
    let mut senders = senders?;
    // Known to the switch, so that senders do not get each other's frames.
    target.send(&hello)?;
    for sender in &mut senders {
        sender.expect(&hello)?;
    }

    let counts: Vec<_> = (0..SENDERS).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (sender, received) in senders.iter_mut().zip(&counts) {
            let failed = &failed;
            scope.spawn(move || -> Result<()> {
                let mut next = 0;
                while next < FRAMES && !failed.load(Ordering::Relaxed) {
                    let room = (received.load(Ordering::Relaxed) + WINDOW - next).min(FRAMES - next);
                    if room == 0 {
                        std::thread::yield_now();
                        continue;
                    }
                    let frames: Vec<_> = (next..next + room)
                        .map(|number| {
                            numbered(sender.mac, mac(100), number, 60 + (number * 131 % 1455) as usize)
                        })
                        .collect();
                    sender.tx.send_all(&frames).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                    next += room;
                }
                Ok(())
            });
        }
        let mut take = || -> Result<()> {
            for count in 0..FRAMES * u64::from(SENDERS) {
                let frame = target.receive().with_context(|| format!("after {count} frames"))?.frame;
                let number = frames::number(&frame).context("A frame is damaged")?;
                let expected = &counts[usize::from(frame[11]) - 1];
                ensure!(
                    number == expected.load(Ordering::Relaxed),
                    "{number} of {} after {expected:?}",
                    frame[11]
                );
                expected.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        take().inspect_err(|_| failed.store(true, Ordering::Relaxed))
    })
}

/// Both directions between two guests at once, and a third that comes and goes all the time without a word.
#[test]
fn a_front_end_that_disappears_disturbs_nobody() -> Result<()> {
    const FRAMES: u64 = 3000;
    let (daemon, sockets) = switch(4, &[])?;
    let mut one = Guest::join(&sockets[0], mac(1), &plain())?;
    let mut two = Guest::join(&sockets[1], mac(2), &plain())?;
    // It gets what the third one sends, as long as there are buffers.
    let mut sink = Guest::join(&sockets[3], mac(4), &plain())?;
    let hello = numbered(mac(4), BROADCAST, 0, 60);
    sink.send(&hello)?;
    one.expect(&hello)?;
    two.expect(&hello)?;
    let done = AtomicBool::new(false);
    let visits = std::thread::scope(|scope| {
        let coming_and_going = scope.spawn(|| -> Result<u32> {
            let mut visits = 0;
            while !done.load(Ordering::Relaxed) || visits < 3 {
                let mut visitor = Guest::join(&sockets[2], mac(3), &plain())?;
                // Gone with frames on the way in both directions.
                for number in 0..20 {
                    let request =
                        visitor.tx.request(Header::default(), &numbered(mac(3), mac(4), number, 60));
                    visitor.tx.ring.submit(&request);
                }
                visitor.tx.ring.kick();
                visits += 1;
            }
            Ok(visits)
        });
        let mut exchange = || -> Result<()> {
            for number in 0..FRAMES {
                for (from, to) in [(0, 1), (1, 0)] {
                    let guests = [&mut one, &mut two];
                    let frame = numbered(guests[from].mac, BROADCAST, number, 200);
                    guests[from].send(&frame)?;
                    guests[to].expect(&frame)?;
                }
            }
            Ok(())
        };
        let result = exchange();
        done.store(true, Ordering::Relaxed);
        let visits = coming_and_going.join().expect("no panic")?;
        result.map(|()| visits)
    })?;
    assert!(visits >= 3);
    assert!(!daemon.stderr().contains("panicked"), "{}", daemon.stderr());
    Ok(())
}

/// A ring that its driver takes back is not written to any more.
#[test]
fn a_queue_that_was_stopped_gets_nothing() -> Result<()> {
    let (_daemon, sockets) = switch(2, &[])?;
    let mut to = Guest::join(&sockets[1], mac(2), &plain())?;
    let mut from = Guest::join(&sockets[0], mac(1), &plain())?;
    let frame = |number| numbered(mac(1), mac(2), number, 60);
    for round in 0..5 {
        from.send(&frame(10 * round))?;
        to.expect(&frame(10 * round))?;
        let base = to.net.device.frontend.get_vring_base(0)?;
        // The device gives back what it had taken in advance.
        assert_eq!(base, u32::from(to.rx.ring.used_idx()));
        for number in 1..5 {
            from.send(&frame(10 * round + number))?;
        }
        assert!(to.receive_ready()?.is_empty());
        to.net.device.start(0, &to.rx.ring)?;
        to.settle()?;
    }
    from.send(&frame(99))?;
    to.expect(&frame(99))
}

fn burst(options: &RawOptions, socket: &std::path::Path, count: u64, len: usize) -> Result<RawNet> {
    let mut net = RawNet::connect(socket, options)?;
    let mut tx = net.tx(0, RING_SIZE)?;
    for number in 0..count {
        let request = tx.request(Header::default(), &numbered(mac(1), mac(2), number, len));
        tx.ring.submit(&request);
    }
    tx.ring.kick();
    Ok(net)
}

/// Ten frames in a second and five at once: 25 frames take two seconds.
#[test]
fn a_limit_on_packets_lets_frames_wait_in_the_sender_s_ring() -> Result<()> {
    let (daemon, sockets) = switch(2, &["--rate-limit-tx", "packets=10:5"])?;
    // Two of the five are used up when the receiver comes, by a throttle of its own.
    let mut to = Guest::join(&sockets[1], mac(2), &plain())?;
    let start = Instant::now();
    let _from = burst(&plain(), &sockets[0], 25, 60)?;
    let mut first = 0;
    for number in 0..25 {
        let received = to.receive()?;
        assert_eq!(frames::number(&received.frame), Some(number));
        first += u32::from(start.elapsed() < Duration::from_millis(100));
    }
    // 19 of them had to wait, at 100 ms each.
    ensure!(start.elapsed() > Duration::from_millis(1500), "all came in {:?}", start.elapsed());
    ensure!(first <= 7, "{first} came at once");
    check_idle(&daemon)
}

#[test]
fn a_limit_on_bytes_lets_frames_wait_in_the_sender_s_ring() -> Result<()> {
    let (daemon, sockets) = switch(2, &["--rate-limit-tx", "bytes=10k:3k"])?;
    let mut to = Guest::join(&sockets[1], mac(2), &plain())?;
    let start = Instant::now();
    let _from = burst(&plain(), &sockets[0], 20, 1000)?;
    for number in 0..20 {
        let received = to.receive()?;
        assert_eq!(frames::number(&received.frame), Some(number));
    }
    ensure!(start.elapsed() > Duration::from_millis(1200), "all came in {:?}", start.elapsed());
    drop(daemon);
    Ok(())
}

#[test]
fn a_limit_on_what_a_guest_receives_drops_and_counts() -> Result<()> {
    let (mut daemon, sockets) = switch(3, &["--rate-limit-rx", "packets=1:5"])?;
    let mut to = Guest::join(&sockets[1], mac(2), &plain())?;
    let mut from = Guest::join(&sockets[0], mac(1), &plain())?;
    let start = Instant::now();
    let frames: Vec<_> = (0..60).map(|number| numbered(mac(1), mac(2), number, 60)).collect();
    from.tx.send_all(&frames)?;
    let got = to.receive_ready()?;
    let numbers: Vec<_> = got.iter().filter_map(|received| frames::number(&received.frame)).collect();
    let allowed = 6 + start.elapsed().as_secs() as usize;
    ensure!((5..=allowed).contains(&numbers.len()), "{numbers:?} arrived");
    assert_eq!(numbers[..5], [0, 1, 2, 3, 4]);
    let dropped = 60 - numbers.len() as u64;
    wait(&mut daemon, &sockets[1], "rx_throttled", dropped)?;
    // The sender has a limit of its own, of which it used nothing.
    let counted = counters(&mut daemon, &sockets[0].display().to_string())?;
    assert_eq!(counted.get("tx_frames"), Some(&60));
    assert_eq!(counted.get("rx_throttled"), None);
    Ok(())
}

/// A frame that is refused for a guest without a driver is no reason to keep the sender waiting either.
#[test]
fn a_guest_that_has_not_started_is_no_receiver() -> Result<()> {
    let (mut daemon, sockets) = switch(3, &[])?;
    let mut from = Guest::join(&sockets[0], mac(1), &plain())?;
    let mut waiting = RawNet::connect(&sockets[1], &plain())?;
    let frames: Vec<_> = (0..10).map(|number| numbered(mac(1), BROADCAST, number, 60)).collect();
    from.tx.send_all(&frames)?;
    // What it posts before its ring starts is used from then on.
    let mut rx = waiting.lay_out_rx(0, RING_SIZE)?;
    for _ in 0..BUFFERS {
        rx.post(&[2048]);
    }
    waiting.device.start(0, &rx.ring)?;
    let mut tx = waiting.tx(0, RING_SIZE)?;
    for _ in 0..2 {
        tx.send(&numbered(mac(2), tests::driver::lan::LINK_LOCAL, 0, 60))?;
    }
    let frame = numbered(mac(1), BROADCAST, 99, 60);
    from.send(&frame)?;
    assert_eq!(rx.receive(TIMEOUT)?.context("no frame")?.frame, frame);
    wait(&mut daemon, &sockets[1], "rx_frames", 1)
}

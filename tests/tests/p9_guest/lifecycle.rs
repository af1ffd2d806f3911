//! A share comes, goes and comes again.
use std::fs;
use std::time::Duration;

use tests::guest::{Guest, Vmm};
use tests::provision::Series;
use tests::share::Share;

const STEP: Duration = Duration::from_secs(120);

#[test]
fn a_share_is_mounted_again_and_again() {
    let share = Share::new("again").unwrap();
    let script = "
for cache in none mmap loose none; do
    share_up again $cache
    echo $cache >>/mnt/log
    umount /mnt
done
share_up again none
report log \"$(cat /mnt/log)\"
";
    let report = share.attach(Guest::new(Vmm::Qemu)).script(script).run().unwrap().check().unwrap();
    assert_eq!(report.value("log").unwrap(), "none\nmmap\nloose\nnone");
    share.stop().unwrap();
}

#[test]
fn a_tag_that_is_unknown_or_in_use_is_refused() {
    let share = Share::new("known").unwrap();
    let script = "
fails share_up unknown none
share_up known none
fails share_up known none /tmp/second
";
    share.attach(Guest::new(Vmm::Qemu)).script(script).run().unwrap().check().unwrap();
    share.stop().unwrap();
}

#[test]
fn a_guest_has_two_shares() {
    let (first, second) = (Share::new("first").unwrap(), Share::new("second").unwrap());
    fs::write(first.path().join("file"), "one").unwrap();
    fs::write(second.path().join("file"), "two").unwrap();
    let script = "
share_up first none /tmp/first
share_up second mmap /tmp/second
report both \"$(cat /tmp/first/file /tmp/second/file)\"
mv /tmp/first/file /tmp/second/moved
";
    let guest = second.attach(first.attach(Guest::new(Vmm::Qemu)));
    let report = guest.script(script).run().unwrap().check().unwrap();
    assert_eq!(report.value("both").unwrap(), "onetwo");
    assert!(!first.path().join("file").exists());
    assert_eq!(fs::read_to_string(second.path().join("moved")).unwrap(), "one");
    first.stop().unwrap();
    second.stop().unwrap();
}

/// The guest does not unmount before it begins anew: the daemon forgets what the last system had open.
#[test]
fn a_guest_reboots_with_a_mounted_share() {
    let share = Share::new("boots").unwrap();
    let script = "
share_up boots none
echo boot >>/mnt/log
if [ $(wc -l </mnt/log) -lt 3 ]; then
    exec 5>/mnt/open
    echo data >&5
    sync
    reboot -f
fi
report boots $(wc -l </mnt/log)
";
    let guest = share.attach(Guest::new(Vmm::Qemu)).may_reboot().script(script);
    let report = guest.run().unwrap().check().unwrap();
    assert_eq!(report.number("boots").unwrap(), 3);
    share.stop().unwrap();
}

/// Linux waits with the removal of a device until nobody uses it, and the share keeps working until then.
#[test]
fn a_mounted_share_is_unplugged() {
    for series in Series::ALL {
        let share = Share::new("plug").unwrap();
        let script = "
share_up plug none
device=$(dirname $(readlink -f /sys/bus/virtio/drivers/9pnet_virtio/virtio*))
{ echo 1 >$device/remove; echo removed >/tmp/removed; } &
sleep 2
[ ! -e /tmp/removed ]
echo still >/mnt/there
report there \"$(cat /mnt/there)\"
umount /mnt
wait_path /tmp/removed
[ ! -e $device ]
fails share_up plug none
echo 1 >/sys/bus/pci/rescan
wait_path $device
share_up plug none
report again \"$(cat /mnt/there)\"
";
        let guest = share.attach(Guest::new(Vmm::Qemu).kernel(series)).script(script);
        let report = guest.run().unwrap().check().unwrap();
        assert_eq!(report.value("there").unwrap(), "still");
        assert_eq!(report.value("again").unwrap(), "still");
        share.stop().unwrap();
    }
}

/// A guest that is killed leaves nothing behind, and the next one starts.
#[test]
fn a_guest_is_killed_and_another_one_takes_its_place() {
    let share = Share::new("next").unwrap();
    let script =
        "share_up next none\nexec 5>/mnt/open\necho data >&5\nrm /mnt/open\nannounce busy\nawait never";
    let mut guest = share.attach(Guest::new(Vmm::Qemu)).script(script).spawn().unwrap();
    guest.wait_for("busy", STEP).unwrap();
    guest.kill();
    let script = "share_up next none\nreport files \"$(ls /mnt)\"\n";
    let report = share.attach(Guest::new(Vmm::Qemu)).script(script).run().unwrap().check().unwrap();
    assert_eq!(report.value("files").unwrap(), "");
    share.stop().unwrap();
}

#[test]
fn a_read_only_share_is_read_only() {
    let share = Share::new("writable").unwrap();
    if share.daemon().is_none() {
        // An option of the daemon.
        return;
    }
    fs::write(share.path().join("file"), "precious").unwrap();
    let read_only = Share::of(share.path(), "ro", tests::share::default_model(), &["--read-only"]).unwrap();
    let script = "
share_up ro none
report file $(cat /mnt/file)
fails sh -c 'echo x >/mnt/file'
fails sh -c 'echo x >/mnt/new'
fails rm /mnt/file
fails chmod 777 /mnt/file
fails mkdir /mnt/folder
";
    let report = read_only.attach(Guest::new(Vmm::Qemu)).script(script).run().unwrap().check().unwrap();
    assert_eq!(report.value("file").unwrap(), "precious");
    assert_eq!(fs::read_to_string(share.path().join("file")).unwrap(), "precious");
    assert_eq!(fs::read_dir(share.path()).unwrap().count(), 1);
    read_only.stop().unwrap();
}

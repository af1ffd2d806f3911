//! Host and guests work on the same tree.
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use tests::guest::{Guest, Running, Vmm};
use tests::share::{Share, default_model};

const LIMIT: Duration = Duration::from_secs(300);
const STEP: Duration = Duration::from_secs(240);

/// Without a cache, each sees at once what the other did. But not below a name that the guest has open: Linux keeps such a
/// name, and does not ask for it again.
#[test]
fn host_and_guest_see_each_others_changes() {
    let share = Share::new("both").unwrap();
    let script = "
share_up both none
mkdir /mnt/guest
echo guest >/mnt/guest/file
announce made
await changed
report content \"$(cat /mnt/guest/file)\"
report mode $(stat -c %a /mnt/guest/file)
report files \"$(ls /mnt)\"
[ ! -e /mnt/gone ]
exec 5</mnt/host/open
announce opened
await replaced
report old \"$(cat <&5)\"
exec 5<&-
report new \"$(cat /mnt/host/open)\"
cd /mnt/host
announce inside
await moved
echo there >created
";
    fs::write(share.path().join("gone"), "").unwrap();
    let mut guest = share.attach(Guest::new(Vmm::Qemu).timeout(LIMIT)).script(script).spawn().unwrap();
    guest.wait_for("made", STEP).unwrap();
    let path = |name: &str| share.path().join(name);
    assert_eq!(fs::read_to_string(path("guest/file")).unwrap(), "guest\n");
    fs::write(path("guest/file"), "host\n").unwrap();
    fs::set_permissions(path("guest/file"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::remove_file(path("gone")).unwrap();
    fs::create_dir(path("host")).unwrap();
    fs::write(path("host/open"), "old").unwrap();
    guest.send("changed").unwrap();
    guest.wait_for("opened", STEP).unwrap();
    fs::write(path("host/next"), "new").unwrap();
    fs::rename(path("host/next"), path("host/open")).unwrap();
    guest.send("replaced").unwrap();
    guest.wait_for("inside", STEP).unwrap();
    // The guest's working folder is the folder, wherever it is now.
    fs::rename(path("host"), path("elsewhere")).unwrap();
    guest.send("moved").unwrap();
    let report = guest.wait().unwrap().check().unwrap();
    assert_eq!(report.value("content").unwrap(), "host");
    // Mapped attributes are the guest's alone.
    let mode = if default_model() == "passthrough" { "600" } else { "644" };
    assert_eq!(report.value("mode").unwrap(), mode);
    assert_eq!(report.value("files").unwrap(), "guest\nhost");
    assert_eq!((report.value("old").unwrap(), report.value("new").unwrap()), ("old", "new"));
    assert_eq!(fs::read_to_string(path("elsewhere/created")).unwrap(), "there\n");
    share.stop().unwrap();
}

/// Each guest and the host make, move and remove files in the same folders, under names of their own and under names
/// that all of them use; at the end the folders are as the last of them left them, for everybody.
#[test]
fn two_guests_and_the_host_change_one_tree() {
    const ROUNDS: usize = 40;
    let first = Share::new("tree").unwrap();
    let second = Share::of(first.path(), "tree", default_model(), &[] as &[&str]).unwrap();
    fs::create_dir(first.path().join("own")).unwrap();
    let guest = |share: &Share, name: &str| -> Running {
        let script = format!(
            "
share_up tree none
announce ready
await go
set +x
n=0
while [ $n -lt {ROUNDS} ]; do
    echo {name} >/mnt/own/{name}-$n
    mkdir /mnt/common 2>/dev/null || true
    echo {name} >/mnt/common/$n 2>/dev/null || true
    mv -f /mnt/common/$n /mnt/common/moved 2>/dev/null || true
    rm -rf /mnt/common 2>/dev/null || true
    [ $((n % 2)) = 0 ] || rm /mnt/own/{name}-$n
    n=$((n + 1))
done
set -x
announce done
await look
report own \"$(ls /mnt/own)\"
report numbers \"$(cd /mnt/own && stat -c '%n %s' *)\"
[ ! -e /mnt/common ]
"
        );
        share.attach(Guest::new(Vmm::Qemu).timeout(LIMIT)).script(script).spawn().unwrap()
    };
    let mut guests = [guest(&first, "one"), guest(&second, "two")];
    for guest in &mut guests {
        guest.wait_for("ready", STEP).unwrap();
    }
    for guest in &mut guests {
        guest.send("go").unwrap();
    }
    let common = first.path().join("common");
    for n in 0..ROUNDS * 20 {
        // Any of these may come too late.
        let _ = fs::create_dir(&common);
        let _ = fs::write(common.join(n.to_string()), "host");
        let _ = fs::rename(common.join(n.to_string()), common.join("moved"));
        let _ = fs::remove_dir_all(&common);
    }
    for guest in &mut guests {
        guest.wait_for("done", STEP).unwrap();
    }
    let _ = fs::remove_dir_all(&common);
    let mut expected: Vec<String> =
        (0..ROUNDS).step_by(2).flat_map(|n| [format!("one-{n}"), format!("two-{n}")]).collect();
    expected.sort();
    let sizes: Vec<String> = expected
        .iter()
        .map(|name| format!("{name} {}", fs::metadata(first.path().join("own").join(name)).unwrap().size()))
        .collect();
    for mut guest in guests {
        guest.send("look").unwrap();
        let report = guest.wait().unwrap().check().unwrap();
        assert_eq!(report.value("own").unwrap(), expected.join("\n"));
        assert_eq!(report.value("numbers").unwrap(), sizes.join("\n"));
    }
    first.stop().unwrap();
    second.stop().unwrap();
}

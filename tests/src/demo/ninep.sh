# What the guest does with its shared directory.
share_up demo none /share
report 9p.read "$(cat /share/from-host)"
announce 9p mounted

echo 'hello from the guest' >/share/from-guest
chmod 640 /share/from-guest
announce 9p written

cd /share/tree
echo 'the guest' >>log
announce 9p entered
await moved
echo 'the guest again' >>log
cd /
report 9p.tree "$(ls /share/moved/log)"
announce 9p followed

echo 'gone' >/share/scratch
exec 6>>/share/scratch 7</share/scratch
rm /share/scratch
fails ls /share/scratch
echo 'but not lost' >&6
report 9p.unlinked "$(cat <&7)"
exec 6>&- 7<&-
announce 9p unlinked

await locked
announce 9p locking
seconds() { cut -d' ' -f1 /proc/uptime; }
start=$(seconds)
report 9p.locked "$(flock /share/locked cat /share/locked)"
report 9p.lock_seconds "$(awk "BEGIN { print $(seconds) - $start }")"
announce 9p locked

report 9p.link "$(readlink /share/outside)"
fails cat /share/outside
announce 9p confined

#!/bin/busybox sh
# The guest's first process: brings the system up, runs the script and powers off.
#
# Two terminals, so that neither garbles the other: the console has the kernel's messages, the standard error of the
# script and a trace of its commands; the channel has the script's standard output and the records for the host,
# which lie between two bytes \036.
export PATH=/usr/bin:/bin HOME=/ LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
. /guest/settings
stty -F "$CHANNEL" raw -echo
exec <"$CHANNEL" 3>"$CHANNEL"

finish() {
    # Opened again: a shell that a person had may have hung it up.
    printf '\036%s\036\n' "$1" >"$CHANNEL"
    # Changing the settings waits until everything is written.
    stty -F "$CHANNEL" sane
    poweroff -f
}

# Should the host's side be killed, nobody else would end this guest.
(sleep "$LIMIT"; poweroff -f) <&- >&- 3>&- &

while read -r module; do
    insmod "/guest/modules/$module.ko" || finish "failure Cannot load the kernel module $module"
done </guest/modules.list
printf '\036up\036\n' >&3
sh -ex -c '. /guest/settings; . /guest/functions.sh; . /guest/script' >&3
status=$?
if [ "$status" = 0 ] && [ -n "$NEW_ROOT" ]; then
    mount -o move /dev "$NEW_ROOT/dev"
    umount /proc /sys /tmp
    # A system of its own begins here: nothing of this one's variables and files is for it.
    exec env -i PATH=/usr/sbin:/usr/bin TERM=linux /bin/busybox switch_root "$NEW_ROOT" /sbin/init <&- >&- 3>&-
fi
finish "exit $status"

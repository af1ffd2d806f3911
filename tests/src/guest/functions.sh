# What a guest's script can call.

# report KEY VALUE: gives the host a value; it may have several lines.
report() { printf '\036report %s %s\036\n' "$1" "$2" >&3; }

# announce TEXT: tells a host that waits for it that the script has come this far.
announce() { printf '\036announce %s\036\n' "$*" >&3; }

# await TEXT: waits until the host has sent the line TEXT.
await() {
    while read -r line; do
        [ "$line" = "$*" ] && return
    done
    echo "The host went away" >&2
    return 1
}

# fails COMMAND...: runs a command that must not succeed. (`! COMMAND` would not end the script if it did.)
fails() {
    if "$@"; then
        echo "This succeeded: $*" >&2
        return 1
    fi
}

# wait_path PATH: waits up to ten seconds for a path to exist, such as a device's node.
wait_path() {
    { set +x; } 2>/dev/null
    tries=0
    until [ -e "$1" ] || [ "$tries" -ge 100 ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
    [ -e "$1" ] || echo "There is no $1" >&2
    set -x
    [ -e "$1" ]
}

# net_up INTERFACE ADDRESS/LENGTH...: waits for an interface, brings it up and gives it addresses.
net_up() {
    wait_path "/sys/class/net/$1"
    interface=$1
    shift
    # Without this an address is unusable for a second, in which the kernel looks for others that have it.
    accept_dad=/proc/sys/net/ipv6/conf/$interface/accept_dad
    [ ! -e "$accept_dad" ] || echo 0 >"$accept_dad"
    ip link set "$interface" up
    for address in "$@"; do
        ip address add "$address" dev "$interface"
    done
}

# wait_ping ADDRESS: waits up to ten seconds for an answer.
wait_ping() {
    tries=0
    until ping -q -c 1 -W 1 "$1" >&2; do
        tries=$((tries + 1))
        [ "$tries" -lt 10 ] || return 1
    done
}

# counter INTERFACE NAME: a statistic such as rx_packets.
counter() { cat "/sys/class/net/$1/statistics/$2"; }

# shell: hands the channel to a person until they leave the shell.
shell() {
    stty -F "$CHANNEL" sane
    ENV=/guest/shellrc setsid -c sh -i <"$CHANNEL" >"$CHANNEL" 2>&1 || true
    # The end of a session hangs its terminal up for everybody who has it open.
    stty -F "$CHANNEL" raw -echo
    exec <"$CHANNEL" 3>"$CHANNEL" >&3
}

# debian_up [FOLDER...]: mounts the Debian at /debian, where these folders of the guest are seen too.
debian_up() {
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial")" != debian ] || break
    done
    mkdir -p /debian
    mount -t ext4 -o ro "/dev/${disk##*/}" /debian
    mount -t tmpfs tmp /debian/tmp
    for folder in /proc /sys /dev "$@"; do
        mount -o bind "$folder" "/debian$folder"
    done
    mkdir -p /dev/shm
    mount -t tmpfs shm /debian/dev/shm
}

# debian COMMAND...: runs a command inside.
debian() {
    chroot /debian /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/tmp LC_ALL=C.UTF-8 "$@"
}

# share_up TAG CACHE [FOLDER]: mounts a shared directory, at /mnt unless told otherwise, with the largest requests that
# Linux's virtio transport sends, and with $SHARE_OPTIONS behind the other options.
share_up() {
    mkdir -p "${3-/mnt}"
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=$2$SHARE_OPTIONS" "$1" "${3-/mnt}"
}

# meminfo NAME: a number of /proc/meminfo, in bytes.
meminfo() { awk -v name="$1:" '$1 == name { printf "%.0f", $2 * 1024 }' /proc/meminfo; }

# balloon_size: the pages in the balloon, as the driver has counted them since it was loaded first.
balloon_size() { awk '/^balloon_inflate/ { n += $2 } /^balloon_deflate/ { n -= $2 } END { print n }' /proc/vmstat; }

# wait_balloon PAGES: waits up to a minute until the balloon has this size.
wait_balloon() {
    { set +x; } 2>/dev/null
    tries=0
    until [ "$(balloon_size)" = "$1" ] || [ "$tries" -ge 300 ]; do
        tries=$((tries + 1))
        sleep 0.2
    done
    set -x
    [ "$(balloon_size)" = "$1" ]
}

# fill MIB: fills a file in memory with so many MiB that differ.
fill() {
    [ -d /fill ] || { mkdir /fill && mount -t tmpfs -o size=100% fill /fill; }
    head -c 1048576 /dev/urandom >/fill/seed
    n=0
    { set +x; } 2>/dev/null
    while [ "$n" -lt "$1" ]; do
        cat /fill/seed
        n=$((n + 1))
    done >/fill/file
    set -x
}

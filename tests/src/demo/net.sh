# What the first guest does with its network interfaces: eth0 is on a switch, eth1 on passt if there is one.
seconds() { cut -d' ' -f1 /proc/uptime; }
elapsed() { awk "BEGIN { print $2 - $1 }"; }
dd if=/dev/urandom of=/tmp/data bs=1M count="$NET_MIB"
sum=$(sha256sum </tmp/data)
report net.sha256 "$sum"

if [ "$OUTSIDE" = yes ]; then
    wait_path /sys/class/net/eth1
    ip link set eth1 up
    mkdir -p /usr/share/udhcpc
    udhcpc -i eth1 -f -q -n -t 10 -O mtu -s /guest/udhcpc
    report net.address "$(ip -4 address show dev eth1 | awk '/inet / { print $2 }')"
    report net.mac "$(cat /sys/class/net/eth1/address)"
    report net.mtu "$(cat /sys/class/net/eth1/mtu)"
    announce net configured
    start=$(seconds)
    nc "$SERVER" "$PORT" </tmp/data >/tmp/back
    end=$(seconds)
    [ "$(sha256sum </tmp/back)" = "$sum" ]
    rm /tmp/back
    report net.outside_seconds "$(elapsed "$start" "$end")"
    announce net outside
fi

net_up eth0 10.0.0.1/24
announce net ready
await neighbour
wait_ping 10.0.0.2
report net.rtt "$(ping -c 5 10.0.0.2 | awk -F/ '/round-trip/ { print $4 }')"
announce net pinged
start=$(seconds)
nc 10.0.0.2 9 </tmp/data
end=$(seconds)
report net.copy_seconds "$(elapsed "$start" "$end")"
announce net copied
rm /tmp/data

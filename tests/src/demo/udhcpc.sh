#!/bin/busybox sh
# What a DHCP server said, done.
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
ip route add default via "$router" dev "$interface"

# What the second guest does: it takes a file from the first one, and stays to be pinged.
net_up eth0 10.0.0.2/24
# Its input never ends, or it would close its side, and the first guest would take that for the end.
mkfifo /tmp/never
exec 5<>/tmp/never
nc -l -p 9 <&5 >/tmp/data &
# Line 0A is a socket that listens.
until cat /proc/net/tcp* | grep -q ':0009 .* 0A '; do sleep 0.1; done
announce ready
wait $!
report sha256 "$(sha256sum </tmp/data)"
announce received
await end

# What the guest does with its memory.
report balloon.total "$(meminfo MemTotal)"
announce balloon up

await fill
fill "$FILL_MIB"
announce balloon filled
await free
rm /fill/file
announce balloon freed

await scatter
{ set +x; } 2>/dev/null
n=0
while [ "$n" -lt "$PIECES" ]; do
    cat /fill/seed >"/fill/keep.$n"
    cat /fill/seed >"/fill/drop.$n"
    n=$((n + 1))
done
set -x
rm /fill/drop.*
announce balloon scattered

await need
available=$(meminfo MemAvailable)
report balloon.before "$available"
needed=$((available + MORE_MIB * 1048576))
report balloon.needed "$(head -c "$needed" /dev/zero | tail -c "$needed" | wc -c)"
report balloon.kills "$(awk '$1 == "oom_kill" { print $2 }' /proc/vmstat)"
announce balloon survived

await again
[ "$(head -c 1048576 /fill/keep.0 | sha256sum)" = "$(sha256sum </fill/seed)" ]
rm /fill/keep.*
fill "$FILL_MIB"
rm /fill/file
announce balloon used

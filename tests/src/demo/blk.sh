# What the guest does with its disk.
seconds() { cut -d' ' -f1 /proc/uptime; }
wait_path /dev/vda
report blk.bytes "$(blockdev --getsize64 /dev/vda)"
report blk.serial "$(cat /sys/block/vda/serial)"
report blk.queues "$(ls /sys/block/vda/mq | wc -l)"
announce blk seen

printf 'label: gpt\n,,L\n' | sfdisk --quiet /dev/vda
wait_path /dev/vda1
mke2fs -q -t ext4 /dev/vda1
mount -t ext4 /dev/vda1 /mnt
announce blk formatted

dd if=/dev/urandom of=/mnt/data bs=1M count="$FILE_MIB" conv=fsync
before=$(sha256sum </mnt/data)
umount /mnt
mount -t ext4 /dev/vda1 /mnt
after=$(sha256sum </mnt/data)
[ "$before" = "$after" ]
report blk.sha256 "$after"
announce blk verified

start=$(seconds)
dd if=/dev/zero of=/mnt/bulk bs=1M count="$BULK_MIB" conv=fsync
middle=$(seconds)
echo 3 >/proc/sys/vm/drop_caches
restart=$(seconds)
dd if=/mnt/bulk of=/dev/null bs=1M
end=$(seconds)
report blk.write_seconds "$(awk "BEGIN { print $middle - $start }")"
report blk.read_seconds "$(awk "BEGIN { print $end - $restart }")"
announce blk measured

await discard
rm /mnt/data /mnt/bulk
sync
fstrim /mnt
announce blk discarded
umount /mnt

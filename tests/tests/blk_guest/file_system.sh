# Partitions, formats and fills the disk, reads it back after a remount, and gives the space back.
wait_path /dev/vda
[ -b /dev/vda ]
report bytes "$(blockdev --getsize64 /dev/vda)"
report serial "$(cat /sys/block/vda/serial)"
report queues "$(ls /sys/block/vda/mq | wc -l)"
report read_only "$(cat /sys/block/vda/ro)"

printf 'label: gpt\n,64MiB,L\n,,L\n' | sfdisk --quiet /dev/vda
wait_path /dev/vda2
mke2fs -q -t ext4 /dev/vda2
mount -t ext4 /dev/vda2 /mnt
for folder in a b c; do
    mkdir -p "/mnt/$folder/deep/down"
    i=0
    while [ $i -lt 20 ]; do
        dd if=/dev/urandom of="/mnt/$folder/deep/down/$i" bs=64k count=$((i % 5 + 1)) 2>/dev/null
        i=$((i + 1))
    done
done
dd if=/dev/zero of=/mnt/bulk bs=1M count=32 conv=fsync
(cd /mnt && find a b c -type f | sort | xargs sha256sum) >/tmp/sums
umount /mnt

e2fsck -f -n /dev/vda2
# Nothing of what is read now comes from a cache.
blockdev --flushbufs /dev/vda
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro /dev/vda2 /mnt
report files "$(wc -l </tmp/sums)"
(cd /mnt && sha256sum -c -s /tmp/sums)
umount /mnt
announce written

await discard
mount -t ext4 /dev/vda2 /mnt
rm -r /mnt/bulk /mnt/a
sync
fstrim /mnt
umount /mnt
e2fsck -f -n /dev/vda2
mount -t ext4 -o ro /dev/vda2 /mnt
grep -v '  a/' /tmp/sums >/tmp/kept
(cd /mnt && sha256sum -c -s /tmp/kept)
umount /mnt
announce discarded

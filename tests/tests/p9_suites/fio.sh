# Two jobs write blocks of all sizes at random places, with checksums in them, and read and verify them.
fio --name=verify --directory=/mnt --size=4M --rw=randwrite --bsrange=512-128k --verify=crc32c --verify_fatal=1 \
    --ioengine=psync --fallocate=none --end_fsync=1 --numjobs=2 --thread --randrepeat=1 --output=/tmp/log ||
    { cat /tmp/log; exit 1; }
fio --name=threads --filename=/mnt/one --size=8M --rw=randrw --bs=4k --verify=sha256 --verify_fatal=1 --runtime=30 \
    --ioengine=psync --fallocate=none --randrepeat=1 --output=/tmp/log || { cat /tmp/log; exit 1; }
fio --name=direct --filename=/mnt/direct --size=4M --rw=randwrite --bs=64k --verify=crc32c --verify_fatal=1 --direct=1 \
    --ioengine=psync --fallocate=none --randrepeat=1 --output=/tmp/log || { cat /tmp/log; exit 1; }
stat -c '%n %s' /mnt/one /mnt/direct

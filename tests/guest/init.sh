#!/bin/busybox sh
# The guest: mounts the disk, and writes files and syncs them until it is told to stop.
#
# "disk" and "port" come from the kernel's command line. What it says to the test begins
# with "guest: ".
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys

say() {
    echo "guest: $*"
}

fail() {
    dmesg | tail -n 20
    say "failed: $*"
    poweroff -f
}

content() { # NUMBER BYTES
    yes "round $1" | head -c "$2"
}

while read -r module; do
    insmod "/modules/$module" || fail "insmod $module"
done </modules/order

case $disk in
virtio)
    device=/dev/vda
    ;;
nbd)
    device=/dev/nbd0
    ip address add 10.0.2.15/24 dev eth0
    ip link set eth0 up
    nbd-client 10.0.2.2 "$port" $device -N vda || fail "nbd-client"
    ;;
esac
mount -t ext4 -o discard $device /mnt || fail "mount"
say "mounted $(md5sum </mnt/from-host)"

stty -echo </dev/console
(while read -r line; do
    [ "$line" != stop ] || touch /stop
    say "asked $line"
done) </dev/console &
round=0
while [ ! -e /stop ]; do
    round=$((round + 1))
    content $round 50000 >/mnt/kept-$round
    content $round 300000 >/mnt/dropped-$round
    rm -f /mnt/dropped-$((round - 3))
    content $round 4096 | dd of=/mnt/ring bs=4096 seek=$((round % 50)) conv=notrunc 2>/dev/null
    echo $round >/mnt/last.new
    mv /mnt/last.new /mnt/last
    sync || fail "sync"
    say "synced $round"
done

umount /mnt || fail "umount"
blockdev --flushbufs $device
say "ended $(md5sum <$device)"
[ $disk = virtio ] || nbd-client -d $device || fail "nbd-client -d"
poweroff -f

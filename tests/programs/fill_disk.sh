# Run a command twice on a small disk: DISK SIZE COMMAND...
# What is left when the disk is full and when there is room is copied out, before the disk goes with the script.
disk=$1 size=$2; shift 2
mount -t tmpfs -o size="$size" tmpfs "$disk" || exit 77
"$@"; echo $?
cp -a "$disk" "$disk.full"
mount -o remount,size=64m "$disk"
"$@"; echo $?
cp -a "$disk" "$disk.roomy"

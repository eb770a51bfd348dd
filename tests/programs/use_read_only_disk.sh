# Run a command with an archive on a read-only disk: DISK ARCHIVE COMMAND...
disk=$1 db=$2; shift 2
mount -t tmpfs tmpfs "$disk" || exit 77
cp "$db" "$disk/archive.db"
mount -o remount,ro "$disk"
"$@"; echo $?
ls -A "$disk"

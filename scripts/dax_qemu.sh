#!/usr/bin/env bash
# Checks tier dax and mtierd on a real devdax, of CXL memory that QEMU emulates: scripts/dax_qemu.sh KERNEL_DIRECTORY
# KERNEL_DIRECTORY has boot/vmlinuz-VERSION and lib/modules/VERSION, such as one that a Debian kernel was unpacked into:
#   apt-get install --no-install-recommends qemu-system-x86 ndctl daxctl busybox-static cpio kmod
#   apt-get download linux-image-6.1.0-56-amd64 && dpkg -x linux-image-*.deb KERNEL_DIRECTORY
# The guest has this machine's files, read-only, and runs scripts/dax_qemu_guest.py. Without KVM: two to five minutes.
# SGLANG_XMEM_PYTHON: an interpreter with everything in it; default: .venv-test's.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

LIMIT_S=900
MODULES=(virtio_pci 9pnet_virtio 9p cxl_acpi cxl_pci cxl_mem cxl_pmem nd_pmem dax_pmem device_dax kmem hwpoison_inject)

(($# == 1)) || { say "usage: scripts/dax_qemu.sh KERNEL_DIRECTORY"; exit 2; }
kernel="$(realpath "$1")"
for program in qemu-system-x86_64 cxl ndctl daxctl busybox cpio modprobe; do
    command -v "$program" >/dev/null || { say "error: there is no $program; install it"; exit 1; }
done
images=("$kernel"/boot/vmlinuz-*)
[[ -f "${images[0]}" ]] || { say "error: $kernel has no boot/vmlinuz-*"; exit 1; }
image="${images[0]}"
version="${image##*/vmlinuz-}"
python="${SGLANG_XMEM_PYTHON:-$REPOSITORY/.venv-test/bin/python}"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# ---- the guest's first files: modules, and an init that goes on in this machine's ----

root="$scratch/root"
mkdir -p "$root"/{bin,modules,proc,sys,dev,host}
cp "$(command -v busybox)" "$root/bin/busybox"
depmod -b "$kernel" "$version"
# Not as this machine is configured: its install commands would not be in the guest.
for module in "${MODULES[@]}"; do
    modprobe -C /dev/null -d "$kernel" -S "$version" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
done | awk '!seen[$0]++' | while read -r path; do
    cp "$path" "$root/modules/"
    basename "$path" >>"$root/modules/order"
done

cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /host
mount -t tmpfs none /host/run
for each in dev proc sys; do mount --bind "/$each" "/host/$each"; done
mkdir -p /host/dev/shm; mount -t tmpfs none /host/dev/shm
mount -t debugfs none /host/sys/kernel/debug
cp /guest /host/run/guest
chroot /host /bin/bash /run/guest
poweroff -f
INIT
cat >"$root/guest" <<GUEST
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=$(printf %q "$HOME") TMPDIR=/dev/shm PYTHONDONTWRITEBYTECODE=1
dmesg -n 1
cxl create-region -t pmem -m -d decoder0.0 mem0 >/dev/null 2>&1
ndctl create-namespace -m devdax -M mem >/dev/null
cd $(printf %q "$REPOSITORY")
PYTHONPATH=. $(printf %q "$python") scripts/dax_qemu_guest.py
echo "GUEST ENDED \$?"
GUEST
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$scratch/initrd"

# ---- the machine: one host bridge with a memory device ----

# mtierd is compiled here: the guest writes no files.
"$python" -c 'from sglang_xmem.mtier.build import built; built()'

machine=(
    -M "q35,cxl=on,cxl-fmw.0.targets.0=cxl.1,cxl-fmw.0.size=4G" -m 2G,maxmem=8G,slots=8 -smp 2
    -object "memory-backend-file,id=memory,share=on,mem-path=$scratch/memory,size=512M"
    -object "memory-backend-file,id=labels,share=on,mem-path=$scratch/labels,size=256M"
    -device pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.1
    -device cxl-rp,port=0,bus=cxl.1,id=port0,chassis=0,slot=2
    # A second port, or the bridge has no decoder that QEMU 7 knows: it would read zeros and lose what is written.
    -device cxl-rp,port=1,bus=cxl.1,id=port1,chassis=0,slot=3
    -device cxl-type3,bus=port0,memdev=memory,lsa=labels,id=cxl0
)
timeout "$LIMIT_S" qemu-system-x86_64 -nodefaults -nographic -no-reboot -serial stdio -accel tcg,thread=multi -cpu max \
    -kernel "$image" -initrd "$scratch/initrd" -append "console=ttyS0 quiet panic=-1" "${machine[@]}" \
    -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=host,mount_tag=host,bus=pcie.0 |
    tee "$scratch/log"
grep -q "GUEST ENDED 0" "$scratch/log"

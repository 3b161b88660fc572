#!/bin/bash
# First process of a lab host (see hosts.py), in network, mount, pid, uts and ipc namespaces of its own.
# arguments: name, address, folder of the lab, machine's site-packages, then paths that the host must see where they are
set -eu
name=$1 address=$2 lab=$3 packages=$4
shift 4

hostname "$name"
mount --make-rprivate /
# Everything is mounted below a tmpfs first: /root and /tmp, which may hold what the host must see, get disks of its own.
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/shared /mnt/disk /mnt/keep /mnt/etc
mount --bind "$lab/shared" /mnt/shared
mount --bind "$lab/disks/$name" /mnt/disk
cp "$lab/hosts" "$lab/key" "$lab/key.pub" "$lab/host_key" /mnt/etc/
number=0
for path in "$@"; do
  number=$((number + 1))
  mkdir "/mnt/keep/$number"
  mount --bind "$path" "/mnt/keep/$number"
done
mount -o remount,bind,ro /
mkdir -p /mnt/disk/root /mnt/disk/tmp
chmod 700 /mnt/disk/root
chmod 1777 /mnt/disk/tmp
mount --bind /mnt/disk/root /root
mount --bind /mnt/disk/tmp /tmp
mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount --bind /mnt/etc/hosts /etc/hosts
number=0
for path in "$@"; do
  number=$((number + 1))
  if [ ! -e "$path" ]; then
    mkdir -p "$path"
    mount --bind "/mnt/keep/$number" "$path"
  fi
done

cd /root
mkdir -p .ssh /run/sshd
chmod 700 .ssh
install -m 600 /mnt/etc/key.pub .ssh/authorized_keys
if [ "$name" = cli ]; then
  install -m 600 /mnt/etc/key .ssh/id_ed25519
fi
cp -n /etc/skel/.bashrc /etc/skel/.profile .
# What `make env` leaves, without a network: an environment of the host's own that finds the libraries of the machine's.
if [ ! -e medtune/.venv/.installed ]; then
  mkdir -p medtune
  "$PYTHON" -m venv --without-pip medtune/.venv
  site=$(echo medtune/.venv/lib/python3.*/site-packages)
  echo "$packages" > "$site/machine.pth"
  # The editable install, as pip makes it, of the host's own checkout.
  for file in "$packages"/__editable__*medtune*; do
    sed "s#'medtune': '[^']*'#'medtune': '/root/medtune/medtune'#" "$file" > "$site/${file##*/}"
  done
  printf '#!/root/medtune/.venv/bin/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n' > medtune/.venv/bin/ray
  printf '#!/root/medtune/.venv/bin/python\nimport sys\nfrom medtune.cli import main\nsys.exit(main())\n' > medtune/.venv/bin/medtune
  chmod +x medtune/.venv/bin/ray medtune/.venv/bin/medtune
  touch medtune/.venv/.installed
fi

install -m 600 /mnt/etc/host_key /run/host_key
/usr/sbin/sshd -D -e -f /dev/null -o ListenAddress="$address" -o HostKey=/run/host_key -o PidFile=none -o UsePAM=no \
  -o PasswordAuthentication=no -o MaxStartups=100 -o MaxSessions=100 -o Subsystem="sftp internal-sftp" &
# Not exec: as first process, bash reaps what others leave behind.
sleep infinity &
touch /run/booted
while true; do wait -n || true; done

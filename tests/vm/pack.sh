# Sourced by the scripts beside it: putting files and their libraries into the
# directory tree of an initramfs.

# pack ROOT PATH..: copies files and directories to the same (canonical) path
# under ROOT. Paths are canonical because a second cpio archive that names
# `lib` as a directory would replace the first one's link `lib -> usr/lib`.
pack() {
    local root=$1 path
    shift
    for path; do
        path=$(realpath -s "$path")
        path=$(realpath "$(dirname "$path")")/$(basename "$path")
        [ -e "$root$path" ] && continue
        mkdir -p "$root$(dirname "$path")"
        cp -aL "$path" "$root$path"
    done
}

# pack_program ROOT PATH..: the same with the shared libraries they are linked to.
pack_program() {
    local root=$1 path library
    shift
    for path; do
        pack "$root" "$path"
        for library in $(ldd "$path" 2>/dev/null | grep -o '/[^ ]*'); do
            pack "$root" "$library"
        done
    done
}

# pack_tool ROOT NAME..: programs found on PATH, those that are missing are left out.
pack_tool() {
    local root=$1 name path
    shift
    for name; do
        path=$(command -v "$name") || continue
        path=$(realpath -s "$path")
        pack_program "$root" "$path"
    done
}

# pack_modules ROOT TREE VERSION NAME..: kernel modules with what they depend on.
# A module the kernel does not have is left out: who needs it will say so.
pack_modules() {
    local root=$1 tree=$2 version=$3 name path inside
    shift 3
    for name; do
        modprobe -d "$tree" -S "$version" --show-depends "$name" 2>/dev/null
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u |
        while read -r path; do
            inside=$root/usr/lib/modules/$version/${path#*"/lib/modules/$version/"}
            install -D -m 644 "$path" "$inside"
            # Newer Debian releases compress modules, which busybox cannot read.
            case $inside in
                *.xz) xz -d "$inside" ;;
                *.zst) zstd -q -d --rm "$inside" ;;
            esac
        done
    cp "$tree/lib/modules/$version/"modules.{builtin,builtin.modinfo,order} "$root/usr/lib/modules/$version/"
    depmod -b "$root" "$version"
}

# skeleton ROOT: the directories and links of a Debian system, and busybox.
skeleton() {
    local root=$1
    mkdir -p "$root"/{dev,proc,sys,run,tmp,root,etc,usr/{bin,sbin,lib,lib64},var/lib}
    ln -s usr/bin "$root/bin"
    ln -s usr/sbin "$root/sbin"
    ln -s usr/lib "$root/lib"
    ln -s usr/lib64 "$root/lib64"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'nobody:x:65534:65534:nobody:/:/bin/sh' >>"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    echo '127.0.0.1 localhost' >"$root/etc/hosts"
}

# archive ROOT > CPIO: uncompressed, because unpacking is slow on an emulated CPU.
archive() {
    (cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z | cpio --quiet -0 -o -H newc -R 0:0)
}

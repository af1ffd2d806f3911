//! Which Debian packages the guests come from: the one place to change a suite, a version or to add a program.

/// The stable release. Everything is taken from here unless a row says why not.
const STABLE: &str = "trixie";
/// Newer versions built for the stable release, so their libraries are still those of [`STABLE`].
const BACKPORTS: &str = "trixie-backports";
/// What becomes the next stable release: for rows that neither of the others can serve. Its packages come with a C
/// library of their own.
pub(super) const TESTING: &str = "forky";

/// The release before: its kernel is the second one that the guests run.
const OLD_STABLE: &str = "bookworm";

/// All suites of the table; the private apt instance knows no others.
pub(super) const SUITES: [&str; 4] = [STABLE, BACKPORTS, OLD_STABLE, TESTING];

/// Something that is fetched, unpacked and cached as a whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Component {
    /// Its folder in the cache, and its name in messages.
    pub(super) name: &'static str,
    pub(super) suite: &'static str,
    /// Fetched with everything that they depend on.
    pub(super) packages: &'static [&'static str],
    /// Fetched alone: self-contained, or with dependencies that are known to be unneeded here.
    pub(super) bare: &'static [&'static str],
    /// A package that carries a version in its name, fetched alone: the one that the first package depends on and
    /// whose name begins with the second word.
    pub(super) current: Option<(&'static str, &'static str)>,
    /// The oldest version that will do: a package's name and a Debian version.
    pub(super) minimum: Option<(&'static str, &'static str)>,
    /// Programs to keep, with the shared libraries that they load.
    pub(super) programs: &'static [&'static str],
    /// Shared objects to keep that programs load by name, relative to the library folder.
    pub(super) plugins: &'static [&'static str],
    /// Other files to keep, relative to the root.
    pub(super) files: &'static [&'static str],
}

/// What most rows leave empty.
const PLAIN: Component = Component {
    name: "",
    suite: STABLE,
    packages: &[],
    bare: &[],
    current: None,
    minimum: None,
    programs: &[],
    plugins: &[],
    files: &[],
};

/// QEMU 11.1 is the first whose generic device (`vhost-user-test-device-pci`) can be created by a user, and stable
/// has 10.0. qemu-img and qemu-io come along as reference front ends (`driver=virtio-blk-vhost-user`); the other
/// block drivers of qemu-block-extra would pull in a whole Ceph. The accelerator "qtest" lets a program drive a device
/// without a guest.
pub(super) const QEMU: Component = Component {
    name: "qemu",
    suite: BACKPORTS,
    packages: &["qemu-system-x86"],
    bare: &["qemu-utils", "qemu-block-extra", "libblkio1"],
    current: None,
    minimum: Some(("qemu-system-x86", "1:11.1")),
    programs: &["qemu-system-x86_64", "qemu-img", "qemu-io"],
    plugins: &["qemu/block-blkio.so", "qemu/accel-qtest.so"],
    files: &[
        "usr/share/qemu/kvmvapic.bin",
        "usr/share/qemu/linuxboot_dma.bin",
        "usr/share/qemu/multiboot_dma.bin",
        "usr/share/qemu/pvh.bin",
        "usr/share/seabios/bios-256k.bin",
        "usr/share/seabios/bios.bin",
    ],
};

/// The generic kernel: Debian's cloud kernels have no 9p.
pub(super) const KERNEL: Component = Component {
    name: "kernel",
    bare: &["linux-image-amd64"],
    current: Some(("linux-image-amd64", "linux-image-")),
    minimum: Some(("linux-image-amd64", "6.12")),
    ..PLAIN
};

/// The generic kernel of the release before. Its file systems do their I/O in another way (without netfs), and nearly
/// all of virtio is modules.
pub(super) const OLD_KERNEL: Component = Component {
    name: "old-kernel",
    suite: OLD_STABLE,
    bare: &["linux-image-amd64"],
    current: Some(("linux-image-amd64", "linux-image-")),
    minimum: Some(("linux-image-amd64", "6.1")),
    ..PLAIN
};

/// The modules that the QEMU guest's kernel is kept with, besides those that they depend on.
pub(super) const KERNEL_MODULES: [&str; 12] = [
    "8021q",
    "9p",
    "9pnet_virtio",
    "crc32c_generic",
    "ext4",
    "nfsv4",
    "virtio_balloon",
    "virtio_blk",
    "virtio_mmio",
    "virtio_net",
    "virtio_pci",
    "virtiofs",
];

/// User Mode Linux of the stable release, the same kernel series as the QEMU guest's.
///
/// It needs a newer C library than older hosts have, and it starts `/proc/self/exe` again, so calling the unpacked
/// loader by hand does not work: patchelf writes the cached loader's path into the program.
///
/// The alternatives were measured: the one of bookworm (6.1) runs unpatched on that release, but takes twice as
/// long for a fork and exec and knows one queue per vhost-user device; the 7.2 of the testing suite is 2.5 times
/// faster at it (seccomp instead of ptrace), which a test of a few dozen commands does not notice, and its version
/// changes under the tests every few weeks.
pub(super) const UML: Component = Component {
    name: "uml",
    packages: &["user-mode-linux", "patchelf"],
    minimum: Some(("user-mode-linux", "6.12")),
    programs: &["linux.uml", "patchelf"],
    ..PLAIN
};

/// The modules that User Mode Linux is kept with. It has the virtio transport and ext4 built in, and no 9p over
/// virtio at all.
pub(super) const UML_MODULES: [&str; 6] =
    ["8021q", "9p", "ipv6", "virtio_balloon", "virtio_blk", "virtio_net"];

/// The guests' shell and tools.
pub(super) const BUSYBOX: Component =
    Component { name: "busybox", bare: &["busybox-static"], programs: &["busybox"], ..PLAIN };

/// Programs of guests and of the namespaces around them. A new row is all that a new program needs.
pub(super) const PROGRAMS: [Component; 8] = [
    Component {
        name: "e2fsprogs",
        packages: &["e2fsprogs"],
        programs: &["mke2fs", "e2fsck", "dumpe2fs", "debugfs"],
        ..PLAIN
    },
    Component { name: "fdisk", packages: &["fdisk"], programs: &["sfdisk"], ..PLAIN },
    Component { name: "util-linux", packages: &["util-linux"], programs: &["flock"], ..PLAIN },
    // One row, because each would bring the same C library along.
    Component {
        name: "network",
        packages: &["iproute2", "iperf3", "ethtool", "slirp4netns", "vde-switch"],
        programs: &["ip", "bridge", "tc", "iperf3", "ethtool", "slirp4netns", "vde_switch"],
        // The C library loads it when a thread of iperf3 is cancelled.
        plugins: &["libgcc_s.so.1"],
        ..PLAIN
    },
    // From the backports, because passt changes fast and the stable release has the one of May 2025.
    Component { name: "passt", suite: BACKPORTS, packages: &["passt"], programs: &["passt"], ..PLAIN },
    DPDK,
    NFS_SERVER,
    // Stable has 1.13, and the backports have none.
    Component {
        name: "virtiofsd",
        suite: TESTING,
        packages: &["virtiofsd"],
        minimum: Some(("virtiofsd", "1.14")),
        programs: &["virtiofsd"],
        ..PLAIN
    },
];

/// DPDK's test program with the drivers that the tests use. The program's own package depends on compilers' headers
/// by way of `libdpdk-dev`, so what it loads is listed instead; whatever is forgotten, the loader names.
pub(super) const DPDK: Component = Component {
    name: "dpdk",
    packages: &[
        "librte-bitratestats25",
        "librte-bpf25",
        "librte-cmdline25",
        "librte-crypto-scheduler25",
        "librte-gro25",
        "librte-gso25",
        "librte-latencystats25",
        "librte-mempool-ring25",
        "librte-net-bnxt25",
        "librte-net-bond25",
        "librte-net-dpaa25",
        "librte-net-i40e25",
        "librte-net-iavf25",
        "librte-net-ice25",
        "librte-net-ixgbe25",
        "librte-net-mlx5-25",
        "librte-net-pcap25",
        "librte-net-vhost25",
        "librte-net-virtio25",
        "librte-pdump25",
    ],
    bare: &["dpdk-dev"],
    programs: &["dpdk-testpmd"],
    plugins: &[
        "librte_mempool_ring.so.25",
        "librte_net_pcap.so.25",
        "librte_net_vhost.so.25",
        "librte_net_virtio.so.25",
    ],
    ..PLAIN
};

/// A server of NFS that is a program like any other. That of the stable release does not start without a configuration of
/// name services in `/etc`.
pub(super) const NFS_SERVER: Component = Component {
    name: "nfs-ganesha",
    suite: BACKPORTS,
    packages: &["nfs-ganesha", "nfs-ganesha-vfs"],
    minimum: Some(("nfs-ganesha", "9")),
    programs: &["ganesha.nfsd"],
    plugins: &["ganesha/libfsalvfs.so"],
    ..PLAIN
};

/// A program of crates.io.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crate {
    /// The crate's name, and the program's.
    pub(super) name: &'static str,
    pub(super) version: &'static str,
}

/// Exercisers of file systems that no Debian package has.
pub(super) const EXERCISERS: [Crate; 2] =
    [Crate { name: "pjdfstest", version: "0.2.2" }, Crate { name: "fsx", version: "0.3.2" }];

/// A whole Debian: guests boot from it, and the programs that need more than a library or two run in it.
///
/// All of it is listed, down to what every Debian has: apt counts nothing as installed.
pub(super) const DEBIAN: Component = Component {
    name: "debian",
    packages: &[
        // What boots and lets somebody log in and install packages.
        "base-files",
        "base-passwd",
        "bash",
        "coreutils",
        "dash",
        "debianutils",
        "diffutils",
        "dpkg",
        "findutils",
        "grep",
        "gzip",
        "hostname",
        "libc-bin",
        "libpam-modules",
        "libpam-runtime",
        "login",
        "mawk",
        "mount",
        "ncurses-base",
        "passwd",
        "perl-base",
        "sed",
        "systemd-sysv",
        "sysvinit-utils",
        "tar",
        "util-linux",
        // What the suites run.
        "acl",
        "attr",
        "dbench",
        "fio",
        "gcc",
        "git",
        "libc6-dev",
        "make",
        "python3",
    ],
    ..PLAIN
};

/// What a guest that runs [`DEBIAN`] installs: it depends on nothing but the C library, and has files of its own.
pub(super) const INSTALLED: Component = Component { name: "installed", bare: &["hello"], ..PLAIN };

/// A crate that brings a C library along: a source tree to unpack and build, in its folder `src/zlib`.
pub(super) const SOURCE: Crate = Crate { name: "libz-sys", version: "1.1.22" };

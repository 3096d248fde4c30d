#!/usr/bin/env python3
# SPDX-License-Identifier: MPL-2.0
"""Writes node.json, a realistic compute node; inventory.json, its inventory; and load.json, an hour
of load for the demo.

    python3 examples/make_node.py [FOLDER]      writes the three files to FOLDER (this one)

Everything is invented, from a fixed seed: each run writes the same files. The node has 8 CPUs, 64
GiB, one pool, and zones of three tenants and of the data center itself, of brands joyent (SmartOS),
lx and bhyve: one is stopped, one has no caps, some have two NICs, two are core zones.
The frames are 15 s apart, and their counters grow at the rates below. As on a real node, there are
hundreds of kstats that the agent must not read, with the kernel's names, classes and types and a
few of their members.
"""
from __future__ import annotations

import json
import random
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cmon_agent import spread       # noqa: E402  (it needs the path)

SEED = "container-monitor/1"
HERE = Path(__file__).resolve().parent
GIB = 1 << 30
MIB = 1 << 20
UNCAPPED = 2 ** 64 - 1
UNCAPPED_MEMORY = 4096 * (2 ** 32 - 1)      # physcap of a zone without cap: ptob(UINT32_MAX)
INT_MAX = 2 ** 31 - 1                       # nprocs of a zone: vmadm sets no cap on it
START = 1_767_225_600           # time of the first frame: 2026-01-01 00:00:00 UTC
FRAMES, STEP = 3, 15            # number of frames, and seconds between them
UPTIME = 3_456_000              # seconds since the node booted, at the first frame: forty days
CPUS = 8
PAGE = 4096
NODE_UUID = "4c4c4544-0042-3510-8051-c4c04f4b3533"
POOL = "zones"

ALICE = "2f6d1c1a-9d3c-4a55-8f0e-2b8f3f3b7a10"
BOB = "7a0d5f62-1e0b-4c7e-9f6a-5d2c4b1e8c21"
CAROL = "c4b9e7d3-6a2f-4e18-b0d5-9e3f1a7c6b32"
ADMIN = "930896af-bf8c-48d4-885c-6573a94b1853"
ACCOUNTS = {"alice": ALICE, "bob": BOB, "carol": CAROL, "admin": ADMIN}

IMAGES = {"joyent": "a5f1d6e2-0a3b-4f7c-8d21-6b9e4c0f7a55",
          "lx": "63d6e664-3f1f-11e8-aef6-a3120cf8dd9d",
          "bhyve": "9aa48095-da9d-41ca-a094-31d1fb476b98"}
NETWORKS = {"admin": "1b7d0c8a-52f5-4a0c-9a4e-0f7c2e61a001",
            "external": "5f1e6b2c-8d43-4d1e-8b3a-6c9d7e52a002",
            "sdc_overlay/5318008": "ae4c0b7d-3e9f-4b62-a6d1-7f0c8d93a003"}


@dataclass
class Zone:
    """One zone: its owner, its size, and how busy it is (0 to 1)."""
    alias: str
    owner: str
    brand: str
    memory: int                     # MiB; 0: no cap
    cpu_cap: int                    # percent of a CPU; 0: no cap
    quota: int                      # GiB
    busy: float
    nics: tuple[str, ...] = ("external",)
    tags: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    running: bool = True
    processes: int = INT_MAX        # cap, set by an operator with prctl
    uuid: str = ""
    id: int = 0
    debug_id: int = 0
    boot: int = 0                   # seconds after the node's


GROUPS = "triton.cmon.groups"
ZONES = [
    Zone("manta-nat", ADMIN, "joyent", 128, 100, 10, 0.02, ("external", "sdc_overlay/5318008"),
         {"smartdc_role": "nat"}),
    Zone("cmon0", ADMIN, "joyent", 1024, 200, 25, 0.10, ("admin", "external"),
         {"smartdc_role": "cmon"}, {"metricPorts": "8881"}),
    Zone("web01", ALICE, "joyent", 2048, 400, 25, 0.55, tags={GROUPS: "web,production"}),
    Zone("web02", ALICE, "joyent", 2048, 400, 25, 0.50, tags={GROUPS: "web,production"}),
    Zone("lb01", ALICE, "joyent", 1024, 200, 10, 0.35, ("external", "sdc_overlay/5318008"),
         {GROUPS: "web"}),
    Zone("db01", ALICE, "joyent", 8192, 800, 200, 0.70, ("sdc_overlay/5318008",),
         {GROUPS: "database,production"}),
    Zone("batch", ALICE, "lx", 0, 0, 100, 0.80, ("sdc_overlay/5318008",)),
    Zone("old-web", ALICE, "joyent", 1024, 200, 25, 0.0, running=False),
    Zone("spark01", BOB, "bhyve", 8192, 400, 300, 0.65, tags={GROUPS: "spark"}),
    Zone("spark02", BOB, "bhyve", 8192, 400, 300, 0.60, tags={GROUPS: "spark"}),
    Zone("jump", BOB, "lx", 512, 100, 10, 0.01),
    Zone("registry", BOB, "lx", 2048, 200, 150, 0.20),
    Zone("ci01", CAROL, "lx", 4096, 400, 80, 0.90, tags={GROUPS: "ci"}, processes=2000),
    Zone("ci02", CAROL, "lx", 4096, 400, 80, 0.15, tags={GROUPS: "ci"}),
    Zone("mail01", CAROL, "joyent", 1024, 100, 50, 0.10),
    Zone("win-build", CAROL, "bhyve", 4096, 200, 120, 0.30),
]

# The commands as the agent runs them (argv joined by spaces), without the program's folder.
ZFS_COLUMNS = ("name", "available", "used", "logicalused", "recordsize", "quota", "compressratio",
               "refcompressratio", "referenced", "logicalreferenced", "usedbydataset",
               "usedbysnapshots")
ZFS = f"zfs list -Hp -t filesystem,volume -o {','.join(ZFS_COLUMNS)} -d 1 {POOL}"
ZPOOL = "zpool list -Hp -o name,allocated,fragmentation,health,size"
NTP_PEERS = "ntpq -n -c apeers"
NTP_SYSTEM = "ntpq -n -c iostats -c kerninfo -c monstats -c sysinfo -c sysstats -c readvar {}"
ZONEADM = "zoneadm list -p -c"

# Kernel memory, as `kstat -c kmem_cache` and `kstat -c vmem` list it.
KMEM_CACHES = tuple(
    [f"kmem_magazine_{size}" for size in (1, 3, 7, 15, 31, 47, 63, 95, 143)]
    + [f"kmem_alloc_{size}" for size in (
        8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512,
        640, 768, 896, 1152, 1344, 1600, 2048, 2688, 4096, 8192, 12288, 16384, 24576, 32768)]
    + [f"{kind}_{size}" for kind in ("zio_buf", "zio_data_buf") for size in (
        512, *range(1024, 4096, 512), *range(4096, 65536, 4096), 131072, 1048576)]
    + [f"streams_dblk_{size}" for size in (
        16, 80, 144, 208, 272, 336, 528, 1040, 1488, 1936, 2576, 3856, 8192, 12048, 16384)]
    + ("kmem_slab_cache kmem_bufctl_cache kmem_va_4096 kmem_va_8192 kmem_va_16384 kmem_io_4G_4096 "
       "segvn_cache anon_cache anonmap_cache seg_cache vn_cache file_cache process_cache "
       "thread_cache lwp_cache cred_cache dnlc_space_cache fnode_cache pipe_cache task_cache "
       "project_cache zone_cache callout_cache turnstile_cache sleepq_cache ipp_mod mac_impl_cache "
       "mac_client_impl_cache dls_link_cache dls_devnet_cache ip_minor_arena_sa_1 conn_cache "
       "tcp_conn_cache udp_conn_cache rawip_conn_cache ire_cache ncec_cache nce_cache "
       "socket_cache socktpi_cache dtrace_state_cache zfs_znode_cache zio_cache zio_link_cache "
       "zil_lwb_cache dmu_buf_impl_t dnode_t arc_buf_hdr_t_full arc_buf_t abd_chunk ksiginfo_cache "
       "sata_pkt_cache mptsas0_cache bp_map_16384 space_seg_cache fctl_cache lxproc_lxpnode_cache "
       "lofs_minfo viona_nebbuf_cache").split())
TASKQS = tuple([f"zio_{step}_{kind}" for step in ("null", "read", "write", "free", "claim", "ioctl")
                for kind in ("issue", "intr")]
               + ("kmem_taskq callout_taskq ip_taskq rnode4_taskq vn_rele_taskq ndis_taskq "
                  "system_taskq dls_devnet_taskq zil_clean metaslab_group_taskq spa_zones "
                  "ACPI_dispatch console_taskq ixgbe_taskq_0 ixgbe_taskq_1 sd_drv_taskq "
                  "sd_rmw_msg_taskq mac_notify lx_taskq netstack_taskq").split())
VMEM_ARENAS = tuple("heap kmem_metadata kmem_default kmem_va kmem_oversize kmem_firewall "
                    "module_text module_data segkp umem_np zio zio_alloc_arena contig device "
                    "ip_minor_arena_la ip_minor_arena_sa bp_map id32 taskq_id_arena "
                    "ptms_minor".split())

Kstat = dict[str, Any]


class Node:
    """The node; methods return its state at a frame."""

    def __init__(self) -> None:
        dice = random.Random(SEED)
        self.dice = dice
        zone_id = 0
        for index, zone in enumerate(ZONES):
            zone.uuid = str(uuid.UUID(int=dice.getrandbits(128), version=4))
            zone.debug_id = index + 1
            zone.boot = 60 + index * 7 if index < 8 else dice.randrange(10_000, UPTIME - 90_000)
            if zone.running:
                zone_id += 1 + (dice.random() < 0.3)
                zone.id = zone_id
        self.fixed: dict[str, float] = {}

    def rate(self, key: str, low: float, high: float) -> float:
        """A rate or level, the same for each call with this key."""
        if key not in self.fixed:
            self.fixed[key] = random.Random(f"{SEED}/{key}").uniform(low, high)
        return self.fixed[key]

    def grown(self, key: str, per_second: float, seconds: float) -> int:
        """The value of a counter that grows at about this rate."""
        steady = self.rate(key, 0.8, 1.2) * per_second
        return int(seconds * steady)

    def level(self, key: str, middle: float, frame: int, swing: float = 0.05) -> int:
        """The value of a gauge that varies around a mean."""
        return int(middle * (1 + random.Random(f"{SEED}/{key}/{frame}").uniform(-swing, swing)))

    # --- kstats -----------------------------------------------------------------------------------

    def kstats(self, frame: int) -> list[Kstat]:
        """All kstats in the order of their creation."""
        up = UPTIME + frame * STEP
        made: list[Kstat] = []

        def add(module: str, instance: int, name: str, kind: str, data: dict[str, Any],
                created: float = 0.0, form: int = 1) -> None:
            made.append({"module": module, "instance": instance, "name": name[:30], "class": kind,
                         "type": form, "crtime": int((38 + created) * 1e9) + len(made) * 1017,
                         "snaptime": up * 10 ** 9 + 4_518_220 + len(made) * 2311, "data": data})

        self.system(add, frame, up)
        self.neighbours(add, up)
        self.cpus(add, up)
        self.storage(add, frame, up)
        for name in ("ixgbe0", "ixgbe1", "external0", "sdc_underlay0"):
            add("link", 0, name, "net", self.link(name, 0.6, up, "global", 10 ** 10))
        self.stack(add, 0, frame, up, "gz", 0.3)
        self.zone(add, Zone("global", ADMIN, "liveimg", 0, 0, 0, 0.2, (), uuid="global"), frame,
                  up)
        for zone in sorted((zone for zone in ZONES if zone.running), key=lambda zone: zone.boot):
            self.zone(add, zone, frame, up - zone.boot)
        return made

    def system(self, add: Any, frame: int, up: int) -> None:
        """Module unix, and the hypervisor's memory reservoir."""
        load = self.level("load", 5.2 * 256, frame)
        add("unix", 0, "system_misc", "misc", {
            "ncpus": CPUS, "lbolt": up * 100 % 2 ** 32, "deficit": 0,
            "clk_intr": up * 100 % 2 ** 32, "vac": 0,
            "nproc": self.level("nproc", 612, frame, 0.02), "avenrun_1min": load,
            "avenrun_5min": int(load * 0.9), "avenrun_15min": int(load * 0.8),
            "boot_time": START - UPTIME, "nsec_per_tick": 10_000_000})
        total = 64 * GIB // PAGE
        free = self.level("freemem", total * 0.11, frame)
        add("unix", 0, "system_pages", "pages", {
            "physmem": total, "nalloc": 95_201_333, "nfree": 81_200_112, "nalloc_calls": 211_002,
            "nfree_calls": 120_451, "kernelbase": 0, "econtig": 18_446_743_524_011_180_032,
            "freemem": free, "availrmem": int(total * 0.35), "lotsfree": total // 64,
            "desfree": total // 128, "minfree": total // 256, "fastscan": 3_972_096,
            "slowscan": 100, "nscan": 0, "desscan": 25, "pp_kernel": int(total * 0.28),
            "pagesfree": free, "pageslocked": int(total * 0.65), "pagestotal": total,
            "low_mem_scan": 0, "zone_cap_scan": 3, "n_throttle": 0})
        # Page counts that the kernel adds up once a second: use differences.
        add("unix", 0, "vminfo", "vm", {
            "freemem": up * int(total * 0.11), "swap_resv": up * int(total * 0.30),
            "swap_alloc": up * int(total * 0.27), "swap_avail": up * int(total * 0.95),
            "swap_free": up * int(total * 0.98), "updates": up}, form=0)
        add("vmm", 0, "vmm_reservoir", "misc", {
            "bytes_free": 2 * GIB, "bytes_alloc": 20 * GIB, "bytes_transient_alloc": 0,
            "bytes_limit": 40 * GIB})

    def neighbours(self, add: Any, up: int) -> None:
        """Other kstats of module unix, which the agent must not read: reading a cache takes each
        CPU's lock, and any of them can block."""
        for name in KMEM_CACHES:
            used = int(self.rate(name, 10, 90_000))
            add("unix", 0, name, "kmem_cache", {
                "buf_size": 64, "buf_inuse": used, "alloc": used * up // 90, "alloc_fail": 0})
        for number, name in enumerate(TASKQS):
            add("unix", number, name, "taskq", {
                "pid": 0, "tasks": self.grown(name, 9, up), "nactive": 1, "threads": 4})
        for table in range(2 * CPUS):       # for each CPU, one for ticks and one for real time
            add("unix", table, "callout", "misc", {
                "callout_timeouts": self.grown(f"callout{table}", 90, up),
                "callout_timeouts_pending": 12})
        for link in ("ixgbe0", "ixgbe1", "external0", "sdc_underlay0"):
            for flow in (f"{link}_ucast", f"{link}_bcast", f"{link}_mcast"):
                self.flow(add, flow, up, 0.0)
        for place in range(24):             # first by file system type, then by mount
            add("unix", 0, "vopstats_zfs" if not place else f"vopstats_4010{place:03x}", "misc",
                {"nopen": self.grown(f"vop{place}", 40, up), "nread": up, "read_bytes": up * 512})
        for name in ("rpc_clts_client", "rpc_cots_client", "rpc_cots_connections",
                     "rpc_clts_server", "rpc_cots_server"):
            add("unix", 0, name, "rpc", {"calls": 0, "badcalls": 0, "timeouts": 0})
        for name, kind in (("dnlcstats", "misc"), ("page_retire", "misc"), ("biostats", "misc"),
                           ("pset", "misc"), ("kstat_types", "kstat")):
            add("unix", 0, name, kind, {"hits": up * 31, "misses": up})
        for number, name in enumerate(VMEM_ARENAS, 1):
            add("vmem", number, name, "vmem", {"mem_inuse": 4096 * number, "vmem_fail": 0})

    def flow(self, add: Any, name: str, up: int, created: float) -> None:
        """MAC's counters of a flow; each NIC has at least one flow."""
        packets = self.grown(name + "/flow", 30, up)
        add("unix", 0, name, "flow", {"rbytes": packets * 700, "ipackets": packets,
                                      "obytes": packets * 400, "opackets": packets}, created)

    def cpus(self, add: Any, up: int) -> None:
        """cpu:N:sys, cpu:N:vm, cpu_info, and other kstats of these modules."""
        counters = ("bread bwrite lread lwrite phread phwrite pswitch trap intr syscall sysread "
                    "syswrite sysfork sysvfork sysexec readch writech rawch outch msg sema namei "
                    "procovf intrthread intrblk intrunpin idlethread inv_swtch nthreads cpumigrate "
                    "xcalls mutex_adenters rw_rdfails rw_wrfails modload modunload iowait").split()
        for cpu in range(CPUS):
            busy = self.rate(f"cpu{cpu}", 0.25, 0.7)
            nanoseconds = up * 10 ** 9
            kernel = int(nanoseconds * busy * 0.35)
            user = int(nanoseconds * busy * 0.65)
            add("cpu", cpu, "sys", "misc", {
                "cpu_nsec_idle": nanoseconds - kernel - user, "cpu_nsec_user": user,
                "cpu_nsec_kernel": kernel, "cpu_nsec_dtrace": up * 1213,
                "cpu_nsec_intr": kernel // 9,
                "cpu_ticks_idle": int(up * 100 * (1 - busy)), "cpu_ticks_user": user // 10 ** 7,
                "cpu_ticks_kernel": kernel // 10 ** 7, "cpu_ticks_wait": 0, "cpu_load_intr": 2,
                "wait_ticks_io": 0, "dtrace_probes": up // 40,
                **{name: self.grown(f"cpu{cpu}/{name}", 900 * busy, up) for name in counters}})
            add("cpu", cpu, "vm", "misc", {
                name: self.grown(f"cpu{cpu}/vm/{name}", 40 * busy, up)
                for name in ("pgrec pgfrec pgin pgpgin pgout pgpgout zfod scan hat_fault as_fault "
                             "maj_fault cow_fault prot_fault anonpgin anonpgout fspgin").split()})
            add("cpu", cpu, "intrstat", "misc", {
                f"level-{level}-{what}": up * level for level in (1, 6, 14)
                for what in ("count", "time")})
            add("cpu_stat", cpu, f"cpu_stat{cpu}", "misc", {}, form=0)
            add("cpu_info", cpu, f"cpu_info{cpu}", "misc", {
                "state": "on-line", "state_begin": START - UPTIME + 2, "cpu_type": "i386",
                "fpu_type": "i387 compatible", "clock_MHz": 2600,
                "current_clock_Hz": 2_600_000_000, "supported_frequencies_Hz":
                "1200000000:1800000000:2600000000", "implementation":
                f"x86 (chipid 0x{cpu // 4:x} GenuineIntel 406F1 family 6 model 79 step 1 "
                "clock 2600 MHz)",
                "brand": "Intel(r) Xeon(r) CPU E5-2690 v4 @ 2.60GHz", "vendor_id": "GenuineIntel",
                "socket_type": "Socket R3", "chip_id": cpu // 4, "core_id": cpu % 4,
                "pkg_core_id": cpu % 4, "clog_id": 0, "pg_id": 3 + cpu, "cache_id": cpu // 4,
                "family": 6, "model": 79, "stepping": 1, "ncpu_per_chip": 4, "ncore_per_chip": 4,
                "supported_max_cstates": 2, "current_cstate": 1})

    def io(self, key: str, busy: float, up: int) -> dict[str, int]:
        """The members of a kstat_io_t."""
        reads = self.grown(key + "/r", 400 * busy, up)
        writes = self.grown(key + "/w", 600 * busy, up)
        run = int(up * 1e9 * busy * 0.4)
        return {"nread": reads * 16384, "nwritten": writes * 24576, "reads": reads % 2 ** 32,
                "writes": writes % 2 ** 32, "wtime": run // 50, "wlentime": run // 20,
                "wlastupdate": up * 10 ** 9 - 30_000_000, "rtime": run, "rlentime": run * 2,
                "rlastupdate": up * 10 ** 9 - 20_000_000, "wcnt": 0, "rcnt": int(busy * 3)}

    def storage(self, add: Any, frame: int, up: int) -> None:
        """Disks, the pool, the ARC, metaslab groups."""
        for number in range(2):
            add("blkdev", number, f"blkdev{number}", "disk", self.io(f"nvme{number}", 0.3, up),
                form=3)
        for number in range(4):
            add("sd", number, f"sd{number}", "disk", self.io(f"sd{number}", 0.5, up), form=3)
            for part in "abq":
                add("sd", number, f"sd{number},{part}", "partition",
                    self.io(f"sd{number}{part}", 0.1, up), form=3)
            add("sderr", number, f"sd{number},err", "device_error", {
                "Soft Errors": 0, "Hard Errors": 1 if number == 2 else 0, "Transport Errors": 0,
                "Vendor": "SEAGATE", "Product": "ST4000NM0043", "Revision": "0003",
                "Size": 4_000_787_030_016, "Media Error": 0})
        add("zfs", 0, POOL, "disk", self.io("pool", 0.8, up), form=3)
        size = self.level("arc", 14 * GIB, frame, 0.01)
        hits, misses = self.grown("hits", 21_000, up), self.grown("misses", 700, up)
        arc = {name: size * share // 100 for name, share in (
            ("anon_evictable_data", 0), ("anon_evictable_metadata", 0), ("anon_size", 1),
            ("arc_meta_limit", 150), ("arc_meta_max", 40), ("arc_meta_min", 5),
            ("arc_meta_used", 31), ("c", 100), ("c_max", 400), ("c_min", 12),
            ("compressed_size", 62), ("data_size", 69), ("hdr_size", 2), ("l2_asize", 0),
            ("l2_hdr_size", 0), ("l2_size", 0), ("metadata_size", 20), ("mfu_evictable_data", 30),
            ("mfu_evictable_metadata", 4), ("mfu_ghost_evictable_data", 21),
            ("mfu_ghost_evictable_metadata", 9), ("mfu_ghost_size", 30), ("mfu_size", 45),
            ("mru_evictable_data", 28), ("mru_evictable_metadata", 3),
            ("mru_ghost_evictable_data", 33), ("mru_ghost_evictable_metadata", 11),
            ("mru_ghost_size", 44), ("mru_size", 42), ("other_size", 8), ("overhead_size", 27),
            ("p", 55), ("size", 100), ("uncompressed_size", 131))}
        arc.update({"hits": hits, "misses": misses, "demand_data_hits": hits * 6 // 10,
                    "demand_data_misses": misses * 3 // 10, "demand_metadata_hits": hits * 3 // 10,
                    "demand_metadata_misses": misses * 2 // 10, "prefetch_data_hits": hits // 20,
                    "prefetch_data_misses": misses * 4 // 10, "prefetch_metadata_hits": hits // 20,
                    "prefetch_metadata_misses": misses // 10, "mru_hits": hits * 3 // 10,
                    "mfu_hits": hits * 6 // 10, "mru_ghost_hits": misses // 50,
                    "mfu_ghost_hits": misses // 70, "hash_elements": 1_301_220 + frame * 31,
                    "hash_elements_max": 1_420_551, "hash_chains": 210_337, "hash_chain_max": 7})
        for name, rate in (("demand_hit_predictive_prefetch", 41), ("evict_l2_cached", 0),
                           ("evict_l2_eligible", 9_000_000), ("evict_l2_ineligible", 2_100_000),
                           ("evict_l2_skip", 0), ("evict_not_enough", 0.2), ("evict_skip", 12),
                           ("hash_collisions", 310), ("memory_throttle_count", 0),
                           ("mutex_miss", 0.4), ("async_upgrade_sync", 3)):
            arc[name] = self.grown(f"arc/{name}", rate, up)
        for name in ("l2_abort_lowmem l2_cksum_bad l2_evict_l1cached l2_evict_lock_retry "
                     "l2_evict_reading l2_feeds l2_free_on_write l2_hits l2_io_error l2_misses "
                     "l2_read_bytes l2_rw_clash l2_write_bytes l2_writes_done l2_writes_error "
                     "l2_writes_lock_retry l2_writes_sent").split():
            arc[name] = 0
        add("zfs", 0, "arcstats", "misc", dict(sorted(arc.items())))
        for guid in ("5313098453092431907", "14980021776183211045"):
            add("zfs_metaslab_group", 0, guid, "misc", {
                "loads": self.grown(f"loads{guid}", 0.02, up),
                "unloads": self.grown(f"unloads{guid}", 0.015, up), "spa_name": POOL})

    def link(self, key: str, busy: float, up: int, zone: str, speed: int) -> dict[str, Any]:
        """The members of a link; the 32-bit ones wrap."""
        packets_in = self.grown(key + "/in", 900 * busy + 1, up)
        packets_out = self.grown(key + "/out", 1100 * busy + 1, up)
        bytes_in, bytes_out = packets_in * 611, packets_out * 905
        return {"ifspeed": speed, "rbytes64": bytes_in, "obytes64": bytes_out,
                "ipackets64": packets_in, "opackets64": packets_out, "rbytes": bytes_in % 2 ** 32,
                "obytes": bytes_out % 2 ** 32, "ipackets": packets_in % 2 ** 32,
                "opackets": packets_out % 2 ** 32, "ierrors": int(self.rate(key + "/ie", 0, 3)),
                "oerrors": 0, "norcvbuf": self.grown(key + "/nr", 0.001 * busy, up), "noxmtbuf": 0,
                "collisions": 0, "multircv": up // 9, "multixmt": up // 31, "brdcstrcv": up // 4,
                "brdcstxmt": up // 120, "unknowns": 0, "link_state": 1, "link_duplex": 2,
                "zonename": zone}

    def stack(self, add: Any, stack: int, frame: int, up: int, key: str, busy: float,
              created: float = 0.0) -> None:
        """The mib2 kstats of one IP stack."""
        segments = self.grown(key + "/seg", 1500 * busy + 2, up)
        opened = self.grown(key + "/active", 3 * busy, up)
        accepted = self.grown(key + "/passive", 25 * busy, up)
        data: dict[str, int] = {
            "rtoAlgorithm": 4, "rtoMin": 400, "rtoMax": 60000, "maxConn": -1,
            "activeOpens": opened % 2 ** 32, "passiveOpens": accepted % 2 ** 32,
            "attemptFails": opened // 40, "estabResets": accepted // 90,
            "currEstab": self.level(key + "/estab", 160 * busy + 2, frame),
            "inSegs": segments, "outSegs": segments * 9 // 8, "connTableSize": 56,
            "connTableSize6": 84}
        for name, share in (("retransSegs", 900), ("inDupAck", 700), ("listenDrop", 500_000),
                            ("listenDropQ0", 900_000), ("halfOpenDrop", 2_000_000),
                            ("timRetransDrop", 60_000), ("outSackRetransSegs", 2_000),
                            ("outRsts", 3_000), ("inErrs", 8_000_000)):
            data[name] = segments // share % 2 ** 32
        add("tcp", stack, "tcp", "mib2", data, created)
        add("udp", stack, "udp", "mib2", {
            "inDatagrams": segments // 20, "inErrors": 0, "outDatagrams": segments // 21}, created)
        for module, name, kind in (("ip", "ip", "mib2"), ("ip", "icmp", "mib2"),
                                   ("sctp", "sctp", "mib2"), ("ip", "ipstat", "net"),
                                   ("tcp", "tcpstat", "net"), ("udp", "udpstat", "net")):
            add(module, stack, name, kind, {"inErrors": 0, "inReceives": segments % 2 ** 32},
                created)
        if stack == 0:
            add("tcp", 0, "tcpstat_g", "net", {"tcp_timermp_alloced": up})

    def zone(self, add: Any, zone: Zone, frame: int, up: int) -> None:
        """All kstats of one zone."""
        key, name, busy = zone.uuid, zone.uuid, zone.busy
        created = UPTIME + frame * STEP - up
        user = int(up * 1e9 * busy * max(zone.cpu_cap, 100) / 100 * 0.6)
        load = self.level(key + "/load", busy * 400 + 3, frame, 0.2)
        memory = zone.memory * MIB
        add("zones", zone.id, name, "zone_misc", {
            "zonename": name, "nsec_user": user, "nsec_sys": user // 3,
            "nsec_waitrq": user // (10 if busy > 0.6 else 300), "avenrun_1min": load,
            "avenrun_5min": int(load * 0.93), "avenrun_15min": int(load * 0.85),
            "forkfail_cap": 3 if busy > 0.85 else 0, "forkfail_noproc": 0, "forkfail_nomem": 0,
            "forkfail_misc": 0, "mapfail_seglim": 0, "nested_interp": 0,
            "init_pid": 4000 + zone.id * 211 if zone.id else 1,
            "boot_time": START - UPTIME + zone.boot}, created)
        rss = self.level(key + "/rss", (memory or 6 * GIB) * (0.35 + busy * 0.6), frame, 0.02)
        add("memory_cap", zone.id, name, "zone_memory_cap", {
            "zonename": name, "rss": rss // PAGE * PAGE, "physcap": memory or UNCAPPED_MEMORY,
            "swap": rss * 5 // 4 // PAGE * PAGE, "swapcap": memory * 2 or UNCAPPED,
            "nover": self.grown(key + "/nover", 0.001 * busy, up),
            "pagedout": self.grown(key + "/pagedout", 40 * busy, up) // PAGE * PAGE,
            "pgpgin": self.grown(key + "/pgpgin", 0.5 * busy, up),
            "anonpgin": self.grown(key + "/anonpgin", 0.1 * busy, up), "execpgin": 51,
            "fspgin": self.grown(key + "/fspgin", 0.3 * busy, up),
            "anon_alloc_fail": 7 if busy > 0.85 else 0,
            "n_pf_throttle": self.grown(key + "/pf", 0.001 * busy, up),
            "n_pf_throttle_usec": self.grown(key + "/pfu", 2 * busy, up)}, created)
        vfs = up * 1e9 * busy
        reads = self.grown(key + "/r", 900 * busy, up)
        writes = self.grown(key + "/w", 300 * busy, up)
        if zone.brand == "bhyve":       # a guest's I/O goes to its volume, past the vfs
            vfs, reads, writes = vfs / 1000, reads // 1000, writes // 1000
        add("zone_vfs", zone.id, name, "zone_vfs", {
            "zonename": name, "nread": reads * 8192, "reads": reads, "rtime": int(vfs * 0.04),
            "rlentime": int(vfs * 0.05), "rcnt": 0, "nwritten": writes * 12288, "writes": writes,
            "wtime": int(vfs * 0.03), "wlentime": int(vfs * 0.06), "wcnt": 0,
            "10ms_ops": reads // 900, "100ms_ops": reads // 30_000, "1s_ops": reads // 4_000_000,
            "10s_ops": 0, "delay_cnt": writes // 9000, "delay_time": writes // 40}, created)
        add("zone_zfs", zone.id, name, "zone_zfs", {
            "zonename": name, "nread": reads * 900, "nwritten": writes * 12900, "reads": reads // 9,
            "writes": writes // 2, "rtime": int(vfs * 0.01), "rlentime": int(vfs * 0.013),
            "waittime": int(vfs * 0.004)}, created)
        caps: list[tuple[str, int, int]] = [
            ("lockedmem", rss // 40, memory or UNCAPPED), ("physicalmem", rss, memory or UNCAPPED),
            ("swapresv", rss * 5 // 4, memory * 2 or UNCAPPED),
            ("nprocs", self.level(key + "/nprocs", 20 + busy * 60, frame), zone.processes)]
        for cap, usage, value in caps:
            add("caps", zone.id, f"{cap}_zone_{zone.id}", "zone_caps",
                {"zonename": name, "usage": usage, "value": value}, created)
        if zone.cpu_cap:
            add("caps", zone.id, f"cpucaps_zone_{zone.id}", "zone_caps", {
                "above_base_sec": int(up * busy * 0.4), "above_sec": int(up * busy * 0.01),
                "baseline": zone.cpu_cap // 2, "below_sec": int(up * (1 - busy * 0.01)),
                "burst_limit_sec": 0, "bursting_sec": int(up * busy * 0.2),
                "effective": zone.cpu_cap, "maxusage": int(zone.cpu_cap * 1.02),
                "nwait": 2 if busy > 0.85 else 0,
                "usage": self.level(key + "/cpu", zone.cpu_cap * busy, frame, 0.2),
                "value": zone.cpu_cap, "zonename": name}, created)
        for index in range(len(zone.nics)):
            nic = "eth" if zone.brand == "lx" else "net"
            add("link", 0, f"z{zone.id}_{nic}{index}", "net",
                self.link(f"{key}/{index}", busy, up, name, 10 ** 10), created)
            self.flow(add, f"z{zone.id}_{nic}{index}", up, created)
        if zone.id:
            self.stack(add, zone.id, frame, up, key, busy if zone.brand != "bhyve" else 0,
                       created)
        if zone.brand == "bhyve":
            self.guest(add, zone, up, created)

    def guest(self, add: Any, zone: Zone, up: int, created: float) -> None:
        """A bhyve guest; the kernel makes 32 vcpu kstats, whatever the guest has."""
        minor = [other for other in ZONES if other.brand == "bhyve"].index(zone) + 1
        add("vmm", minor, "vm", "misc", {"vm_name": f"SYSbhyve-{zone.debug_id}"}, created)
        for vcpu in range(32):
            on = vcpu < zone.cpu_cap // 100
            run = int(up * 1e9 * zone.busy) if on else 0
            add("vmm", minor, f"vcpu{vcpu}", "misc", {
                "vcpu": vcpu, "time_init": 912_000 if on else 0, "time_run": run,
                "time_idle": int(up * 1e9) - run if on else 0, "time_emu_kern": run // 200,
                "time_emu_user": run // 90, "time_sched": run // 400}, created)
        packets = self.grown(zone.uuid + "/viona", 700 * zone.busy, up)
        card = 4 + 2 * minor            # viona numbers open NICs, not guests
        add("viona", card, "viona_stat", "misc", {
            "rx_packets": packets, "rx_bytes": packets * 733, "rx_errors": 0,
            "rx_drops": packets // 90_000, "tx_packets": packets * 6 // 5,
            "tx_bytes": packets * 1021, "tx_errors": 0, "tx_drops": 0}, created)

    # --- commands and VM objects ------------------------------------------------------------------

    def commands(self, frame: int) -> dict[str, Any]:
        """The output of each command, by its argv."""
        def good(stdout: str) -> dict[str, Any]:
            return {"status": 0, "stdout": stdout, "stderr": ""}
        allocated = 1_890_424_586_240 + frame * 6_291_456
        zpool = f"{POOL}\t{allocated}\t31%\tONLINE\t3985729650688\n"
        return {f"/usr/sbin/{ZFS}": good(self.zfs(frame)), f"/usr/sbin/{ZPOOL}": good(zpool),
                f"/usr/sbin/{NTP_PEERS}": good(self.ntp_peers(frame)),
                f"/usr/sbin/{NTP_SYSTEM.format(41210)}": good(self.ntp_system(frame)),
                f"/usr/sbin/{ZONEADM}": good(self.zoneadm()),
                "/usr/bin/sysinfo -f": good(json.dumps(SYSINFO, indent=2) + "\n")}

    def zfs(self, frame: int) -> str:
        """zfs list -Hp -d 1: ratios keep their x."""
        rows = [[POOL, 1_976_000_000_000, 1_990_424_586_240, 3_100_000_000_000, 131072, 0, "1.58x",
                 "1.00x", 831_488, 366_592, 831_488, 0]]
        for zone in sorted(ZONES, key=lambda zone: zone.uuid):
            quota = zone.quota * GIB
            used = self.level(zone.uuid + "/used", quota * self.rate(zone.uuid + "/fill", 0.1, 0.8),
                              frame, 0.001)
            if zone.brand == "bhyve":
                quota_used = 25 * GIB // 100
                rows.append([f"{POOL}/{zone.uuid}", 25 * GIB - quota_used, used, used * 2, 131072,
                             25 * GIB, "1.62x", "1.01x", 69120, 61440, 69120, 0])
            else:
                rows.append([f"{POOL}/{zone.uuid}", quota - used, used, used * 2, 131072, quota,
                             "2.11x", "2.02x", used + 400 * MIB, used * 2 + 800 * MIB,
                             used * 49 // 50, used // 50])
        return "".join("\t".join(map(str, row)) + "\n" for row in rows)

    @staticmethod
    def ntp_peers(frame: int) -> str:
        """ntpq -n -c apeers; one refid touches its association number."""
        return f"""\
     remote       refid   assid  st t when poll reach   delay   offset  jitter
==============================================================================
*192.0.2.10      c0000217 41210   2 u   {33 + frame * 15}   64  377    1.204   -0.118   0.077
x198.51.100.4    .GPS.    41211   1 u   5h 1024  377   18.402   91.220   0.401
 0.pool.example. .POOL.   41209  16 p    -   64    0    0.000    0.000   0.000
-203.0.113.200   GPS_NMEA(1)41212   2 u  870 1024  357   64.302   -3.310   4.108
+2001:db8:0:643: 0a00002a 41213   3 u    2   16    1   22.040   +0.204   1.120
"""

    @staticmethod
    def ntp_system(frame: int) -> str:
        """ntpq's second command: five reports and the variables of the system peer."""
        up = UPTIME + frame * STEP
        return f"""\
time since reset:     	{up}
receive buffers:      	10
free receive buffers: 	9
used receive buffers: 	0
low water refills:    	1
dropped packets:      	0
ignored packets:      	0
received packets:     	{up // 16}
packets sent:         	{up // 16 + 4}
packet send failures: 	2
input wakeups:        	{up + up // 16}
useful input wakeups: 	{up // 15}
associd=0 status=0615 leap_none, sync_ntp, 1 event, clock_sync,
pll offset:            -0.118262
pll frequency:         -17.3316
maximum error:         28.5
estimated error:       0.087
kernel status:         pll nano
pll time constant:     6
precision:             1e-06
frequency tolerance:   500
pps frequency:         0
pps stability:         0
pps jitter:            0
calibration interval   4
calibration cycles:    0
jitter exceeded:       0
stability exceeded:    0
calibration errors:    0
enabled:               0x1
addresses:             12
peak addresses:        17
maximum addresses:     11915
reclaim above count:   600
reclaim older than:    64
kilobytes:             1
maximum kilobytes:     1024
associd=0 status=0615 leap_none, sync_ntp, 1 event, clock_sync,
system peer:           192.0.2.10:123
system peer mode:      client
leap indicator:        00
stratum:               3
log2 precision:        -23
root delay:            2.371
root dispersion:       31.227
reference ID:          192.0.2.10
reference time:        ed07c4{frame:02x}.40000000  Thu, Jan  1 2026  0:00:{frame * 15:02d}.250
system jitter:         0.077120
clock jitter:          0.061
clock wander:          0.004
broadcast delay:       -50.000
symm. auth. delay:     0.000
uptime:                {up}
sysstats reset:        {up}
packets received:      {up // 16}
current version:       {up // 32}
older version:         14
bad length or format:  0
authentication failed: 0
declined:              0
restricted:            3
rate limited:          0
KoD responses:         0
processed for time:    {up // 17}
associd=41210 status=961a conf, reach, sel_sys.peer, 1 event, sys_peer,
srcadr=192.0.2.10, srcport=123, dstadr=10.20.0.7, dstport=123, leap=00,
stratum=2, precision=-24, rootdelay=1.160, rootdisp=14.130,
refid=192.0.2.23,
reftime=ed07c3f0.d2b1c9f0  Wed, Dec 31 2025 23:59:44.823,
rec=ed07c3df.40000000  Wed, Dec 31 2025 23:59:27.250, reach=377,
unreach=0, hmode=3, pmode=4, hpoll=6, ppoll=6, headway=12, flash=0x0,
keyid=0, offset=-0.118, delay=1.204, dispersion=2.043, jitter=0.077,
xleave=0.031,
filtdelay=     1.20    1.31    1.22    1.29    1.40    1.27    1.33    1.25,
filtoffset=   -0.12   -0.09   -0.11   -0.02   -0.05   -0.13   -0.08   -0.10,
filtdisp=      0.00    1.01    1.98    2.94    3.90    4.88    5.82    6.79
"""

    @staticmethod
    def zoneadm() -> str:
        """zoneadm list -p -c: a stopped zone has no id."""
        lines = ["0:global:running:/::liveimg:shared:0"]
        for zone in sorted(ZONES, key=lambda zone: (not zone.running, zone.id)):
            lines.append(":".join((
                str(zone.id) if zone.running else "-", zone.uuid,
                "running" if zone.running else "installed", f"/{POOL}/{zone.uuid}", zone.uuid,
                zone.brand, "excl", str(zone.debug_id))))
        return "\n".join(lines) + "\n"

    def vms(self) -> list[dict[str, Any]]:
        """The VM objects of vminfod, with the members that the agent uses."""
        vms = []
        for zone in ZONES:
            nics = []
            for index, tag in enumerate(zone.nics):
                dice = random.Random(f"{SEED}/{zone.uuid}/nic{index}")
                host = dice.randrange(10, 250)
                second = (20, 99, 172)[list(NETWORKS).index(tag)]
                address = f"10.{second}.{dice.randrange(8)}.{host}"
                nics.append({
                    "interface": f"{'eth' if zone.brand == 'lx' else 'net'}{index}",
                    "mac": ":".join(f"{part:02x}" for part in (
                        0x90, 0xb8, 0xd0, dice.randrange(256), dice.randrange(256), host)),
                    "nic_tag": tag, "network_uuid": NETWORKS[tag], "ip": address,
                    "ips": [f"{address}/24"], "netmask": "255.255.255.0", "vlan_id": 0,
                    "primary": index == 0})
            vm: dict[str, Any] = {
                "uuid": zone.uuid, "zonename": zone.uuid, "alias": zone.alias, "brand": zone.brand,
                "state": "running" if zone.running else "stopped",
                "zone_state": "running" if zone.running else "installed", "owner_uuid": zone.owner,
                "image_uuid": IMAGES[zone.brand], "tags": zone.tags,
                "customer_metadata": zone.metadata, "internal_metadata": {}, "nics": nics,
                "zpool": POOL, "zfs_filesystem": f"{POOL}/{zone.uuid}",
                "zonepath": f"/{POOL}/{zone.uuid}", "quota": zone.quota, "autoboot": zone.running,
                "server_uuid": NODE_UUID, "datacenter_name": SYSINFO["Datacenter Name"]}
            if zone.running:
                vm["zoneid"] = zone.id
            if zone.memory:
                vm.update(ram=zone.memory, max_physical_memory=zone.memory)
            if zone.cpu_cap:
                vm["cpu_cap"] = zone.cpu_cap
            vms.append(vm)
        return vms


SYSINFO: dict[str, Any] = {
    "Live Image": "20251218T001122Z", "System Type": "SunOS", "Boot Time": str(START - UPTIME),
    "Datacenter Name": "dc-a", "SDC Version": "7.0", "Manufacturer": "Dell Inc.",
    "Product": "PowerEdge R730", "UUID": NODE_UUID, "Hostname": "cn07", "Admin NIC Tag": "admin",
    "Admin IP": "10.20.0.7", "VM Capable": True, "Bhyve Capable": True,
    "CPU Type": "Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz", "CPU Count": CPUS,
    "MiB of Memory": str(64 * 1024), "Zpool": POOL, "Zpool Disks": "c1t0d0,c1t1d0",
    "Zpool Size in GiB": 3712,
    "Network Interfaces": {
        "ixgbe0": {"MAC Address": "90:e2:ba:00:11:22", "ip4addr": "10.20.0.7", "Link Status": "up",
                   "NIC Names": ["admin"]},
        "ixgbe1": {"MAC Address": "90:e2:ba:00:11:23", "ip4addr": "", "Link Status": "up",
                   "NIC Names": ["external"]}},
    "Virtual Network Interfaces": {}, "Link Aggregations": {}}


def capture() -> dict[str, Any]:
    """The whole capture."""
    node = Node()
    return {"format": 1, "host": SYSINFO, "frames": [
        {"at": START + frame * STEP, "kstats": node.kstats(frame),
         "commands": node.commands(frame), "vms": node.vms()} for frame in range(FRAMES)]}


def load() -> list[dict[str, Any]]:
    """An hour of load for the demo: all zones have busy and quiet times; db01 reaches its CPU cap,
    web02 leaks memory until it is restarted, lb01 drops packets.

    Each row has a member of a kstat and points of [seconds, value]: for a gauge, its value; for a
    counter, its growth per second in addition to that in the frames.
    """
    Node()                                          # assigns the zones' ids
    rows: list[dict[str, Any]] = []
    named = {zone.alias: zone for zone in ZONES}

    def move(module: str, instance: int, name: str, member: str, *points: tuple[int, float]
             ) -> None:
        rows.append({"module": module, "instance": instance, "name": name[:30], "member": member,
                     "points": [[at, round(value)] for at, value in points]})

    for zone in ZONES:
        if not zone.running or not zone.cpu_cap:
            continue
        dice = random.Random(f"{SEED}/load/{zone.alias}")
        usual = 0.8 * zone.busy * max(zone.cpu_cap, 100)    # as in the frames, in percent
        room = max(0.85 * zone.cpu_cap - usual, 0)
        extra = [(at, room * dice.random() ** 2) for at in range(0, 3600, 300)]
        if zone.alias == "db01":
            full = zone.cpu_cap - usual
            extra = [(0, 60), (20, full), (2900, full), (3000, 60)]
            move("caps", zone.id, f"cpucaps_zone_{zone.id}", "nwait", (0, 0), (20, 7), (2900, 9),
                 (3000, 0), (3600, 0))
            move("zones", zone.id, zone.uuid, "nsec_waitrq", (0, 0), (20, 9e8), (2900, 1.4e9),
                 (3000, 0), (3600, 0))
        extra.append((3600, extra[0][1]))
        move("caps", zone.id, f"cpucaps_zone_{zone.id}", "usage",
             *((at, usual + more) for at, more in extra))
        move("zones", zone.id, zone.uuid, "nsec_user", *((at, more * 1e7) for at, more in extra))
    leak, cap = named["web02"], named["web02"].memory * MIB
    move("memory_cap", leak.id, leak.uuid, "rss", (0, cap * 0.88), (60, cap * 0.96),
         (180, cap * 0.998), (2700, cap * 0.999), (2715, cap * 0.35), (3600, cap * 0.88))
    move("memory_cap", leak.id, leak.uuid, "anon_alloc_fail", (0, 0), (170, 0), (180, 4),
         (2700, 12), (2705, 0), (3600, 0))
    lossy = named["lb01"]
    move("link", 0, f"z{lossy.id}_net0", "norcvbuf", (0, 20), (600, 45), (1500, 12), (2500, 60),
         (3600, 20))
    move("tcp", lossy.id, "tcp", "retransSegs", (0, 40), (600, 90), (1500, 25), (2500, 120),
         (3600, 40))
    return rows


def inventory(recorded: dict[str, Any]) -> dict[str, Any]:
    """The inventory for a proxy; the accounts' keys are left empty."""
    return {
        "accounts": [{"uuid": owner, "login": login, "keys": [], "operator": login == "admin"}
                     for login, owner in ACCOUNTS.items()],
        "servers": [{"uuid": NODE_UUID, "hostname": SYSINFO["Hostname"],
                     "admin_ip": "127.0.0.1:9163"}],
        "vms": [{name: vm[name] for name in ("uuid", "alias", "owner_uuid", "server_uuid",
                                             "image_uuid", "brand", "state", "tags")}
                for vm in recorded["frames"][0]["vms"]]}


def main() -> int:
    """Write the files to the folder given, or to this one."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    recorded = capture()
    (folder / "node.json").write_text(spread(recorded))
    (folder / "load.json").write_text(
        "[\n" + ",\n".join(map(json.dumps, load())) + "\n]\n")
    (folder / "inventory.json").write_text(json.dumps(inventory(recorded), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

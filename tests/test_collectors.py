# SPDX-License-Identifier: MPL-2.0
"""Collectors on a recorded node, and with each quirk of kernels and commands."""
from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Iterable, Sequence, Union

import pytest
from nodes import placed
from support import NODE

import cmon_agent as agent
from cmon_agent import CollectError, Family, Kstat, KstatError, NodeContext, Part, ZoneContext

ZONE = "0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b10"
TWIN = "0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b11"      # the same first 30 characters
NICS = {"net0": ("external", "5f1e6b2c-8d43-4d1e-8b3a-6c9d7e52a002")}
ORIGINAL = list(csv.DictReader(Path(__file__).with_name("metrics.tsv").open(encoding="utf-8"),
                               delimiter="\t"))


def kstat(module: str, name: str, instance: int = 7, klass: str = "", /, **data: Any) -> Kstat:
    return agent.pack(placed(module, instance, name, klass), 0, data)


def failed(what: str, why: str) -> KstatError:
    """A kstat that could not be read."""
    module, instance, name = what.split(":")
    return KstatError(why, placed(module, int(instance), name))


Read = Union[Kstat, KstatError]
WITH_PAGE = [[one for one in collectors if one.collect is None]     # those that read kstats
             for collectors in (agent.ZONE_COLLECTORS, agent.NODE_COLLECTORS)]


def reading(read: Iterable[Read]) -> agent.Reading:
    """What a reader brings of these."""
    read = list(read)
    return agent.Reading([one for one in read if isinstance(one, Kstat)],
                         [one for one in read if isinstance(one, KstatError)])


def parts(collectors: Sequence[agent.Collector], read: Iterable[Read], context: agent.Context
          ) -> list[Part]:
    """What collectors that read kstats with the page send, all together."""
    came = agent.from_kstats(agent.wants_of(tuple(collectors)), reading(read), context)
    values = came.values.split(agent.BETWEEN)
    return [Part(template, agent.BETWEEN.join(values[place.start:place.stop]))
            for template, place in zip(came.form.templates, came.form.places)]


def zone(collector: str, *kstats: Read, **context: Any) -> dict[str, Any]:
    """Samples of a zone's collector: name -> value, or labels -> value."""
    [part] = parts([named(agent.ZONE_COLLECTORS, collector)], kstats,
                   ZoneContext(7, ZONE.encode(), **context))
    return shown(part)


def node(collector: str, *kstats: Read, **context: Any) -> dict[str, Any]:
    row = named(agent.NODE_COLLECTORS, collector)
    found = reading(kstats)
    return shown(agent.part_of(agent.alloc_families(found.kstats, 4096)) if collector == "alloc"
                 else agent.cpu_part(found) if collector == "cpu_info"
                 else parts([row], kstats, NodeContext(**context))[0])


def named(collectors: Sequence[agent.Collector], name: str) -> agent.Collector:
    return next(one for one in collectors if one.name == name)


def shown(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in agent.parse(part.text()):
        assert family.samples and family.help
        for sample in family.samples:
            found[family.name + agent.label_text(sample.labels)] = sample.value
    return found


# --- the recorded node ----------------------------------------------------------------------------

class Recorded:
    """The first frame of examples/node.json as families by scope."""

    def __init__(self, capture: dict[str, Any]) -> None:
        frame = capture["frames"][0]
        self.kstats = [
            agent.pack(placed(one["module"], one["instance"], one["name"], one["class"]),
                       one["snaptime"], one["data"]) for one in frame["kstats"]]
        self.commands = {argv.split("/")[-1]: output["stdout"]
                         for argv, output in frame["commands"].items()}
        self.vms = {vm["uuid"]: vm for vm in frame["vms"]}
        self.before = next(agent.pack(one.ref, 0, dict.fromkeys(one.data, 0))
                           for one in self.kstats if one.ref.name == "vminfo")
        self.zones = agent.parse_zoneadm(self.commands["zoneadm " + " ".join(
            agent.ZONEADM_COMMAND)])

    def zone(self, line: agent.ZoneLine) -> list[Family]:
        number = line.zone_id
        machine = next((one.ref.instance for one in self.kstats if one.ref.module == "vmm"
                        and one.data.get("vm_name") == f"SYSbhyve-{line.debug_id}"), None)
        nics = agent.nic_labels(self.vms[line.name])
        context = ZoneContext(number or 0, line.name.encode(), lambda: nics)
        read = [one for one in self.kstats
                if any(table.zone and table.zone(one.ref) == number for table in one.ref.tables)
                or one.ref.module == "vmm" and one.ref.instance == machine]
        found = parts(WITH_PAGE[0], read, context)
        datasets = agent.parse_list("zfs", self.commands["zfs " + " ".join(
            agent.zfs_command(agent.ZFS_COLUMNS, "zones"))], agent.ZFS_COLUMNS)
        return families_of([*found, agent.zfs_part(datasets[f"zones/{line.name}"]), TIME])

    def node(self) -> list[Family]:
        found = parts(WITH_PAGE[1], self.kstats, NodeContext(4096, (self.before,)))
        found.append(agent.part_of(agent.alloc_families(self.kstats, 4096)))
        found.append(agent.cpu_part(reading(one for one in self.kstats
                                            if agent.CPU_INFO in one.ref.tables)))
        pools = self.commands["zpool " + " ".join(agent.ZPOOL_COMMAND)]
        found.append(agent.zpool_part(agent.parse_list("zpool", pools, agent.ZPOOL_COLUMNS),
                                      reading(self.kstats)))
        peers = agent.parse_apeers(self.commands["ntpq " + " ".join(agent.APEERS_COMMAND)])
        details = self.commands["ntpq " + " ".join(
            (*agent.NTP_COMMAND, "-c", f"readvar {agent.system_peer(peers)}"))]
        return families_of([*found, agent.part_of(agent.zone_states(self.zones)), TIME,
                            agent.ntp_part(peers, agent.parse_ntp_details(details))])


TIME = Part(agent.TIME_TEMPLATE, "1767225600500")


def families_of(parts: list[Part]) -> list[Family]:
    return agent.parse("".join(part.text() for part in parts))


@pytest.fixture(scope="module")
def recorded(recorded_node: dict[str, Any]) -> Recorded:
    return Recorded(recorded_node)


def running(recorded: Recorded) -> list[agent.ZoneLine]:
    return [line for line in recorded.zones if line.zone_id]


@pytest.fixture(scope="module")
def pages(recorded: Recorded) -> dict[str, dict[str, list[Family]]]:
    """Families by scope and name, of all pages."""
    found: dict[str, dict[str, list[Family]]] = {"vm": {}, "gz": {}}
    for scope, families in [("gz", recorded.node())] + [
            ("vm", recorded.zone(line)) for line in running(recorded)]:
        for family in families:
            found[scope].setdefault(family.name, []).append(family)
    return found


@pytest.mark.parametrize("row", ORIGINAL, ids=[row["metric"] for row in ORIGINAL])
def test_a_metric_of_the_original_is_on_the_recorded_pages(
        row: dict[str, str], pages: dict[str, dict[str, list[Family]]]) -> None:
    if row["metric"] == "arcstats_sync_wait_for_async_total":
        pytest.xfail("of older platforms; the recorded one has async_upgrade_sync")
    names = tuple(name for name in row["labels"].split(",") if name)
    for scope in ("vm", "gz") if row["scope"] == "both" else (row["scope"],):
        for family in pages[scope][row["metric"]]:
            assert family.kind == row["type"]
            for sample in family.samples:
                assert tuple(name for name, _ in sample.labels) == names


def test_every_recorded_sample_has_its_metadata(
        pages: dict[str, dict[str, list[Family]]]) -> None:
    known = {(row["scope"], row["name"]) for row in agent.metadata()}
    for scope, word in (("vm", "zone"), ("gz", "node")):
        for name in pages[scope]:
            assert (word, name) in known


def test_every_metric_to_look_at_is_on_the_recorded_pages(
        pages: dict[str, dict[str, list[Family]]]) -> None:
    for use in agent.USE:
        for name in use.utilisation + use.saturation + use.errors:
            assert name in pages["vm" if use.scope == "zone" else "gz"], use.resource


def test_recorded_pages_are_good_pages(recorded: Recorded) -> None:
    for families in [recorded.node(), *map(recorded.zone, running(recorded))]:
        names = [family.name for family in families]
        assert len(names) == len(set(names))
        page = agent.render(families)
        assert agent.render(agent.parse(page)) == page


# --- zones ----------------------------------------------------------------------------------------

def test_counters_are_exact() -> None:
    values = zone("zone_misc", kstat("zones", ZONE[:30], zonename=ZONE, nsec_user=2 ** 64 - 1))
    assert values == {"cpu_user_usage": 2 ** 64 - 1}
    assert type(values["cpu_user_usage"]) is int


def test_a_member_that_is_missing_costs_its_sample() -> None:
    assert zone("memcap", kstat("memory_cap", ZONE[:30], rss=5, swap="?")) == {"mem_agg_usage": 5}


@pytest.mark.parametrize("cap", [0, 2 ** 64 - 1, 2 ** 64, 17592186040320, 35184372080640])
def test_a_zone_without_cap_has_no_limit_sample(cap: int) -> None:
    assert zone("memcap", kstat("memory_cap", ZONE[:30], physcap=cap, swapcap=cap)) == {}


def test_a_zone_of_vmadm_has_no_limit_on_processes() -> None:
    """vmadm sets zone.max-lwps alone, so that the kstat holds INT_MAX."""
    assert zone("limits", kstat("caps", "nprocs_zone_7", 7, usage=31, value=2147483647)) == {
        "proc_processes": 31}


@pytest.mark.parametrize("collector", ["cpucap", "limits", "link", "memcap", "tcp", "vcpu",
                                       "zone_misc", "zone_vfs", "time", "textfile"])
def test_without_its_kstat_a_collector_is_empty(collector: str) -> None:
    assert zone(collector) == {}


def test_a_kstat_of_another_zone_is_ignored() -> None:
    twin = kstat("memory_cap", TWIN[:30], zonename=TWIN, rss=1)
    own = kstat("memory_cap", ZONE[:30], zonename=ZONE, rss=2)
    assert zone("memcap", twin, own) == {"mem_agg_usage": 2}
    assert zone("memcap", twin) == {}


def test_of_duplicate_kstats_the_first_is_used() -> None:
    assert zone("tcp", kstat("tcp", "tcp", activeOpens=1), kstat("tcp", "tcp", activeOpens=2),
                kstat("tcp", "tcpstat", activeOpens=3)) == {"tcp_active_open_count": 1}


@pytest.mark.parametrize("what, collector", [
    ("memory_cap:7:0b7e2c1a-5d44-4f0e-9c3a-7f21d8", "memcap"),
    ("caps:7:cpucaps_zone_7", "cpucap"), ("caps:7:nprocs_zone_7", "limits"),
    ("link:0:z7_net0", "link"), ("tcp:7:tcp", "tcp")])
@pytest.mark.parametrize("why", ["i/o error", "unsupported type 2 with 20 bytes"])
def test_a_kstat_that_cannot_be_read_costs_its_collector_alone(what: str, collector: str,
                                                               why: str) -> None:
    kstats = (failed(what, why), kstat("zones", ZONE[:30], avenrun_1min=256))
    error = f"{what}: {why}"
    for one in agent.ZONE_COLLECTORS:
        if one.name == collector:
            with pytest.raises(CollectError, match=f"{collector}: {error}"):
                zone(one.name, *kstats)
        else:
            zone(one.name, *kstats)
    assert zone("zone_misc", *kstats) == {"load_average": 1.0}


def test_run_length_is_not_wait_length() -> None:
    assert zone("zone_vfs", kstat("zone_vfs", ZONE[:30], rlentime=1, wlentime=2)) == {
        "vfs_wait_length_time_count": 2, "vfs_run_length_time_count": 1}


def test_slow_operations_are_one_family() -> None:
    slow = kstat("zone_vfs", ZONE[:30], 7, "", **{"10ms_ops": 4, "1s_ops": 1})
    part = agent.kstat_part(reading([slow]), agent.ZONE_VFS)
    assert [family.name for family in families_of([part])] == ["vfs_slow_operations_total"]
    assert shown(part) == {'vfs_slow_operations_total{over="10ms"}': 4,
                               'vfs_slow_operations_total{over="1s"}': 1}


def links(*names: str, nics: dict[str, tuple[str, str]] | None = None) -> list[str]:
    values = zone("link", *(kstat("link", name, 0, rbytes64=1) for name in names),
                  nics=lambda: nics)
    return [name[len("net_agg_bytes_in"):] for name in values]


LINKS: list[tuple[str, tuple[str, ...], dict[str, tuple[str, str]] | None, list[str]]] = [
    ("a link of a zone", ("z7_net0",), NICS, [
        '{interface="vnic0",nic_tag="external",'
        'network_uuid="5f1e6b2c-8d43-4d1e-8b3a-6c9d7e52a002"}']),
    ("a link without vminfod", ("z7_net0",), None, ['{interface="vnic0"}']),
    ("a link that vminfod does not know", ("z7_net1",), NICS,
     ['{interface="vnic1",nic_tag="",network_uuid=""}']),
    ("a link of LX", ("z7_eth0",), None, ['{interface="vnic0"}']),
    ("a link of LX that vmadm calls net0", ("z7_eth0",), NICS, [
        '{interface="vnic0",nic_tag="external",'
        'network_uuid="5f1e6b2c-8d43-4d1e-8b3a-6c9d7e52a002"}']),
    ("two links with one number", ("z7_net0", "z7_eth0"), None,
     ['{interface="net0"}', '{interface="vnic0"}']),
    ("a link without a number", ("z7_uplink",), None, ['{interface="uplink"}']),
    ("a link that looks like a label", ("z7_eth0", "z7_vnic0"), None,
     ['{interface="vnic0"}', '{interface="z7_vnic0"}']),
    ("a link of two digits", ("z7_net10", "z7_net2"), None,
     ['{interface="vnic10"}', '{interface="vnic2"}']),
    ("a link of another zone's number", ("z77_net0",), None, ['{interface="z77_net0"}']),
]


@pytest.mark.parametrize("names, nics, expected", [row[1:] for row in LINKS],
                         ids=[row[0] for row in LINKS])
def test_a_link_has_its_label(names: tuple[str, ...], nics: dict[str, tuple[str, str]] | None,
                              expected: list[str]) -> None:
    assert links(*names, nics=nics) == expected


def test_a_link_has_errors_drops_state_and_speed() -> None:
    values = zone("link", kstat("link", "z7_net0", 0, ierrors=1, oerrors=2, norcvbuf=3,
                                noxmtbuf=4, link_state=1, ifspeed=10 ** 10, zonename=ZONE))
    assert values == {name + '{interface="vnic0"}': value for name, value in (
        ("net_errors_in_total", 1), ("net_errors_out_total", 2), ("net_drops_in_total", 3),
        ("net_drops_out_total", 4), ("net_link_up", 1),
        ("net_speed_bytes_per_second", 1_250_000_000))}


def test_virtual_cpus_that_never_ran_are_left_out() -> None:
    ran = kstat("vmm", "vcpu0", 3, vcpu=0, time_run=2 * 10 ** 9, time_init=5)
    idle = kstat("vmm", "vcpu1", 3, vcpu=1, time_run=0, time_idle=0, time_init=10 ** 12)
    assert zone("vcpu", ran, idle) == {'vcpu_seconds_total{vcpu="0",state="run"}': 2.0}


# --- the node -------------------------------------------------------------------------------------

def test_cpu_times_are_seconds_by_cpu() -> None:
    assert node("cpu_util", kstat("cpu", "sys", 0, cpu_nsec_idle=15 * 10 ** 8),
                kstat("cpu", "vm", 0, pgin=1), kstat("cpu", "sys", 12, cpu_nsec_idle=10 ** 9)) \
        == {'cpu_idle_seconds_total{cpu_id="0"}': 1.5, 'cpu_idle_seconds_total{cpu_id="12"}': 1.0}


def test_cpu_info_is_of_the_first_cpu_and_states_are_counted() -> None:
    infos = [kstat("cpu_info", f"cpu_info{number}", number, model=70 + number,
                   state="on-line" if number else "faulted") for number in (2, 1, 0)]
    assert node("cpu_info", *infos) == {'cpu_info_cpus{state="faulted"}': 1,
                                        'cpu_info_cpus{state="on-line"}': 2, "cpu_info_model": 70}


def test_pages_become_bytes_and_events_do_not() -> None:
    assert node("memory", kstat("unix", "system_pages", 0, physmem=16, nscan=3, n_throttle=1),
                page_size=8192) == {"memory_total_bytes": 131072, "memory_scanned_pages": 3,
                                    "memory_throttles_total": 1}


SWAPS: list[tuple[str, dict[str, int] | None, dict[str, int]]] = [
    ("no earlier reading", None, {}),
    ("an earlier reading", {"updates": 90, "swap_free": 900}, {"swap_free_bytes": 4096 * 10}),
    ("no update since", {"updates": 100, "swap_free": 1000}, {}),
    ("counters that have gone back", {"updates": 90, "swap_free": 2000}, {})]


@pytest.mark.parametrize("before, expected", [row[1:] for row in SWAPS],
                         ids=[row[0] for row in SWAPS])
def test_swap_is_the_mean_between_two_reads(before: dict[str, int] | None, expected: dict[str, int]
                                           ) -> None:
    earlier = () if before is None else (kstat("unix", "vminfo", 0, **before),)
    assert node("swap", kstat("unix", "vminfo", 0, updates=100, swap_free=1000),
                vminfo_before=earlier) == expected


def test_swap_does_not_flicker_with_two_reads_in_one_second() -> None:
    readings: tuple[Kstat, ...] = ()
    found = []
    for updates in (90, 100, 100, 105):
        vminfo = kstat("unix", "vminfo", 0, updates=updates, swap_free=updates * 10)
        found.append(node("swap", vminfo, vminfo_before=readings))
        readings = agent.vminfo_readings([kstat("unix", "system_misc", 0), vminfo], readings)
        assert len(readings) <= 2
    assert found == [{}] + [{"swap_free_bytes": 40960}] * 3
    assert agent.vminfo_readings([], readings) == readings


def test_allocated_and_available_resources_are_both_shown() -> None:
    assert node("alloc", kstat("unix", "system_misc", 0, ncpus=8),
                kstat("unix", "system_pages", 0, physmem=100),
                kstat("caps", "cpucaps_zone_7", 7, value=350, zonename=ZONE),
                kstat("caps", "nprocs_zone_7", 7, value=2000, zonename=ZONE),
                kstat("memory_cap", "global", 0, physcap=9, zonename="global"),
                kstat("memory_cap", ZONE[:30], 7, physcap=2 ** 30, zonename=ZONE),
                kstat("memory_cap", TWIN[:30], 8, physcap=4096 * (2 ** 32 - 1), zonename=TWIN),
                failed("caps:8:cpucaps_zone_8", "i/o error")) == {
        "alloc_cpus": 8, "alloc_cpu_caps_cpus": 3.5, "alloc_memory_bytes": 409600,
        "alloc_memory_caps_bytes": 2 ** 30, 'alloc_uncapped_zones{resource="cpu"}': 1,
        'alloc_uncapped_zones{resource="memory"}': 1}


def test_disks_and_links_are_labelled_by_name() -> None:
    assert node("disk", kstat("disk", "sd0", 0, "disk", rtime=10 ** 9)) == {
        'disk_busy_seconds_total{device="sd0"}': 1.0}
    assert node("link", kstat("link", "ixgbe0", 0, link_state=0)) == {'link_up{link="ixgbe0"}': 0}


def test_of_duplicate_labels_the_first_is_used() -> None:
    assert node("disk", kstat("disk", "sd0", 0, "disk", reads=1),
                kstat("disk", "sd1", 1, "disk", reads=2),
                kstat("disk", "sd0", 0, "disk", reads=3)) == {
        'disk_reads_total{device="sd0"}': 1, 'disk_reads_total{device="sd1"}': 2}


def test_a_kstat_of_the_node_that_cannot_be_read_costs_its_collector() -> None:
    with pytest.raises(CollectError, match="arcstats"):
        node("arcstats", failed("zfs:0:arcstats", "i/o error"))
    assert node("load", failed("unix:0:vminfo", "i/o error"),
                kstat("unix", "system_misc", 0, avenrun_5min=128)) == {"load_average_5min": 0.5}


# --- commands -------------------------------------------------------------------------------------

DATASET = "\t".join(("zones/a", "10", "20", "30", "-", "0", "2.11x", "2.02", "40", "50", "60", "-"))


def test_zfs_list() -> None:
    rows = agent.parse_list("zfs list", DATASET + "\nshort\tline\n", agent.ZFS_COLUMNS)
    assert list(rows) == ["zones/a"]
    assert shown(agent.zfs_part(rows["zones/a"])) == {
        "zfs_available": 10, "zfs_used": 20, "zfs_logicalused": 30, "zfs_quota": 0,
        "zfs_compressratio": 2.11, "zfs_refcompressratio": 2.02, "zfs_referenced": 40,
        "zfs_logicalreferenced": 50, "zfs_usedbydataset": 60}


@pytest.mark.parametrize("output", ["", "no pools available\n", "no datasets available\n"])
def test_an_empty_list_is_one(output: str) -> None:
    assert agent.parse_list("zfs list", output, agent.ZFS_COLUMNS) == {}


def test_invalid_output_is_a_failure() -> None:
    with pytest.raises(CollectError, match="zfs list: no line has 12 columns"):
        agent.parse_list("zfs list", "cannot open\n", agent.ZFS_COLUMNS)


def test_zpool_list() -> None:
    pools = agent.parse_list("zpool list", "zones\t18\t31%\tONLINE\t39\n"
                             "tank\t-\t-\tUNAVAIL\t-\n", agent.ZPOOL_COLUMNS)
    group = kstat("zfs_metaslab_group", "53", 0, loads=1, unloads=2, spa_name="zones")
    assert shown(agent.zpool_part(pools, reading([group]))) == {
        'metaslab_group_loads{pool="zones",vdev_guid="53"}': 1,
        'metaslab_group_unloads{pool="zones",vdev_guid="53"}': 2,
        'zpool_allocated_bytes{pool="zones"}': 18, 'zpool_fragmentation_percent{pool="zones"}': 31,
        'zpool_health_status{pool="zones"}': 0, 'zpool_health_status{pool="tank"}': 5,
        'zpool_size_bytes{pool="zones"}': 39}


APEERS = """\
     remote       refid   assid  st t when poll reach   delay   offset  jitter
==============================================================================
*192.0.2.10      c0000217 41210   2 u   33   64  377    1.204   -0.118   0.077
x198.51.100.4    .GPS.    41211   1 u   5h 1024  377   18.402   91.220   0.401
 pool.example.or .POOL.   41209  16 p    -   64    0    0.000    0.000   0.000
-203.0.113.200   GPS_NMEA(1)41212   2 u  870 1024  357   64.302   -3.310   4.108
+2001:db8:0:643: 0a00002a 41213   3 u    2   16    1   22.040   +0.204   1.120
+2001:db8:0:643: 0a00002a 41214   3 u    2   16    1   22.040   +0.204   1.120
"""


def test_apeers() -> None:
    peers = agent.parse_apeers(APEERS)
    assert [(peer.remote, peer.assid, peer.words["refid"]) for peer in peers] == [
        ("192.0.2.10", "41210", "c0000217"), ("198.51.100.4", "41211", ".GPS."),
        ("pool.example.or", "41209", ".POOL."), ("203.0.113.200", "41212", "GPS_NMEA(1)"),
        ("2001:db8:0:643:", "41213", "0a00002a"), ("2001:db8:0:643: 41214", "41214", "0a00002a")]
    assert agent.system_peer(peers) == "41210"
    assert agent.system_peer([]) is None
    values = shown(agent.ntp_part(peers, agent.NtpDetails({}, {})))
    for name, remote, value in [
            ("ntp_peer_state", "192.0.2.10", 6), ("ntp_peer_state", "198.51.100.4", 1),
            ("ntp_peer_last_query_seconds", "198.51.100.4", 18000),
            ("ntp_peer_last_query_seconds", "pool.example.or", -1),
            ("ntp_peer_delay_seconds", "192.0.2.10", 0.001204),
            ("ntp_peer_offset_seconds", "2001:db8:0:643:", 0.000204),
            ("ntp_peer_last8_polls_failure_count", "203.0.113.200", 1),
            ("ntp_peer_connection_type", "pool.example.or", -1),
            ("ntp_peer_stratum_number", "pool.example.or", 16)]:
        assert values[f'{name}{{remote="{remote}"}}'] == value


DETAILS = """\
time since reset:     \t3456000
calibration interval   4
calibration cycles:    0
enabled:               0x1
kilobytes:             3
broadcast delay:       -50.000
estimated error:       0.5
KoD responses:         8
kernel status:         pll nano
system peer mode:      client
leap indicator:        01
reference time:        ed003780.40000000  Thu, Jan  1 2026  0:00:00.250
no such line in 4.2.8
associd=41210 status=961a conf, reach, sel_sys.peer, 1 event, sys_peer,
srcadr=192.0.2.10, leap=11, stratum=2, rootdelay=1.160, rootdisp=14.130,
reftime=ed003780.80000000  Thu, Jan  1 2026  0:00:00.500,
rec=(no time), unreach=3, offset=-0.5, xleave=0.031,
filtdelay=     1.20    1.31
"""


def test_details_of_ntp_with_the_units_that_ntpd_sends() -> None:
    assert shown(agent.ntp_part([], agent.parse_ntp_details(DETAILS))) == {
        "ntp_syspeer_leap_indicator_status": 3, "ntp_syspeer_offset_seconds": -0.0005,
        "ntp_syspeer_rec_seconds": 0, "ntp_syspeer_reftime_seconds": 3976214400.5,
        "ntp_syspeer_root_delay_seconds": 1.160 / 1000,
        "ntp_syspeer_root_dispersion_seconds": 14.130 / 1000, "ntp_syspeer_stratum_number": 2,
        "ntp_syspeer_unreach_total": 3, "ntp_syspeer_xleave_seconds": 0.031 / 1000,
        "ntp_time_since_reset_seconds": 3456000, "ntp_calibration_cycles_total": 0,
        "ntp_calibration_interval_seconds": 4, "ntp_estimated_error_seconds": 0.0005,
        "ntp_mru_monitor_enabled_boolean": 1, "ntp_mru_monitor_memory_bytes": 3072,
        "ntp_broadcast_delay_seconds": -0.05, "ntp_leap_indicator_status": 1,
        "ntp_syspeer_mode_number": 2, "ntp_reftime_seconds": 3976214400.25,
        "ntp_kod_responses_total": 8}


def test_a_silent_ntpd_is_reported() -> None:
    with pytest.raises(CollectError, match="is ntpd running"):
        agent.ntp_part(agent.parse_apeers(""), agent.parse_ntp_details(""))


TRACKING = "7F7F0101,,3,1767225600,0.001,0.0,0.0,-1.5,0.0,0.1,0.01,0.002,64.2,Normal\n"
SOURCES = ("^,*,192.0.2.1,2,6,357,33,0.0001,0.0002,0.01\n^,!,192.0.2.2,2,99,0,1,0,0,0\n"
           "^,*,192.0.2.1,9,6,377,33,0,0,0\nshort,line\n")


def test_chrony_is_used_without_ntpd() -> None:
    one, two = '{remote="192.0.2.1"}', '{remote="192.0.2.2"}'
    assert shown(agent.part_of(agent.chrony_families(TRACKING, SOURCES))) == {
        "ntp_stratum_number": 3, "ntp_pll_offset_seconds": 0.001, "ntp_frequency_offset_ppm": -1.5,
        "ntp_root_delay_seconds": 0.01, "ntp_root_dispersion_seconds": 0.002,
        "ntp_reftime_seconds": 3976214400, "ntp_leap_indicator_status": 0,
        "ntp_peer_state" + one: 6, "ntp_peer_state" + two: -1, "ntp_peer_stratum_number" + one: 2,
        "ntp_peer_stratum_number" + two: 2, "ntp_peer_poll_interval_seconds" + one: 64,
        "ntp_peer_last8_polls_failure_count" + one: 1,
        "ntp_peer_last8_polls_failure_count" + two: 8, "ntp_peer_last_query_seconds" + one: 33,
        "ntp_peer_last_query_seconds" + two: 1, "ntp_peer_offset_seconds" + one: 0.0001,
        "ntp_peer_offset_seconds" + two: 0}
    with pytest.raises(CollectError):
        agent.chrony_families("506 Cannot talk to daemon\n", "")


ZONEADM = """\
0:global:running:/::liveimg:shared:0
7:web:running:/zones/a\\:b:0b7e2c1a-5d44-4f0e-9c3a-7f21d8aa6b10:joyent:excl:12
-:old:installed:/zones/old:11:lx:excl:13
31:new:configured:/zones/new:12:bhyve:excl:14
8:upstream:running:/zones/up:13:ipkg:excl
bad line
"""


@pytest.mark.parametrize("output", ["", "-:broken\n", "zoneadm: cannot tell\n"])
def test_zoneadm_without_a_zone_is_a_failure(output: str) -> None:
    host = agent.RecordedHost(str(NODE), agent.Settings())
    with pytest.raises(CollectError, match="zoneadm list"):
        agent.collect_zones(agent.Task(
            host, lambda *_: agent.Output(0, output, ""), agent.NODE, 1.0, "zones",
            lambda work: agent.Reading([], []), lambda: 0.0))


def test_zoneadm() -> None:
    lines = agent.parse_zoneadm(ZONEADM)
    assert lines[1] == (7, "web", "running", "/zones/a:b", ZONE, "joyent", "excl", 12)
    assert [(line.name, line.zone_id, line.debug_id) for line in lines] == [
        ("global", 0, 0), ("web", 7, 12), ("old", None, 13), ("new", None, 14),
        ("upstream", 8, None)]
    assert shown(agent.part_of(agent.zone_states(lines))) == {
        'zones_in_state{state="configured"}': 1, 'zones_in_state{state="installed"}': 1,
        'zones_in_state{state="running"}': 2}


# --- plugins, text files, vminfod -----------------------------------------------------------------

def test_a_plugin_of_lines() -> None:
    families, ttl, problems = agent.plugin_families("my-plugin", "\n".join((
        "depth\tgauge\t5\tJobs that wait", "", "done\tcounter\t18446744073709551615",
        "ttl\toption\t5", "ttl\toption\t30\r", "ttl\toption\t-1", "speed\toption\t3",
        "two words\tgauge\t1", "a\thistogram\t1", "b\tgauge\tmany", "c\tgauge", "depth\tgauge\t6",
        "d\tgauge\t1\thelp\tmore", "e 5\tgauge\t1", 'f{a="b"} 5\tgauge\t1', "g\tgauge\t1 2",
        'h{__name__="x"}\tgauge\t1', "i{a\tgauge\t1")), False)
    assert families == [
        Family("plugin_my_plugin_depth", "gauge", "Jobs that wait", [agent.Sample((), 5)]),
        Family("plugin_my_plugin_done", "counter", "done", [agent.Sample((), 2 ** 64 - 1)])]
    assert ttl == 30.0
    assert [problem.split(":")[0] for problem in problems] == [
        f"line {number}" for number in range(6, 19)]


def test_a_plugin_in_the_format_of_prometheus() -> None:
    families, ttl, problems = agent.plugin_families("q.v2", "\n".join((
        "# OPTION ttl 7", "# TYPE a gauge", "# HELP a All of it.", 'a{x="1"} 1', "a{x=1} 2",
        "untyped 4", "# TYPE h histogram", 'h_bucket{le="+Inf"} 1', "h_sum 2", "h_count 1",
        "# TYPE b counter", 'b{__name__="cpu_user_usage"} 1')), True)
    assert agent.render(families) == "\n".join((
        "# HELP a All of it.", "# TYPE a gauge", 'a{x="1"} 1', "# HELP h h", "# TYPE h histogram",
        'h_bucket{le="+Inf"} 1', "h_sum 2", "h_count 1", ""))
    assert ttl == 7.0
    assert len(problems) == 3
    assert problems[0].startswith("line 5:")
    assert agent.plugin_families("a", "# OPTION ttl soon\n", True)[1] is None


def test_a_text_file_cannot_name_what_is_ours() -> None:
    families, problems = agent.foreign_families("app_", "\n".join(
        ["# TYPE cpu_user_usage counter", "cpu_user_usage 1", "orders 2"]), 10)
    assert [family.name for family in families] == ["app_cpu_user_usage"]
    assert problems == ["orders has no TYPE"]


def test_a_text_file_has_limits() -> None:
    families, problems = agent.foreign_families("app_", "# TYPE a gauge\n" + "".join(
        f'a{{n="{number}"}} 1\n' for number in range(agent.MAX_FOREIGN_LINES)),
        agent.MAX_TEXTFILE_SAMPLES)
    assert [len(family.samples) for family in families] == [agent.MAX_TEXTFILE_SAMPLES]
    assert f"more than {agent.MAX_FOREIGN_LINES} lines; the rest is left out" in problems


VMS: list[tuple[str, Any, dict[str, tuple[str, str]], list[int], bool]] = [
    ("a zone of Triton", {
        "owner_uuid": agent.ADMIN_UUID, "tags": {"smartdc_role": "cmon"},
        "customer_metadata": {"metricPorts": "8881, 8882,8881,0,70000,x"},
        "nics": [{"interface": "net0", "nic_tag": "admin", "network_uuid": "n"},
                 {"interface": "net1"}, {"nic_tag": "lost"}, None]},
     {"net0": ("admin", "n"), "net1": ("", "")}, [8881, 8882], True),
    ("a tenant with a tag of Triton", {"owner_uuid": ZONE, "tags": {"smartdc_role": "cmon"}},
     {}, [], False),
    ("a port as a number", {"customer_metadata": {"metricPorts": 9090}}, {}, [9090], False),
    ("half a character", {"nics": [{"interface": "net0", "nic_tag": "\ud800"}]},
     {"net0": ("?", "")}, [], False),
    ("nothing", None, {}, [], False),
    ("a list", [], {}, [], False),
]


@pytest.mark.parametrize("vm, nics, ports, core", [row[1:] for row in VMS],
                         ids=[row[0] for row in VMS])
def test_records_of_vminfod(vm: Any, nics: dict[str, tuple[str, str]], ports: list[int], core: bool
                           ) -> None:
    assert (agent.nic_labels(vm), agent.metric_ports(vm), agent.is_core(vm)) == (nics, ports, core)

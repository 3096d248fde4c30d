/* SPDX-License-Identifier: MPL-2.0 */
/*
 * A stand-in for libkstat.so.1 with its LP64 ABI, for tests and measurements on any machine.
 *
 * It serves the "kernel" that a text file describes. The files lie in the folder of the library
 * itself, so that a test copies the library into its own folder and needs no environment:
 *
 *   kstats    what the kernel has (fields are separated by TABs, # starts a comment line)
 *                 K module instance name class type crtime snaptime [flags]
 *                 M type member value          type: char i32 u32 i64 u64 f d str null
 *                 R ndata hexadecimal-bytes    data of a RAW, INTR or TIMER kstat
 *             an IO kstat has M lines with the member names of kstat_io_t; snaptime 0: now.
 *             Or one line `synth zones=500 kstats=50000`: made-up kstats, nothing is stored.
 *             A kstat keeps its kid as long as module, instance, name, class and crtime stay.
 *   control   faults, one a line, SEL is a glob over module:instance:name
 *                 fail SEL errno [times]       kstat_read fails
 *                 block SEL                    kstat_read waits until the line is gone
 *                 delay SEL milliseconds       kstat_read takes that long
 *                 hide SEL                     created, not installed yet: no header, no data;
 *                                              the chain id does not change when it goes away
 *                 late SEL                     as hide, for handles that are open now; one that is
 *                                              opened later sees it
 *                 switch SEL file              the next read of it replaces `kstats` by `file`
 *                                              before anything is read, once
 *                 churn                        every kstat_chain_update finds a new chain and
 *                                              frees every header
 *                 bump number                  the chain changes (by one kstat) when the number does
 *                 fail-open errno, fail-update errno
 *   stats     mapped counters, see `enum` below; word GENERATION is the test's: when it changes,
 *             `kstats` and `control` are looked at again at once (otherwise within 2 s)
 *   reads     when it exists, each kstat_read appends module:instance:name to it
 *
 * What is faithful: sizes and offsets, names cut to 30 characters, ascending kids, the merge of
 * kstat_chain_update (it frees pointers to kstats that still exist), data in one block with the
 * strings behind the array, ENXIO for what has gone, ENOENT from look-ups. Headers that were freed
 * are poisoned, and a read through one is counted (STALE) instead of being a crash.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define KSTAT_STRLEN 31
enum { KSTAT_TYPE_RAW, KSTAT_TYPE_NAMED, KSTAT_TYPE_INTR, KSTAT_TYPE_IO, KSTAT_TYPE_TIMER };
enum { DATA_CHAR, DATA_INT32, DATA_UINT32, DATA_INT64, DATA_UINT64, DATA_FLOAT, DATA_DOUBLE,
    DATA_STRING = 9, DATA_NULL = 99 /* ours: a STRING without bytes */ };

typedef int kid_t;
typedef long long hrtime_t;

typedef struct kstat {
	hrtime_t	ks_crtime;
	struct kstat	*ks_next;
	kid_t		ks_kid;
	char		ks_module[KSTAT_STRLEN];
	unsigned char	ks_resv;
	int		ks_instance;
	char		ks_name[KSTAT_STRLEN];
	unsigned char	ks_type;
	char		ks_class[KSTAT_STRLEN];
	unsigned char	ks_flags;
	void		*ks_data;
	unsigned int	ks_ndata;
	size_t		ks_data_size;
	hrtime_t	ks_snaptime;
	void		*ks_update, *ks_private, *ks_snapshot, *ks_lock;
} kstat_t;

typedef struct kstat_ctl {
	kid_t	kc_chain_id;
	kstat_t	*kc_chain;
	int	kc_kd;
} kstat_ctl_t;

typedef struct kstat_named {
	char		name[KSTAT_STRLEN];
	unsigned char	data_type;
	union {
		char		c[16];
		int32_t		i32;
		uint32_t	ui32;
		int64_t		i64;
		uint64_t	ui64;
		float		f;
		double		d;
		struct { char *addr; uint32_t len; } str;
	} value;
} kstat_named_t;

typedef struct kstat_io {
	uint64_t	nread, nwritten;
	uint32_t	reads, writes;
	hrtime_t	wtime, wlentime, wlastupdate, rtime, rlentime, rlastupdate;
	uint32_t	wcnt, rcnt;
} kstat_io_t;

_Static_assert(sizeof (kstat_ctl_t) == 24 && offsetof(kstat_ctl_t, kc_chain) == 8 &&
    offsetof(kstat_ctl_t, kc_kd) == 16, "kstat_ctl_t");
_Static_assert(sizeof (kstat_t) == 184 && offsetof(kstat_t, ks_next) == 8 &&
    offsetof(kstat_t, ks_kid) == 16 && offsetof(kstat_t, ks_module) == 20 &&
    offsetof(kstat_t, ks_resv) == 51 && offsetof(kstat_t, ks_instance) == 52 &&
    offsetof(kstat_t, ks_name) == 56 && offsetof(kstat_t, ks_type) == 87 &&
    offsetof(kstat_t, ks_class) == 88 && offsetof(kstat_t, ks_flags) == 119 &&
    offsetof(kstat_t, ks_data) == 120 && offsetof(kstat_t, ks_ndata) == 128 &&
    offsetof(kstat_t, ks_data_size) == 136 && offsetof(kstat_t, ks_snaptime) == 144, "kstat_t");
_Static_assert(sizeof (kstat_named_t) == 48 && offsetof(kstat_named_t, data_type) == 31 &&
    offsetof(kstat_named_t, value) == 32 && offsetof(kstat_named_t, value.str.len) == 40,
    "kstat_named_t");
_Static_assert(sizeof (kstat_io_t) == 80 && offsetof(kstat_io_t, wtime) == 24 &&
    offsetof(kstat_io_t, wcnt) == 72, "kstat_io_t");

/* --- counters that the test reads (words of the file `stats`) ------------------------------------ */

enum { GENERATION, OPENS, CLOSES, READS, UPDATES, REBUILDS, LOOKUPS, OVERLAPS, STALE, BLOCKED,
    FAILED, BYTES, PEAK_BYTES, HEADERS, CHAIN_ID, PROCESSES, COUNTERS };

static _Atomic uint64_t nowhere[COUNTERS];
static _Atomic uint64_t *counter = nowhere;

static void
count(int which, int64_t by)
{
	uint64_t now = atomic_fetch_add(&counter[which], (uint64_t)by) + (uint64_t)by;

	if (which == BYTES && now > atomic_load(&counter[PEAK_BYTES]))
		atomic_store(&counter[PEAK_BYTES], now);
}

/* Every block carries its size, so that a measurement can take the stand-in's memory off. */
static void *
take(size_t size)
{
	size_t *block = calloc(1, size + 16);

	if (block == NULL)
		abort();
	*block = size;
	count(BYTES, (int64_t)size + 32);
	return ((char *)block + 16);
}

static void
give(void *memory)
{
	if (memory != NULL) {
		size_t *block = (size_t *)(void *)((char *)memory - 16);
		size_t size = *block;

		memset(memory, 0xdb, size);
		count(BYTES, -((int64_t)size + 32));
		free(block);
	}
}

/* --- the kernel ---------------------------------------------------------------------------------- */

typedef struct {
	unsigned char	type;
	char		name[KSTAT_STRLEN];
	union { uint64_t u; int64_t i; double d; } value;
	char		*text;
} member_t;

typedef struct {
	kid_t		kid;
	char		module[KSTAT_STRLEN], name[KSTAT_STRLEN], class[KSTAT_STRLEN];
	int		instance, type, flags;
	hrtime_t	crtime, snaptime;
	unsigned int	ndata;
	member_t	*members;
	unsigned char	*raw;
	size_t		raw_size;
	int		used;
} entry_t;

enum { FAIL, BLOCK, DELAY, HIDE, LATE, SWITCH, CHURN, BUMP, FAIL_OPEN, FAIL_UPDATE };
static const char *const rule_names[] = { "fail", "block", "delay", "hide", "late", "switch",
    "churn", "bump", "fail-open", "fail-update" };

typedef struct {
	int	kind;
	char	module[64], instance[32], name[64];
	long	number, times;
	char	file[256];
	uint64_t after;			/* LATE: handles with a higher number see it */
} rule_t;

/* One lock for all of the kernel; never held while a read is blocked or delayed. */
static pthread_mutex_t kernel = PTHREAD_MUTEX_INITIALIZER;
static char folder[3072];
static entry_t *entries;
static size_t entry_count;
static kid_t last_kid, chain_id = 1;
static rule_t *rules;
static size_t rule_count;
static long bumped;
static uint64_t opened;
static long synth_zones, synth_count;	/* > 0: made-up kstats instead of entries */
static time_t synth_start;
static uint64_t seen_generation = UINT64_MAX;
static hrtime_t seen_at;
static struct stat seen_kstats, seen_control;

static hrtime_t
now_ns(clockid_t clock)
{
	struct timespec ts;

	(void) clock_gettime(clock, &ts);
	return ((hrtime_t)ts.tv_sec * 1000000000 + ts.tv_nsec);
}

static char *
path_of(const char *name, char *buffer)
{
	(void) snprintf(buffer, 4096, "%s/%s", folder, name);
	return (buffer);
}

static void __attribute__((constructor))
find_folder(void)
{
	Dl_info info;
	char path[4096], *slash;
	int fd;
	void *map;

	if (dladdr((void *)(uintptr_t)find_folder, &info) == 0 || realpath(info.dli_fname, path) == NULL)
		return;
	if ((slash = strrchr(path, '/')) != NULL)
		*slash = '\0';
	if (strlen(path) >= sizeof (folder))
		return;
	strcpy(folder, path);
	if ((fd = open(path_of("stats", path), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) < 0)
		return;
	if (ftruncate(fd, 4096) == 0 && (map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED,
	    fd, 0)) != MAP_FAILED)
		counter = map;
	(void) close(fd);
	count(PROCESSES, 1);
}

static void
put_name(char *to, const char *from)
{
	size_t length = strlen(from);

	if (length > KSTAT_STRLEN - 1)
		length = KSTAT_STRLEN - 1;
	memset(to, 0, KSTAT_STRLEN);
	memcpy(to, from, length);
}

static char *
read_file(const char *name, struct stat *st)
{
	char path[4096], *text;
	int fd = open(path_of(name, path), O_RDONLY | O_CLOEXEC);
	ssize_t got, size = 0;

	memset(st, 0, sizeof (*st));
	if (fd < 0)
		return (NULL);
	(void) fstat(fd, st);
	text = malloc((size_t)st->st_size + 1);
	while (size < st->st_size && (got = read(fd, text + size, (size_t)(st->st_size - size))) > 0)
		size += got;
	text[size] = '\0';
	(void) close(fd);
	return (text);
}

static void
free_entries(entry_t *list, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		if (list[i].members != NULL) {
			for (unsigned int m = 0; m < list[i].ndata; m++)
				give(list[i].members[m].text);
		}
		give(list[i].members);
		give(list[i].raw);
	}
	give(list);
}

static int
by_kid(const void *a, const void *b)
{
	return (((const entry_t *)a)->kid - ((const entry_t *)b)->kid);
}

static int
same_kstat(const entry_t *a, const entry_t *b)
{
	return (a->instance == b->instance && a->crtime == b->crtime && strcmp(a->name, b->name) == 0 &&
	    strcmp(a->module, b->module) == 0 && strcmp(a->class, b->class) == 0 && a->type == b->type);
}

static int
type_of(const char *word)
{
	static const struct { const char *word; int type; } types[] = {
		{ "u64", DATA_UINT64 }, { "u32", DATA_UINT32 }, { "str", DATA_STRING },
		{ "i64", DATA_INT64 }, { "i32", DATA_INT32 }, { "char", DATA_CHAR },
		{ "f", DATA_FLOAT }, { "d", DATA_DOUBLE }, { "null", DATA_NULL } };

	for (size_t i = 0; i < sizeof (types) / sizeof (types[0]); i++)
		if (strcmp(word, types[i].word) == 0)
			return (types[i].type);
	(void) fprintf(stderr, "libkstat stand-in: no such member type: %s\n", word);
	abort();
}

static void
add_member(entry_t *e, char *const *field)
{
	member_t *m;

	if ((e->ndata & (e->ndata - 1)) == 0) {		/* full at each power of two: double it */
		member_t *grown = take(sizeof (member_t) * (e->ndata == 0 ? 1 : e->ndata * 2));

		if (e->members != NULL)
			memcpy(grown, e->members, sizeof (member_t) * e->ndata);
		give(e->members);
		e->members = grown;
	}
	m = &e->members[e->ndata++];
	m->type = (unsigned char)type_of(field[1]);
	put_name(m->name, field[2]);
	switch (m->type) {
	case DATA_STRING: case DATA_CHAR:
		m->text = take(strlen(field[3]) + 1);
		strcpy(m->text, field[3]);
		break;
	case DATA_INT32: case DATA_INT64:
		m->value.i = strtoll(field[3], NULL, 10);
		break;
	case DATA_FLOAT: case DATA_DOUBLE:
		m->value.d = strtod(field[3], NULL);
		break;
	default:
		m->value.u = strtoull(field[3], NULL, 10);
	}
}

/* Kids stay with the kstats that stay; what is new gets the next ones, at the end of the chain. */
static void
load_kstats(void)
{
	char *text = read_file("kstats", &seen_kstats), *line, *rest = text, *field[10];
	entry_t *list, *e = NULL;
	size_t n = 0, room = 64, hint = 0, kept = 0;
	int changed = 0, fresh = entries == NULL && synth_count == 0;

	if (text == NULL)
		return;
	if (strncmp(text, "synth", 5) == 0) {
		char *at = strstr(text, "zones=");
		long zones = at != NULL ? strtol(at + 6, NULL, 10) : 1;
		long total = (at = strstr(text, "kstats=")) != NULL ? strtol(at + 7, NULL, 10) : 0;

		if (synth_count != total || synth_zones != zones)
			chain_id++;
		synth_zones = zones;
		synth_count = total;
		if (synth_start == 0)
			synth_start = time(NULL) - 100000;
		free(text);
		return;
	}
	synth_count = 0;
	list = take(room * sizeof (entry_t));
	while ((line = strsep(&rest, "\n")) != NULL) {
		int fields = 0;
		char *word, *left = line;

		if (line[0] == '#' || line[0] == '\0')
			continue;
		while (fields < 10 && (word = strsep(&left, "\t")) != NULL)
			field[fields++] = word;
		for (int i = fields; i < 10; i++)
			field[i] = "";
		if (field[0][0] == 'K') {
			if (n == room) {
				entry_t *grown = take(2 * room * sizeof (entry_t));

				memcpy(grown, list, n * sizeof (entry_t));
				give(list);
				list = grown;
				room *= 2;
			}
			e = &list[n++];
			put_name(e->module, field[1]);
			e->instance = (int)strtol(field[2], NULL, 10);
			put_name(e->name, field[3]);
			put_name(e->class, field[4]);
			e->type = (int)strtol(field[5], NULL, 10);
			e->crtime = strtoll(field[6], NULL, 10);
			e->snaptime = strtoll(field[7], NULL, 10);
			e->flags = (int)strtol(field[8], NULL, 0);
			for (size_t i = 0; i < entry_count; i++) {
				entry_t *old = &entries[(hint + i) % entry_count];

				if (!old->used && same_kstat(old, e)) {
					old->used = 1;
					e->kid = old->kid;
					hint = (hint + i + 1) % entry_count;
					kept++;
					break;
				}
			}
			if (e->kid == 0) {
				e->kid = ++last_kid;
				changed = 1;
			}
		} else if (field[0][0] == 'M' && e != NULL) {
			add_member(e, field);
		} else if (field[0][0] == 'R' && e != NULL) {
			e->ndata = (unsigned int)strtoul(field[1], NULL, 10);
			e->raw_size = strlen(field[2]) / 2;
			e->raw = take(e->raw_size + 1);
			for (size_t i = 0; i < e->raw_size; i++) {
				unsigned int byte = 0;

				(void) sscanf(field[2] + 2 * i, "%2x", &byte);
				e->raw[i] = (unsigned char)byte;
			}
		}
	}
	free(text);
	qsort(list, n, sizeof (entry_t), by_kid);
	if (kept != entry_count)
		changed = 1;
	free_entries(entries, entry_count);
	entries = list;
	entry_count = n;
	if (changed && !fresh)
		chain_id++;
}

static void
load_control(void)
{
	char *text = read_file("control", &seen_control), *line, *rest = text;

	free(rules);
	rules = NULL;
	rule_count = 0;
	while (text != NULL && (line = strsep(&rest, "\n")) != NULL) {
		rule_t rule;
		char *field[4] = { "", "", "", "" }, *word, *left = line;
		int fields = 0;

		while (fields < 4 && (word = strsep(&left, "\t")) != NULL)
			field[fields++] = word;
		memset(&rule, 0, sizeof (rule));
		for (rule.kind = 0; rule.kind <= FAIL_UPDATE; rule.kind++)
			if (strcmp(field[0], rule_names[rule.kind]) == 0)
				break;
		if (rule.kind > FAIL_UPDATE)
			continue;
		rule.times = -1;
		if (rule.kind >= CHURN) {
			rule.number = strtol(field[1], NULL, 10);
			if (rule.kind == BUMP && rule.number != bumped) {
				bumped = rule.number;
				chain_id++;
			}
		} else {
			char *colon = strchr(field[1], ':'), *second;

			if (colon == NULL || (second = strchr(colon + 1, ':')) == NULL)
				continue;
			*colon = *second = '\0';
			(void) snprintf(rule.module, sizeof (rule.module), "%s", field[1]);
			(void) snprintf(rule.instance, sizeof (rule.instance), "%s", colon + 1);
			(void) snprintf(rule.name, sizeof (rule.name), "%s", second + 1);
			rule.number = strtol(field[2], NULL, 10);
			if (field[3][0] != '\0')
				rule.times = strtol(field[3], NULL, 10);
			(void) snprintf(rule.file, sizeof (rule.file), "%s", field[2]);
			rule.after = opened > 0 ? opened : 1;
		}
		rules = realloc(rules, (rule_count + 1) * sizeof (rule_t));
		rules[rule_count++] = rule;
	}
	free(text);
}

static int
file_changed(const char *name, const struct stat *seen)
{
	struct stat st;
	char path[4096];

	if (stat(path_of(name, path), &st) != 0)
		return (seen->st_ino != 0);
	return (st.st_ino != seen->st_ino || st.st_size != seen->st_size ||
	    st.st_mtim.tv_sec != seen->st_mtim.tv_sec || st.st_mtim.tv_nsec != seen->st_mtim.tv_nsec);
}

/* Call with the lock held. */
static void
look_again(void)
{
	uint64_t generation = atomic_load(&counter[GENERATION]);
	hrtime_t now = now_ns(CLOCK_MONOTONIC_COARSE);

	if (generation == seen_generation && now - seen_at < 2000000000)
		return;
	seen_generation = generation;
	seen_at = now;
	if (file_changed("kstats", &seen_kstats))
		load_kstats();
	if (file_changed("control", &seen_control))
		load_control();
	atomic_store(&counter[CHAIN_ID], (uint64_t)chain_id);
}

static int
matches(const rule_t *rule, const kstat_t *ks)
{
	char instance[16];

	(void) snprintf(instance, sizeof (instance), "%d", ks->ks_instance);
	return (fnmatch(rule->module, ks->ks_module, 0) == 0 &&
	    fnmatch(rule->instance, instance, 0) == 0 && fnmatch(rule->name, ks->ks_name, 0) == 0);
}

static rule_t *
rule_for(int kind, const kstat_t *ks)
{
	for (size_t i = 0; i < rule_count; i++)
		if (rules[i].kind == kind && rules[i].times != 0 && (ks == NULL || matches(&rules[i], ks)))
			return (&rules[i]);
	return (NULL);
}

static int
hidden(const kstat_t *ks, uint64_t handle)
{
	rule_t *rule;

	if (rule_count == 0)
		return (0);
	if (rule_for(HIDE, ks) != NULL)
		return (1);
	return ((rule = rule_for(LATE, ks)) != NULL && handle <= rule->after);
}

/* --- made-up kstats ------------------------------------------------------------------------------ */

#define	PER_ZONE 20
static const struct { const char *module, *name, *class; const char *members; } synth[PER_ZONE] = {
	/* member names; a leading $ is the zonename, # a value that stays, ! a 32-bit one */
	{ "zones", "@", "zone_misc", "$zonename nsec_user nsec_sys nsec_waitrq !avenrun_1min "
	    "!avenrun_5min !avenrun_15min !forkfail_cap !forkfail_noproc !forkfail_nomem !forkfail_misc "
	    "!mapfail_seglim !nested_interp !init_pid #boot_time" },
	{ "memory_cap", "@", "zone_memory_cap", "$zonename rss #physcap swap #swapcap nover pagedout "
	    "pgpgin anonpgin execpgin fspgin anon_alloc_fail n_pf_throttle n_pf_throttle_usec" },
	{ "caps", "cpucaps_zone_%d", "zone_caps", "$zonename #value #baseline #effective usage "
	    "#maxusage #burst_limit_sec bursting_sec below_sec above_sec above_base_sec nwait" },
	{ "zone_vfs", "@", "zone_vfs", "$zonename nread nwritten reads writes rtime wtime rlentime "
	    "wlentime rcnt wcnt 10ms_ops 100ms_ops 1s_ops 10s_ops delay_cnt delay_time" },
	{ "zone_zfs", "@", "zone_zfs", "$zonename nread nwritten reads writes rtime rlentime waittime" },
	{ "link", "z%d_net0", "net", "#ifspeed rbytes64 obytes64 ipackets64 opackets64 !rbytes !obytes "
	    "!ipackets !opackets !ierrors !oerrors !norcvbuf !noxmtbuf !collisions !multircv !multixmt "
	    "!brdcstrcv !brdcstxmt !unknowns !link_state !link_duplex $zonename" },
	{ "tcp", "tcp", "mib2", "!rtoAlgorithm !rtoMin !rtoMax !maxConn !activeOpens !passiveOpens "
	    "!attemptFails !estabResets !currEstab inSegs outSegs !retransSegs !connTableSize !outRsts "
	    "!inErrs !inDupAck !listenDrop !listenDropQ0 !halfOpenDrop !timRetransDrop "
	    "!outSackRetransSegs" },
	{ "caps", "nprocs_zone_%d", "zone_caps", "$zonename usage #value" },
	{ "caps", "lockedmem_zone_%d", "zone_caps", "$zonename usage #value" },
	{ "caps", "swapresv_zone_%d", "zone_caps", "$zonename usage #value" },
	{ "caps", "physicalmem_zone_%d", "zone_caps", "$zonename usage #value" },
	{ "udp", "udp", "mib2", "inDatagrams !inErrors outDatagrams !entrySize" },
	{ "ip", "ip", "mib2", "!forwarding !defaultTTL inReceives !inHdrErrors !inAddrErrors" },
	{ "ip", "icmp", "mib2", "!inMsgs !inErrors !inCksumErrs !inUnknowns !outMsgs" },
	{ "sctp", "sctp", "mib2", "!rtoAlgorithm !currEstab !activeEstab" },
	{ "tcp", "tcpstat", "net", "tcp_time_wait tcp_rput_add_mblk" },
	{ "udp", "udpstat", "net", "udp_ip_send udp_ip_recv" },
	{ "ip", "ipstat", "net", "ip_udp_fannorm ip_tcp_softerror" },
	{ "icmp", "rawip", "mib2", "inDatagrams outDatagrams" },
	{ "icmp", "rawip_stat", "net", "rawip_in" },
};

static void
synth_header(long i, kstat_t *ks)
{
	char text[64];
	long zone = i / PER_ZONE + 1;

	memset(ks, 0, sizeof (*ks));
	ks->ks_type = KSTAT_TYPE_NAMED;
	ks->ks_kid = (kid_t)(i + 1);
	ks->ks_crtime = 40000000000 + i * 1000;
	if (zone <= synth_zones) {
		const char *name = synth[i % PER_ZONE].name;

		put_name(ks->ks_module, synth[i % PER_ZONE].module);
		put_name(ks->ks_class, synth[i % PER_ZONE].class);
		/* Instance 0 for every link, the zone id for the rest: as the kernel does. */
		ks->ks_instance = strcmp(ks->ks_module, "link") == 0 ? 0 : (int)zone;
		if (name[0] == '@')
			(void) snprintf(text, sizeof (text), "%08lx-0000-4000-8000-%012lx", zone, zone);
		else
			(void) snprintf(text, sizeof (text), name, (int)zone);
		put_name(ks->ks_name, text);
	} else {
		if (i == synth_count) {		/* the one that `bump` replaces */
			ks->ks_kid = (kid_t)(synth_count + 1 + bumped);
			ks->ks_crtime += bumped;
		}
		put_name(ks->ks_module, "vmem");
		ks->ks_instance = (int)i;
		(void) snprintf(text, sizeof (text), "kmem_arena_%ld", i);
		put_name(ks->ks_name, text);
		put_name(ks->ks_class, "vmem");
	}
	ks->ks_ndata = 1;
}

static entry_t *
synth_entry(long i)
{
	static entry_t e;		/* under the lock; filled again each time */
	static member_t members[32];
	static char zonename[64];
	kstat_t ks;
	long zone = i / PER_ZONE + 1;
	char list[512], *word, *rest = list;
	uint64_t seconds = (uint64_t)(time(NULL) - synth_start), value = 1;

	synth_header(i, &ks);
	memset(&e, 0, sizeof (e));
	e.kid = ks.ks_kid;
	e.type = KSTAT_TYPE_NAMED;
	e.members = members;
	(void) snprintf(list, sizeof (list), "%s", zone <= synth_zones ?
	    synth[i % PER_ZONE].members : "mem_inuse mem_import mem_total vmem_source alloc free wait fail");
	(void) snprintf(zonename, sizeof (zonename), "%08lx-0000-4000-8000-%012lx", zone, zone);
	while ((word = strsep(&rest, " ")) != NULL && e.ndata < 32) {
		member_t *m = &members[e.ndata++];

		memset(m, 0, sizeof (*m));
		m->type = DATA_UINT64;
		value = value * 31 + (uint64_t)(unsigned char)word[0] + (uint64_t)zone % 97;
		m->value.u = (value % 100000) * (1000 + seconds);
		if (*word == '$') {
			m->type = DATA_STRING;
			m->text = zonename;
			word++;
		} else if (*word == '#') {
			m->value.u = (value % 64 + 1) << 30;
			if (strstr(synth[i % PER_ZONE].name, "cpucaps") != NULL)
				m->value.u = 100 * (value % 8 + 1);
			if (strcmp(word, "#boot_time") == 0)
				m->value.u = (uint64_t)synth_start;
			word++;
		} else if (*word == '!') {
			m->type = DATA_UINT32;
			m->value.u = (uint32_t)(value % 1000 + seconds / 10);
			word++;
		}
		put_name(m->name, word);
	}
	return (&e);
}

/* --- library side -------------------------------------------------------------------------------- */

#define	LIVE 0x6b737461744c4956ULL
#define	DEAD 0x6b73746174444541ULL
#define	QUARANTINE 8192

typedef struct node {
	uint64_t	magic;
	kstat_t		ks;
} node_t;

typedef struct {
	kstat_ctl_t	kc;
	uint64_t	number;
	_Atomic int	calls;
} handle_t;

static node_t *graves[QUARANTINE];	/* freed headers, kept so that a stale read is seen, not UB */
static size_t next_grave;

static void
enter(handle_t *h)
{
	if (atomic_fetch_add(&h->calls, 1) != 0)
		count(OVERLAPS, 1);
}

static void
leave(handle_t *h)
{
	(void) atomic_fetch_sub(&h->calls, 1);
}

/* Call with the lock held. */
static void
free_header(kstat_t *ks)
{
	node_t *node = (node_t *)(void *)((char *)ks - offsetof(node_t, ks));

	give(ks->ks_data);
	memset(ks, 0xdb, sizeof (*ks));
	node->magic = DEAD;
	if (graves[next_grave % QUARANTINE] != NULL) {
		graves[next_grave % QUARANTINE]->magic = 0;
		give(graves[next_grave % QUARANTINE]);
	}
	graves[next_grave++ % QUARANTINE] = node;
	count(HEADERS, -1);
}

static size_t
kernel_count(void)
{
	return (synth_count > 0 ? (size_t)synth_count + 1 : entry_count);
}

static void
kernel_header(size_t i, kstat_t *ks)
{
	entry_t *e;

	if (synth_count > 0) {
		synth_header((long)i, ks);
		return;
	}
	e = &entries[i];
	memset(ks, 0, sizeof (*ks));
	ks->ks_crtime = e->crtime;
	ks->ks_kid = e->kid;
	memcpy(ks->ks_module, e->module, KSTAT_STRLEN);
	ks->ks_instance = e->instance;
	memcpy(ks->ks_name, e->name, KSTAT_STRLEN);
	ks->ks_type = (unsigned char)e->type;
	memcpy(ks->ks_class, e->class, KSTAT_STRLEN);
	ks->ks_flags = (unsigned char)e->flags;
	ks->ks_ndata = e->ndata;
}

/* The merge of the real library: what does not match at its place is freed, the rest is made again. */
static void
merge(handle_t *h)
{
	kstat_t **tail = &h->kc.kc_chain, *old = h->kc.kc_chain, *next, header;
	size_t i = 0, n = kernel_count();
	int everything = rule_for(CHURN, NULL) != NULL;

	for (; old != NULL; old = next) {
		next = old->ks_next;
		while (i < n && (kernel_header(i, &header), hidden(&header, h->number)))
			i++;
		if (!everything && i < n && header.ks_kid == old->ks_kid) {
			*tail = old;
			tail = &old->ks_next;
			i++;
		} else {
			free_header(old);
		}
	}
	for (; i < n; i++) {
		node_t *node;

		kernel_header(i, &header);
		if (hidden(&header, h->number))
			continue;
		node = take(sizeof (node_t));
		node->magic = LIVE;
		node->ks = header;
		*tail = &node->ks;
		tail = &node->ks.ks_next;
		count(HEADERS, 1);
	}
	*tail = NULL;
	h->kc.kc_chain_id = chain_id;
	count(REBUILDS, 1);
}

kstat_ctl_t *
kstat_open(void)
{
	handle_t *h;
	rule_t *rule;

	(void) pthread_mutex_lock(&kernel);
	look_again();
	if ((rule = rule_for(FAIL_OPEN, NULL)) != NULL || (entries == NULL && synth_count == 0)) {
		(void) pthread_mutex_unlock(&kernel);
		errno = rule != NULL ? (int)rule->number : ENOENT;
		return (NULL);
	}
	h = take(sizeof (handle_t));
	h->number = ++opened;
	h->kc.kc_kd = open("/dev/null", O_RDONLY);
	merge(h);
	count(OPENS, 1);
	(void) pthread_mutex_unlock(&kernel);
	return (&h->kc);
}

int
kstat_close(kstat_ctl_t *kc)
{
	handle_t *h = (handle_t *)(void *)kc;
	kstat_t *ks, *next;

	enter(h);
	(void) pthread_mutex_lock(&kernel);
	for (ks = kc->kc_chain; ks != NULL; ks = next) {
		next = ks->ks_next;
		free_header(ks);
	}
	(void) close(kc->kc_kd);
	count(CLOSES, 1);
	give(h);
	(void) pthread_mutex_unlock(&kernel);
	return (0);
}

kid_t
kstat_chain_update(kstat_ctl_t *kc)
{
	handle_t *h = (handle_t *)(void *)kc;
	kid_t result = 0;
	rule_t *rule;

	enter(h);
	(void) pthread_mutex_lock(&kernel);
	count(UPDATES, 1);
	look_again();
	if (rule_for(CHURN, NULL) != NULL)
		chain_id++;
	if ((rule = rule_for(FAIL_UPDATE, NULL)) != NULL) {
		errno = (int)rule->number;
		result = -1;
	} else if (kc->kc_chain_id != chain_id) {
		merge(h);
		result = chain_id;
	}
	(void) pthread_mutex_unlock(&kernel);
	leave(h);
	return (result);
}

static entry_t *
entry_of(const kstat_t *ks)
{
	size_t low = 0, high = entry_count;

	if (synth_count > 0) {
		if (ks->ks_kid > synth_count)
			return (ks->ks_kid == synth_count + 1 + bumped ? synth_entry(synth_count) : NULL);
		return (synth_entry(ks->ks_kid - 1));
	}
	while (low < high) {
		size_t middle = (low + high) / 2;

		if (entries[middle].kid < ks->ks_kid)
			low = middle + 1;
		else
			high = middle;
	}
	return (low < entry_count && entries[low].kid == ks->ks_kid ? &entries[low] : NULL);
}

static uint64_t
io_member(const entry_t *e, const char *name)
{
	for (unsigned int i = 0; e->members != NULL && i < e->ndata; i++)
		if (strcmp(e->members[i].name, name) == 0)
			return (e->members[i].value.u);
	return (0);
}

static void
fill(kstat_t *ks, const entry_t *e)
{
	size_t size = e->raw_size, text = 0;

	if (e->type == KSTAT_TYPE_IO)
		size = sizeof (kstat_io_t);
	if (e->type == KSTAT_TYPE_NAMED) {
		for (unsigned int i = 0; i < e->ndata; i++)
			if (e->members[i].type == DATA_STRING)
				text += strlen(e->members[i].text) + 1;
		size = e->ndata * sizeof (kstat_named_t) + text;
	}
	if (ks->ks_data == NULL || ks->ks_data_size != size) {
		give(ks->ks_data);
		ks->ks_data = take(size + 1);
	}
	ks->ks_data_size = size;
	ks->ks_ndata = e->type == KSTAT_TYPE_IO ? 1 : e->ndata;
	if (e->type == KSTAT_TYPE_IO) {
		kstat_io_t *io = ks->ks_data;

		io->nread = io_member(e, "nread");
		io->nwritten = io_member(e, "nwritten");
		io->reads = (uint32_t)io_member(e, "reads");
		io->writes = (uint32_t)io_member(e, "writes");
		io->wtime = (hrtime_t)io_member(e, "wtime");
		io->wlentime = (hrtime_t)io_member(e, "wlentime");
		io->wlastupdate = (hrtime_t)io_member(e, "wlastupdate");
		io->rtime = (hrtime_t)io_member(e, "rtime");
		io->rlentime = (hrtime_t)io_member(e, "rlentime");
		io->rlastupdate = (hrtime_t)io_member(e, "rlastupdate");
		io->wcnt = (uint32_t)io_member(e, "wcnt");
		io->rcnt = (uint32_t)io_member(e, "rcnt");
	} else if (e->type == KSTAT_TYPE_NAMED) {
		kstat_named_t *named = ks->ks_data;
		char *strings = (char *)&named[e->ndata];

		memset(named, 0, e->ndata * sizeof (kstat_named_t));
		for (unsigned int i = 0; i < e->ndata; i++) {
			const member_t *m = &e->members[i];

			memcpy(named[i].name, m->name, KSTAT_STRLEN);
			named[i].data_type = m->type == DATA_NULL ? DATA_STRING : m->type;
			switch (m->type) {
			case DATA_CHAR:
				for (size_t c = 0; c < 16 && m->text[c] != '\0'; c++)
					named[i].value.c[c] = m->text[c];
				break;
			case DATA_STRING:
				named[i].value.str.addr = strings;
				named[i].value.str.len = (uint32_t)strlen(m->text) + 1;
				strcpy(strings, m->text);
				strings += strlen(m->text) + 1;
				break;
			case DATA_INT32: named[i].value.i32 = (int32_t)m->value.i; break;
			case DATA_UINT32: named[i].value.ui32 = (uint32_t)m->value.u; break;
			case DATA_FLOAT: named[i].value.f = (float)m->value.d; break;
			case DATA_DOUBLE: named[i].value.d = m->value.d; break;
			case DATA_NULL: break;
			default: named[i].value.ui64 = m->value.u;
			}
		}
	} else if (size > 0) {
		memcpy(ks->ks_data, e->raw, size);
	}
	ks->ks_snaptime = e->snaptime != 0 ? e->snaptime : now_ns(CLOCK_MONOTONIC);
}

static void
log_read(const kstat_t *ks)
{
	static int fd = -2;		/* under the lock */
	char path[4096], line[128];
	int length;

	if (fd == -2)
		fd = open(path_of("reads", path), O_WRONLY | O_APPEND | O_CLOEXEC);
	if (fd < 0)
		return;
	length = snprintf(line, sizeof (line), "%s:%d:%s\n", ks->ks_module, ks->ks_instance, ks->ks_name);
	if (write(fd, line, (size_t)length) < 0)
		fd = -1;
}

/* Waits outside the lock while a `block` line names the kstat. */
static void
wait_until_released(const kstat_t *ks)
{
	struct timespec tick = { 0, 5000000 };
	rule_t *rule;

	if ((rule = rule_for(DELAY, ks)) != NULL) {
		struct timespec delay = { rule->number / 1000, rule->number % 1000 * 1000000 };

		(void) pthread_mutex_unlock(&kernel);
		(void) nanosleep(&delay, NULL);
		(void) pthread_mutex_lock(&kernel);
	}
	if (rule_for(BLOCK, ks) == NULL)
		return;
	count(BLOCKED, 1);
	while (rule_for(BLOCK, ks) != NULL) {
		(void) pthread_mutex_unlock(&kernel);
		(void) nanosleep(&tick, NULL);
		(void) pthread_mutex_lock(&kernel);
		look_again();
	}
	count(BLOCKED, -1);
}

kid_t
kstat_read(kstat_ctl_t *kc, kstat_t *ks, void *data)
{
	handle_t *h = (handle_t *)(void *)kc;
	node_t *node = (node_t *)(void *)((char *)ks - offsetof(node_t, ks));
	kid_t result = -1;
	int error = 0;
	entry_t *e;
	rule_t *rule;

	enter(h);
	(void) pthread_mutex_lock(&kernel);
	count(READS, 1);
	look_again();
	if (node->magic != LIVE) {
		count(STALE, 1);
		error = EFAULT;
	} else {
		log_read(ks);
		if (rule_count > 0) {
			if ((rule = rule_for(SWITCH, ks)) != NULL) {
				char from[4096], to[4096];

				rule->times = 0;
				(void) rename(path_of(rule->file, from), path_of("kstats", to));
				load_kstats();
			}
			wait_until_released(ks);
		}
		if ((rule = rule_count > 0 ? rule_for(FAIL, ks) : NULL) != NULL) {
			error = (int)rule->number;
			if (rule->times > 0)
				rule->times--;
		} else if ((e = entry_of(ks)) == NULL || hidden(ks, h->number)) {
			error = ENXIO;
		} else {
			fill(ks, e);
			if (data != NULL)
				memcpy(data, ks->ks_data, ks->ks_data_size);
			result = chain_id;
		}
	}
	if (error != 0)
		count(FAILED, 1);
	(void) pthread_mutex_unlock(&kernel);
	leave(h);
	if (error != 0)
		errno = error;
	return (result);
}

kid_t
kstat_write(kstat_ctl_t *kc, kstat_t *ks, void *data)
{
	(void) kc, (void) ks, (void) data;
	errno = EPERM;
	return (-1);
}

kstat_t *
kstat_lookup(kstat_ctl_t *kc, char *module, int instance, char *name)
{
	kstat_t *ks;

	enter((handle_t *)(void *)kc);
	count(LOOKUPS, 1);
	for (ks = kc->kc_chain; ks != NULL; ks = ks->ks_next)
		if ((module == NULL || strcmp(module, ks->ks_module) == 0) &&
		    (instance == -1 || instance == ks->ks_instance) &&
		    (name == NULL || strcmp(name, ks->ks_name) == 0))
			break;
	leave((handle_t *)(void *)kc);
	if (ks == NULL)
		errno = ENOENT;
	return (ks);
}

void *
kstat_data_lookup(kstat_t *ks, char *name)
{
	kstat_named_t *named = ks->ks_data;

	if (ks->ks_type != KSTAT_TYPE_NAMED && ks->ks_type != KSTAT_TYPE_TIMER) {
		errno = EINVAL;
		return (NULL);
	}
	for (unsigned int i = 0; ks->ks_type == KSTAT_TYPE_NAMED && named != NULL && i < ks->ks_ndata; i++)
		if (strcmp(named[i].name, name) == 0)
			return (&named[i]);
	errno = ENOENT;
	return (NULL);
}

/* SPDX-License-Identifier: MPL-2.0 */
/*
 * Load generator: one thread, one epoll, keep-alive connections, plain or TLS.
 *
 *     load HOST PORT CONNECTIONS SECONDS REQUESTS [tls CERT KEY] [close] [idle] [window=N] [count=N]
 *
 * REQUESTS is a file of whole requests, separated by NUL bytes. Each connection cycles through
 * them, starting at a different one. close: one connection per request (with tls, a full
 * handshake each). idle: each connection sends one request and stays open until stdin ends.
 * window=N: open at most N connections ahead of the responses (256). count=N: stop after N
 * responses. Responses need a Content-Length. Prints one JSON object.
 *
 * In C, so that the generator is not slower than the servers. libssl's functions are declared
 * here because its headers, unlike the library, are not installed everywhere.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct ssl_st SSL;
typedef struct ssl_ctx_st SSL_CTX;
extern const void *TLS_client_method(void);
extern SSL_CTX *SSL_CTX_new(const void *);
extern int SSL_CTX_use_certificate_chain_file(SSL_CTX *, const char *);
extern int SSL_CTX_use_PrivateKey_file(SSL_CTX *, const char *, int);
extern void SSL_CTX_set_verify(SSL_CTX *, int, void *);
extern SSL *SSL_new(SSL_CTX *);
extern int SSL_set_fd(SSL *, int);
extern int SSL_connect(SSL *), SSL_read(SSL *, void *, int), SSL_write(SSL *, const void *, int);
extern int SSL_get_error(const SSL *, int), SSL_shutdown(SSL *);
extern void SSL_free(SSL *);
#define	WANT_READ 2
#define	WANT_WRITE 3

enum state { CONNECTING, SHAKING, WRITING, READING, HOLDING };

typedef struct {
	int fd;
	enum state state;
	SSL *ssl;
	size_t next, sent, have, room, need;	/* need: size of the response, 0 until its head is complete */
	char *buffer;
	int status;
	double began;
} connection_t;

static int epoll, keep = 1, idle;
static SSL_CTX *tls;
static struct sockaddr_in address;
static char **requests;
static size_t *lengths, request_count;
static uint64_t done, errors, refused, bytes, open_now;
static float *latencies;
static size_t latency_count, latency_room;
static double deadline;
static uint64_t most = UINT64_MAX;

static double
now(void)
{
	struct timespec ts;

	(void) clock_gettime(CLOCK_MONOTONIC, &ts);
	return ((double)ts.tv_sec + (double)ts.tv_nsec / 1e9);
}

static void
wait_for(connection_t *c, uint32_t events, int add)
{
	struct epoll_event event = { .events = events, .data.ptr = c };

	(void) epoll_ctl(epoll, add ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, c->fd, &event);
}

static void step(connection_t *c);

static void
begin(connection_t *c)
{
	int one = 1;

	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (c->fd < 0) {
		perror("socket");
		exit(1);
	}
	(void) setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof (one));
	c->began = now();
	c->state = CONNECTING;
	c->sent = c->have = c->need = 0;
	(void) connect(c->fd, (struct sockaddr *)&address, sizeof (address));
	wait_for(c, EPOLLOUT, 1);
}

static void
end(connection_t *c)
{
	if (c->ssl != NULL) {
		(void) SSL_shutdown(c->ssl);
		SSL_free(c->ssl);
		c->ssl = NULL;
	}
	/* RST instead of TIME_WAIT: ten thousand closes a second would use up the ports. */
	if (!keep && tls == NULL)
		(void) setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 },
		    sizeof (struct linger));
	(void) close(c->fd);
}

static void
fail(connection_t *c)
{
	errors++;
	end(c);
	if (now() < deadline)
		begin(c);
}

/* Read the status and, from Content-Length, the size of the response; 0 without one. */
static int
measure(connection_t *c, size_t head)
{
	char *line = memmem(c->buffer, head, "\r\n", 2);

	c->status = atoi(c->buffer + 9);
	while (line != NULL && line + 2 < c->buffer + head) {
		line += 2;
		if (strncasecmp(line, "content-length:", 15) == 0) {
			c->need = head + (size_t)strtoul(line + 15, NULL, 10);
			return (1);
		}
		line = memmem(line, (size_t)(c->buffer + head - line), "\r\n", 2);
	}
	return (0);
}

static int
want(connection_t *c, int result)
{
	int error = c->ssl != NULL ? SSL_get_error(c->ssl, result) : 0;

	if (c->ssl != NULL ? error == WANT_READ : errno == EAGAIN && c->state == READING) {
		wait_for(c, EPOLLIN, 0);
		return (1);
	}
	if (c->ssl != NULL ? error == WANT_WRITE : errno == EAGAIN) {
		wait_for(c, EPOLLOUT, 0);
		return (1);
	}
	return (0);
}

static void
finish(connection_t *c)
{
	double at = now();

	if (latency_count == latency_room) {
		latency_room = latency_room ? latency_room * 2 : 65536;
		latencies = realloc(latencies, latency_room * sizeof (float));
	}
	latencies[latency_count++] = (float)(at - c->began);
	if (++done >= most)
		deadline = 0;
	bytes += c->need;
	if (c->status != 200)
		refused++;
	c->have = c->need = c->sent = 0;
	c->next = (c->next + 1) % request_count;
	if (idle) {
		c->state = HOLDING;
		open_now++;
		free(c->buffer);
		c->buffer = NULL;
		c->room = 0;
		wait_for(c, EPOLLIN, 0);
	} else if (!keep) {
		end(c);
		if (at < deadline)
			begin(c);
	} else if (at < deadline) {
		c->began = at;
		c->state = WRITING;
		step(c);
	}
}

static void
step(connection_t *c)
{
	for (;;) {
		int result;
		socklen_t size = sizeof (result);
		char *head;

		switch (c->state) {
		case CONNECTING:
			if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &result, &size) != 0 || result != 0) {
				fail(c);
				return;
			}
			c->state = WRITING;
			if (tls != NULL) {
				c->ssl = SSL_new(tls);
				(void) SSL_set_fd(c->ssl, c->fd);
				c->state = SHAKING;
			}
			break;
		case SHAKING:
			if ((result = SSL_connect(c->ssl)) != 1) {
				if (!want(c, result))
					fail(c);
				return;
			}
			c->state = WRITING;
			break;
		case WRITING:
			result = c->ssl != NULL ?
			    SSL_write(c->ssl, requests[c->next] + c->sent, (int)(lengths[c->next] - c->sent)) :
			    (int)send(c->fd, requests[c->next] + c->sent, lengths[c->next] - c->sent, MSG_NOSIGNAL);
			if (result <= 0) {
				if (!want(c, result))
					fail(c);
				return;
			}
			c->sent += (size_t)result;
			if (c->sent == lengths[c->next]) {
				c->state = READING;
				wait_for(c, EPOLLIN, 0);
				return;
			}
			break;
		case READING:
			if (c->have == c->room) {
				c->room = c->room ? c->room * 2 : 32768;
				c->buffer = realloc(c->buffer, c->room + 1);
			}
			result = c->ssl != NULL ?
			    SSL_read(c->ssl, c->buffer + c->have, (int)(c->room - c->have)) :
			    (int)recv(c->fd, c->buffer + c->have, c->room - c->have, 0);
			if (result <= 0) {
				if (!want(c, result))
					fail(c);
				return;
			}
			c->have += (size_t)result;
			c->buffer[c->have] = '\0';
			if (c->need == 0 && (head = memmem(c->buffer, c->have, "\r\n\r\n", 4)) != NULL &&
			    !measure(c, (size_t)(head - c->buffer) + 4)) {
				fail(c);
				return;
			}
			if (c->need != 0 && c->have >= c->need) {
				finish(c);
				return;
			}
			break;
		case HOLDING:		/* the server closed the connection */
			open_now--;
			errors++;
			(void) epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
			return;
		}
	}
}

static int
by_value(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;

	return ((x > y) - (x < y));
}

static double
percentile(double share)
{
	if (latency_count == 0)
		return (0);
	return ((double)latencies[(size_t)(share * (double)(latency_count - 1))] * 1e3);
}

static void
report(double elapsed)
{
	struct rusage usage;

	(void) getrusage(RUSAGE_SELF, &usage);
	qsort(latencies, latency_count, sizeof (float), by_value);
	printf("{\"requests\": %lu, \"seconds\": %.3f, \"rate\": %.1f, \"errors\": %lu, \"refused\": %lu, "
	    "\"bytes\": %lu, \"p50\": %.4f, \"p99\": %.4f, \"max\": %.4f, \"cpu\": %.3f, \"open\": %lu}\n",
	    done, elapsed, (double)done / elapsed, errors, refused, bytes, percentile(0.5),
	    percentile(0.99), percentile(1.0),
	    (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
	    (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6, open_now);
	(void) fflush(stdout);
}

int
main(int argc, char **argv)
{
	size_t count, size = 0, at = 0, started = 0, window = 256;
	connection_t *connections;
	double began;
	char *text;
	FILE *file;
	struct rlimit limit;

	if (argc < 6) {
		(void) fprintf(stderr, "usage: load HOST PORT CONNECTIONS SECONDS REQUESTS [tls CERT KEY] "
		    "[close] [idle] [window=N] [count=N]\n");
		return (2);
	}
	(void) getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	(void) setrlimit(RLIMIT_NOFILE, &limit);
	address.sin_family = AF_INET;
	address.sin_port = htons((uint16_t)atoi(argv[2]));
	(void) inet_pton(AF_INET, argv[1], &address.sin_addr);
	count = strtoul(argv[3], NULL, 10);
	for (int i = 6; i < argc; i++) {
		if (strcmp(argv[i], "tls") == 0 && i + 2 < argc) {
			tls = SSL_CTX_new(TLS_client_method());
			SSL_CTX_set_verify(tls, 0, NULL);
			if (SSL_CTX_use_certificate_chain_file(tls, argv[i + 1]) != 1 ||
			    SSL_CTX_use_PrivateKey_file(tls, argv[i + 2], 1) != 1) {
				(void) fprintf(stderr, "load: bad certificate or key\n");
				return (1);
			}
			i += 2;
		} else if (strcmp(argv[i], "close") == 0) {
			keep = 0;
		} else if (strcmp(argv[i], "idle") == 0) {
			idle = 1;
		} else if (strncmp(argv[i], "window=", 7) == 0) {
			window = strtoul(argv[i] + 7, NULL, 10);
		} else if (strncmp(argv[i], "count=", 6) == 0) {
			most = strtoul(argv[i] + 6, NULL, 10);
		}
	}
	if ((file = fopen(argv[5], "rb")) == NULL) {
		perror(argv[5]);
		return (1);
	}
	(void) fseek(file, 0, SEEK_END);
	size = (size_t)ftell(file);
	rewind(file);
	text = malloc(size + 1);
	if (fread(text, 1, size, file) != size)
		return (1);
	text[size] = '\0';
	while (at < size) {
		requests = realloc(requests, (request_count + 1) * sizeof (char *));
		lengths = realloc(lengths, (request_count + 1) * sizeof (size_t));
		requests[request_count] = text + at;
		lengths[request_count] = strlen(text + at);
		at += lengths[request_count++] + 1;
	}
	epoll = epoll_create1(EPOLL_CLOEXEC);
	connections = calloc(count, sizeof (connection_t));
	began = now();
	deadline = began + strtod(argv[4], NULL);
	for (;;) {
		struct epoll_event events[256];
		int n;

		/* Not all at once: thousands of connects would measure the backlog. */
		while (started < count && started < done + window) {
			connections[started].next = started * request_count / count;
			begin(&connections[started++]);
		}
		if (idle ? open_now + errors >= count : now() >= deadline)
			break;
		if (idle && now() >= deadline)
			break;
		n = epoll_wait(epoll, events, 256, 100);
		for (int i = 0; i < n; i++)
			step(events[i].data.ptr);
	}
	report(now() - began);
	if (idle) {
		char byte;

		while (read(0, &byte, 1) > 0)
			continue;
		for (size_t i = 0; i < started; i++)
			end(&connections[i]);
	}
	return (0);
}

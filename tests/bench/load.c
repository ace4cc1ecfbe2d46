/* A closed-loop HTTP/1.1 load generator.

     load --port P --request FILE --connections C  (--requests N | --seconds S) [--warmup N] [--once] [--ramp MS]
          [--numbers FROM] [--keys K] [--timeout S]

   FILE is one raw request to 127.0.0.1. Each run of exactly 12 @ in it becomes, in every request, 12 digits that
   never come twice (FROM, FROM + 1, ...; without --numbers from the clock's microseconds). Each connection sends,
   reads the whole answer, and sends again; one that was closed is opened anew. --once: each makes one request.
   Each run of exactly 12 # becomes one of 0 to K - 1 by turns, not in their order: the key of a caller.
   --ramp: the connections begin spread over that time. --warmup: so many requests before, which are not counted.

   Prints one JSON object. latency_us: from the first byte sent to the last one read, of every whole answer
   whatever its status; first_us: to the first byte of the body (of its first chunk's data). An error is an answer
   that is cut or does not come; errors_by says which. A request on a used connection that ends with no byte of an
   answer is tried once more on a new one (the server may have closed it while idle), and counted in "reopened".

   One thread, edge-triggered epoll. Bodies that nobody looks at are dropped in the kernel, not copied. */

#include "wire.h"

#include <sys/uio.h>

enum {
    SPOTS = 256,            /* runs of @ and # in a request */
    DIGITS = 12,
    STRIDE = 7919,          /* a prime: from one key to the next */
    OPENED = 256,           /* connections begun between two looks at events */
    SAMPLE = 2000,
};

enum state { CLOSED, CONNECTING, IDLE, BUSY };
enum part { IN_HEAD, IN_LENGTH, IN_CHUNKS, UNTIL_CLOSE };
enum error { CONNECT, CUT, TIMEOUT, ERRORS };

struct conn {
    struct conn *before, *after;   /* of those with a request, the oldest first */
    struct conn *next_later;
    int fd;
    uint32_t generation, kept;
    uint64_t sent, number, left;   /* left: of a body with a length */
    struct chunks chunks;
    int64_t begun_ns, started_ns, first_ns;
    int16_t status;
    uint8_t state, part;
    bool used, answering, closes, retried, broken;
    char head[HEAD];
};

struct samples {
    int64_t *ns;
    size_t count, room;
};

static struct sockaddr_in target = {.sin_family = AF_INET};
static struct conn *conns;
static uint64_t connections, requests, warmup, ramp_ms, next_number, timeout_s = 700, keys = 1;
static double seconds;
static bool once;

static const char *request;
static uint64_t request_size, spots[SPOTS];
static int spot_count;

/* The phase: the warmup, then what is counted. */
static uint64_t to_issue, issued, active, slots;
static int64_t phase_ns, end_ns, last_ns;
static bool counted;
static struct conn *oldest, *newest, *later, **later_end = &later;

static uint64_t whole, errors[ERRORS], statuses[1000], bytes_in, bytes_out, reopened;
static struct samples latencies, firsts;
static char sample[SAMPLE];
static size_t sample_size;
static struct conn *sampled;      /* whose answer is copied to sample */
static bool has_sample;

static int epoll_fd;

static void begin(struct conn *c);

static void keep(struct samples *s, int64_t ns)
{
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 1 << 16;
        s->ns = realloc(s->ns, s->room * sizeof *s->ns);
        if (!s->ns)
            die("no memory");
    }
    s->ns[s->count++] = ns;
}

static void disconnect(struct conn *c)
{
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->state = CLOSED;
    c->generation++;
}

/* The request is done with, well or not. */
static void settle(struct conn *c)
{
    *(c->before ? &c->before->after : &oldest) = c->after;
    *(c->after ? &c->after->before : &newest) = c->before;
    active--;
    last_ns = now_ns();
    if (sampled == c)
        sampled = NULL;
}

static void fail(struct conn *c, enum error why)
{
    if (counted)
        errors[why]++;
    disconnect(c);
    settle(c);
    if (once && counted)
        return;
    c->next_later = NULL; /* not at once: where nothing can be reached this would never return */
    *later_end = c;
    later_end = &c->next_later;
}

static void succeed(struct conn *c)
{
    settle(c);
    if (counted) {
        whole++;
        statuses[c->status]++;
        keep(&latencies, last_ns - c->started_ns);
        keep(&firsts, (c->first_ns ? c->first_ns : last_ns) - c->started_ns);
    }
    c->used = true;
    c->state = IDLE;
    if (c->closes || c->sent < request_size || (once && counted))
        disconnect(c);
    if (!once || !counted)
        begin(c);
}

static void write_digits(char *to, uint64_t value)
{
    for (int i = DIGITS - 1; i >= 0; i--, value /= 10)
        to[i] = (char)('0' + value % 10);
}

/* What of the request is still to be sent, with its numbers. Returns the number of parts. */
static int parts_of(const struct conn *c, struct iovec *parts)
{
    static char digits[SPOTS][DIGITS];
    int count = 0;
    uint64_t at = c->sent;
    for (int i = 0; i < spot_count; i++) {
        uint64_t spot = spots[i];
        if (at >= spot + DIGITS)
            continue;
        if (at < spot) {
            parts[count++] = (struct iovec){(char *)request + at, spot - at};
            at = spot;
        }
        bool is_key = request[spot] == '#';
        uint64_t turn = c->number / (uint64_t)spot_count % keys;
        write_digits(digits[i], is_key ? turn * STRIDE % keys : c->number + (uint64_t)i);
        parts[count++] = (struct iovec){digits[i] + (at - spot), spot + DIGITS - at};
        at = spot + DIGITS;
    }
    if (at < request_size)
        parts[count++] = (struct iovec){(char *)request + at, request_size - at};
    return count;
}

static void push(struct conn *c)
{
    struct iovec parts[2 * SPOTS + 1];
    while (c->sent < request_size && !c->broken) {
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)parts_of(c, parts)};
        if (!c->started_ns)
            c->started_ns = now_ns();
        ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            c->broken = errno != EAGAIN; /* an answer may have come before: reading will tell */
            return;
        }
        c->sent += (uint64_t)n;
        if (counted)
            bytes_out += (uint64_t)n;
    }
}

static void send_request(struct conn *c)
{
    c->state = BUSY;
    c->part = IN_HEAD;
    c->sent = c->kept = 0;
    c->first_ns = 0;
    c->answering = c->closes = c->broken = false;
    push(c);
}

static void open_connection(struct conn *c)
{
    int one = 1;
    c->used = false;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("a socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&target, sizeof target) && errno != EINPROGRESS) {
        fail(c, CONNECT);
        return;
    }
    c->state = CONNECTING;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                            .data.u64 = (uint64_t)c->generation << 32 | (uint64_t)(c - conns)};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &e))
        die("epoll_ctl");
}

/* Makes the next request, if there is one to make. */
static void begin(struct conn *c)
{
    if (issued >= to_issue || (end_ns && now_ns() >= end_ns))
        return;
    issued++;
    active++;
    c->retried = false;
    c->number = next_number;
    next_number += (uint64_t)spot_count;
    c->started_ns = 0;
    c->begun_ns = now_ns();
    c->after = NULL;
    c->before = newest;
    *(newest ? &newest->after : &oldest) = c;
    newest = c;
    if (c->state == IDLE)
        send_request(c);
    else
        open_connection(c);
}

/* The connection has ended, or failed. */
static void lost(struct conn *c, bool in_order)
{
    if (c->state == IDLE) {
        disconnect(c);
    } else if (c->state == CONNECTING) {
        fail(c, CONNECT);
    } else if (in_order && c->part == UNTIL_CLOSE) {
        c->closes = true;
        succeed(c);
    } else if (c->used && !c->answering && !c->retried) {
        c->retried = true;
        if (counted)
            reopened++;
        disconnect(c);
        open_connection(c);
    } else {
        fail(c, CUT);
    }
}

/* Returns whether it is the head of an answer. One with a status below 200 is passed over. */
static bool read_head(struct conn *c, const char *head, const char *end)
{
    if (end - head < 13 || strncmp(head, "HTTP/1.", 7))
        return false;
    c->status = (int16_t)((head[9] - '0') * 100 + (head[10] - '0') * 10 + (head[11] - '0'));
    if (c->status < 100 || c->status > 999)
        return false;
    if (c->status < 200)
        return true;
    bool none = c->status == 204 || c->status == 304;
    c->closes = head[7] == '0';
    c->part = UNTIL_CLOSE;
    c->left = 0;
    const char *value, *stop, *line = memchr(head, '\n', (size_t)(end - head)) + 1;
    for (; line < end; line = stop + 1) {
        stop = memchr(line, '\n', (size_t)(end - line));
        switch (*line | 0x20) {
        case 'c':
            if (c->part != IN_CHUNKS && is(line, stop, "content-length:", &value)) {
                c->part = IN_LENGTH;
                c->left = strtoull(value, NULL, 10);
            } else if (is(line, stop, "connection:", &value)) {
                c->closes = says(value, stop, "close");
            }
            break;
        case 't':
            if (is(line, stop, "transfer-encoding:", &value) && says(value, stop, "chunked"))
                c->part = IN_CHUNKS;
            break;
        }
    }
    if (none)
        c->part = IN_LENGTH;
    if (none)
        c->left = 0;
    c->chunks = (struct chunks){0};
    if (c->status != 200 && counted && !has_sample) {
        has_sample = true;
        sampled = c;
        sample_size = (size_t)(end - head) < SAMPLE ? (size_t)(end - head) : SAMPLE;
        memcpy(sample, head, sample_size);
    }
    return true;
}

/* Reads what came, up to the answer's end. */
static void feed(struct conn *c, const char *at, size_t size)
{
    c->answering = true;
    while (c->part == IN_HEAD) {
        const char *head = at, *end;
        size_t kept = c->kept, used = size;
        if (kept) {
            used = size < HEAD - kept ? size : HEAD - kept;
            memcpy(c->head + kept, at, used);
            head = c->head;
        }
        end = memmem(head, kept + used, "\r\n\r\n", 4);
        if (!end && kept + used < HEAD) {
            if (!kept)
                memcpy(c->head, at, size);
            c->kept = (uint32_t)(kept + used);
            return;
        }
        if (!end || !read_head(c, head, end + 4)) {
            fail(c, CUT);
            return;
        }
        used = (size_t)(end + 4 - head) - kept;
        c->kept = 0;
        at += used;
        size -= used;
    }
    if (sampled == c) {
        size_t n = size < SAMPLE - sample_size ? size : SAMPLE - sample_size;
        memcpy(sample + sample_size, at, n);
        sample_size += n;
    }
    bool done = false;
    if (c->part == IN_CHUNKS) {
        ssize_t used = walk_chunks(&c->chunks, at, size, &done);
        if (c->chunks.any && !c->first_ns)
            c->first_ns = now_ns();
        if (used < 0) {
            fail(c, CUT);
            return;
        }
        c->closes |= (size_t)used < size; /* more than the answer: who knows what follows */
    } else {
        if (size && !c->first_ns)
            c->first_ns = now_ns();
        if (c->part == IN_LENGTH) {
            c->closes |= size > c->left;
            c->left -= size < c->left ? size : c->left;
            done = !c->left;
        }
    }
    if (done)
        succeed(c);
}

static void read_all(struct conn *c, bool ended)
{
    uint32_t generation = c->generation;
    while (c->generation == generation) {
        uint64_t left = c->part == IN_LENGTH ? c->left : c->part == IN_CHUNKS ? data_left(&c->chunks) : 0;
        bool dropped = c->state == BUSY && left >= DROPPED && sampled != c;
        size_t most = dropped && left < SCRATCH ? (size_t)left : SCRATCH;
        ssize_t n = recv(c->fd, scratch, most, dropped ? MSG_TRUNC : 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0 || c->state != BUSY) { /* an idle server has nothing to say but its end */
            lost(c, n == 0);
            return;
        }
        if (counted)
            bytes_in += (uint64_t)n;
        feed(c, scratch, (size_t)n);
        if ((size_t)n < most && !ended)
            return; /* nothing is left, and more would be a new event */
    }
}

static void on_event(struct conn *c, uint32_t what)
{
    bool ended = what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
    if (c->state == CONNECTING) {
        if (what & (EPOLLHUP | EPOLLERR))
            fail(c, CONNECT);
        else if (what & EPOLLOUT)
            send_request(c);
    } else if (c->state == BUSY && (what & EPOLLOUT)) {
        push(c);
    }
    if (c->state >= IDLE && (ended || (what & EPOLLIN)))
        read_all(c, ended);
}

/* Runs a phase until all its requests are done with. */
static void run(uint64_t most, bool counts, double seconds_long)
{
    static struct epoll_event events[EVENTS];
    to_issue = most;
    issued = slots = 0;
    counted = counts;
    phase_ns = last_ns = now_ns();
    end_ns = seconds_long > 0 ? phase_ns + (int64_t)(seconds_long * 1e9) : 0;
    for (;;) {
        uint64_t due = connections;
        int64_t passed_ms = (now_ns() - phase_ns) / 1000000;
        if (ramp_ms && (uint64_t)passed_ms < ramp_ms)
            due = connections * (uint64_t)passed_ms / ramp_ms + 1;
        for (int i = 0; i < OPENED && slots < due && slots < connections; i++)
            begin(&conns[slots++]);
        struct conn *again = later;
        later = NULL;
        later_end = &later;
        while (again) {
            struct conn *c = again;
            again = c->next_later;
            begin(c);
        }
        bool more = issued < to_issue && (!end_ns || now_ns() < end_ns);
        if (!active && !(more && (later || slots < connections)))
            return;
        int wait_ms = later || slots < (due < connections ? due : connections) ? 0 : slots < connections ? 1 : 1000;
        int n = epoll_wait(epoll_fd, events, EVENTS, wait_ms);
        for (int i = 0; i < n; i++) {
            struct conn *c = &conns[(uint32_t)events[i].data.u64];
            if (c->generation == (uint32_t)(events[i].data.u64 >> 32) && c->fd >= 0)
                on_event(c, events[i].events);
        }
        int64_t too_old_ns = now_ns() - (int64_t)timeout_s * INT64_C(1000000000);
        while (oldest && oldest->begun_ns <= too_old_ns)
            fail(oldest, TIMEOUT);
    }
}

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void print_samples(const char *name, struct samples *s, const char *after)
{
    static const int cuts[] = {50, 90, 99};
    double sum = 0;
    if (!s->count)
        keep(s, 0);
    qsort(s->ns, s->count, sizeof *s->ns, by_value);
    for (size_t i = 0; i < s->count; i++)
        sum += (double)s->ns[i];
    printf("\"%s\": {\"mean\": %.1f", name, sum / (double)s->count / 1e3);
    for (int i = 0; i < 3; i++) {
        size_t rank = (s->count * (size_t)cuts[i] + 99) / 100; /* the nearest rank */
        printf(", \"p%d\": %.1f", cuts[i], (double)s->ns[rank - 1] / 1e3);
    }
    printf(", \"max\": %.1f, \"min\": %.1f}%s", (double)s->ns[s->count - 1] / 1e3, (double)s->ns[0] / 1e3, after);
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void print_all(double cpu)
{
    const char *between = "";
    printf("{\"requests\": %" PRIu64 ", \"errors\": %" PRIu64 ", ", whole, errors[CONNECT] + errors[CUT] + errors[TIMEOUT]);
    printf("\"errors_by\": {\"connect\": %" PRIu64 ", \"cut\": %" PRIu64 ", \"timeout\": %" PRIu64 "}, \"statuses\": {",
           errors[CONNECT], errors[CUT], errors[TIMEOUT]);
    for (int i = 0; i < 1000; i++)
        if (statuses[i]) {
            printf("%s\"%d\": %" PRIu64, between, i, statuses[i]);
            between = ", ";
        }
    printf("}, \"reopened\": %" PRIu64 ", \"seconds\": %.6f, \"cpu_seconds\": %.6f, ", reopened,
           (double)(last_ns - phase_ns) / 1e9, cpu);
    printf("\"bytes_in\": %" PRIu64 ", \"bytes_out\": %" PRIu64 ", \"head_sample\": ", bytes_in, bytes_out);
    if (!has_sample)
        printf("null");
    else
        putchar('"');
    for (size_t i = 0; has_sample && i < sample_size; i++) {
        unsigned char b = (unsigned char)sample[i];
        if (b == '"' || b == '\\')
            printf("\\%c", b);
        else if (b < 0x20)
            printf("\\u%04x", b);
        else
            putchar(b);
    }
    printf("%s, ", has_sample ? "\"" : "");
    print_samples("latency_us", &latencies, ", ");
    print_samples("first_us", &firsts, "}\n");
}

static void open_request(const char *path)
{
    int fd;
    request = map_file(path, &fd, &request_size);
    close(fd);
    const char *at = request, *end = request + request_size;
    while (at < end) {
        const char *from = at++;
        if (*from != '@' && *from != '#')
            continue;
        while (at < end && *at == *from)
            at++;
        if (at - from != DIGITS)
            continue;
        if (spot_count == SPOTS)
            die("too many runs of @ and #");
        spots[spot_count++] = (uint64_t)(from - request);
    }
}

int main(int count, char **words)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    next_number = ((uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000) % UINT64_C(1000000000000);
    errno = 0;
    uint64_t port = 0;
    for (int i = 1; i < count; i++) {
        const char *name = words[i], *value = words[i + 1];
        if (!strcmp(name, "--once")) {
            once = true;
            continue;
        }
        i++;
        if (!strcmp(name, "--request") && value)
            open_request(value);
        else if (!strcmp(name, "--seconds") && value)
            seconds = strtod(value, NULL);
        else if (!strcmp(name, "--port"))
            port = number(value);
        else if (!strcmp(name, "--connections"))
            connections = number(value);
        else if (!strcmp(name, "--requests"))
            requests = number(value);
        else if (!strcmp(name, "--warmup"))
            warmup = number(value);
        else if (!strcmp(name, "--ramp"))
            ramp_ms = number(value);
        else if (!strcmp(name, "--numbers"))
            next_number = number(value);
        else if (!strcmp(name, "--keys"))
            keys = number(value);
        else if (!strcmp(name, "--timeout"))
            timeout_s = number(value);
        else {
            fprintf(stderr, "load: not understood: %s\n", name);
            return 2;
        }
    }
    errno = 0;
    if (!port || !request || !connections || !keys || (!requests && !(seconds > 0) && !once))
        die("needs --port, --request, --connections, and --requests, --seconds or --once");
    if (connections + 16 > (uint64_t)raise_files())
        die("more connections than files may be open (ulimit -n)");
    target.sin_port = htons((uint16_t)port);
    target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    conns = room_for(connections * sizeof *conns);
    for (uint64_t i = 0; i < connections; i++)
        conns[i].fd = -1;
    if (warmup) {
        uint64_t ramp = ramp_ms;
        ramp_ms = 0;
        run(warmup, false, 0);
        ramp_ms = ramp;
    }
    for (uint64_t i = 0; once && i < connections; i++)
        disconnect(&conns[i]);
    double cpu = cpu_seconds();
    run(once ? connections : requests ? requests : UINT64_MAX, true, once ? 0 : seconds);
    print_all(cpu_seconds() - cpu);
    return 0;
}

/* An HTTP/1.1 upstream that is never the bottleneck: it answers every request with one file.

     mock --control PORT  --port P --reply FILE [--delay MS] [--gather N] [--piece BYTES --gap MS]
                          [--port P2 --reply FILE2 ...]

   Options after a --port belong to it; port 0 takes a free one. FILE is the raw answer: status line, headers,
   body (already chunked, where it says so). The first line on stdout is "listening CONTROL P P2 ...".
   --gather: answers are held until N requests wait, then all go at once; --delay begins after that.
   --piece/--gap: the answer goes out in pieces, with gaps between them.
   GET /stats on the control port tells, per port: requests, bytes_in, bytes_out, now_waiting (whole requests
   whose answer has not begun), connections (open now), accepted (since the start).

   One thread, edge-triggered epoll, nothing allocated after the start. All that waits on a port waits equally
   long, so a queue in order of arrival is a timer: nothing is searched, whatever the number of connections. */

#include "wire.h"

#include <signal.h>
#include <sys/sendfile.h>
#include <sys/timerfd.h>

enum {
    COPIED = 32 * 1024,     /* up to here a copy by send() costs less than sendfile() */
    PORTS = 32,
};

enum state { CLOSED, IN_HEAD, IN_BODY, IN_CHUNKS, WAITING, SENDING, PAUSED };

struct queue {
    struct conn *first, *last;
    uint64_t length;
};

struct port {
    int listener, number, file;
    const char *reply;
    uint64_t size, piece, gather;
    int64_t delay_ns, gap_ns;
    bool closes;               /* the answer's end, or its head, ends the connection */
    struct queue gathered, delayed, paused;
    uint64_t requests, bytes_in, bytes_out, connections, accepted;
};

struct conn {
    struct conn *before, *after;
    struct queue *queue;
    struct port *port;
    int64_t due_ns;
    uint64_t sent, until;      /* of the answer: bytes sent, and where this piece ends */
    uint64_t left;             /* of the request's body */
    struct chunks chunks;      /* of one that comes in chunks */
    uint32_t generation;       /* tells an event of this connection from one of its fd's last */
    uint32_t kept;             /* bytes in head, of one that is not whole yet */
    uint8_t state;
    bool readable, ended, closes;
    char head[HEAD];
};

static struct conn *conns;     /* by fd */
static int most_files;
static struct port ports[PORTS], control;
static int port_count;
static int epoll_fd, timer_fd, spare_fd;
static volatile sig_atomic_t stopped;

static void pump(struct conn *c);

static int fd_of(const struct conn *c) { return (int)(c - conns); }

static void put(struct queue *q, struct conn *c)
{
    c->queue = q;
    c->after = NULL;
    c->before = q->last;
    *(q->last ? &q->last->after : &q->first) = c;
    q->last = c;
    q->length++;
}

static void take_out(struct conn *c)
{
    struct queue *q = c->queue;
    if (!q)
        return;
    *(c->before ? &c->before->after : &q->first) = c->after;
    *(c->after ? &c->after->before : &q->last) = c->before;
    q->length--;
    c->queue = NULL;
}

static void drop(struct conn *c)
{
    take_out(c);
    c->state = CLOSED;
    c->generation++;
    c->port->connections--;
    close(fd_of(c));
}

/* Sends what may be sent now. The connection then reads again, is SENDING, PAUSED or CLOSED. */
static void push(struct conn *c)
{
    struct port *p = c->port;
    c->state = SENDING;
    while (c->sent < c->until) {
        uint64_t n = c->until - c->sent;
        ssize_t sent;
        if (n <= COPIED) {
            sent = send(fd_of(c), p->reply + c->sent, n, MSG_NOSIGNAL);
        } else {
            off_t from = (off_t)c->sent;
            sent = sendfile(fd_of(c), p->file, &from, n);
        }
        if (sent <= 0) {
            if (sent < 0 && errno == EINTR)
                continue;
            if (sent == 0 || errno != EAGAIN)
                drop(c);
            return;
        }
        c->sent += (uint64_t)sent;
        p->bytes_out += (uint64_t)sent;
    }
    if (c->sent < p->size) {
        c->until = p->size - c->sent < p->piece ? p->size : c->sent + p->piece;
        c->due_ns = now_ns() + p->gap_ns;
        c->state = PAUSED;
        put(&p->paused, c);
    } else if (c->closes || p->closes) {
        drop(c);
    } else {
        c->state = IN_HEAD;
    }
}

static void begin_answer(struct conn *c)
{
    c->sent = 0;
    c->until = c->port->piece && c->port->piece < c->port->size ? c->port->piece : c->port->size;
    push(c);
}

static void send_stats(struct conn *c)
{
    static char body[PORTS * 256], answer[PORTS * 256 + 256];
    size_t size = (size_t)snprintf(body, sizeof body, "{\"ports\": {");
    for (int i = 0; i < port_count; i++) {
        const struct port *p = &ports[i];
        size += (size_t)snprintf(
            body + size, sizeof body - size,
            "%s\"%d\": {\"requests\": %" PRIu64 ", \"bytes_in\": %" PRIu64 ", \"bytes_out\": %" PRIu64
            ", \"now_waiting\": %" PRIu64 ", \"connections\": %" PRIu64 ", \"accepted\": %" PRIu64 "}",
            i ? ", " : "", p->number, p->requests, p->bytes_in, p->bytes_out,
            p->gathered.length + p->delayed.length, p->connections, p->accepted);
    }
    int whole = snprintf(answer, sizeof answer,
                         "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n"
                         "connection: close\r\n\r\n%s}}",
                         size + 2, body);
    if (send(fd_of(c), answer, (size_t)whole, MSG_NOSIGNAL) < 0)
        errno = 0; /* who asked has left */
    drop(c);
}

/* The request is whole. */
static void answer(struct conn *c)
{
    struct port *p = c->port;
    if (p == &control) {
        send_stats(c);
        return;
    }
    p->requests++;
    if (!p->gather && !p->delay_ns) {
        begin_answer(c);
        return;
    }
    c->state = WAITING;
    c->due_ns = now_ns() + p->delay_ns;
    if (!p->gather) {
        put(&p->delayed, c);
        return;
    }
    put(&p->gathered, c);
    if (p->gathered.length < p->gather)
        return;
    /* All leave by the queue of delays: the main loop sends them, this one with them. */
    int64_t due_ns = c->due_ns;
    while ((c = p->gathered.first)) {
        take_out(c);
        c->due_ns = due_ns;
        put(&p->delayed, c);
    }
}

static void read_head(struct conn *c, const char *head, const char *end)
{
    bool continues = false;
    const char *value, *line = head, *stop = memchr(head, '\n', (size_t)(end - head));
    c->closes = says(head, stop, "HTTP/1.0");
    c->left = 0;
    c->state = IN_BODY;
    for (line = stop + 1; line < end; line = stop + 1) {
        stop = memchr(line, '\n', (size_t)(end - line));
        if (!stop)
            break;
        switch (*line | 0x20) {
        case 'c':
            if (is(line, stop, "content-length:", &value))
                c->left = strtoull(value, NULL, 10);
            else if (is(line, stop, "connection:", &value))
                c->closes = says(value, stop, "close") || (c->closes && !says(value, stop, "keep-alive"));
            break;
        case 't':
            if (is(line, stop, "transfer-encoding:", &value) && says(value, stop, "chunked"))
                c->state = IN_CHUNKS;
            break;
        case 'e':
            continues |= is(line, stop, "expect:", &value) && says(value, stop, "100-continue");
            break;
        }
    }
    c->chunks = (struct chunks){0};
    if (continues && (c->left || c->state == IN_CHUNKS)) {
        static const char text[] = "HTTP/1.1 100 Continue\r\n\r\n";
        if (send(fd_of(c), text, sizeof text - 1, MSG_NOSIGNAL) > 0)
            c->port->bytes_out += sizeof text - 1;
    }
}

/* Reads what came, and answers whole requests. */
static void feed(struct conn *c, const char *at, size_t size)
{
    while (size && c->state != CLOSED) {
        if (c->state == IN_HEAD) {
            const char *head = at, *end;
            size_t kept = c->kept, used = size;
            if (kept) {
                used = size < HEAD - kept ? size : HEAD - kept;
                memcpy(c->head + kept, at, used);
                c->kept += (uint32_t)used;
                head = c->head;
            }
            end = memmem(head, kept + used, "\r\n\r\n", 4);
            if (!end) {
                if (kept + used >= HEAD) {
                    drop(c);
                    return;
                }
                if (!kept)
                    memcpy(c->head, at, size);
                c->kept = (uint32_t)(kept + used);
                return;
            }
            read_head(c, head, end + 4);
            used = (size_t)(end + 4 - head) - kept;
            c->kept = 0;
            at += used;
            size -= used;
            if (c->state == IN_BODY && !c->left)
                answer(c);
        } else if (c->state == IN_BODY) {
            size_t n = size < c->left ? size : c->left;
            at += n;
            size -= n;
            c->left -= n;
            if (!c->left)
                answer(c);
        } else if (c->state == IN_CHUNKS) {
            bool whole = false;
            ssize_t n = walk_chunks(&c->chunks, at, size, &whole);
            if (n < 0) {
                drop(c);
                return;
            }
            at += n;
            size -= (size_t)n;
            if (whole)
                answer(c);
        } else { /* a request behind one that is not answered yet: nobody here pipelines */
            drop(c);
        }
    }
}

/* Reads while there is something to read and no answer is under way. */
static void pump(struct conn *c)
{
    while (c->state >= IN_HEAD && c->state <= IN_CHUNKS) {
        if (!c->readable)
            return;
        uint64_t left = c->state == IN_BODY ? c->left : c->state == IN_CHUNKS ? data_left(&c->chunks) : 0;
        bool dropped = left >= DROPPED;
        size_t most = dropped && left < SCRATCH ? (size_t)left : SCRATCH;
        ssize_t n = recv(fd_of(c), scratch, most, dropped ? MSG_TRUNC : 0);
        if (n <= 0) {
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0 && errno == EAGAIN) {
                c->readable = false;
                continue;
            }
            drop(c);
            return;
        }
        /* Fewer than asked for: nothing is left, and more would be a new event. */
        if ((size_t)n < most && !c->ended)
            c->readable = false;
        c->port->bytes_in += (uint64_t)n;
        feed(c, scratch, (size_t)n);
    }
    if (c->ended && (c->state == WAITING || c->state == PAUSED))
        drop(c); /* the client has left */
}

/* Lets go whose time has come. Returns when the next one's comes, 0 if none waits. */
static int64_t release(void)
{
    int64_t next_ns = 0;
    for (int i = 0; i < port_count; i++) {
        struct queue *both[] = {&ports[i].delayed, &ports[i].paused};
        for (int k = 0; k < 2; k++) {
            struct conn *c;
            while ((c = both[k]->first) && c->due_ns <= now_ns()) {
                take_out(c);
                if (k == 0)
                    begin_answer(c);
                else
                    push(c);
                pump(c);
            }
            if (c && (!next_ns || c->due_ns < next_ns))
                next_ns = c->due_ns;
        }
    }
    return next_ns;
}

static void watch(int fd, uint32_t events, uint32_t generation)
{
    struct epoll_event e = {.events = events, .data.u64 = (uint64_t)generation << 32 | (uint32_t)fd};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e))
        die("epoll_ctl");
}

static void accept_all(struct port *p)
{
    for (int i = 0; i < EVENTS; i++) {
        int fd = accept4(p->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE) { /* else epoll would tell of it for ever */
                close(spare_fd);
                fd = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC);
                if (fd >= 0)
                    close(fd);
                spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
            }
            return;
        }
        if (fd >= most_files) {
            close(fd);
            continue;
        }
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct conn *c = &conns[fd];
        c->port = p;
        c->state = IN_HEAD;
        c->kept = 0;
        c->readable = c->ended = false;
        p->connections++;
        p->accepted++;
        watch(fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, c->generation);
    }
}

static void listen_on(struct port *p)
{
    int one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)p->number)};
    socklen_t size = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    p->listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(p->listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(p->listener, (struct sockaddr *)&at, sizeof at) || listen(p->listener, 65535) ||
        getsockname(p->listener, (struct sockaddr *)&at, &size))
        die("cannot listen");
    p->number = ntohs(at.sin_port);
    conns[p->listener].port = p;
    watch(p->listener, EPOLLIN, UINT32_MAX);
}

static void open_reply(struct port *p, const char *path)
{
    p->reply = map_file(path, &p->file, &p->size);
    const char *end = memmem(p->reply, p->size, "\r\n\r\n", 4);
    if (!end)
        die("the reply has no end of its head");
    bool sized = false;
    const char *value, *line = p->reply;
    for (; line && line < end + 2; line = memchr(line, '\n', (size_t)(end + 2 - line)), line += !!line) {
        const char *stop = memchr(line, '\n', (size_t)(end + 2 - line));
        sized |= is(line, stop, "content-length:", &value) || is(line, stop, "transfer-encoding:", &value);
        p->closes |= is(line, stop, "connection:", &value) && says(value, stop, "close");
    }
    p->closes |= !sized;
}

static void read_options(int count, char **words)
{
    struct port *p = NULL;
    bool controlled = false;
    for (int i = 1; i < count; i += 2) {
        const char *name = words[i], *value = words[i + 1];
        if (!strcmp(name, "--control")) {
            control.number = (int)number(value);
            controlled = true;
        } else if (!strcmp(name, "--port") && port_count < PORTS) {
            p = &ports[port_count++];
            p->number = (int)number(value);
        } else if (p && value && !strcmp(name, "--reply")) {
            open_reply(p, value);
        } else if (p && !strcmp(name, "--delay")) {
            p->delay_ns = (int64_t)number(value) * 1000000;
        } else if (p && !strcmp(name, "--gather")) {
            p->gather = number(value);
        } else if (p && !strcmp(name, "--piece")) {
            p->piece = number(value);
        } else if (p && !strcmp(name, "--gap")) {
            p->gap_ns = (int64_t)number(value) * 1000000;
        } else {
            fprintf(stderr, "mock: not understood: %s\n", name);
            exit(2);
        }
    }
    if (!controlled || !p)
        die("needs --control, and --port with --reply");
    for (int i = 0; i < port_count; i++)
        if (!ports[i].reply)
            die("a --port has no --reply");
}

static void on_signal(int number) { stopped = number; }

static void arm(int64_t due_ns)
{
    static int64_t armed_ns;
    if (due_ns == armed_ns)
        return;
    struct itimerspec when = {.it_value = {due_ns / 1000000000, due_ns % 1000000000}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
    armed_ns = due_ns;
}

int main(int count, char **words)
{
    most_files = raise_files();
    conns = room_for((size_t)most_files * sizeof *conns);
    read_options(count, words);

    struct sigaction stop = {.sa_handler = on_signal};
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    signal(SIGPIPE, SIG_IGN); /* sendfile() has no MSG_NOSIGNAL */
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    watch(timer_fd, EPOLLIN | EPOLLET, UINT32_MAX);
    listen_on(&control);
    for (int i = 0; i < port_count; i++)
        listen_on(&ports[i]);
    printf("listening %d", control.number);
    for (int i = 0; i < port_count; i++)
        printf(" %d", ports[i].number);
    printf("\n");
    fflush(stdout);

    static struct epoll_event events[EVENTS];
    while (!stopped) {
        int n = epoll_wait(epoll_fd, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = (int)(uint32_t)events[i].data.u64;
            uint32_t generation = (uint32_t)(events[i].data.u64 >> 32), what = events[i].events;
            struct conn *c = &conns[fd];
            if (generation == UINT32_MAX) {
                if (fd != timer_fd)
                    accept_all(c->port);
                continue;
            }
            if (c->generation != generation || c->state == CLOSED)
                continue;
            c->readable |= !!(what & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR));
            c->ended |= !!(what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
            if ((what & EPOLLOUT) && c->state == SENDING)
                push(c);
            pump(c);
        }
        arm(release());
    }
    return 0;
}

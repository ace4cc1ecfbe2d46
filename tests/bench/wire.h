/* What the mock upstream and the load generator have in common: reading HTTP/1.1, options, limits, the clock. */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    SCRATCH = 256 * 1024,
    HEAD = 8 * 1024,        /* the longest head of a request or an answer */
    DROPPED = 16 * 1024,    /* from here on a body is dropped in the kernel, never copied */
    EVENTS = 512,
    MOST_FILES = 65536,
};

static char scratch[SCRATCH];  /* everything is read into it */

static inline void die(const char *what)
{
    fprintf(stderr, "%s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(2);
}

static inline int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static inline uint64_t number(const char *text)
{
    char *end;
    errno = 0;
    uint64_t value = text ? strtoull(text, &end, 10) : 0;
    if (!text || errno || end == text || *end)
        die("an option lacks its whole number");
    return value;
}

/* Allows as many open files as may be, up to MOST_FILES. Returns how many that is. */
static inline int raise_files(void)
{
    struct rlimit files = {MOST_FILES, MOST_FILES};
    if (setrlimit(RLIMIT_NOFILE, &files)) { /* only root may go above the hard limit */
        getrlimit(RLIMIT_NOFILE, &files);
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    getrlimit(RLIMIT_NOFILE, &files);
    errno = 0;
    return files.rlim_cur < MOST_FILES ? (int)files.rlim_cur : MOST_FILES;
}

/* Zeroed, and taken up only as it is used. */
static inline void *room_for(size_t bytes)
{
    void *room = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        die("no memory");
    return room;
}

/* A whole file, mapped, and its open descriptor. */
static inline const char *map_file(const char *path, int *fd, uint64_t *size)
{
    struct stat about;
    errno = 0;
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0 || fstat(*fd, &about))
        die(path);
    *size = (uint64_t)about.st_size;
    const char *text = *size ? mmap(NULL, *size, PROT_READ, MAP_SHARED | MAP_POPULATE, *fd, 0) : MAP_FAILED;
    if (text == MAP_FAILED)
        die(path);
    return text;
}

/* Whether the line is this header; then *value is where its value begins. */
static inline bool is(const char *line, const char *end, const char *name, const char **value)
{
    size_t size = strlen(name);
    if ((size_t)(end - line) < size || strncasecmp(line, name, size))
        return false;
    for (line += size; line < end && (*line == ' ' || *line == '\t'); line++)
        ;
    *value = line;
    return true;
}

static inline bool says(const char *value, const char *end, const char *word)
{
    size_t size = strlen(word);
    for (; (size_t)(end - value) >= size; value++)
        if (!strncasecmp(value, word, size))
            return true;
    return false;
}

/* Where one is in a chunked body; all zero at its start. */
struct chunks {
    enum { SIZE, REST_OF_SIZE, DATA, AFTER_DATA, TRAILER, TRAILER_LINE } in;
    bool digit;       /* the size has one */
    bool any;         /* of the data, some has come */
    uint64_t left;    /* of this chunk's data */
};

static inline uint64_t data_left(const struct chunks *c) { return c->in == DATA ? c->left : 0; }

/* Walks on. Returns how many bytes it used; *whole is set at the body's end. -1: this is no chunked body. */
static inline ssize_t walk_chunks(struct chunks *c, const char *at, size_t size, bool *whole)
{
    const char *from = at, *end = at + size;
    while (at < end) {
        if (c->in == DATA) {
            uint64_t n = (uint64_t)(end - at) < c->left ? (uint64_t)(end - at) : c->left;
            c->any = true;
            at += n;
            c->left -= n;
            if (!c->left)
                c->in = AFTER_DATA;
            continue;
        }
        char b = *at++, low = (char)(b | 0x20);
        if (c->in == SIZE) {
            int digit = b >= '0' && b <= '9' ? b - '0' : low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
            if (digit >= 0 && !(c->left >> 56)) {
                c->left = c->left * 16 + (uint64_t)digit;
                c->digit = true;
                continue;
            }
            if (digit >= 0 || !c->digit)
                return -1;
            c->in = REST_OF_SIZE;
        }
        if (c->in == TRAILER && b != '\r' && b != '\n')
            c->in = TRAILER_LINE;
        if (b != '\n')
            continue;
        if (c->in == TRAILER) { /* an empty line */
            *whole = true;
            return at - from;
        }
        c->in = c->in == REST_OF_SIZE && c->left ? DATA : c->in == AFTER_DATA ? SIZE : TRAILER;
        c->digit = false;
    }
    return at - from;
}

/* The calls into libc by which a process works on files below one folder: counted, failed on cue, and recorded.
 *
 * Preloaded by distckpt/testing/system_calls.py, which explains what for. Everything is off until calls_watch() names
 * the folder. Calls on other paths, and other calls, go through untouched. While it records, calls that change
 * something happen one at a time, so that the record has them in the order in which they took effect.
 *
 * Not seen: bytes that arrive through mmap, sendfile or copy_file_range, and what libc does for itself (fopen).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "the 32-bit and the 64-bit variant of a call must be one");

#define PUBLIC __attribute__((visibility("default")))
#define ALSO(name) __attribute__((alias(#name), visibility("default")))
#define REAL(name)                                                                                                     \
    ({                                                                                                                 \
        static __typeof__(&name) real;                                                                                 \
        if (!real)                                                                                                     \
            real = next(#name);                                                                                        \
        real;                                                                                                          \
    })

/* ---- what is counted, and what a fault does ---------------------------------------------------------------------- */

enum kind { OPEN, CREATE, READ, WRITE, SYNC, LINK, UNLINK, RENAME, MKDIR, RMDIR, LIST, ENTRY, STAT, CLOSE, FLAGS, TRUNCATE, KINDS };

static const char *const NAMES[KINDS] = {"open",  "create", "read", "write", "sync", "link",  "unlink", "rename",
                                         "mkdir", "rmdir",  "list", "entry", "stat", "close", "flags",  "truncate"};

enum how {
    NO_FAULT,
    BEFORE,  /* nothing is done, and an error returned */
    AFTER,   /* it is done, and an error returned: the answer was lost */
    SHORT,   /* half of the bytes are read or written */
    PRETEND, /* nothing is done, and success returned: the call lies */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static int watching;
static int record = -1;
static long counts[KINDS];

static struct {
    unsigned kinds;  /* a bit for each kind */
    long nth, times; /* from the nth call of these kinds on, so many; times < 0: all that follow */
    enum how how;
    int error;
    long seen;
    char struck[PATH_MAX + 32];
} fault;

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found)
        abort();
    return found;
}

static int changes(enum kind kind) {
    return (1u << kind) & (1u << CREATE | 1u << WRITE | 1u << SYNC | 1u << LINK | 1u << UNLINK | 1u << RENAME |
                           1u << MKDIR | 1u << RMDIR | 1u << TRUNCATE);
}

/* Counts a call and says what is to become of it. While recording, one that changes something holds the lock. */
static enum how enter(enum kind kind, const char *path) {
    enum how how = NO_FAULT;
    pthread_mutex_lock(&lock);
    counts[kind]++;
    if (fault.kinds & 1u << kind) {
        long at = fault.seen++;
        if (at >= fault.nth && (fault.times < 0 || at < fault.nth + fault.times)) {
            how = fault.how;
            if (!fault.struck[0])
                snprintf(fault.struck, sizeof fault.struck, "%s %s", NAMES[kind], path);
        }
    }
    if (record < 0 || !changes(kind))
        pthread_mutex_unlock(&lock);
    return how;
}

static int is_done(enum how how) { return how == NO_FAULT || how == AFTER || how == SHORT; }

/* The end of a call that enter() has begun: what it returns. */
static long leave(enum kind kind, enum how how, long result, int error) {
    if (record >= 0 && changes(kind))
        pthread_mutex_unlock(&lock);
    if (how == BEFORE || (how == AFTER && result >= 0)) {
        errno = fault.error;
        return -1;
    }
    errno = error;
    return result;
}

/* ---- where a call goes ------------------------------------------------------------------------------------------- */

static int below(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int path_of(int fd, char *path) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* Whether an open file is below the folder; its path. Leaves errno alone. */
static int watched(int fd, char *path) {
    int error = errno;
    int found = watching && path_of(fd, path) && below(path);
    errno = error;
    return found;
}

/* Likewise for a path relative to an open folder. */
static int watched_at(int folder, const char *name, char *path) {
    if (!watching || !name)
        return 0;
    int error = errno, known = 1;
    char base[PATH_MAX] = "";
    if (*name != '/')
        known = folder == AT_FDCWD ? getcwd(base, sizeof base) != NULL : path_of(folder, base);
    int length = snprintf(path, PATH_MAX, "%s%s%s", base, *base && *name ? "/" : "", name);
    errno = error;
    return known && length < PATH_MAX && below(path);
}

/* ---- the record -------------------------------------------------------------------------------------------------- */

enum { ROOT = 100, MARK }; /* kinds of events beside those of calls */

struct event {
    uint32_t kind, name_length, other_name_length, reserved;
    uint64_t folder, inode, other_folder, offset, length;
};

static void put(const void *data, size_t size) {
    for (const char *at = data; size;) {
        long written = syscall(SYS_write, record, at, size);
        if (written < 0 && errno != EINTR)
            abort(); /* a record with a hole would prove nothing */
        if (written > 0)
            at += written, size -= written;
    }
}

static void note(struct event event, const char *name, const char *other_name) {
    event.name_length = name ? strlen(name) : 0;
    event.other_name_length = other_name ? strlen(other_name) : 0;
    put(&event, sizeof event);
    put(name, event.name_length);
    put(other_name, event.other_name_length);
}

static uint64_t inode_at(int folder, const char *name) {
    struct statx found;
    int flags = AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH);
    return statx(folder, name, flags, STATX_INO, &found) ? 0 : found.stx_ino;
}

static uint64_t inode_of(int fd) { return inode_at(fd, ""); }

static const char *last(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The folder that has, or is to have, the entry of a path. */
static uint64_t folder_of(const char *path) {
    char above[PATH_MAX];
    snprintf(above, sizeof above, "%s", path);
    above[last(path) - path] = 0;
    return inode_at(AT_FDCWD, above);
}

static void note_entry(enum kind kind, const char *path, uint64_t inode) {
    if (record >= 0)
        note((struct event){.kind = kind, .folder = folder_of(path), .inode = inode}, last(path), NULL);
}

/* ---- calls_*: what the process itself says ----------------------------------------------------------------------- */

/* Watch the files below a folder, an absolute path without links; NULL: none. Counts from nothing, with no fault. */
PUBLIC void calls_watch(const char *folder) {
    pthread_mutex_lock(&lock);
    watching = folder != NULL;
    snprintf(root, sizeof root, "%s", folder ? folder : "");
    memset(counts, 0, sizeof counts);
    memset(&fault, 0, sizeof fault);
    pthread_mutex_unlock(&lock);
}

PUBLIC void calls_fail(unsigned kinds, long nth, long times, int how, int error) {
    pthread_mutex_lock(&lock);
    memset(&fault, 0, sizeof fault);
    fault.kinds = kinds, fault.nth = nth, fault.times = times, fault.how = how, fault.error = error;
    pthread_mutex_unlock(&lock);
}

/* The first call that the fault has struck, "" if none. */
PUBLIC const char *calls_struck(void) { return fault.struck; }

PUBLIC long calls_counted(int kind) { return counts[kind]; }

/* The name of a kind, NULL after the last. */
PUBLIC const char *calls_kind(int kind) { return kind < KINDS ? NAMES[kind] : NULL; }

/* From now on record everything that changes something, in a file outside of the folder. */
PUBLIC int calls_record(const char *path) {
    pthread_mutex_lock(&lock);
    record = REAL(open64)(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0666);
    if (record >= 0)
        note((struct event){.kind = ROOT, .inode = inode_at(AT_FDCWD, root)}, NULL, NULL);
    pthread_mutex_unlock(&lock);
    return record >= 0 ? 0 : -1;
}

/* A word of the process itself, at its place among the calls. */
PUBLIC void calls_mark(const char *text) {
    pthread_mutex_lock(&lock);
    if (record >= 0)
        note((struct event){.kind = MARK}, text, NULL);
    pthread_mutex_unlock(&lock);
}

/* ---- open and close ---------------------------------------------------------------------------------------------- */

static int is_there(int folder, const char *name) {
    return faccessat(folder, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static int open_at(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!watched_at(folder, name, path))
        return REAL(openat64)(folder, name, flags, mode);
    enum kind kind = flags & O_CREAT ? CREATE : OPEN;
    enum how how = enter(kind, path);
    int existed = kind == CREATE && record >= 0 && is_there(folder, name);
    int fd = is_done(how) ? REAL(openat64)(folder, name, flags, mode) : -1, error = errno;
    if (fd >= 0 && kind == CREATE && !existed)
        note_entry(CREATE, path, inode_of(fd));
    else if (fd >= 0 && flags & O_TRUNC && record >= 0)
        note((struct event){.kind = TRUNCATE, .inode = inode_of(fd)}, NULL, NULL);
    if (fd >= 0 && how == AFTER)
        REAL(close)(fd);
    return leave(kind, how, fd, error);
}

#define MODE_OF(flags)                                                                                                 \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {                                                     \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }

PUBLIC int open64(const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_at(AT_FDCWD, name, flags, mode);
}
PUBLIC int openat64(int folder, const char *name, int flags, ...) {
    MODE_OF(flags)
    return open_at(folder, name, flags, mode);
}
int open(const char *, int, ...) ALSO(open64);
int openat(int, const char *, int, ...) ALSO(openat64);

/* Of what was open for writing: no file system has anything to say at the end of reading. The descriptor is gone. */
PUBLIC int close(int fd) {
    char path[PATH_MAX];
    if (!watched(fd, path) || (REAL(fcntl64)(fd, F_GETFL) & O_ACCMODE) == O_RDONLY)
        return REAL(close)(fd);
    enum how how = enter(CLOSE, path);
    int result = REAL(close)(fd), error = errno;
    return leave(CLOSE, how, result, error);
}

PUBLIC int fcntl64(int fd, int command, ...) {
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    char path[PATH_MAX];
    if (command != F_SETFL || !watched(fd, path))
        return REAL(fcntl64)(fd, command, argument);
    enum how how = enter(FLAGS, path);
    int result = is_done(how) ? REAL(fcntl64)(fd, command, argument) : 0, error = errno;
    return leave(FLAGS, how, result, error);
}
int fcntl(int, int, ...) ALSO(fcntl64);

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

static size_t total(const struct iovec *parts, int count) {
    size_t sum = 0;
    for (int at = 0; at < count; at++)
        sum += parts[at].iov_len;
    return sum;
}

/* The first ``most`` bytes of ``parts``, which are copied to ``some``; how many parts that are. */
static int first_bytes(const struct iovec *parts, int count, size_t most, struct iovec *some) {
    int used = 0;
    for (; used < count && used < IOV_MAX && most; used++) {
        some[used] = parts[used];
        if (some[used].iov_len > most)
            some[used].iov_len = most;
        most -= some[used].iov_len;
    }
    return used;
}

static void note_write(int fd, const struct iovec *parts, int count, off_t offset, size_t written) {
    struct iovec some[IOV_MAX];
    struct event event = {.kind = WRITE, .inode = inode_of(fd), .length = written};
    event.offset = offset < 0 ? lseek(fd, 0, SEEK_CUR) - (off_t)written : offset;
    note(event, NULL, NULL);
    count = first_bytes(parts, count, written, some);
    for (int at = 0; at < count; at++)
        put(some[at].iov_base, some[at].iov_len);
}

/* Reads or writes; an offset of -1 means where the file stands. */
static ssize_t move_bytes(enum kind kind, const char *path, int fd, const struct iovec *parts, int count, off_t offset,
                          int flags) {
    struct iovec some[IOV_MAX];
    size_t size = total(parts, count);
    enum how how = enter(kind, path);
    if (how == SHORT && size > 1) {
        count = first_bytes(parts, count, size / 2, some);
        parts = some;
    }
    ssize_t moved = size;
    int error = errno;
    if (is_done(how)) {
        moved = kind == READ ? REAL(preadv64v2)(fd, parts, count, offset, flags)
                             : REAL(pwritev64v2)(fd, parts, count, offset, flags);
        error = errno;
        if (kind == WRITE && moved > 0 && record >= 0)
            note_write(fd, parts, count, offset, moved);
    }
    return leave(kind, how, moved, error);
}

#define ONE_PART(data, size) (&(struct iovec){(void *)(data), (size)}), 1

#define MOVES(kind, name, parameters, arguments, parts, offset, flags)                                                 \
    PUBLIC ssize_t name parameters {                                                                                   \
        char path[PATH_MAX];                                                                                           \
        return watched(fd, path) ? move_bytes(kind, path, fd, parts, offset, flags) : REAL(name) arguments;            \
    }

MOVES(READ, read, (int fd, void *data, size_t size), (fd, data, size), ONE_PART(data, size), -1, 0)
MOVES(WRITE, write, (int fd, const void *data, size_t size), (fd, data, size), ONE_PART(data, size), -1, 0)
MOVES(READ, pread64, (int fd, void *data, size_t size, off64_t offset), (fd, data, size, offset), ONE_PART(data, size),
      offset, 0)
MOVES(WRITE, pwrite64, (int fd, const void *data, size_t size, off64_t offset), (fd, data, size, offset),
      ONE_PART(data, size), offset, 0)

#define PARTS const struct iovec *parts, int count
#define BOTH parts, count
MOVES(READ, readv, (int fd, PARTS), (fd, BOTH), BOTH, -1, 0)
MOVES(WRITE, writev, (int fd, PARTS), (fd, BOTH), BOTH, -1, 0)
MOVES(READ, preadv64v2, (int fd, PARTS, off64_t offset, int flags), (fd, BOTH, offset, flags), BOTH, offset, flags)
MOVES(WRITE, pwritev64v2, (int fd, PARTS, off64_t offset, int flags), (fd, BOTH, offset, flags), BOTH, offset, flags)

PUBLIC ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return preadv64v2(fd, parts, count, offset, 0);
}
PUBLIC ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return pwritev64v2(fd, parts, count, offset, 0);
}
ssize_t pread(int, void *, size_t, off_t) ALSO(pread64);
ssize_t pwrite(int, const void *, size_t, off_t) ALSO(pwrite64);
ssize_t preadv(int, const struct iovec *, int, off_t) ALSO(preadv64);
ssize_t pwritev(int, const struct iovec *, int, off_t) ALSO(pwritev64);
ssize_t preadv2(int, const struct iovec *, int, off_t, int) ALSO(preadv64v2);
ssize_t pwritev2(int, const struct iovec *, int, off_t, int) ALSO(pwritev64v2);

PUBLIC int ftruncate64(int fd, off64_t length) {
    char path[PATH_MAX];
    if (!watched(fd, path))
        return REAL(ftruncate64)(fd, length);
    enum how how = enter(TRUNCATE, path);
    int result = is_done(how) ? REAL(ftruncate64)(fd, length) : 0, error = errno;
    if (is_done(how) && !result && record >= 0)
        note((struct event){.kind = TRUNCATE, .inode = inode_of(fd), .length = length}, NULL, NULL);
    return leave(TRUNCATE, how, result, error);
}
int ftruncate(int, off_t) ALSO(ftruncate64);

static int sync_file(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    if (!watched(fd, path))
        return real(fd);
    enum how how = enter(SYNC, path);
    int result = is_done(how) ? real(fd) : 0, error = errno;
    if (is_done(how) && !result && record >= 0)
        note((struct event){.kind = SYNC, .inode = inode_of(fd)}, NULL, NULL);
    return leave(SYNC, how, result, error);
}
PUBLIC int fsync(int fd) { return sync_file(fd, REAL(fsync)); }
PUBLIC int fdatasync(int fd) { return sync_file(fd, REAL(fdatasync)); }

/* ---- names ------------------------------------------------------------------------------------------------------- */

PUBLIC int linkat(int from, const char *name, int to, const char *other, int flags) {
    char path[PATH_MAX];
    if (!watched_at(to, other, path))
        return REAL(linkat)(from, name, to, other, flags);
    enum how how = enter(LINK, path);
    int result = is_done(how) ? REAL(linkat)(from, name, to, other, flags) : 0, error = errno;
    if (is_done(how) && !result)
        note_entry(LINK, path, record >= 0 ? inode_at(to, other) : 0);
    return leave(LINK, how, result, error);
}
PUBLIC int link(const char *name, const char *other) { return linkat(AT_FDCWD, name, AT_FDCWD, other, 0); }

PUBLIC int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!watched_at(folder, name, path))
        return REAL(unlinkat)(folder, name, flags);
    enum kind kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    enum how how = enter(kind, path);
    int result = is_done(how) ? REAL(unlinkat)(folder, name, flags) : 0, error = errno;
    if (is_done(how) && !result)
        note_entry(kind, path, 0);
    return leave(kind, how, result, error);
}
PUBLIC int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
PUBLIC int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

PUBLIC int renameat2(int from, const char *name, int to, const char *other, unsigned flags) {
    char path[PATH_MAX], source[PATH_MAX];
    if (!watched_at(to, other, path) || !watched_at(from, name, source))
        return REAL(renameat2)(from, name, to, other, flags);
    enum how how = enter(RENAME, path);
    int result = is_done(how) ? REAL(renameat2)(from, name, to, other, flags) : 0, error = errno;
    if (is_done(how) && !result && record >= 0)
        note((struct event){.kind = RENAME,
                            .folder = folder_of(source),
                            .inode = inode_at(to, other),
                            .other_folder = folder_of(path)},
             last(source), last(path));
    return leave(RENAME, how, result, error);
}
PUBLIC int renameat(int from, const char *name, int to, const char *other) {
    return renameat2(from, name, to, other, 0);
}
PUBLIC int rename(const char *name, const char *other) { return renameat2(AT_FDCWD, name, AT_FDCWD, other, 0); }

PUBLIC int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    if (!watched_at(folder, name, path))
        return REAL(mkdirat)(folder, name, mode);
    enum how how = enter(MKDIR, path);
    int result = is_done(how) ? REAL(mkdirat)(folder, name, mode) : 0, error = errno;
    if (is_done(how) && !result)
        note_entry(MKDIR, path, record >= 0 ? inode_at(folder, name) : 0);
    return leave(MKDIR, how, result, error);
}
PUBLIC int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

/* ---- looking ----------------------------------------------------------------------------------------------------- */

static int looks(enum kind kind, const char *path, int *error) {
    enum how how = enter(kind, path);
    *error = fault.error;
    return how == NO_FAULT;
}

PUBLIC DIR *opendir(const char *name) {
    char path[PATH_MAX];
    int error;
    if (watched_at(AT_FDCWD, name, path) && !looks(LIST, path, &error))
        return errno = error, NULL;
    return REAL(opendir)(name);
}
PUBLIC DIR *fdopendir(int fd) {
    char path[PATH_MAX];
    int error;
    if (watched(fd, path) && !looks(LIST, path, &error))
        return errno = error, NULL;
    return REAL(fdopendir)(fd);
}
PUBLIC struct dirent64 *readdir64(DIR *folder) {
    char path[PATH_MAX];
    int error;
    if (watched(dirfd(folder), path) && !looks(ENTRY, path, &error))
        return errno = error, NULL;
    return REAL(readdir64)(folder);
}

PUBLIC int fstatat64(int folder, const char *name, struct stat64 *found, int flags) {
    char path[PATH_MAX];
    int error;
    int seen = !*name && folder != AT_FDCWD ? watched(folder, path) : watched_at(folder, name, path);
    if (seen && !looks(STAT, path, &error))
        return errno = error, -1;
    return REAL(fstatat64)(folder, name, found, flags);
}
PUBLIC int stat64(const char *name, struct stat64 *found) { return fstatat64(AT_FDCWD, name, found, 0); }
PUBLIC int lstat64(const char *name, struct stat64 *found) {
    return fstatat64(AT_FDCWD, name, found, AT_SYMLINK_NOFOLLOW);
}
PUBLIC int fstat64(int fd, struct stat64 *found) { return fstatat64(fd, "", found, AT_EMPTY_PATH); }

/* Fails the n-th system call that changes files below one folder. Loaded with LD_PRELOAD; see crash_matrix.py.
 *
 * faultshim_arm(folder, n, kind) starts counting at 1; n = 0 counts only. kind: "kill" before the call, "torn" after
 * half of it, "short" does half and says so, "ENOSPC", "EIO", "ESTALE" from this call on, "EINTR" once.
 * faultshim_count() returns how many calls there were. Which file a call changes is asked of /proc, so that nothing has
 * to be remembered. faultshim_log(file) writes a line for each call that succeeded: what, path, other path or "", number,
 * bytes in hexadecimal, separated by tabs.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static int target, fault, sticky, journal = -1;
static enum { KILL, TORN, SHORT, FAIL } how;
static atomic_int count;

void faultshim_arm(const char *path, int n, const char *kind) {
    strncpy(folder, path, sizeof folder - 1);
    atomic_store(&count, 0);
    target = n;
    how = !strcmp(kind, "kill") ? KILL : !strcmp(kind, "torn") ? TORN : !strcmp(kind, "short") ? SHORT : FAIL;
    fault = !strcmp(kind, "ENOSPC") ? ENOSPC : !strcmp(kind, "EIO") ? EIO : !strcmp(kind, "ESTALE") ? ESTALE : EINTR;
    sticky = fault != EINTR;
}

int faultshim_count(void) { return atomic_load(&count); }

static int below(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

void faultshim_log(const char *path) { journal = syscall(SYS_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_APPEND, 0666); }

/* The absolute path of a descriptor (path NULL), or of a path relative to one. */
static int absolute(int fd, const char *path, char *result, size_t room) {
    char link[64];
    ssize_t size = 0;
    if (!path || path[0] != '/') {
        if (fd == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        size = readlink(link, result, room / 2);
        if (size < 0) return 0;
    }
    result[size] = 0;
    if (path) snprintf(result + size, room - size, "%s%s", size ? "/" : "", path);
    return 1;
}

static int ours(int fd, const char *path) {
    char full[8192];
    int saved = errno;
    int result = folder[0] && absolute(fd, path, full, sizeof full) && below(full);
    errno = saved;
    return result;
}

static void note(const char *what, int fd, const char *path, const char *other, long long number, const void *data, ssize_t size) {
    static const char digits[] = "0123456789abcdef";
    char full[8192];
    int saved = errno;
    if (journal >= 0 && ours(fd, path) && absolute(fd, path, full, sizeof full)) {
        char *line = malloc(2 * size + strlen(full) + strlen(other) + 100);
        int length = sprintf(line, "%s\t%s\t%s\t%lld\t", what, full, other, number);
        for (ssize_t i = 0; i < size; i++) {
            line[length++] = digits[((const unsigned char *)data)[i] >> 4];
            line[length++] = digits[((const unsigned char *)data)[i] & 15];
        }
        line[length++] = '\n';
        syscall(SYS_write, journal, line, length);
        free(line);
    }
    errno = saved;
}

enum verdict { PASS, HALF, DIE_AFTER, REFUSE };

/* What to do with a call that changes a file; errno is set where it is refused. */
static enum verdict judge(int fd, const char *path) {
    if (!ours(fd, path)) return PASS;
    int number = atomic_fetch_add(&count, 1) + 1;
    if (!target || number < target || (number > target && !(how == FAIL && sticky))) return PASS;
    if (how == KILL) kill(getpid(), SIGKILL);
    if (how == TORN) return DIE_AFTER;
    if (how == SHORT) return HALF;
    errno = fault;
    return REFUSE;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define DIE() kill(getpid(), SIGKILL)

#define SIMPLE(name, fd, path, parameters, arguments, what, other, number) \
    int name parameters {                                 \
        REAL(name);                                       \
        enum verdict verdict = judge(fd, path);           \
        if (verdict == REFUSE) return -1;                 \
        int result = real arguments;                      \
        if (!result) note(what, fd, path, other, number, "", 0); \
        if (verdict == DIE_AFTER) DIE();                  \
        return result;                                    \
    }

#define WRITE(name, fd, parameters, half, whole, data, at) \
    ssize_t name parameters {                             \
        REAL(name);                                       \
        enum verdict verdict = judge(fd, NULL);           \
        if (verdict == REFUSE) return -1;                 \
        ssize_t result = verdict == PASS ? real whole : real half; \
        if (result > 0) note((data) ? "write" : "unknown", fd, NULL, "", at, data, (data) ? result : 0); \
        if (verdict == DIE_AFTER) DIE();                  \
        return result;                                    \
    }

/* Half, but never nothing: a write of no bytes would look like a full disk. */
#define PART(size) ((size) > 1 ? (size) / 2 : (size))

WRITE(write, fd, (int fd, const void *data, size_t size), (fd, data, PART(size)), (fd, data, size), data, lseek(fd, 0, SEEK_CUR) - result)
WRITE(pwrite, fd, (int fd, const void *data, size_t size, off_t at), (fd, data, PART(size), at), (fd, data, size, at), data, at)
WRITE(pwrite64, fd, (int fd, const void *data, size_t size, off64_t at), (fd, data, PART(size), at), (fd, data, size, at), data, at)
/* What it copies is logged as "unknown", on which a replay gives up. */
WRITE(copy_file_range, out, (int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags), (in, from, out, to, PART(size), flags), (in, from, out, to, size, flags), NULL, 0)

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    enum verdict verdict = judge(fd, NULL);
    if (verdict == REFUSE) return -1;
    ssize_t result = real(fd, parts, verdict == PASS ? n : PART(n));
    if (result > 0 && journal >= 0) {
        char *all = malloc(result);
        ssize_t done = 0;
        for (int i = 0; i < n && done < result; i++) {
            ssize_t size = parts[i].iov_len < (size_t)(result - done) ? (ssize_t)parts[i].iov_len : result - done;
            memcpy(all + done, parts[i].iov_base, size);
            done += size;
        }
        note("write", fd, NULL, "", lseek(fd, 0, SEEK_CUR) - result, all, result);
        free(all);
    }
    if (verdict == DIE_AFTER) DIE();
    return result;
}

SIMPLE(fsync, fd, NULL, (int fd), (fd), "sync", "", 0)
SIMPLE(fdatasync, fd, NULL, (int fd), (fd), "sync", "", 0)
SIMPLE(ftruncate, fd, NULL, (int fd, off_t size), (fd, size), "truncate", "", size)
SIMPLE(ftruncate64, fd, NULL, (int fd, off64_t size), (fd, size), "truncate", "", size)
SIMPLE(rename, AT_FDCWD, to, (const char *from, const char *to), (from, to), "rename", from, 0)
SIMPLE(renameat, b, to, (int a, const char *from, int b, const char *to), (a, from, b, to), "rename", from, 0)
SIMPLE(renameat2, b, to, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags), flags & RENAME_EXCHANGE ? "exchange" : "rename", from, 0)
SIMPLE(mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode), "mkdir", "", 0)
SIMPLE(mkdirat, at, path, (int at, const char *path, mode_t mode), (at, path, mode), "mkdir", "", 0)
SIMPLE(unlink, AT_FDCWD, path, (const char *path), (path), "remove", "", 0)
SIMPLE(unlinkat, at, path, (int at, const char *path, int flags), (at, path, flags), "remove", "", 0)
SIMPLE(rmdir, AT_FDCWD, path, (const char *path), (path), "remove", "", 0)
SIMPLE(symlink, AT_FDCWD, path, (const char *to, const char *path), (to, path), "symlink", to, 0)
SIMPLE(symlinkat, at, path, (const char *to, int at, const char *path), (to, at, path), "symlink", to, 0)
SIMPLE(link, AT_FDCWD, path, (const char *from, const char *path), (from, path), "link", from, 0)

/* These return the error instead of setting errno. */
#define ALLOCATE(name, off)                               \
    int name(int fd, off begin, off size) {               \
        REAL(name);                                       \
        enum verdict verdict = judge(fd, NULL);           \
        if (verdict == REFUSE) return errno;              \
        int result = real(fd, begin, size);               \
        if (!result) note("extend", fd, NULL, "", begin + size, "", 0); \
        if (verdict == DIE_AFTER) DIE();                  \
        return result;                                    \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

/* Opening changes something where it creates or truncates. */
#define OPEN(name, at, parameters, arguments)                                       \
    int name parameters {                                                           \
        REAL(name);                                                                 \
        mode_t mode = 0;                                                            \
        if (flags & (O_CREAT | O_TMPFILE)) {                                        \
            va_list rest;                                                           \
            va_start(rest, flags);                                                  \
            mode = va_arg(rest, mode_t);                                            \
            va_end(rest);                                                           \
        }                                                                           \
        int changes = flags & (O_CREAT | O_TRUNC);                                  \
        enum verdict verdict = changes ? judge(at, path) : PASS;                    \
        if (verdict == REFUSE) return -1;                                           \
        int result = real arguments;                                                \
        if (result >= 0 && changes) note("open", at, path, "", flags & O_TRUNC, "", 0); \
        if (verdict == DIE_AFTER) DIE();                                            \
        return result;                                                              \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, mode))
OPEN(openat64, fd, (int fd, const char *path, int flags, ...), (fd, path, flags, mode))

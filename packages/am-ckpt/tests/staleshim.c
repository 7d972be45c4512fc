/* The first reads of tensors of files in optim/ fail as those of a network file system do; staleshim_arm(n): how many. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int left;

void staleshim_arm(int n) { left = n; }

static ssize_t fail(int fd) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (!left || readlink(link, path, sizeof path - 1) <= 0 || !strstr(path, "/optim/")) return 0;
    left--;
    errno = ESTALE;
    return 1;
}

/* What os.preadv calls. A row of the test's tensor has 48 bytes. */
#define READ(name) ssize_t name(int fd, const struct iovec *v, int n, off_t at, int flags) { \
    ssize_t (*next)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, #name); \
    return n && v[0].iov_len == 48 && fail(fd) ? -1 : next(fd, v, n, at, flags); }
READ(preadv2)
READ(preadv64v2)

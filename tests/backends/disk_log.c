/* Preloaded into a process, logs what it does to the files of one directory: in which order, and what was synced.
 *
 * DISK_LOG_DIR is the directory, DISK_LOG the log. One event: kind (1 byte), offset (8), length of the data (4),
 * length of the path (2), the path, the data. Kinds: w write, s sync, t truncate (offset: the new length), u unlink.
 * One lock spans each call and its event, so the log's order is the order in which the calls happened, and a sync
 * is logged once it is done.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static char dir[4096];
static size_t dir_len;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("DISK_LOG"), *where = getenv("DISK_LOG_DIR");
    if (!path || !where) return;
    snprintf(dir, sizeof dir, "%s/", where);
    dir_len = strlen(dir);
    log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void put(const void *data, size_t len) {
    const char *at = data;
    while (len) {
        long done = syscall(SYS_write, log_fd, at, len);
        if (done < 0) abort();
        at += done;
        len -= done;
    }
}

static void event(char kind, const char *path, uint64_t offset, const void *data, uint32_t len) {
    uint16_t path_len = strlen(path);
    char head[15];
    head[0] = kind;
    memcpy(head + 1, &offset, 8);
    memcpy(head + 9, &len, 4);
    memcpy(head + 13, &path_len, 2);
    put(head, 15);
    put(path, path_len);
    put(data, len);
}

/* The path of an open file, if it lies in the directory. */
static int known(int fd, char *path) {
    char link[64];
    if (log_fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, 4095);
    if (len < 0) return 0;
    path[len] = 0;
    return strncmp(path, dir, dir_len) == 0;
}

#define REAL(name) (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CALL(name, ...)                                                                                          \
    static __typeof__(&name) real;                                                                               \
    if (!real) real = REAL(name);                                                                                \
    char path[4096];                                                                                             \
    if (!known(fd, path)) return real(__VA_ARGS__);                                                              \
    pthread_mutex_lock(&turn);                                                                                   \
    __typeof__(real(__VA_ARGS__)) done = real(__VA_ARGS__);

#define END                                                                                                      \
    pthread_mutex_unlock(&turn);                                                                                 \
    return done;

ssize_t pwrite(int fd, const void *data, size_t len, off_t at) {
    CALL(pwrite, fd, data, len, at)
    if (done > 0) event('w', path + dir_len, at, data, done);
    END
}

ssize_t pwrite64(int fd, const void *data, size_t len, off64_t at) {
    CALL(pwrite64, fd, data, len, at)
    if (done > 0) event('w', path + dir_len, at, data, done);
    END
}

ssize_t write(int fd, const void *data, size_t len) {
    CALL(write, fd, data, len)
    if (done > 0) event('w', path + dir_len, lseek(fd, 0, SEEK_CUR) - done, data, done);
    END
}

int fsync(int fd) {
    CALL(fsync, fd)
    if (!done) event('s', path + dir_len, 0, "", 0);
    END
}

int fdatasync(int fd) {
    CALL(fdatasync, fd)
    if (!done) event('s', path + dir_len, 0, "", 0);
    END
}

int ftruncate(int fd, off_t len) {
    CALL(ftruncate, fd, len)
    if (!done) event('t', path + dir_len, len, "", 0);
    END
}

int ftruncate64(int fd, off64_t len) {
    CALL(ftruncate64, fd, len)
    if (!done) event('t', path + dir_len, len, "", 0);
    END
}

int unlink(const char *path) {
    static __typeof__(&unlink) real;
    if (!real) real = REAL(unlink);
    pthread_mutex_lock(&turn);
    int done = real(path);
    if (!done && log_fd >= 0 && strncmp(path, dir, dir_len) == 0) event('u', path + dir_len, 0, "", 0);
    pthread_mutex_unlock(&turn);
    return done;
}

/* A CUDA runtime without a GPU, for tests: device memory is host memory that is kept apart.
 *
 * As on a GPU, what is copied to the host arrives only once the stream is waited for, so a missing
 * wait shows; a copy whose direction does not fit its addresses is refused. What was not given
 * back is counted into the file that FAKE_CUDA_LEDGER names. FAKE_FAULT plants faults.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 64, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };
static struct { char *start; size_t size; } blocks[MOST];
static struct { void *to; const void *from; size_t size; } waiting[MOST];
static int handles, pending;
static double clock_ms;

static int fault(const char *name) {
    const char *set = getenv("FAKE_FAULT");
    return set && strcmp(set, name) == 0;
}

int fake_on_device(const void *address) {
    for (int i = 0; i < MOST; i++)
        if (blocks[i].start && (char *)address >= blocks[i].start &&
            (char *)address < blocks[i].start + blocks[i].size)
            return 1;
    return 0;
}

void fake_flush(void) {
    for (int i = 0; i < pending; i++) memcpy(waiting[i].to, waiting[i].from, waiting[i].size);
    pending = 0;
}

void fake_work(void) { clock_ms += 0.25; }

int cudaGetDeviceCount(int *count) {
    *count = 1;
    return fault("no device") ? NO_DEVICE : 0;
}
int cudaSetDevice(int device) { return device ? INVALID : 0; }
int cudaGetDeviceProperties(char *properties, int device) {
    strcpy(properties, "Fake Orin");
    return device ? INVALID : 0;
}
int cudaDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 8 : which == 76 ? 7 : -1;
    return device ? INVALID : 0;
}
int cudaRuntimeGetVersion(int *value) { return *value = 12060, 0; }
int cudaDriverGetVersion(int *value) { return *value = 12060, 0; }
const char *cudaGetErrorString(int code) {
    return code == NO_DEVICE ? "no CUDA-capable device is detected"
         : code == OUT_OF_MEMORY ? "out of memory" : "invalid argument";
}

int cudaMalloc(void **address, size_t size) {
    if (!size || fault("out of memory")) return OUT_OF_MEMORY;
    for (int i = 0; i < MOST; i++)
        if (!blocks[i].start) {
            blocks[i].start = *address = malloc(size);
            blocks[i].size = size;
            memset(*address, 0xA5, size);
            return 0;
        }
    return OUT_OF_MEMORY;
}
int cudaFree(void *address) {
    for (int i = 0; i < MOST; i++)
        if (address && blocks[i].start == address) {
            free(address);
            blocks[i].start = NULL;
            return 0;
        }
    return INVALID;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    int fits = kind == 1 ? fake_on_device(to) && !fake_on_device(from)
             : kind == 2 && fake_on_device(from) && !fake_on_device(to);
    if (size && (!fits || !stream || pending == MOST)) return INVALID;
    waiting[pending].to = to;
    waiting[pending].from = from;
    waiting[pending++].size = size;
    return 0;
}

static int make(void **handle) { return handles++, *handle = malloc(sizeof(double)), 0; }
static int destroy(void *handle) { return free(handle), handles--, 0; }
int cudaStreamCreate(void **stream) { return make(stream); }
int cudaStreamDestroy(void *stream) { return destroy(stream); }
int cudaStreamSynchronize(void *stream) { return fake_flush(), stream ? 0 : INVALID; }
int cudaEventCreate(void **event) { return make(event); }
int cudaEventDestroy(void *event) { return destroy(event); }
int cudaEventRecord(double *event, void *stream) {
    *event = clock_ms;
    return stream ? 0 : INVALID;
}
int cudaEventSynchronize(double *event) { return event ? 0 : INVALID; }
int cudaEventElapsedTime(float *milliseconds, double *start, double *end) {
    *milliseconds = *end - *start;
    return 0;
}

__attribute__((destructor)) static void settle(void) {
    const char *path = getenv("FAKE_CUDA_LEDGER");
    FILE *file = path ? fopen(path, "w") : NULL;
    int held = handles;
    for (int i = 0; i < MOST; i++) held += blocks[i].start != NULL;
    if (file) fprintf(file, "%d", held), fclose(file);
}

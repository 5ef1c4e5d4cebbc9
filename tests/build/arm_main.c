/* Runs one kernel that was compiled for another processor: tensors from standard input, through it, to standard output.

   Input, little-endian: the number of arguments; then each as {dimensions or -1 for an integer, DLPack's type code and
   bits, the shape or the integer, the bytes}. Output: the bytes of every tensor, as the kernel left them. It has what a
   compiled kernel asks of TVM's runtime, with one thread. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { void *data; int32_t device, device_id, ndim; uint8_t code, bits; uint16_t lanes; int64_t *shape, *strides; uint64_t offset; } Tensor;
typedef struct { int32_t type, padding; union { int64_t integer; void *pointer; }; } Any;
typedef struct { void *sync; int32_t tasks; } Group;
enum { INTEGER = 1, TENSOR = 7, MOST = 16 };

extern int __tvm_ffi_f(void *self, const Any *args, int32_t count, Any *result);
extern int (*__TVMBackendParallelLaunch)(int (*)(int, Group *, void *), void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
#pragma weak __TVMBackendParallelLaunch
#pragma weak __TVMBackendAllocWorkspace
#pragma weak __TVMBackendFreeWorkspace

static int launch(int (*body)(int, Group *, void *), void *data, int tasks) {
    Group group = {0, 1};
    (void)tasks;
    return body(0, &group, data);
}
static void *allocate(int type, int id, uint64_t bytes, int code, int bits) {
    (void)type, (void)id, (void)code, (void)bits;
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}
static int release(int type, int id, void *memory) {
    (void)type, (void)id;
    free(memory);
    return 0;
}
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    fprintf(stderr, "%s: ", kind);
    for (int i = 0; i < count; i++) if (parts[i]) fputs(parts[i], stderr);
    fputc('\n', stderr);
}
static void take(void *to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) exit(3);
}
static size_t count_bytes(const Tensor *t) {
    size_t bytes = t->bits / 8;
    for (int i = 0; i < t->ndim; i++) bytes *= t->shape[i];
    return bytes;
}
int main(void) {
    int32_t count, head[3];
    static Tensor tensors[MOST];
    static Any args[MOST], result;
    if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
    if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
    if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;
    take(&count, 4);
    if (count > MOST) return 4;
    for (int i = 0; i < count; i++) {
        take(head, 12);
        if (head[0] < 0) {
            args[i].type = INTEGER;
            take(&args[i].integer, 8);
            continue;
        }
        Tensor *t = &tensors[i];
        *t = (Tensor){.device = 1, .ndim = head[0], .code = head[1], .bits = head[2], .lanes = 1};
        t->shape = calloc(t->ndim + 1, 8);
        take(t->shape, t->ndim * 8);
        t->data = aligned_alloc(64, (count_bytes(t) + 63) / 64 * 64 + 64);
        take(t->data, count_bytes(t));
        args[i].type = TENSOR;
        args[i].pointer = t;
    }
    if (__tvm_ffi_f(0, args, count, &result)) return 5;
    for (int i = 0; i < count; i++)
        if (args[i].type == TENSOR) fwrite(tensors[i].data, 1, count_bytes(&tensors[i]), stdout);
    return 0;
}

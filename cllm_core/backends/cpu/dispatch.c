/* Which of the instruction sets that the kernels are compiled for this processor has. */

#define _GNU_SOURCE
#include "kernels.h"

#define VISIBLE __attribute__((visibility("default")))

processor_traits processor;

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* State that the system saves for a thread (XCR0). */
#define VECTORS_STATE 0x06 /* AVX */
#define WIDE_STATE 0xe6    /* AVX-512 too */
#define TILES_STATE 0x60000
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static int has_avx2, has_avx512, has_avx512_bf16, has_tiles;

static int bit(unsigned value, int index) { return (value >> index) & 1; }

static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Tiles take memory in every thread, so that Linux wants to be asked before. */
static int may_use_tiles(void) {
#ifdef __linux__
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
#else
    return 0;
#endif
}

__attribute__((constructor)) static void look(void) {
    unsigned a, b, c, d, ignored, more;
    char vendor[13] = {0};
    if (!__get_cpuid(0, &ignored, (unsigned *)vendor, (unsigned *)(vendor + 8), (unsigned *)(vendor + 4))) return;
    /* Past the caches, weights left more of them to what every step reads again (AMD, Zen 5); on an Intel processor with
     * AMX they took twice as long to come. */
    processor.prefetch = strcmp(vendor, "AuthenticAMD") ? PREFETCH_TO_CACHES : PREFETCH_PAST_CACHES;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return; /* xgetbv */
    int has_fma = bit(c, 12);
    uint64_t state = saved_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    if (!__get_cpuid_count(7, 1, &more, &ignored, &ignored, &ignored)) more = 0;
    has_avx2 = (state & VECTORS_STATE) == VECTORS_STATE && has_fma && bit(b, 5);
    has_avx512 = has_avx2 && (state & WIDE_STATE) == WIDE_STATE && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
    processor.has_avx_vnni = has_avx2 && bit(more, 4);
    processor.has_avx512_vnni = has_avx512 && bit(c, 11);
    has_avx512_bf16 = processor.has_avx512_vnni && bit(more, 5); /* whoever has it has both */
    has_tiles = has_avx512_bf16 && (state & TILES_STATE) == TILES_STATE && bit(d, 22) && bit(d, 24) && bit(d, 25);
}

VISIBLE int cllm_supports(const char *isa) {
    if (!strcmp(isa, "amx")) return has_tiles && may_use_tiles();
    if (!strcmp(isa, "avx512_bf16")) return has_avx512_bf16;
    if (!strcmp(isa, "avx512")) return has_avx512;
    return !strcmp(isa, "avx2") && has_avx2;
}

#elif defined(__aarch64__)
#ifdef __linux__
#include <sys/auxv.h>
#endif

__attribute__((constructor)) static void look(void) {
    processor.prefetch = PREFETCH_TO_CACHES;
#if defined(__ARM_FEATURE_DOTPROD)
    processor.has_dotprod = 1;
#elif defined(__linux__)
    processor.has_dotprod = (getauxval(AT_HWCAP) >> 20) & 1; /* HWCAP_ASIMDDP */
#endif
}

VISIBLE int cllm_supports(const char *isa) { return !strcmp(isa, "neon"); }
#endif

/* Whether products of 8-bit numbers may use dot products that the instruction set does not include; for tests. */
VISIBLE void cllm_use_dot_products(int use) {
    look();
    if (!use) processor.has_avx512_vnni = processor.has_avx_vnni = processor.has_dotprod = 0;
}

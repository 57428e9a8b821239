/* All kernels for one instruction set, which the compiler is told by ISA (a name of dispatch.c) and flags
 * (cllm_core/backends/cpu/compilation.py). A new part is a header included here that exports its functions by EXPORT. */

#include "kernels.h"

#if defined(__AMX_TILE__)
#include "tiles_amx.h"
#elif defined(__AVX512BF16__)
#include "tiles_avx512_bf16.h"
#elif defined(__AVX512F__)
#include "tiles_avx512.h"
#elif defined(__AVX2__)
#include "tiles_avx2.h"
#elif defined(__ARM_NEON)
#include "tiles_neon.h"
#endif

#include "products.h"

#include "elementwise.h"

#include "attention.h"

#include "decoder.h"

#include "sampling.h"

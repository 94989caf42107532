// ELAN's modules on a CPU in float32: what archs/cpu calls, compiled for AVX-512 and for AVX2, or for NEON.
//
// Maps are (image, row, channel, column): a row of the image is a block of lines, one per channel, each `pitch` numbers
// long of which the first `w` are pixels. Vectors hold neighbouring pixels of a line, so a shift is another address, a
// 1x1 convolution multiplies whole vectors by single weights, and windows are cut in runs of their width.
//
// Weights are packed as [block of R outputs][input][R], filled up with zeros, and biases filled up as well.
#include <omp.h>
#include <pthread.h>
#include <signal.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL32 _Pragma("GCC unroll 32")

#include "threads.h"

// A module, as archs/cpu/inference.py writes it down: packed weights, and what its attention is.
struct Module {
    const float *weights0, *bias0, *weights1, *bias1, *out_weights, *out_bias;
    int64_t shares, shifted;
};

// Weights and bias of a module's projection to the queries and to the values of a group of channels; the values' alone
// where queries are shared.
struct Projection {
    const float *query_weights, *query_bias, *value_weights, *value_bias;
};

// What the modules of a block that share their attention leave for the first one, which comes last: gradients of
// results and values, [task][module * d][room], and sums over channels of gradient * result, [task][room].
struct Shared {
    float *grads, *values, *dots;
    int64_t modules;
};

#ifdef __x86_64__

#define NAMESPACE avx512
#define LANES 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include "tiles.h"
#include "bands.h"
#include "attention.h"
#include "features.h"
#include "body.h"
#include "gradients.h"
#pragma GCC pop_options
#undef NAMESPACE
#undef LANES

#if __GNUC__ >= 11  // older compilers do not know the instructions
#define WITH_BF16
#define NAMESPACE avx512_bf16  // inference alone: training is in float32 under autocast too
#define LANES 16
#define BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "tiles.h"
#include "bands.h"
#include "attention.h"
#include "features.h"
#include "body.h"
#pragma GCC pop_options
#undef NAMESPACE
#undef LANES
#undef BF16
#endif

#define NAMESPACE avx2
#define LANES 8
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "tiles.h"
#include "bands.h"
#include "attention.h"
#include "features.h"
#include "body.h"
#include "gradients.h"
#pragma GCC pop_options

#define CHOOSE(name, ...) (width() == 16 ? avx512::name(__VA_ARGS__) : avx2::name(__VA_ARGS__))

namespace {

int width() {
    static const int found = []() {
        __builtin_cpu_init();
        const char *asked = getenv("ELAN_KERNELS");
        const bool narrow = asked && !strcmp(asked, "avx2");
        const bool wide = !narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return wide ? 16 : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 8 : 0;
    }();
    return found;
}

}  // namespace

#else  // aarch64, of which every processor has NEON

#define NAMESPACE neon
#define LANES 4
#include "tiles.h"
#include "bands.h"
#include "attention.h"
#include "features.h"
#include "body.h"
#include "gradients.h"

#define CHOOSE(name, ...) neon::name(__VA_ARGS__)

namespace {
constexpr int width() { return LANES; }
}  // namespace

#endif

#ifdef WITH_BF16
#define CHOOSE_BF16(bf16, name, ...) (bf16 ? avx512_bf16::name(__VA_ARGS__) : CHOOSE(name, __VA_ARGS__))
#define HAS_BF16 (width() == 16 && __builtin_cpu_supports("avx512bf16"))
#else
#define CHOOSE_BF16(bf16, name, ...) CHOOSE(name, __VA_ARGS__)
#define HAS_BF16 false
#endif

extern "C" {

// Numbers in a vector: 16 with AVX-512, 8 with AVX2, 4 with NEON; 0 on an x86 processor that has neither, where nothing
// else here may be called.
long elan_lanes() { return width(); }

// Outputs of a tile, of which packed weights are blocks.
long elan_outputs() {
#ifdef __x86_64__
    return width() == 16 ? avx512::R : avx2::R;
#else
    return neon::R;
#endif
}

// Whether the processor multiplies pairs of bfloat16, which a call that says `bf16` takes.
long elan_has_bf16() { return HAS_BF16; }

// What these kernels were compiled from, as setup.py and library.py sum it up.
const char *elan_sources() { return SOURCES; }

void elan_body(float *x, float *other, long h, long w, long pitch, long c, long hidden, long groups,
               const int64_t *edges, float *const *queries, const Module *modules, const Projection *projections,
               long count, long bf16, float *scratch, long each, long rows, long pieces, long threads) {
    CHOOSE_BF16(bf16, run_body, {{1, h, w, pitch, c}, hidden, groups, edges, queries, modules, projections, count}, x,
                other, {rows, pieces, threads}, scratch, each);
}

void elan_features_forward(const float *x, float *hidden, float *out, long b, long h, long w, long c, long wide,
                           const float *weights0, const float *bias0, const float *weights1, const float *bias1,
                           float *sums, float *scratch, long each, long rows, long pieces, long threads) {
    CHOOSE(features_forward, x, hidden, out, {b, h, w, w, c}, wide, weights0, bias0, weights1, bias1, sums,
           {scratch, each}, {rows, pieces, threads});
}

void elan_pack_weights(const float *weights, long row, long column, float *to, long n, long k, long bf16) {
    CHOOSE_BF16(bf16, pack_weights, weights, row, column, to, n, k);
}

void elan_add_slots(const float *sums, float *totals, long slots, long rows, long columns, long line, long transposed,
                    long threads) {
    CHOOSE(add_slots, sums, totals, slots, rows, columns, line, transposed != 0, threads);
}

void elan_features_back(const float *x, const float *hidden, const float *grad, float *of_far, float *of_near,
                        float *out, long b, long h, long w, long c, long wide, const float *weights0,
                        const float *weights1, float *of_weights0, float *of_bias0, float *of_weights1, float *of_bias1,
                        float *scratch, long each, long rows, long pieces, long threads) {
    CHOOSE(features_back, x, hidden, grad, of_far, of_near, out, {b, h, w, w, c}, wide, weights0, weights1,
           {of_weights0, of_bias0}, {of_weights1, of_bias1}, {scratch, each}, {rows, pieces, threads});
}

void elan_project_squares(const float *x, float *z, long b, long h, long w, long c, long n, const float *weights,
                          const float *bias, float *sums, long rows, long pieces, long threads) {
    CHOOSE(project_squares, x, z, {b, h, w, w, c}, n, weights, bias, sums, {rows, pieces, threads});
}

void elan_norm_back(const float *grad, const float *z, const float *scale, const float *through, const float *bias,
                    const float *x, const float *mean, const float *residual, float *out, long b, long h, long w,
                    long c, long n, const float *weights, float *of_weights, float *scratch, long each, long rows,
                    long pieces, long threads) {
    CHOOSE(norm_back, grad, z, scale, through, bias, x, mean, residual, out, {b, h, w, w, c}, n, weights, of_weights,
           {scratch, each}, {rows, pieces, threads});
}

void elan_attention_forward(const float *queries, long queries_n, const float *queries_scale,
                            const float *queries_offset, const float *values, long values_n, const float *values_scale,
                            const float *values_offset, long b, long h, long w, long c, long groups,
                            const int64_t *edges, long shifted, float *const *sums, float *attended, const float *x,
                            float *out, const float *weights, const float *bias, float *scratch, long each, long rows,
                            long pieces, long threads) {
    CHOOSE(attention_forward, {queries, queries_n, queries_scale, queries_offset},
           {values, values_n, values_scale, values_offset}, attended, x, out,
           {{b, h, w, w, c}, groups, edges, shifted != 0, sums}, weights, bias, {scratch, each},
           {rows, pieces, threads});
}

void elan_attention_back(const float *queries, long queries_n, const float *queries_scale, const float *queries_offset,
                         const float *values, long values_n, const float *values_scale, const float *values_offset,
                         long b, long h, long w, long c, long groups, const int64_t *edges, long shifted,
                         float *const *sums, const float *grad, const float *attended, float *of_normalised,
                         const Shared *shared, long module, const float *const *out_weights, float *of_out_weights,
                         float *of_out_bias, float *of_scale, float *of_offset, float *scratch, long each, long rows,
                         long pieces, long threads) {
    CHOOSE(attention_backward, {queries, queries_n, queries_scale, queries_offset},
           {values, values_n, values_scale, values_offset}, grad, attended, of_normalised,
           {{b, h, w, w, c}, groups, edges, shifted != 0, sums}, shared, module, out_weights,
           {{of_out_weights, of_out_bias}, of_scale, of_offset}, {scratch, each}, {rows, pieces, threads});
}

}  // extern "C"

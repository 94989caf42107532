// Vectors, and 1x1 convolutions of a few vectors of pixels. Included once for each instruction set.
//
// With BF16 the factors of a product are pairs of bfloat16 in 32 bits, of two inputs of a pixel and of two weights; the
// sums are in float32.
namespace NAMESPACE {

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef int32_t loose_int __attribute__((may_alias));

constexpr bool FEW = LANES == 8;        // registers: AVX2 has 16, AVX-512 and NEON have 32
constexpr int R = FEW ? 6 : 5;          // outputs of a tile: 60, 120, 180 and 360 channels leave no rest
constexpr int V = FEW ? 2 : 4;          // vectors of pixels of a tile; R * V sums stay in registers
constexpr long PIXELS = V * LANES;

INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec v) { *(loose_vec *)p = v; }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }  // b where one is not a number
INLINE long smaller(long a, long b) { return a < b ? a : b; }

enum Factors { SINGLE, PAIRS };
#ifdef BF16
constexpr Factors FACTORS = PAIRS;
constexpr long TOGETHER = 2;            // inputs in 32 bits

INLINE vec rounded(vec low, vec high) { return (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// sum + x y of both factors of the pairs.
INLINE vec add_pairs(vec sum, vec x, ivec y) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#else
constexpr Factors FACTORS = SINGLE;
constexpr long TOGETHER = 1;
#endif

// A vector of factors: of(0), or in pairs of(0) and of(1).
template <class Of> INLINE vec factors(Of of) {
#ifdef BF16
    const vec first = of(0), second = of(1);
    const vec halves = rounded(first, second);
    __v32hi places;
    UNROLL32 for (int i = 0; i < 2 * LANES; i++) places[i] = i / 2 + i % 2 * LANES;
    return (vec)_mm512_permutexvar_epi16((__m512i)places, (__m512i)halves);
#else
    return of(0);
#endif
}

// A map of images, and the memory of row y of image b.
struct Map {
    long b, h, w, pitch, c;
    long rows() const { return b * h; }
    long row() const { return c * pitch; }
    long vectors() const { return (w + LANES - 1) / LANES; }
    Map with(long channels) const { return {b, h, w, pitch, channels}; }
};

// e^x = 2^t to three units in the last place; 1.2e-38 from -87 down, NaN for NaN. The nearest integer to t becomes the
// exponent; what is left, within half of one, goes through a polynomial of the least relative error that is 1 at 0.
INLINE vec exponential(vec x) {
    const float rounder = 12582912.f;  // adding 1.5 * 2^23 leaves the nearest integer in the last bits
    const vec t = larger(vec{} - 126.f, x * 1.44269504088896341f);
    const vec n = t + rounder;
    const vec f = t - (n - rounder);
    vec p = f * 1.320298221e-3f + 9.674951930e-3f;
    p = p * f + 5.551047383e-2f;
    p = p * f + 2.402216601e-1f;
    p = p * f + 6.931465959e-1f;
    p = p * f + 1.f;
    return (vec)((ivec)p + ((ivec)n << 23));
}

// sums[i][u] += weights[k][i] * x[k][pixels of u] over k lines of factors; the weights of a line are `step` apart.
template <int N, int U, Factors F = FACTORS>
INLINE void accumulate(const float *x, long stride, const float *weights, long step, long inner, long k,
                       vec (&sums)[N][U]) {
    for (long j = 0; j < k; j++, x += stride, weights += step) {
        vec xs[U];
        UNROLL for (int u = 0; u < U; u++) xs[u] = load(x + u * LANES);
        UNROLL for (int i = 0; i < N; i++) {
#ifdef BF16
            if (F == PAIRS) {
                const ivec pair = ivec{} + *(const loose_int *)(weights + i * inner);
                UNROLL for (int u = 0; u < U; u++) sums[i][u] = add_pairs(sums[i][u], xs[u], pair);
                continue;
            }
#endif
            UNROLL for (int u = 0; u < U; u++) sums[i][u] += xs[u] * weights[i * inner];
        }
    }
}

// The nearest number in bfloat16.
INLINE uint32_t half_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// Weights (n, k) of which rows and columns are so many numbers apart, packed for `tile`.
static void pack_weights(const float *weights, long row, long column, float *to, long n, long k) {
    for (long first = 0; first < n; first += R)
        for (long j = 0; j < k; j += TOGETHER)
            for (long i = first; i < first + R; i++, to++) {
                const float *at = weights + i * row + j * column;
                if (i >= n) *to = 0;
                else if (FACTORS == SINGLE) *to = *at;
                else *(loose_int *)to = half_of(at[0]) | half_of(at[column]) << 16;
            }
}

enum Into { WRITE, RELU, ADD };

// out = weights x + bias for U vectors of pixels: x is (k, ...) lines of factors, out (n, ...).
template <int U, Into INTO, Factors F>
inline void tile(const float *x, long stride, const float *weights, const float *bias, long k, long n, float *out,
                 long out_stride) {
    for (long first = 0; first < n; first += R, weights += k * R) {
        vec sums[R][U];
        UNROLL for (int i = 0; i < R; i++) {
            UNROLL for (int u = 0; u < U; u++) sums[i][u] = bias ? vec{} + bias[first + i] : vec{};
        }
        accumulate<R, U, F>(x, stride, weights, R, 1, k, sums);
        UNROLL for (int i = 0; i < R; i++) {
            if (first + i < n) {
                UNROLL for (int u = 0; u < U; u++) {
                    float *to = out + (first + i) * out_stride + u * LANES;
                    vec y = sums[i][u];
                    if (INTO == RELU) y = larger(vec{}, y);
                    if (INTO == ADD) y += load(to);
                    store(to, y);
                }
            }
        }
    }
}

// The same for 1 to V vectors, and k inputs.
template <Into INTO, Factors F = FACTORS>
inline void product(long vectors, const float *x, long stride, const float *weights, const float *bias, long k, long n,
                    float *out, long out_stride) {
    if (F == PAIRS) k /= 2;
    switch (vectors) {
    case 1: return tile<1, INTO, F>(x, stride, weights, bias, k, n, out, out_stride);
    case 2: return tile<2, INTO, F>(x, stride, weights, bias, k, n, out, out_stride);
    case 3: return tile<(V < 3 ? 1 : 3), INTO, F>(x, stride, weights, bias, k, n, out, out_stride);
    case 4: return tile<(V < 4 ? 1 : 4), INTO, F>(x, stride, weights, bias, k, n, out, out_stride);
    }
}

INLINE void copy_lines(const float *from, long stride, float *to, long to_stride, long lines, long vectors) {
    for (long k = 0; k < lines; k++, from += stride, to += to_stride)
        for (long u = 0; u < vectors; u++) store(to + u * LANES, load(from + u * LANES));
}

// Lines of inputs as those of factors: in pairs, packed, or as they are.
INLINE const float *lines_of_factors(const float *from, long &stride, float *packed, long lines, long vectors) {
    if (FACTORS == SINGLE) return from;
    float *to = packed;
    for (long k = 0; k < lines; k += TOGETHER, from += TOGETHER * stride, to += vectors * LANES)
        for (long u = 0; u < vectors; u++)
            store(to + u * LANES, factors([&](long i) { return load(from + i * stride + u * LANES); }));
    stride = vectors * LANES;
    return packed;
}

// `product` for whole rows of a map: x and out are their first ones. Pairs take `packed`, room for a tile of inputs.
template <Into INTO>
INLINE void product_of_rows(const float *x, const Map &size, long rows, const float *weights, const float *bias, long n,
                            float *out, float *packed = nullptr) {
    for (long y = 0; y < rows; y++)
        for (long u = 0; u < size.vectors(); u += V) {
            const long vectors = smaller(V, size.vectors() - u);
            long stride = size.pitch;
            const float *lines = lines_of_factors(x + y * size.row() + u * LANES, stride, packed, size.c, vectors);
            product<INTO>(vectors, lines, stride, weights, bias, size.c, n, out + y * n * size.pitch + u * LANES,
                          size.pitch);
        }
}

// Vector `u` of a line of w pixels, each pixel reading its neighbour `step` to the right, zero outside.
INLINE vec beside(const float *line, long u, long w, int step) {
    if (step < 0 && u == 0) {
        ivec before;
        UNROLL for (int i = 0; i < LANES; i++) before[i] = i ? i - 1 : LANES;
        return __builtin_shuffle(load(line), vec{}, before);
    }
    vec v = load(line + u * LANES + step);
    if (step > 0 && (u + 1) * LANES >= w) {
        ivec place;
        UNROLL for (int i = 0; i < LANES; i++) place[i] = i;
        v = place < ivec{} + (int32_t)(w - 1 - u * LANES) ? v : vec{};
    }
    return v;
}

// A row of a map and its neighbours, null outside the image.
struct Rows {
    const float *above, *here, *below;
};

INLINE Rows rows_at(const float *map, const Map &size, long y) {
    const float *here = map + y * size.row();
    return {y % size.h ? here - size.row() : nullptr, here, y % size.h < size.h - 1 ? here + size.row() : nullptr};
}

// Vectors first.. of a row of the shifted map, as lines of factors `stride` apart. The groups of channels read the pixel
// to the right, to the left, below, above, and themselves; or, going back, those on the other side.
template <bool BACK>
INLINE void pack_shifted(Rows rows, long pitch, long c, long w, long first, long vectors, float *to, long stride) {
    const long group = c / 5;
    const float *from[] = {rows.here, rows.here, BACK ? rows.above : rows.below, BACK ? rows.below : rows.above,
                           rows.here};
    for (long g = 0; g < 5; g++) {
        const float *line = from[g] ? from[g] + g * group * pitch : nullptr;
        for (long k = g * group; k < (g == 4 ? c : (g + 1) * group); k += TOGETHER, to += stride) {
            for (long u = 0; u < vectors; u++)
                store(to + u * LANES, factors([&](long i) {
                    if (g < 2) return beside(line + i * pitch, first + u, w, (g == 0) != BACK ? 1 : -1);
                    return line ? load(line + i * pitch + (first + u) * LANES) : vec{};
                }));
            if (line) line += TOGETHER * pitch;
        }
    }
}

}  // namespace NAMESPACE

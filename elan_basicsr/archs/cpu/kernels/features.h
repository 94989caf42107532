// Local feature extraction and the projection out of attention, for inference.
namespace NAMESPACE {

// out = x + the local features of x, in rows first to last. Three rows of the widened map follow the output down a
// thread's share of them.
static void features(const float *x, float *out, Map size, long first, long last, long hidden, const float *weights0,
                     const float *bias0, const float *weights1, const float *bias1, float *scratch, long room,
                     long threads) {
    const long row = size.row(), ring_row = hidden * size.pitch;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long t = 0; t < threads; t++) {
        float *packed = scratch + t * room, *ring = packed + hidden * PIXELS;
        const long begin = first + (last - first) * t / threads, end = first + (last - first) * (t + 1) / threads;
        long ready = begin > 0 ? begin - 1 : 0;
        for (long y = begin; y < end; y++) {
            for (; ready < smaller(y + 2, size.h); ready++)
                for (long u = 0; u < size.vectors(); u += V) {
                    const long vectors = smaller(V, size.vectors() - u);
                    pack_shifted<false>(rows_at(x, size, ready), size.pitch, size.c, size.w, u, vectors, packed,
                                        PIXELS);
                    product<RELU>(vectors, packed, PIXELS, weights0, bias0, size.c, hidden,
                                  ring + ready % 3 * ring_row + u * LANES, size.pitch);
                }
            const Rows near = {y ? ring + (y + 2) % 3 * ring_row : nullptr, ring + y % 3 * ring_row,
                               y < size.h - 1 ? ring + (y + 1) % 3 * ring_row : nullptr};
            for (long u = 0; u < size.vectors(); u += V) {
                const long vectors = smaller(V, size.vectors() - u);
                pack_shifted<false>(near, size.pitch, hidden, size.w, u, vectors, packed, PIXELS);
                float *to = out + y * row + u * LANES;
                copy_lines(x + y * row + u * LANES, size.pitch, to, size.pitch, size.c, vectors);
                product<ADD>(vectors, packed, PIXELS, weights1, bias1, hidden, size.c, to, size.pitch);
            }
        }
    }
}

// x += weights y + bias in rows first to last, counted on from the last row of x to its first one; y is `kept`.
static void add_product(const float *y, Kept kept, float *x, Map size, long first, long last, const float *weights,
                        const float *bias, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = first; row < last; row++)
        for (long u = 0; u < size.vectors(); u += V)
            product<ADD>(smaller(V, size.vectors() - u), y + kept.row(row) * size.row() + u * LANES, size.pitch,
                         weights, bias, size.c, size.c, x + row % size.h * size.row() + u * LANES, size.pitch);
}

}  // namespace NAMESPACE
